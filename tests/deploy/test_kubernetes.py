"""The manifests say what KubeRay, Ray Serve and our own commands understand. Needs no cluster."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from typing import Any

import jsonschema
import pytest
import tyro
import yaml
from ray.serve.schema import ServeDeploySchema

from helpers import kuberay
from helpers.repository import ROOT
from pipelines.recipes.registry import RECIPES
from serve.embeddings.settings import ServeSettings
from serve.lm.settings import LMSettings
from serve.planning.settings import PlanningSettings

FOLDER = ROOT / "deploy/kubernetes"
PINS = dict(
    line.split("==")
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if not line.startswith("#")
)


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def spec_of(name: str) -> dict[str, Any]:
    (document,) = documents(name)
    assert document["apiVersion"] == "ray.io/v1"
    return document["spec"]


def clusters() -> dict[str, dict[str, Any]]:
    return {
        "ray_cluster.yaml": spec_of("ray_cluster.yaml"),
        "ray_job.yaml": spec_of("ray_job.yaml")["rayClusterSpec"],
        "ray_service.yaml": spec_of("ray_service.yaml")["rayClusterConfig"],
    }


CLUSTERS = clusters()


def pods(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def faults(document: dict[str, Any]) -> list[str]:
    """Returns what KubeRay's schema and its operator refuse of an object."""
    kind, metadata = document["kind"], document["metadata"]
    found = jsonschema.Draft202012Validator(kuberay.schema_of(kind)).iter_errors(document)
    told = [error.message for error in found]
    name = metadata.get("name") or metadata["generateName"] + "xxxxx"
    if not kuberay.NAME.fullmatch(name) or len(name) > kuberay.LONGEST_NAME[kind]:
        told.append(f"the name {name}")
    (cluster,) = (c for c in clusters_of(document))
    return told + kuberay.refusals(cluster)


def clusters_of(document: dict[str, Any]) -> list[dict[str, Any]]:
    spec = document["spec"]
    return [one for one in (spec.get("rayClusterSpec"), spec.get("rayClusterConfig")) if one] or [
        spec
    ]


@pytest.mark.parametrize("name", CLUSTERS)
def test_kuberay_takes_every_field_and_value(name: str) -> None:
    (document,) = documents(name)
    assert faults(document) == []


@pytest.mark.parametrize(
    ("name", "path", "value", "said"),
    [
        ("ray_cluster.yaml", ("workerGroupSpecs", 0, "minReplica"), 1, "minReplica"),
        ("ray_cluster.yaml", ("workerGroupSpecs", 0, "minReplicas"), "1", "'1' is not of type"),
        ("ray_cluster.yaml", ("headGroupSpec", "rayStartParams", "num-cpus"), 0, "0 is not of"),
        ("ray_cluster.yaml", ("headGroupSpec", "rayStartParams", "redis-password"), "x", "Redis"),
        ("ray_cluster.yaml", ("gcsFaultToleranceOptions", "redisAdress"), "r:1", "redisAdress"),
        ("ray_cluster.yaml", ("rayVersion",), "2.51.0", "tokens"),
        ("ray_job.yaml", ("submissionMode",), "K8sJob", "'K8sJob' is not one of"),
        ("ray_job.yaml", ("rayClusterConfig",), {}, "rayClusterConfig"),
        ("ray_job.yaml", ("shutdownAfterJobFinishes",), "yes", "'yes' is not of type"),
        ("ray_service.yaml", ("rayClusterConfig", "authOptions", "mode"), "on", "'on' is not one"),
        ("ray_service.yaml", ("upgradeStrategy",), {"type": "Rolling"}, "Rolling"),
    ],
)
def test_what_kuberay_would_drop_or_refuse_is_found(
    name: str, path: tuple[Any, ...], value: Any, said: str
) -> None:
    (document,) = documents(name)
    place = document["spec"]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert said in " ".join(faults(document))


