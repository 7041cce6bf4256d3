"""What KubeRay 1.5 takes, as a JSON schema of the parts that deploy/kubernetes may use.

Written from KubeRay's documents and Go types (ray-project/kuberay: docs/reference/api.md,
ray-operator/apis/ray/v1/{raycluster,rayjob,rayservice}_types.go), and from the checks of its
operator (ray-operator/controllers/ray/utils/validation.go), read on 2026-11-29 and 2026-11-30.
Kubernetes itself drops unknown fields of such objects without a word; here they are refused.
"""

from __future__ import annotations

import re
from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
WHOLE: Schema = {"type": "integer", "minimum": 0}
YES_NO: Schema = {"type": "boolean"}
TEXTS: Schema = {"type": "object", "additionalProperties": TEXT}
ANY: Schema = {"type": "object"}
ANY_LIST: Schema = {"type": "array", "items": ANY}


def fields(known: dict[str, Schema], *required: str) -> Schema:
    """Returns the schema of an object with these fields and no others."""
    return {
        "type": "object",
        "properties": known,
        "required": list(required),
        "additionalProperties": False,
    }


# Of Kubernetes' own Container and PodSpec, those that the manifests may use.
ENV: Schema = {
    "type": "array",
    "items": fields({"name": TEXT, "value": TEXT, "valueFrom": ANY}, "name"),
}
RESOURCES = fields({"requests": ANY, "limits": ANY})
CONTAINER = fields(
    {
        **{"name": TEXT, "image": TEXT, "env": ENV, "resources": RESOURCES},
        **{"ports": ANY_LIST, "volumeMounts": ANY_LIST, "lifecycle": ANY},
    },
    *("name", "image"),
)
POD = fields(
    {
        **{"serviceAccountName": TEXT, "nodeSelector": TEXTS, "tolerations": ANY_LIST},
        **{"terminationGracePeriodSeconds": WHOLE, "securityContext": ANY, "volumes": ANY_LIST},
        "containers": {"type": "array", "items": CONTAINER, "minItems": 1},
    },
    "containers",
)
TEMPLATE = fields({"metadata": ANY, "spec": POD}, "spec")

CREDENTIAL = fields({"value": TEXT, "valueFrom": ANY})
HEAD = fields(
    {
        **{"template": TEMPLATE, "rayStartParams": TEXTS, "headService": ANY},
        **{"enableIngress": YES_NO, "serviceType": TEXT, "resources": TEXTS},
    },
    *("template", "rayStartParams"),
)
WORKERS = fields(
    {
        **{"groupName": TEXT, "template": TEMPLATE, "rayStartParams": TEXTS, "resources": TEXTS},
        **{"replicas": WHOLE, "minReplicas": WHOLE, "maxReplicas": WHOLE, "numOfHosts": WHOLE},
        **{"idleTimeoutSeconds": WHOLE, "scaleStrategy": ANY, "suspend": YES_NO},
    },
    *("groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"),
)
AUTOSCALER = fields(
    {
        **{"resources": RESOURCES, "image": TEXT, "imagePullPolicy": TEXT, "env": ENV},
        **{"envFrom": ANY_LIST, "volumeMounts": ANY_LIST, "securityContext": ANY},
        **{"idleTimeoutSeconds": WHOLE, "version": TEXT},
        "upscalingMode": {"enum": ["Default", "Aggressive", "Conservative"]},
    }
)
FAULT_TOLERANCE = fields(
    {
        **{"redisAddress": TEXT, "redisUsername": CREDENTIAL, "redisPassword": CREDENTIAL},
        "externalStorageNamespace": TEXT,
    },
    "redisAddress",
)
CLUSTER = fields(
    {
        **{"rayVersion": TEXT, "suspend": YES_NO, "managedBy": TEXT, "upgradeStrategy": ANY},
        **{"enableInTreeAutoscaling": YES_NO, "headServiceAnnotations": TEXTS},
        "authOptions": fields({"mode": {"enum": ["disabled", "token"]}}, "mode"),
        "autoscalerOptions": AUTOSCALER,
        "gcsFaultToleranceOptions": FAULT_TOLERANCE,
        "headGroupSpec": HEAD,
        "workerGroupSpecs": {"type": "array", "items": WORKERS},
    },
    "headGroupSpec",
)
JOB = fields(
    {
        **{"entrypoint": TEXT, "runtimeEnvYAML": TEXT, "jobId": TEXT, "metadata": TEXTS},
        **{"entrypointNumCpus": {"type": "number"}, "entrypointNumGpus": {"type": "number"}},
        **{"entrypointResources": TEXT, "clusterSelector": TEXTS, "rayClusterSpec": CLUSTER},
        **{"backoffLimit": WHOLE, "activeDeadlineSeconds": {"type": "integer", "minimum": 1}},
        **{"shutdownAfterJobFinishes": YES_NO, "ttlSecondsAfterFinished": WHOLE},
        **{"submitterPodTemplate": TEMPLATE, "submitterConfig": fields({"backoffLimit": WHOLE})},
        **{"suspend": YES_NO, "managedBy": TEXT},
        "submissionMode": {"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    },
    *("entrypoint", "rayClusterSpec"),
)
SERVICE = fields(
    {
        **{"serveConfigV2": TEXT, "rayClusterConfig": CLUSTER, "serveService": ANY},
        "excludeHeadPodFromServeSvc": YES_NO,
        "upgradeStrategy": fields({"type": {"enum": ["NewCluster", "None"]}}),
    },
    *("serveConfigV2", "rayClusterConfig"),
)
SPECS = {"RayCluster": CLUSTER, "RayJob": JOB, "RayService": SERVICE}
LONGEST_NAME = {"RayCluster": 53, "RayJob": 47, "RayService": 47}
"""Characters of a name; generated ones get five more."""
NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
FIRST_RAY_WITH_TOKENS = (2, 52)


def schema_of(kind: str) -> Schema:
    """Returns the schema of a whole object."""
    names = fields({"name": TEXT, "generateName": TEXT, "namespace": TEXT, "labels": TEXTS})
    head = {"apiVersion": {"const": "ray.io/v1"}, "kind": {"const": kind}, "metadata": names}
    return fields({**head, "spec": SPECS[kind]}, *head, "spec")


def refusals(cluster: dict[str, Any]) -> list[str]:
    """Returns what KubeRay's operator refuses of a cluster that its schema allows."""
    head = cluster["headGroupSpec"]
    env = {one["name"] for one in head["template"]["spec"]["containers"][0].get("env", [])}
    told: list[str] = []
    if set(head["rayStartParams"]) & {"redis-password", "redis-username"}:
        told.append("credentials of Redis in rayStartParams")
    if env & {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME"}:
        told.append("Redis in the environment of the head")
    version = tuple(int(part) for part in cluster["rayVersion"].split(".")[:2])
    if cluster.get("authOptions", {}).get("mode") == "token" and version < FIRST_RAY_WITH_TOKENS:
        told.append("tokens, which this Ray has not")
    return told
