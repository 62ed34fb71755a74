"""Stage one on a real Ray: parts side by side, failures kept apart, resume from checkpoints."""

import os
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import ray.train
import torch
from ray.train.v2._internal.execution.storage import StorageContext
from ray.util import placement_group, remove_placement_group

from dsmip.config import ExperimentConfig, Resources, Running
from dsmip.data.dataset import Dataset
from dsmip.errors import StoreAway, UserError
from dsmip.runs.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from dsmip.runs.load_config import changed
from dsmip.runs.run import Run
from dsmip.training.local_context import LocalContext
from dsmip.training.monitor import StepFigures
from dsmip.training.stages import train_part
from ray_jobs.cluster import resources
from ray_jobs.cluster.failures import JobFailed
from ray_jobs.cluster.resources import Request, check_feasible, describe_wait
from ray_jobs.jobs.train_experts import train_experts, train_parts
from ray_jobs.training.context import RayContext
from ray_jobs.training.ray_train import Training, run_trainings
from tests.support.cluster.reached import is_loopback, listeners_of_this_process
from tests.support.displays import Lines

pytestmark = [pytest.mark.usefixtures("ray_cluster")]


def count_epochs(context: RayContext, settings: Mapping[str, Any]) -> None:
    """Four epochs that only count. Once, after the second, it breaks in the way that `settings` ask."""
    restored = context.restore()
    start = load_checkpoint(restored, context.device).epoch if restored else 0
    log, broken = Path(settings["log"]), Path(settings["log"] + ".broken")
    for epoch in range(start, 4):
        if epoch == 2 and settings["how"] and not broken.exists():
            broken.touch()
            if settings["how"] != "raise":
                newest = ray.train.get_all_reported_checkpoints()[-1].checkpoint  # waits until all are stored
                if settings["how"] == "damage":
                    (Path(newest.path) / "weights.safetensors").write_bytes(b"")
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("the disc is full")
        with log.open("a") as stream:
            stream.write(f"{epoch} ")
        folder = context.checkpoint_folder(epoch + 1, 0)
        save_checkpoint(folder, Checkpoint(epoch + 1, [], {}, {}, {}, {}, {}))
        context.step_done(epoch, 0, 1, StepFigures(0.5, torch.tensor(2.0), 0.01, 8, 2.0, 0.5))
        context.epoch_done({"epoch": epoch, "loss": 0.0}, folder)


def save_in_turn(context: RayContext, settings: Mapping[str, Any]) -> None:
    """Two checkpoints, each stored a second late or when the next one is begun; notes how many are on their way."""
    begun, store = threading.Event(), StorageContext.persist_current_checkpoint

    def store_late(*arguments: Any) -> Any:
        begun.wait(1.0)
        return store(*arguments)

    StorageContext.persist_current_checkpoint = store_late  # type: ignore[assignment,method-assign]
    for epoch in range(2):
        folder = context.checkpoint_folder(epoch + 1, 0)
        with Path(settings["log"]).open("a") as stream:
            stream.write(f"{len(list(folder.parent.glob('epoch-*')))} ")
        if epoch:
            begun.set()
        save_checkpoint(folder, Checkpoint(epoch + 1, [], {}, {}, {}, {}, {}))
        context.epoch_done({"epoch": epoch, "loss": 0.0}, folder)


HALF_A_CPU = Running(resources=Resources(cpu=0.5))


def counting(name: str, how: str, folder: Path) -> Training:
    settings = {"how": how, "log": str(folder / name)}
    return Training(name, count_epochs, settings, num_epochs=4, location=folder / "ray", plan=HALF_A_CPU)


