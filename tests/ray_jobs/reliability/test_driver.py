"""Commands that are killed or run out of room in the middle of an epoch: the same command again goes on."""

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest

from dsmip.config import ExperimentConfig
from dsmip.data.dataset import Dataset
from dsmip.runs.load_config import changed
from dsmip.runs.run import Run
from tests.support.cluster.disturbed import (
    WAIT_SECONDS,
    StepLog,
    assert_equal_parts,
    command,
    descendants,
    ended,
    is_alive,
    train_arguments,
    wait_stored,
)
from tests.support.cluster.ray_heads import processes_of, running_head, wait_until
from tests.support.full_disk import fill, small_disk

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
WORKERS = {"text": 1, "visual": 1}
STORED = {"text": (1, 0), "visual": (1, 2)}


@pytest.mark.soak
def test_a_killed_command_leaves_no_process_and_goes_on(
    tmp_path: Path, config: ExperimentConfig, small_data: Dataset, expected: Run
) -> None:
    log = StepLog(tmp_path / "log", holds=((1, 3),))
    arguments = train_arguments(log, config, small_data, tmp_path / "run")
    with command(arguments) as process:
        log.wait_held((1, 3), WORKERS, ended=process.poll)
        wait_stored(tmp_path / "run", STORED)
        started = descendants(process.pid)
        process.kill()
        gone = wait_until(lambda: not any(map(is_alive, started)), WAIT_SECONDS, "processes of the killed command stay")
    log.release((1, 3))
    event = time.time()
    with command(arguments) as process:
        code, output = ended(process)
    assert code == 0, output
    print(f"{len(started)} processes of the killed command were gone after {gone:.0f} s")
    assert log.cost("text", event, "killed command; from the next command on") == 4
    assert log.cost("visual", event, "killed command; from the next command on") == 2
    assert_equal_parts(Run.open(tmp_path / "run"), expected)


@pytest.mark.soak
def test_a_full_disk_is_one_line_and_with_room_again_it_goes_on(
    tmp_path: Path, config: ExperimentConfig, small_data: Dataset, expected: Run
) -> None:
    log = StepLog(tmp_path / "log", holds=((1, 3),))
    config = changed(config, {"parts": {part: {"restarts": 0} for part in WORKERS}})  # else it is tried that often
    with small_disk(tmp_path / "disk", megabytes=8) as disk:
        arguments = train_arguments(log, config, small_data, disk / "run")
        with command(arguments) as process:
            log.wait_held((1, 3), WORKERS, ended=process.poll)
            wait_stored(disk / "run", STORED)
            fill(disk / "filler")
            log.release((1, 3))
            code, output = ended(process)
        assert code == 2, output
        for part in WORKERS:
            assert f"{part}: failed: no space left on the disk of {disk / 'run'}" in output, output
        assert "Traceback" not in output
        (disk / "filler").unlink()
        event = time.time()
        with command(arguments) as process:
            code, output = ended(process)
        assert code == 0, output
        assert log.cost("visual", event, "full disk; from the next command on") <= 4
        assert_equal_parts(Run.open(disk / "run"), expected)


@pytest.mark.soak
def test_a_submitted_training_outlives_its_driver_and_its_head(
    tmp_path: Path, config: ExperimentConfig, small_data: Dataset, expected: Run
) -> None:
    log = StepLog(tmp_path / "log", holds=((1, 3), (2, 1)))
    arguments = train_arguments(log, config, small_data, tmp_path / "run")
    with running_head(["--num-cpus", "2"]) as head:
        head.start("first", *arguments)
        log.wait_held((1, 3), WORKERS, ended=lambda: head.client.get_job_status("first").is_terminal())
        wait_stored(tmp_path / "run", STORED)
        for pid in processes_of(log.folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_until(lambda: head.client.get_job_status("first").is_terminal(), WAIT_SECONDS, "the job did not end")
        workers = [log.notes(part)[-1].pid for part in WORKERS]
        gone = wait_until(lambda: not any(map(is_alive, workers)), WAIT_SECONDS, "workers of a killed driver stay")
        print(f"workers of the killed driver were gone after {gone:.0f} s")
        log.release((1, 3))
        driver_killed = time.time()
        head.start("second", *arguments)
        log.wait_held((2, 1), WORKERS, ended=lambda: head.client.get_job_status("second").is_terminal())
        wait_stored(tmp_path / "run", {"text": (2, 0), "visual": (2, 0)})
        workers = [log.notes(part)[-1].pid for part in WORKERS]
    gone = wait_until(lambda: not any(map(is_alive, workers)), WAIT_SECONDS, "workers of a killed head stay")
    print(f"workers of the killed head were gone after {gone:.0f} s")
    log.release((2, 1))
    head_killed = time.time()
    with running_head(["--num-cpus", "2"]) as head:
        job = head.submit("third", *arguments)
    assert job.exit_code == 0, job.output
    assert log.cost("text", driver_killed, "killed driver of a job; from the next submit on") == 4
    assert log.cost("text", head_killed, "killed head; from the start of the next head on") == 2
    assert_equal_parts(Run.open(tmp_path / "run"), expected)
