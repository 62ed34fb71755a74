"""Workers that are lost, hang or go wrong in the middle of an epoch: the training ends as if nothing had happened."""

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from disturbed import StepLog, assert_equal_parts, disturbed_config, noted, undisturbed

from dsmip.config import ExperimentConfig
from dsmip.runs import Run
from dsmip.shards import Dataset
from ray_jobs import train_experts as job
from ray_jobs.progress import Display
from ray_jobs.train_experts import train_experts

pytestmark = [pytest.mark.usefixtures("ray_cluster")]
PARTS = ("text", "visual")


@pytest.fixture(scope="module")
def config(small_config: ExperimentConfig) -> ExperimentConfig:
    return disturbed_config(small_config, visual_workers=2)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, config: ExperimentConfig, small_data: Dataset) -> Run:
    return undisturbed(tmp_path_factory.mktemp("undisturbed"), config, small_data)


@contextmanager
def in_background(config: ExperimentConfig, dataset: Dataset, folder: Path) -> Iterator["Future[Run]"]:
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(train_experts, config, dataset, folder, Display())


def test_killed_workers_go_on_from_their_checkpoints(
    tmp_path: Path, config: ExperimentConfig, small_data: Dataset, expected: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = StepLog(tmp_path / "log", holds=((1, 3),))
    monkeypatch.setattr(job, "_loop", noted(log))
    with in_background(config, small_data, tmp_path / "run") as training:
        log.wait_held((1, 3), {"text": 1, "visual": 2}, ended=training.done)
        event = time.time()
        os.kill(log.notes("text")[-1].pid, signal.SIGKILL)
        os.kill(log.notes("visual", rank=1)[-1].pid, signal.SIGKILL)
        run = training.result()
    assert log.cost("text", event, "SIGKILL of the only worker") <= 4
    assert log.cost("visual", event, "SIGKILL of one of two workers") <= 4
    assert_equal_parts(run, expected)