@pytest.mark.slow
def test_a_failure_stops_no_other_and_is_resumed(tmp_path: Path) -> None:
    trainings = [
        counting("sound", "", tmp_path),
        counting("lost", "kill", tmp_path),
        counting("damaged", "damage", tmp_path),
        counting("full", "raise", tmp_path),
        Training("slow", save_in_turn, {"log": str(tmp_path / "slow")}, 2, tmp_path / "ray", HALF_A_CPU),
    ]
    display = Lines()
    with pytest.raises(JobFailed, match="failed: full; run the same command again") as failed:
        run_trainings(trainings, display)
    assert failed.value.exit_code == 1
    assert any(line.startswith("  full: failed: RuntimeError: the disc is full") for line in display.lines)
    assert "in count_epochs" in (tmp_path / "ray" / "full.error.txt").read_text()
    assert (tmp_path / "sound").read_text() == "0 1 2 3 "
    assert (tmp_path / "lost").read_text() == "0 1 2 3 "  # came back by itself, from its last checkpoint
    assert (tmp_path / "full").read_text() == "0 1 "
    assert (tmp_path / "damaged").read_text() == "0 1 1 2 3 "  # from the checkpoint before the damaged one
    assert any("damaged: warning: checkpoint file" in line for line in display.lines)
    assert (tmp_path / "slow").read_text() == "1 1 ", "a slow store gets one checkpoint at a time"
    assert len(list((tmp_path / "ray" / "slow").glob("checkpoint_*/"))) == 2
    run_trainings([trainings[3]], display)
    assert (tmp_path / "full").read_text() == "0 1 2 3 "


@pytest.mark.slow
def test_experts_train_side_by_side_and_finished_ones_are_kept(
    tmp_path: Path, small_config: ExperimentConfig, small_data: Dataset
) -> None:
    wrong = changed(small_config, {"parts": {"multimodal": {"train": {"learning_rate": 1e30}}}})
    display = Lines()
    with pytest.raises(JobFailed, match="failed: multimodal") as failed:
        train_experts(wrong, small_data, tmp_path / "run", display)
    assert failed.value.exit_code == 2  # every cause was a user's mistake
    assert any("  multimodal: failed: " in line and "the training has diverged" in line for line in display.lines)
    run = Run.open(tmp_path / "run")
    assert [part for part in run.part_names if run.is_finished(part)] == ["text", "visual"]
    saved = "text finished, visual finished, multimodal nothing yet"
    assert display.interrupted() == f"interrupted; saved in {run.storage}: {saved}; the same command goes on from there"
    assert len(run.part_report("text")["history"]) == 2
    run.load_part("visual", with_encoder=False)
    weights = (run.folder / "text" / "weights.safetensors").stat().st_mtime_ns

    with pytest.raises(JobFailed, match="failed: multimodal"):
        train_experts(wrong, small_data, tmp_path / "run", display := Lines())
    assert any(line.startswith("  text: finished already, validation hits@1") for line in display.lines)
    assert (run.folder / "text" / "weights.safetensors").stat().st_mtime_ns == weights


def away(context: RayContext, settings: Mapping[str, Any]) -> None:
    """Its store is away as often as `settings` say, by the first worker's count."""
    tries = Path(settings["log"])
    rank = ray.train.get_context().get_world_rank()
    if rank == 0:
        with tries.open("a") as stream:
            stream.write(".")
        if len(tries.read_text()) <= settings["times"]:
            raise StoreAway("s3://b/run: cannot be reached")


@pytest.mark.soak
def test_a_store_that_is_away_is_no_mistake(tmp_path: Path) -> None:
    """Several workers are started again, as after any failure that is not the user's; a lone one is not."""
    cases = {"alone": (1, 1, 1), "once": (2, 1, 2), "always": (2, 9, 2)}  # workers, times away, tries
    trainings = []
    for name, (workers, times, _) in cases.items():
        plan = Running(workers=workers, restarts=1, resources=Resources(cpu=0.5))
        settings = {"log": str(tmp_path / name), "times": times}
        trainings.append(Training(name, away, settings, num_epochs=1, location=tmp_path / "ray", plan=plan))
    with pytest.raises(JobFailed, match="failed: alone, always; run") as failed:
        run_trainings(trainings, display := Lines())
    assert failed.value.exit_code == 1
    for name in ("alone", "always"):
        assert f"  {name}: failed: s3://b/run: cannot be reached" in display.lines
    assert not list((tmp_path / "ray").glob("*.error.txt"))
    for name, (_, _, tries) in cases.items():
        assert len((tmp_path / name).read_text()) == tries, name


