"""Nodes that are lost, or taken away with notice, in the middle of an epoch: the training goes on on another one."""

import subprocess
import tempfile
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from disturbed import StepLog, assert_equal_parts, disturbed_config, ended, train, undisturbed
from ray_heads import wait_until

import ray_jobs.environment  # noqa: F401  (before Ray is imported)
from dsmip.config import ExperimentConfig
from dsmip.runs import Run
from dsmip.shards import Dataset

# isort: split
from ray.cluster_utils import Cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
WORKERS = {"text": 1, "visual": 1}
FAST_CHECKS = {"period_ms": 1000, "timeout_ms": 2000, "initial_delay_ms": 1000, "failure_threshold": 2}


@pytest.fixture(scope="module")
def config(small_config: ExperimentConfig) -> ExperimentConfig:
    return disturbed_config(small_config)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, config: ExperimentConfig, small_data: Dataset) -> Run:
    return undisturbed(tmp_path_factory.mktemp("undisturbed"), config, small_data)


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A head without CPUs, which notices within about two seconds that a node is gone."""
    with pytest.MonkeyPatch.context() as variables, tempfile.TemporaryDirectory(prefix="dc") as folder:
        variables.setenv("RAY_TMPDIR", folder)
        variables.setenv("RAY_worker_niceness", "0")
        variables.delenv("RAY_ADDRESS", raising=False)
        for name, value in FAST_CHECKS.items():
            variables.setenv(f"RAY_health_check_{name}", str(value))
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
    with train(log, config, small_data, tmp_path / "run", {"RAY_ADDRESS": cluster.address}) as process:
        log.wait_held((1, 3), WORKERS, ended=process.poll)
        event = time.time()
        cluster.remove_node(node, allow_graceful=False)
        cluster.add_node(num_cpus=1)
        code, output = ended(process)
    assert code == 0, output
    for part in WORKERS:
        assert log.cost(part, event, "SIGKILL of the node, another one joins at once") <= 4
    assert_equal_parts(Run.open(tmp_path / "run"), expected)
