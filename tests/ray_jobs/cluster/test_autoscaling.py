"""A cluster that starts with no worker: nodes come for three experts, work, and go away when they are idle.

Ray's fake node provider starts a raylet on this machine for every node that its autoscaler asks for.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsmip.config import ExperimentConfig
from dsmip.data.dataset import Dataset
from dsmip.runs.run import Run
from ray_jobs.cluster.node_types import VARIABLE
from tests.support.cluster.ray_heads import Head, free_ports, running_head, wait_until

# isort: split
from ray.util import get_node_ip_address
from ray.util.state import list_nodes

from dsmip.runs.load_config import to_yaml

pytestmark = [pytest.mark.soak, pytest.mark.timeout(600)]  # its nodes starve beside any other load
HEAD_ID = "f" * 51 + "00000"  # the fake provider numbers its nodes from here


@pytest.fixture
def head(tmp_path: Path) -> Iterator[Head]:
    """A head without CPUs whose autoscaler may add three nodes of one CPU, and takes idle ones away after 6 s."""
    (port,) = free_ports(1)
    config = {
        "cluster_name": "fake",
        "max_workers": 3,
        "idle_timeout_minutes": 0.1,
        "upscaling_speed": 1.0,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": f"{get_node_ip_address()}:{port}",
            "head_node_id": HEAD_ID,
            "launch_multiple": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "auth": {},
        "head_node_type": "ray.head.default",  # the name that the fake provider gives its head
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "cpu": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 3},
        },
        "file_mounts": {},
        **{f"{kind}_commands": [] for kind in ("initialization", "setup", "head_setup", "worker_setup")},
        **{f"{kind}_start_ray_commands": [] for kind in ("head", "worker")},
        "cluster_synced_files": [],
    }
    path = tmp_path / "autoscaler.json"
    path.write_text(json.dumps(config))
    variables = {
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
        VARIABLE: json.dumps({"cpu": config["available_node_types"]["cpu"]}),  # type: ignore[index]
    }
    with running_head(["--num-cpus", "0", "--autoscaling-config", str(path)], variables, gcs_port=port) as started:
        yield started


def workers_of(head: Head) -> int:
    """How many worker nodes are alive."""
    # raise_on_missing_output: a node that comes or goes while Ray counts is no mistake
    nodes = list_nodes(address=head.address, filters=[("state", "=", "ALIVE")], raise_on_missing_output=False)
    return sum(not node.is_head_node for node in nodes)


def test_nodes_come_for_three_experts_work_and_go(
    head: Head, tmp_path: Path, small_config: ExperimentConfig, small_data: Dataset
) -> None:
    path, run = tmp_path / "config.yaml", tmp_path / "run"
    path.write_text(to_yaml(small_config))
    job = ["ray_jobs/train_experts.py", "--config", str(path), "--data", str(small_data.folder), "--run", str(run)]
    assert workers_of(head) == 0
    ended = head.submit("too-large", *job, "--set", "parts.visual.resources.cpu=2")
    assert ended.exit_code == 2, ended.output
    assert "visual asks 1 worker with 2 CPU each, which this cluster can never give" in ended.output, ended.output
    assert "biggest node has 1 CPU, all together have 3 CPU" in ended.output
    assert workers_of(head) == 0

    started, came, most = time.monotonic(), {}, 0
    head.start("train", *job)
    while not (status := head.client.get_job_status("train")).is_terminal():
        most = max(most, workers_of(head))
        came.setdefault(most, time.monotonic() - started)
        assert time.monotonic() - started < 170, head.client.get_job_logs("train")
        time.sleep(0.5)
    log, trained = head.client.get_job_logs("train"), time.monotonic() - started
    assert status == "SUCCEEDED", log
    assert most == 3, log
    opened = Run.open(run)
    assert all(opened.is_finished(part) for part in ("text", "visual", "multimodal"))
    gone = wait_until(lambda: workers_of(head) == 0, 120, "idle nodes stay")
    print(f"three nodes after {came[3]:.0f} s, trained after {trained:.0f} s, none {gone:.0f} s later")