def keep_times(context: RayContext, settings: Mapping[str, Any]) -> None:
    """Notes when it starts and, after every worker of this training has started, when it ends; and who listens."""
    context.step_done(0, 0, 1, StepFigures(0.0, torch.tensor(0.0), 0.01, 8, 1.0, 0.0))
    with Path(settings["log"]).open("a") as stream:
        stream.write(f"start {settings['name']}\n")
    with Path(settings["log"] + ".listeners").open("a") as stream:
        stream.writelines(f"{listener.host}\n" for listener in listeners_of_this_process())
    context.epoch_done({"epoch": 0, "loss": 0.0}, None)  # waits for the others
    with Path(settings["log"]).open("a") as stream:
        stream.write(f"end {settings['name']}\n")


@pytest.mark.soak
def test_three_trainings_that_fit_only_one_at_a_time_queue_and_all_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers with 2 CPUs on 4 CPUs: were workers placed one by one, two trainings could hold one each for ever."""
    monkeypatch.setattr(resources, "WAIT_LINE_SECONDS", 1.0)
    log, display = tmp_path / "log", Lines()
    trainings = [
        Training(
            name,
            keep_times,
            {"name": name, "log": str(log)},
            1,
            tmp_path / "ray",
            Running(workers=2, resources=Resources(cpu=2)),
        )
        for name in ("a", "b", "c")
    ]
    run_trainings(trainings, display)
    lines = log.read_text().split("\n")[:-1]
    order = [line.split()[1] for line in lines[::4]]
    assert sorted(order) == ["a", "b", "c"]
    expected = [f"{what} {name}" for name in order for what in ("start", "start", "end", "end")]
    assert [line.split()[1] for line in lines] == [line.split()[1] for line in expected]  # one after the other
    hosts = Path(f"{log}.listeners").read_text().split()
    assert len(hosts) >= 6  # each worker listens for the other ones and for Ray
    assert [host for host in hosts if not is_loopback(host)] == []
    waits = [line for line in display.lines if "waiting to start" in line]
    assert any(
        f"{order[-1]} asks 2 workers with 2 CPU each" in line and "free: 0 CPU of 4 CPU" in line for line in waits
    )
    assert all(line.endswith("awaited: no node") for line in waits)


@pytest.mark.slow
def test_two_workers_train_a_part_as_one_does(
    tmp_path: Path, small_config: ExperimentConfig, small_data: Dataset
) -> None:
    alone = Run.create(tmp_path / "alone", small_config, small_data)
    expected = train_part(alone, "text", LocalContext(tmp_path / "checkpoints"))
    shared = changed(small_config, {"parts": {"text": {"workers": 2, "resources": {"cpu": 0.5}}}})
    run = Run.create(tmp_path / "run", shared, small_data)
    train_parts(run, [(run, "text")], Lines())
    found = run.part_report("text")["history"]
    assert [epoch["loss"] for epoch in found] == pytest.approx([epoch["loss"] for epoch in expected.history], rel=1e-4)
    assert found[-1]["mrr"] == pytest.approx(expected.history[-1]["mrr"])


def test_a_request_that_can_never_be_fulfilled_ends_at_once(tmp_path: Path) -> None:
    large = Training(
        "large", count_epochs, {}, num_epochs=1, location=tmp_path, plan=Running(resources=Resources(cpu=1000))
    )
    with pytest.raises(UserError, match="large asks 1 worker with 1000 CPU each, which this cluster can never give"):
        run_trainings([counting("sound", "", tmp_path), large], Lines())
    assert list(tmp_path.iterdir()) == []
    check_feasible([Request("four", 4, 1, 0)])
    with pytest.raises(UserError, match="biggest node has 4 CPU"):
        check_feasible([Request("five", 5, 1, 0)])


def test_the_waiting_line_says_who_asks_what() -> None:
    request = Request("visual", 2, 3, 0)
    assert describe_wait([request], 60) == "starting 2 workers: imports, weights, 60 s so far"
    asked = placement_group([{"CPU": 3}] * 2)  # as Ray Train does, on 4 CPUs of one node
    ready = asked.ready()
    try:
        while "waiting" not in (line := describe_wait([request], 60)):
            assert not ray.wait([ready], timeout=0.1)[0]
    finally:
        remove_placement_group(asked)
    assert line.startswith("waiting to start: visual asks 2 workers with 3 CPU each; free: ")
    assert line.endswith(" of 4 CPU; awaited: no node")
