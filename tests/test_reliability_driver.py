"""Commands that are killed or run out of room in the middle of an epoch: the same command again goes on."""

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from disturbed import StepLog, assert_equal_parts, descendants, disturbed_config, is_alive, undisturbed
from ray_heads import wait_until

from dsmip.config import ExperimentConfig
from dsmip.runs import Run
from dsmip.shards import Dataset

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[1]
WORKERS = {"text": 1, "visual": 1}


@pytest.fixture(scope="module")
def config(small_config: ExperimentConfig) -> ExperimentConfig:
    return disturbed_config(small_config)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, config: ExperimentConfig, small_data: Dataset) -> Run:
    return undisturbed(tmp_path_factory.mktemp("undisturbed"), config, small_data)


def test_a_killed_driver_leaves_nothing_and_its_command_goes_on(
    tmp_path: Path, config: ExperimentConfig, small_data: Dataset, expected: Run
) -> None:
    log = StepLog(tmp_path / "log", holds=((1, 3),))
    with train(log, config, small_data, tmp_path / "run") as process:
        log.wait_held((1, 3), WORKERS, ended=process.poll)
        started = descendants(process.pid)
        process.kill()
    names = {p: Path(f"/proc/{p}/cmdline").read_bytes()[:100] for p in started}
    t0 = time.time()
    while any(map(is_alive, started)) and time.time() - t0 < 100:
        print(f"{time.time()-t0:.0f}", [names[p] for p in started if is_alive(p)], flush=True)
        time.sleep(4)
    gone = time.time() - t0
    print(f"{len(started)} processes gone after {gone:.0f} s")
    log.release((1, 3))
    event = time.time()
    with train(log, config, small_data, tmp_path / "run") as process:
        output, errors = process.communicate()
    assert process.returncode == 0, output + errors
    for part in WORKERS:
        assert log.cost(part, event, "SIGKILL of the command, from the next one") <= 4
    assert_equal_parts(Run.open(tmp_path / "run"), expected)
