"""The cluster files: valid by Ray's own schema or KubeRay's resources, scaled from nothing, their commands exist."""

import copy
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from dsmip.runs.load_config import shipped_configs
from ray_jobs.cli import app
from ray_jobs.cluster.node_types import VARIABLE
from tests.support.cluster.kuberay import NetworkPolicy, PersistentVolumeClaim, RayJob, RayService

# isort: split
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.runtime_env import RuntimeEnv
from ray.serve.schema import ServeDeploySchema

from ray_jobs.serving import ServeArguments
from tests.support.paths import ROOT
from tools.refresh_pins import BUILD_REQUIREMENTS, REQUIREMENTS

KUBERAY = ROOT / "deploy" / "kuberay"
STAGES = ("prepare", "train", "tune", "evaluate")
PINS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["uv"]["constraint-dependencies"]
RAY_VERSION = next(pin.removeprefix("ray==") for pin in PINS if pin.startswith("ray=="))


def _tree(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def _prepared(name: str) -> dict[str, Any]:
    """A cluster launcher's file, filled in and checked as `ray up` does it."""
    config: dict[str, Any] = prepare_config(copy.deepcopy(_tree(ROOT / name)))
    validate_config(config)
    return config


def _built(stage: str) -> dict[str, Any]:
    """A stage's RayJob as `kubectl kustomize` builds it: base, then `replace` patches, then images."""
    base = _tree(KUBERAY / "base" / "kustomization.yaml")
    (resource,) = base["resources"]
    text = (KUBERAY / "base" / resource).read_text(encoding="utf-8")
    for image in base["images"]:
        text = text.replace(f"image: {image['name']}\n", f"image: {image['newName']}:{image['newTag']}\n")
    job: dict[str, Any] = yaml.safe_load(text)
    (patch,) = _tree(KUBERAY / stage / "kustomization.yaml")["patches"]
    for change in yaml.safe_load(patch["patch"]):
        assert change["op"] == "replace"
        *parents, key = change["path"].strip("/").split("/")
        node = job
        for parent in parents:
            node = node[parent]
        assert key in node
        node[key] = change["value"]
    return job


def test_the_cluster_file_starts_with_no_worker_and_rents_gpus_on_the_spot_market() -> None:
    config = _prepared("cluster.yaml")
    assert config["docker"]["image"].startswith(f"rayproject/ray:{RAY_VERSION}-")
    groups = {name: kind for name, kind in config["available_node_types"].items() if name != config["head_node_type"]}
    assert sorted(groups) == ["cpu", "gpu"]
    assert {kind["min_workers"] for kind in groups.values()} == {0}
    assert all(0 < kind["max_workers"] <= config["max_workers"] for kind in groups.values())
    assert [name for name, kind in groups.items() if kind["resources"].get("GPU")] == ["gpu"]
    assert groups["gpu"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "InstanceMarketOptions" not in config["available_node_types"]["head"]["node_config"]
    assert groups["gpu"]["docker"]["worker_image"] == f"{config['docker']['image']}-gpu"
    assert "-v /shared:/shared" in config["docker"]["run_options"]


def test_workers_pass_on_the_notice_that_their_machine_goes() -> None:
    config = _prepared("cluster.yaml")
    commands = config["worker_start_ray_commands"]
    (started,) = (number for number, command in enumerate(commands) if "ray start" in command)
    (watching,) = (number for number, command in enumerate(commands) if "python ~/dsmip/spot_notice.py" in command)
    assert watching > started
    assert Path(config["file_mounts"]["/home/ray/dsmip/spot_notice.py"]).name == "spot_notice.py"
    assert (ROOT / "deploy" / "spot_notice.py").is_file()


def test_the_schema_refuses_an_unknown_key() -> None:
    config = _tree(ROOT / "cluster.yaml")
    config["available_node_types"]["gpu"]["max_worker"] = 3
    with pytest.raises(Exception, match="max_worker"):
        validate_config(prepare_config(config))


def test_the_on_premise_file_is_valid_and_its_machines_join_at_once() -> None:
    config = _prepared("deploy/onprem.yaml")
    (kind,) = config["available_node_types"].values()
    assert kind["min_workers"] == kind["max_workers"] == len(config["provider"]["worker_ips"])
    aws = _tree(ROOT / "cluster.yaml")
    assert config["docker"]["image"] == aws["available_node_types"]["gpu"]["docker"]["worker_image"]
    assert config["setup_commands"] == aws["setup_commands"]
    assert config["file_mounts"].items() <= aws["file_mounts"].items()


@pytest.mark.parametrize("name", ["cluster.yaml", "deploy/onprem.yaml"])
def test_a_cluster_asks_for_a_token_and_installs_what_has_the_pinned_hashes(name: str) -> None:
    config = _prepared(name)
    starts = [
        command
        for kind in ("head", "worker")
        for command in config[f"{kind}_start_ray_commands"]
        if "ray start" in command or "spot_notice.py" in command
    ]
    assert len(starts) >= 2
    assert all("RAY_AUTH_MODE=token " in command for command in starts)
    assert Path(config["file_mounts"]["/home/ray/.ray/auth_token"]).name == "auth_token"
    assert any("chmod 600 ~/.ray/auth_token" in command for command in config["setup_commands"])
    assert (ROOT / config["file_mounts"]["/home/ray/dsmip/requirements.txt"]) == ROOT / REQUIREMENTS
    installs = [command for command in config["setup_commands"] if "install" in command]
    assert installs == ["pip install --quiet --require-hashes --requirement ~/dsmip/requirements.txt"]
    options = " ".join(config["docker"]["run_options"])
    assert "--privileged" not in options
    assert "--user" not in options  # the image's own is not root


def test_whoever_is_not_of_ray_reaches_no_pod_of_it() -> None:
    policy = NetworkPolicy.model_validate(_tree(KUBERAY / "network.yaml"))
    assert policy.spec.policyTypes == ["Ingress"]
    assert policy.spec.podSelector.matchLabels == {"ray.io/is-ray-node": "yes"}
    inside, dashboard, served = policy.spec.ingress
    assert [peer.namespaceSelector for peer in served.from_] == [None]
    assert [port.port for port in served.ports] == [8000]
    assert [peer.podSelector for peer in inside.from_] == [policy.spec.podSelector]
    assert [peer.namespaceSelector for peer in inside.from_] == [None]  # of this namespace alone
    assert [port.port for port in dashboard.ports] == [8265]
    submitters, operator = dashboard.from_
    assert submitters.podSelector is not None
    (submitting,) = submitters.podSelector.matchExpressions
    assert submitting.values == [_built(stage)["metadata"]["name"] for stage in STAGES]
    assert operator.podSelector is not None
    assert operator.podSelector.matchLabels == {"app.kubernetes.io/name": "kuberay-operator"}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_on_kuberay_is_a_rayjob_that_starts_with_no_worker(stage: str) -> None:
    job = RayJob.model_validate(_built(stage))
    assert job.metadata.name == f"dsmip-{stage}"
    assert job.spec.shutdownAfterJobFinishes
    runtime_env = RuntimeEnv(**yaml.safe_load(job.spec.runtimeEnvYAML))
    cluster = job.spec.rayClusterSpec
    assert cluster.rayVersion == RAY_VERSION
    assert cluster.authOptions.mode == "token"
    assert cluster.enableInTreeAutoscaling
    assert cluster.headGroupSpec.rayStartParams["num-cpus"] == "0"
    assert [group.groupName for group in cluster.workerGroupSpecs] == ["cpu", "gpu"]
    assert all(group.replicas == group.minReplicas == 0 < group.maxReplicas for group in cluster.workerGroupSpecs)
    claim = PersistentVolumeClaim.model_validate(_tree(KUBERAY / "shared.yaml"))
    assert claim.spec.accessModes == ["ReadWriteMany"]
    templates = [cluster.headGroupSpec.template, *(group.template for group in cluster.workerGroupSpecs)]
    for pod in (template.spec for template in templates):
        (container,) = pod.containers
        assert container.resources.requests == container.resources.limits
        assert {mount.name for mount in container.volumeMounts} == {volume.name for volume in pod.volumes}
        claims = {volume.name: volume.persistentVolumeClaim for volume in pod.volumes}
        (shared,) = (mount.name for mount in container.volumeMounts if mount.mountPath == "/shared")
        assert claims[shared] is not None
        assert claims[shared].claimName == claim.metadata.name
    node_types = {
        group.groupName: {
            "resources": {
                name: int(limits[key]) for name, key in (("CPU", "cpu"), ("GPU", "nvidia.com/gpu")) if key in limits
            },
            "max_workers": group.maxReplicas,
        }
        for group in cluster.workerGroupSpecs
        for limits in [group.template.spec.containers[0].resources.limits]
    }
    assert yaml.safe_load(runtime_env["env_vars"][VARIABLE]) == node_types
    on_gpu = cluster.workerGroupSpecs[1].template.spec
    assert on_gpu.containers[0].resources.limits["nvidia.com/gpu"] == "1"
    assert on_gpu.nodeSelector == {"karpenter.sh/capacity-type": "spot"}
    (wait,) = (env.value for env in on_gpu.containers[0].env if env.name == "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S")
    assert 30 < int(wait) < on_gpu.terminationGracePeriodSeconds, "trainings on it have no time to save"

    program, command, *arguments = shlex.split(job.spec.entrypoint)
    assert (program, command) == ("dsmip", stage)
    context = typer.main.get_command(app).commands[command].make_context(command, list(arguments))  # type: ignore[attr-defined]
    assert context.params.get("config") in {None, *shipped_configs()}
    assert all(str(path).startswith("/shared/") for path in context.params.values() if isinstance(path, Path))


def test_a_served_linker_on_kuberay_has_arguments_that_it_takes_and_pods_that_hold_its_replicas() -> None:
    service = RayService.model_validate(_tree(KUBERAY / "rayservice.yaml"))
    config = ServeDeploySchema.model_validate(yaml.safe_load(service.spec.serveConfigV2))
    (application,) = config.applications
    assert application.import_path == "ray_jobs.serving:app"
    arguments = ServeArguments.model_validate(application.args)
    assert arguments.model.startswith("/shared/")
    cluster = service.spec.rayClusterConfig
    assert (cluster.rayVersion, cluster.authOptions.mode) == (RAY_VERSION, "token")
    (group,) = cluster.workerGroupSpecs
    limits = group.template.spec.containers[0].resources.limits
    a_pod = min(int(int(limits["nvidia.com/gpu"]) / arguments.gpus), int(int(limits["cpu"]) / arguments.cpus))
    assert a_pod * group.maxReplicas == arguments.max_replicas
    templates = [cluster.headGroupSpec.template, group.template]
    (built,) = yaml.safe_load((KUBERAY / "base" / "kustomization.yaml").read_text())["images"]
    images = {template.spec.containers[0].image for template in templates}
    assert images == {f"{built['newName']}:{built['newTag']}"}
    policy = NetworkPolicy.model_validate(_tree(KUBERAY / "network.yaml"))
    assert config.http_options.port in {port.port for rule in policy.spec.ingress for port in rule.ports}


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed")
def test_kubectl_builds_the_same() -> None:
    for stage in STAGES:
        command = ["kubectl", "kustomize", str(KUBERAY / stage)]
        built = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        assert yaml.safe_load(built) == _built(stage)


def test_the_image_holds_what_the_package_needs() -> None:
    """The Dockerfile copies each package, and every file that building it reads."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    lines = (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8").splitlines()
    copied = {word for line in lines if line.startswith("COPY") for word in line.split()[2:-1]}
    read = {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]}
    assert copied == {*packages, *read, REQUIREMENTS, BUILD_REQUIREMENTS}
    assert f"FROM rayproject/ray:{RAY_VERSION}-py311" in lines


def test_the_image_installs_nothing_without_its_hash_and_does_not_run_as_root() -> None:
    text = (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    installs = re.findall(r"pip install [^&\n]*", text)
    assert len(installs) == 3
    own = "pip install --no-cache-dir --no-deps --no-build-isolation ."
    assert all("--require-hashes" in each or each.strip() == own for each in installs)
    head = RayJob.model_validate(_built("train")).spec.rayClusterSpec.headGroupSpec.template.spec
    users = [line for line in text.splitlines() if line.startswith("USER ")]
    assert users == [f"USER {head.securityContext.runAsUser}"]


def test_the_runtime_environment_is_rays() -> None:
    RuntimeEnv(**_tree(ROOT / "deploy" / "runtime_env.yaml"))