@pytest.mark.parametrize("name", CLUSTERS)
def test_every_cluster_asks_for_the_token_and_keeps_tasks_off_its_head(name: str) -> None:
    cluster = CLUSTERS[name]
    assert cluster["rayVersion"] == PINS["ray"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert [group["groupName"] for group in cluster["workerGroupSpecs"]] == ["gpu", "cpu"]


@pytest.mark.parametrize("name", CLUSTERS)
def test_pods_hold_what_ray_needs(name: str) -> None:
    (account,) = documents("service_account.yaml")
    for pod in pods(CLUSTERS[name]):
        (container,) = pod["containers"]
        assert pod["serviceAccountName"] == account["metadata"]["name"]
        assert pod["securityContext"]["runAsNonRoot"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        assert mounts["/dev/shm"]["emptyDir"] == {"medium": "Memory"}
        assert "ephemeral" in mounts["/tmp"]  # checkpoints, spilled objects, Ray's logs
        assert container["resources"]["limits"]["memory"]
    head, gpu, cpu = pods(CLUSTERS[name])
    assert gpu["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert "nvidia.com/gpu" not in cpu["containers"][0]["resources"]["limits"]
    assert "nvidia.com/gpu" not in head["containers"][0]["resources"]["limits"]
    assert gpu["nodeSelector"] != cpu["nodeSelector"]


def test_the_job_trains_as_its_command_line_says_and_fits() -> None:
    job, cluster = spec_of("ray_job.yaml"), CLUSTERS["ray_job.yaml"]
    words = shlex.split(job["entrypoint"])
    assert words[:3] == ["python", "-m", "pipelines.pretrain"]
    cfg = tyro.extras.overridable_config_cli(RECIPES, args=words[3:])
    gpu, cpu = cluster["workerGroupSpecs"]
    limits = gpu["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert cfg.run.gpu
    assert cfg.run.workers <= gpu["maxReplicas"]
    assert cfg.run.cpus_per_worker <= int(limits["cpu"])
    # A run counts the CPUs that are there when its trainers start.
    assert cfg.data.decode_in != "data" or cpu["minReplicas"] > 0


def serve_config() -> dict[str, Any]:
    return yaml.safe_load(spec_of("ray_service.yaml")["serveConfigV2"])


def test_serve_accepts_the_service_and_we_its_arguments() -> None:
    config = ServeDeploySchema.model_validate(serve_config())
    settings = {app.name: app.args for app in config.applications}
    assert ServeSettings(**settings["embeddings"]).gpus == 1
    assert LMSettings(**settings["language"]).store is not None
    assert PlanningSettings(**settings["planning"]).agent.startswith("s3://")
    with pytest.raises(ValueError, match="artifakt"):
        ServeSettings(**settings["embeddings"], artifakt="s3://bucket/a")


def named(deployments: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in deployments}


def test_the_service_is_the_shipped_configuration() -> None:
    """But for its place, and two of each replica, which outlive a lost node.

    The embeddings differ: their model is on GPUs, so it has replicas of its own.
    """
    apps = {app["name"]: app for app in serve_config()["applications"]}
    files = {"embeddings": "config.yaml", "language": "lm_config.yaml"}
    files["planning"] = "planning_config.yaml"
    assert apps.keys() == files.keys()
    for name, file in files.items():
        shipped = yaml.safe_load((ROOT / "serve" / file).read_text())["applications"][0]
        assert apps[name]["import_path"] == shipped["import_path"]
        own, theirs = (named(app["deployments"]) for app in (apps[name], shipped))
        if apps[name]["args"].get("placement") == "separate":
            assert own.keys() == {"Ingress", "Embedder", "Telemetry"}
            del own["Ingress"], own["Embedder"], theirs["Ingress"]
        assert own == theirs


def test_a_pod_ends_after_its_requests() -> None:
    arguments = [app["args"] for app in serve_config()["applications"]]
    kinds = (ServeSettings, LMSettings, PlanningSettings)
    drain_s = max(kind(**given).drain_s for kind, given in zip(kinds, arguments, strict=True))
    assert drain_s > 0
    for pod in pods(CLUSTERS["ray_service.yaml"])[1:]:
        hook = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert hook[0] == "sleep"
        assert drain_s < int(hook[1])
        env = {one["name"]: one["value"] for one in pod["containers"][0]["env"]}
        node_s = int(env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        assert drain_s < node_s
        assert int(hook[1]) + node_s + 30 < pod["terminationGracePeriodSeconds"]


@pytest.mark.parametrize("name", ["ray_cluster.yaml", "ray_service.yaml"])
def test_the_heads_state_is_in_the_redis_beside_it(name: str) -> None:
    service, redis = documents("redis.yaml")
    options = CLUSTERS[name]["gcsFaultToleranceOptions"]
    port = service["spec"]["ports"][0]["port"]
    assert options["redisAddress"] == f"{service['metadata']['name']}:{port}"
    (container,) = redis["spec"]["template"]["spec"]["containers"]
    secret = container["env"][0]["valueFrom"]["secretKeyRef"]
    assert options["redisPassword"]["valueFrom"]["secretKeyRef"] == secret
    (claim,) = redis["spec"]["volumeClaimTemplates"]
    assert claim["metadata"]["name"] == container["volumeMounts"][0]["name"]
    assert "--appendonly" in container["args"]


def test_the_kustomization_lists_files_and_one_image() -> None:
    (kustomization,) = documents("kustomization.yaml")
    files = {path.name for path in FOLDER.glob("*.yaml")} - {"kustomization.yaml"}
    assert set(kustomization["resources"]) == files - {"ray_job.yaml"}
    (image,) = kustomization["images"]
    used = {
        c["image"] for name in CLUSTERS for pod in pods(CLUSTERS[name]) for c in pod["containers"]
    }
    assert used == {image["name"], f"{image['newName']}:{image['newTag']}"}


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_kubectl_builds_it() -> None:
    done = subprocess.run(
        ["kubectl", "kustomize", str(FOLDER)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    kinds = [document["kind"] for document in yaml.safe_load_all(done.stdout)]
    assert sorted(kinds) == sorted(
        ["Namespace", "ServiceAccount", "Service", "StatefulSet", "RayCluster", "RayService"]
    )
    assert "image: rayjepa\n" not in done.stdout
