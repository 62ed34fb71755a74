"""`dsmip bench` that is stopped in the middle: the same command goes on, repeats nothing and writes the same tables."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from dsmip.data.dataset import Dataset
from dsmip.evaluation.index_builder import OpenedEvaluation
from dsmip.evaluation.report import evaluate_model
from dsmip.runs.run import Run
from dsmip.suites.members import suite_members
from dsmip.suites.schema import Suite, load_suite
from dsmip.training.stages import CPU
from tests.support.cluster.disturbed import (
    WAIT_SECONDS,
    assert_equal_parts,
    command,
    descendants,
    ended,
    is_alive,
    undisturbed,
)
from tests.support.cluster.ray_heads import processes_of, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
Process = subprocess.Popen[str]
EPOCHS = {"short": 1, "long": 40}  # of three steps
STEPS = [f"small/{system}/seed-0/{step}" for system in EPOCHS for step in ("train", "evaluate-clip")]


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory, narrow_backbone: Path, small_data: Dataset) -> Path:
    """Of two trainings side by side, of which one takes much longer."""
    folder = tmp_path_factory.mktemp("suite")
    shutil.copytree(small_data.folder, folder / "data" / "small")
    config = {"model": "clip", "backbone": {"architecture": str(narrow_backbone)}, "train": {"batch_size": 8}}
    (folder / "clip.yaml").write_text(yaml.safe_dump(config))
    systems = {
        name: {"config": str(folder / "clip.yaml"), "set": {"train": {"epochs": epochs}}}
        for name, epochs in EPOCHS.items()
    }
    suite = {"title": "Stopped", "data": {"small": {}}, "systems": systems, "seeds": [0], "metrics": ["hits@1", "mrr"]}
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite))
    return folder / "suite.yaml"


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, suite: Path) -> dict[str, Run]:
    """By system: its run, trained and evaluated without Ray."""
    loaded, folder = load_suite(str(suite)), tmp_path_factory.mktemp("expected")
    assert isinstance(loaded, Suite)
    dataset = Dataset.open(suite.parent / "data" / "small")
    runs = {
        member.system: undisturbed(folder / member.system, member.config, dataset)
        for member in suite_members(loaded, "", folder)
    }
    for run in runs.values():
        evaluate_model(OpenedEvaluation(run, "test"), CPU)
    return runs


def terminated(process: Process) -> None:
    process.terminate()
    code, said = ended(process)
    assert code == 128 + signal.SIGTERM
    assert said.splitlines()[-1] == "interrupted; run the command again to go on"
    assert "Traceback" not in said


def killed(process: Process) -> None:
    process.kill()


def switched_off(process: Process) -> None:
    """As the machine: nothing of it has time to do anything."""
    for pid in (process.pid, *descendants(process.pid)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    "stop",
    [terminated, pytest.param(killed, marks=pytest.mark.soak), pytest.param(switched_off, marks=pytest.mark.soak)],
)
def test_a_stopped_suite_leaves_no_process_goes_on_and_repeats_nothing(
    tmp_path: Path, suite: Path, expected: dict[str, Run], stop: Callable[[Process], None]
) -> None:
    out = tmp_path / "out"
    arguments = ["-m", "ray_jobs", "bench", str(suite), "--data-root", str(suite.parent / "data"), "--out", str(out)]

    def in_the_middle() -> bool:
        """One training has ended, and the other one has something to lose."""
        assert process.poll() is None, "it ended before"
        trained = {system for system in EPOCHS if made(out, f"small/{system}/seed-0/train")}
        assert len(trained) < len(EPOCHS), "both trainings ended before"
        others = EPOCHS.keys() - trained
        return bool(trained) and all([*out.glob(f"runs/small/{other}/seed-0/ray/*/checkpoint_*")] for other in others)

    with command(arguments) as process:
        wait_until(in_the_middle, WAIT_SECONDS, "no training ended")
        started = descendants(process.pid)
        stop(process)
        gone = wait_until(
            lambda: not any(map(is_alive, started)) and not processes_of(out), WAIT_SECONDS, "processes of it stay"
        )
    print(f"{len(started)} processes were gone {gone:.0f} s after the command")
    finished = {step: made(out, step) for step in STEPS if made(out, step)}
    assert 0 < len(finished) < len(STEPS)
    with command(arguments) as process:
        code, said = ended(process)
    assert code == 0, said
    assert f"{len(STEPS)} steps, {len(finished)} of them done" in said
    assert [step for step in STEPS if f"{step}: started" in said] == [step for step in STEPS if step not in finished]
    assert {step: made(out, step) for step in finished} == finished
    lines = {line["row"]: line for line in pq.read_table(out / "results.parquet").to_pylist()}
    assert lines.keys() == expected.keys()
    for system, run in expected.items():
        assert_equal_parts(Run.open(out / "runs" / "small" / system / "seed-0"), run)
        figures = json.loads((run.folder / "evaluate/test/clip/metrics.json").read_text())["overall"]
        assert {name: lines[system][name] for name in figures} == figures
        assert f"{100 * figures['mrr']:.2f}" in (out / "results.md").read_text()


def made(out: Path, step: str) -> dict[str, int]:
    """When what a step makes, and its log, were last written; empty where it is not done."""
    run, kind = step.rsplit("/", 1)
    report = {"train": "clip/part.json", "evaluate-clip": "evaluate/test/clip/metrics.json"}[kind]
    files = out / "runs" / run / report, out / "logs" / f"{step}.log"
    return {str(file): file.stat().st_mtime_ns for file in files} if files[0].is_file() else {}
