"""cluster.yaml is valid for Ray, launchable by EC2's rules, and consistent. Needs no network."""

from __future__ import annotations

import copy
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import jsonschema
import pytest
import tyro
import yaml
from botocore.validate import ParamValidator
from moto import mock_aws
from ray.autoscaler._private import util

from helpers.repository import ROOT
from pipelines.recipes.registry import RECIPES
from pipelines.runtime.cluster import check_fits


@pytest.fixture
def written() -> dict[str, Any]:
    """The file as it stands."""
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


@pytest.fixture
def cluster(written: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The configuration as `ray up` completes it, from the root of the checkout."""
    monkeypatch.chdir(ROOT)
    return util.prepare_config(written)


@pytest.fixture
def aws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty pretended AWS account holding the two instance profiles, and an empty home."""
    monkeypatch.setenv("HOME", str(tmp_path))  # `ray up` writes the SSH key it makes to ~/.ssh
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    with mock_aws():
        iam = boto3.client("iam")
        for name in ("rayjepa-head", "rayjepa-worker"):
            iam.create_instance_profile(InstanceProfileName=name)
        yield


def test_ray_accepts_it(cluster: dict[str, Any]) -> None:
    util.validate_config(cluster)


def test_ray_refuses_a_typo(cluster: dict[str, Any]) -> None:
    cluster["idle_timeout_minuets"] = cluster.pop("idle_timeout_minutes")
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout_minuets"):
        util.validate_config(cluster)


def test_every_node_type_launches(cluster: dict[str, Any], aws: None) -> None:
    # Ray's AWS provider against moto: botocore checks every key and type of node_config, moto the
    # instance types, zones and profiles.
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    filled = bootstrap_aws(cluster)
    provider = AWSNodeProvider(filled["provider"], filled["cluster_name"])
    for name, node_type in filled["available_node_types"].items():
        nodes = provider.create_node(node_type["node_config"], {"ray-node-name": name}, 1)
        assert [n.instance_type for n in nodes.values()] == [
            cluster["available_node_types"][name]["node_config"]["InstanceType"]
        ]
    assert len(provider.non_terminated_nodes({})) == 4


def test_stated_resources_are_the_instances(cluster: dict[str, Any], aws: None) -> None:
    types = cluster["available_node_types"]
    names = sorted({t["node_config"]["InstanceType"] for t in types.values()})
    client = boto3.client("ec2", region_name=cluster["provider"]["region"])
    listed = client.describe_instance_types(InstanceTypes=names)["InstanceTypes"]
    real = {i["InstanceType"]: i for i in listed}
    for name, node_type in types.items():
        instance = real[node_type["node_config"]["InstanceType"]]
        gpus = sum(g["Count"] for g in instance.get("GpuInfo", {}).get("Gpus", []))
        assert node_type["resources"].get("GPU", 0) == gpus
        if name != cluster["head_node_type"]:
            assert node_type["resources"]["CPU"] == instance["VCpuInfo"]["DefaultVCpus"]


def test_node_types_do_what_the_comments_say(cluster: dict[str, Any]) -> None:
    types = cluster["available_node_types"]
    names = ("head", "gpu_worker", "gpu_worker_on_demand", "decode_worker")
    assert tuple(types) == names
    head, gpu, fallback, decode = (types[name] for name in names)
    assert cluster["head_node_type"] == "head"
    assert head["resources"] == {"CPU": 0}
    assert "InstanceMarketOptions" not in head["node_config"]  # never lose the head to spot
    assert gpu["resources"]["GPU"] == 1
    assert "GPU" not in decode["resources"]
    # Nothing idles but what a run must find when it starts.
    assert [n for n, t in types.items() if t["min_workers"]] == ["decode_worker"]
    assert gpu["max_workers"] + decode["max_workers"] <= cluster["max_workers"]
    # The same on demand, chosen after spot: only the market and the priority differ.
    assert gpu["priority"] > fallback["priority"]
    spot = gpu["node_config"].pop("InstanceMarketOptions")
    assert spot == decode["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert {**gpu, "priority": 0} == fallback
    assert len({t["node_config"]["ImageId"] for t in types.values()}) == 1


def test_rights_come_from_roles_alone(written: dict[str, Any]) -> None:
    for name, node_type in written["available_node_types"].items():
        role = "rayjepa-head" if name == "head" else "rayjepa-worker"
        assert node_type["node_config"]["IamInstanceProfile"] == {"Name": role}
    text = (ROOT / "cluster.yaml").read_text()
    assert not re.search(r"AKIA|aws_secret|AWS_SECRET|aws_credentials", text)


def test_every_node_gets_the_token_and_turns_authentication_on(cluster: dict[str, Any]) -> None:
    assert cluster["file_mounts"]["/home/ubuntu/.ray/auth_token"] == "~/.ray/auth_token"
    for when in ("head_start_ray_commands", "worker_start_ray_commands"):
        (start,) = (c for c in cluster[when] if "ray start" in c)
        exports, _, command = start.partition("ray start")
        assert "export RAY_AUTH_MODE=token" in exports
        assert f"AWS_DEFAULT_REGION={cluster['provider']['region']}" in exports
        assert "PATH=$HOME/venv/bin:" in exports
        assert "dashboard-host" not in command  # stays on loopback, behind the SSH tunnel


def test_trainers_stand_in_one_zone_of_the_region(cluster: dict[str, Any]) -> None:
    (zone,) = cluster["provider"]["availability_zone"].split(",")
    assert zone.startswith(cluster["provider"]["region"])


def test_all_that_is_written_lies_on_the_scratch_disk(cluster: dict[str, Any]) -> None:
    mounts = (ROOT / "deploy/aws/nvme.sh").read_text()
    assert "scratch=${RAYJEPA_SCRATCH:-/mnt/scratch}\n" in mounts
    for when in ("head", "worker"):
        setup = cluster[f"{when}_setup_commands"]
        assert [c for c in setup if "nvme.sh" in c] == ["sudo bash ~/rayjepa/deploy/aws/nvme.sh"]
        (start,) = (c for c in cluster[f"{when}_start_ray_commands"] if "ray start" in c)
        assert "export TMPDIR=/mnt/scratch/tmp " in start.partition("ray start")[0]
        assert "--temp-dir=/mnt/scratch/ray " in start
        assert "--object-spilling-directory=/mnt/scratch/spill" in start


def test_http_is_closed_to_the_world_and_the_way_to_open_it_is_valid(
    cluster: dict[str, Any], aws: None
) -> None:
    from ray.autoscaler._private.aws.config import bootstrap_aws

    assert "IpPermissions" not in cluster["provider"]["security_group"]
    text = (ROOT / "cluster.yaml").read_text()
    opened = yaml.safe_load(
        text.replace("    # IpPermissions:", "    IpPermissions:").replace(
            "    #   - {IpP", "      - {IpP"
        )
    )
    (rule,) = opened["provider"]["security_group"]["IpPermissions"]
    assert rule["FromPort"] == rule["ToPort"] == 8000
    assert rule["IpRanges"] != [{"CidrIp": "0.0.0.0/0"}]
    bootstrap_aws(util.prepare_config(opened))
    groups = boto3.client("ec2", region_name="us-west-2").describe_security_groups(
        Filters=[{"Name": "group-name", "Values": ["rayjepa"]}]
    )["SecurityGroups"]
    ports = {permission.get("FromPort") for permission in groups[0]["IpPermissions"]}
    assert {22, 8000} <= ports


def test_the_variant_with_efa_is_valid(
    written: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    changes = yaml.safe_load((ROOT / "deploy/aws/efa.yaml").read_text())["available_node_types"]
    gpu = written["available_node_types"]["gpu_worker"]
    changed = {**gpu, **changes["gpu_worker"]}
    changed["node_config"] = {**gpu["node_config"], **changes["gpu_worker"]["node_config"]}
    written["available_node_types"]["gpu_worker"] = changed
    util.validate_config(util.prepare_config(written))
    service = boto3.client("ec2", region_name="us-west-2").meta.service_model
    shape = service.operation_model("RunInstances").input_shape
    request = {"MinCount": 1, "MaxCount": 1, **changed["node_config"]}
    assert ParamValidator().validate(request, shape).generate_report() == ""
    request["NetworkInterfaces"][0]["InterfaceKind"] = request["NetworkInterfaces"][0].pop(
        "InterfaceType"
    )
    assert "InterfaceKind" in ParamValidator().validate(request, shape).generate_report()


def test_the_variant_with_redis_is_cluster_yaml_but_for_the_heads_state(
    written: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    changes = yaml.safe_load((ROOT / "deploy/aws/redis.yaml").read_text())
    head = changes["available_node_types"]["head"]["node_config"]
    assert head["NetworkInterfaces"][0]["PrivateIpAddress"]  # workers know the head by it
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        ours, plain = (
            {word.rstrip(";") for c in commands if "ray start" in c for word in c.split()}
            for commands in (changes[key], written[key])
        )
        assert plain <= ours
        assert "RAY_gcs_rpc_server_reconnect_timeout_s=300" in ours
        assert ("--head" in ours) == any("=rediss://" in word for word in ours - plain)
    written["available_node_types"]["head"]["node_config"] |= head
    written |= {key: changes[key] for key in changes if key.endswith("commands")}
    util.validate_config(util.prepare_config(written))
    service = boto3.client("ec2", region_name="us-west-2").meta.service_model
    shape = service.operation_model("RunInstances").input_shape
    request = {"MinCount": 1, "MaxCount": 1} | written["available_node_types"]["head"][
        "node_config"
    ]
    assert ParamValidator().validate(request, shape).generate_report() == ""


def test_mounts_hold_what_the_installation_needs(cluster: dict[str, Any]) -> None:
    remote = "/home/ubuntu/rayjepa/"
    mounts = {r: path for r, path in cluster["file_mounts"].items() if r.startswith(remote)}
    assert all(r == remote + path and (ROOT / path).exists() for r, path in mounts.items())
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"][
        "packages"
    ]
    needed = {p.partition(".")[0] for p in packages}
    needed |= {"pyproject.toml", "README.md", "constraints.txt", "deploy/aws"}
    assert set(mounts.values()) == needed
    (install,) = (c for c in cluster["worker_setup_commands"] if "install.sh" in c)
    assert install.endswith("bash ~/rayjepa/deploy/aws/install.sh")
    script = (ROOT / "deploy/aws/install.sh").read_text()
    installs = [line for line in script.splitlines() if "pip install" in line]
    assert installs
    assert all('-c "$constraints"' in line for line in installs)
    assert "constraints=~/rayjepa/constraints.txt\n" in script


def test_completion_does_not_change_what_is_written(written: dict[str, Any]) -> None:
    completed = util.prepare_config(copy.deepcopy(written))
    for key in written.keys() - {"available_node_types"}:
        assert completed[key] == written[key]


def pretrain_commands(document: str) -> list[tuple[str, list[str]]]:
    """(where it runs, arguments of pretrain) of every run in a document's shell blocks.

    `--dry-run` starts none; its commands are tried in tests/pipelines/capacity.
    """
    found = []
    for block in re.findall(r"```sh\n(.*?)```", (ROOT / document).read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            jobs = [w for w in words if w in ("pipelines.pretrain", "pipelines/pretrain.py")]
            if jobs and "--dry-run" not in words:
                where = "cluster" if words[:3] == ["ray", "job", "submit"] else "laptop"
                found.append((where, words[words.index(jobs[0]) + 1 :]))
    return found


@pytest.mark.parametrize("document", ["README.md", "docs/cluster.md"])
def test_pretrain_commands_fit_as_printed(
    document: str, cluster: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Submitted commands fit the shipped cluster, all others two cores or one GPU."""
    commands = pretrain_commands(document)
    assert commands
    limits = "ray._private.state.state.get_max_resources_from_cluster_config"
    monkeypatch.setattr(limits, lambda: None)
    for where, arguments in commands:
        cfg = tyro.extras.overridable_config_cli(RECIPES, args=arguments)
        there = {"CPU": 2.0}
        if where == "cluster":
            there = dict.fromkeys(("CPU", "GPU"), 0.0)
            for node_type in cluster["available_node_types"].values():
                for name, amount in node_type["resources"].items():
                    there[name] += amount * node_type.get("max_workers", 1)
            assert cfg.run.workers <= cluster["available_node_types"]["gpu_worker"]["max_workers"]
        elif cfg.run.gpu:
            there = {"CPU": 16.0, "GPU": 1.0}
        monkeypatch.setattr("ray.cluster_resources", lambda there=there: there)
        check_fits(cfg)
    if document == "README.md":
        printed = [(where, arguments[0]) for where, arguments in commands]
        assert printed == [("laptop", "vicreg_laptop"), ("cluster", "ijepa_vitb16")]
        assert not RECIPES["vicreg_laptop"][1].run.gpu
    else:
        assert ("laptop", "ijepa_vits16") in [
            (where, arguments[0]) for where, arguments in commands
        ]
        monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 64.0, "GPU": 1.0})
        with pytest.raises(ValueError, match=r"--run\.workers 8"):  # asks for eight
            check_fits(RECIPES["ijepa_vits16"][1])
