"""Nodes that are lost, or taken away with notice, in the middle of an epoch: the training goes on on another one."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dsmip.config import ExperimentConfig
from dsmip.data.dataset import Dataset
from dsmip.runs.run import Run
from ray_jobs.cluster.local import own_token  # before Ray is imported
from tests.support.cluster.disturbed import (
    StepLog,
    assert_equal_parts,
    command,
    disturbed_config,
    ended,
    is_alive,
    train_arguments,
    undisturbed,
    wait_stored,
)
from tests.support.cluster.ray_heads import wait_until

# isort: split
from ray.cluster_utils import Cluster

from dsmip.runs.load_config import changed

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
WORKERS = {"text": 1, "visual": 1}
FAST_CHECKS = {"period_ms": 1000, "timeout_ms": 2000, "initial_delay_ms": 1000, "failure_threshold": 2}


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A head without CPUs, which notices within about two seconds that a node is gone."""
    with pytest.MonkeyPatch.context() as variables, tempfile.TemporaryDirectory(prefix="dc") as folder:
        variables.setenv("RAY_TMPDIR", folder)
        variables.setenv("RAY_worker_niceness", "0")
        variables.delenv("RAY_ADDRESS", raising=False)
        for name in [name for name in os.environ if name.startswith("RAY_TRAIN_")]:
            variables.delenv(name)  # other tests' cluster of this process watches for no notice; nodes hand that on
        for name, value in FAST_CHECKS.items():
            variables.setenv(f"RAY_health_check_{name}", str(value))
        own_token()
        started = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        try:
            yield started
        finally:
            started.shutdown()


def test_a_killed_node_is_replaced_by_another(
    tmp_path: Path, config: ExperimentConfig, small_data: Dataset, expected: Run, cluster: Any
) -> None:
    log = StepLog(tmp_path / "log", holds=((1, 3),))
    node = cluster.add_node(num_cpus=1)
    arguments = train_arguments(log, config, small_data, tmp_path / "run")
    with command(arguments, {"RAY_ADDRESS": cluster.address}) as process:
        log.wait_held((1, 3), WORKERS, ended=process.poll)
        wait_stored(tmp_path / "run", {"text": (1, 0), "visual": (1, 2)})
        event = time.time()
        cluster.remove_node(node, allow_graceful=False)
        cluster.add_node(num_cpus=1)
        code, output = ended(process)
    assert code == 0, output
    assert log.cost("text", event, "killed node, another one joins at once") == 4
    assert log.cost("visual", event, "killed node, another one joins at once") == 2
    assert_equal_parts(Run.open(tmp_path / "run"), expected)


@pytest.mark.soak
@pytest.mark.parametrize("workers", [1, 2])
def test_a_node_that_is_taken_away_with_notice_costs_no_step(
    tmp_path: Path, small_config: ExperimentConfig, small_data: Dataset, cluster: Any, workers: int
) -> None:
    """Without any restart allowed: leaving on notice is none. Of two workers one is on another node, and leaves too."""
    config = disturbed_config(small_config, workers=workers, resources={"cpu": 0.8})
    parts = {"text": {"restarts": 0, "resources": {"cpu": 0.2}}, "visual": {"restarts": 0}}
    careful = changed(config, {"parts": parts})
    expected = undisturbed(tmp_path / "undisturbed", careful, small_data)
    log = StepLog(tmp_path / "log", holds=((1, 3),), pause=2.0)  # as a slow step: the notice comes before the last one
    nodes = [cluster.add_node(num_cpus=1) for _ in range(workers)]
    arguments = train_arguments(log, careful, small_data, tmp_path / "run")
    with command(arguments, {"RAY_ADDRESS": cluster.address}) as process:
        log.wait_held((1, 3), {"text": 1, "visual": workers}, ended=process.poll)
        cluster.add_node(num_cpus=1)
        event = time.time()
        drain(cluster, nodes[0])
        log.release((1, 3))
        code, output = ended(process)
    assert code == 0, output
    left = [part for part in WORKERS if len(log.pids(part)) > 1]
    assert "visual" in left, (
        "it never left the node"
    )  # a worker of it was there, the text expert perhaps on another one
    for part in left:
        assert log.cost(part, event, f"node taken away with notice, after the notice ({workers} workers)") == 0
        times = [[note.time for note in log.notes(part) if note.pid == pid] for pid in log.pids(part)]
        print(
            f"| ... from its last step there to its first one elsewhere | {part} | {times[1][0] - times[0][-1]:.1f} s |"
        )
        positions = [note.position for note in log.notes(part)]
        assert len(positions) == len(set(positions))
    assert_equal_parts(Run.open(tmp_path / "run"), expected)


@pytest.mark.soak
def test_an_elastic_part_goes_on_with_fewer_workers_and_with_more_again(
    tmp_path: Path, small_config: ExperimentConfig, small_data: Dataset, cluster: Any
) -> None:
    """Two workers, one when a node is lost and none comes, two when one comes: the same batches all the way."""
    config = disturbed_config(small_config, workers="1..2", resources={"cpu": 0.9})
    config = changed(config, {"parts": {"text": {"resources": {"cpu": 0.1}}}})
    alone = undisturbed(tmp_path / "alone", changed(config, {"parts": {"visual": {"workers": 1}}}), small_data)
    log = StepLog(tmp_path / "log", holds=((0, 3), (2, 1)))
    nodes = [cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1)]
    variables = {"RAY_ADDRESS": cluster.address, "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20"}
    with command(train_arguments(log, config, small_data, tmp_path / "run"), variables) as process:
        log.wait_held((0, 3), {"visual": 2}, ended=process.poll)
        workers = [log.notes("visual", rank)[-1].pid for rank in (0, 1)]
        event = time.time()
        cluster.remove_node(nodes[1], allow_graceful=False)
        wait_until(lambda: not all(map(is_alive, workers)), 60, "the lost node's worker lives")
        log.release((0, 3))
        log.wait_held((2, 1), {"visual": 1}, ended=process.poll)
        assert log.notes("visual", rank=1)[-1].position < (2, 0)
        assert log.cost("visual", event, "killed node of an elastic training, none joins") <= 2
        event = time.time()
        cluster.add_node(num_cpus=1)
        log.wait_held((2, 1), {"visual": 2}, ended=process.poll)
        log.release((2, 1))
        code, output = ended(process)
    assert code == 0, output
    assert log.cost("visual", event, "another node joins the elastic training") <= 2
    found = Run.open(tmp_path / "run").part_report("visual")["history"]
    for ours, theirs in zip(found, alone.part_report("visual")["history"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
        assert ours["mrr"] == pytest.approx(theirs["mrr"], rel=1e-3)


def drain(cluster: Any, node: Any) -> None:
    """Tells Ray that a node will be taken away in a minute."""
    options = ["--address", cluster.address, "--node-id", node.node_id, "--deadline-remaining-seconds", "60"]
    reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "preempted"]
    ray = Path(sys.executable).parent / "ray"
    ended = subprocess.run([str(ray), "drain-node", *options, *reason], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
