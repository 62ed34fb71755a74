"""Figures of trainings reach the tools: read back from TensorBoard's records, MLflow's store and W&B's folder."""

import importlib.util
import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboardX.proto.event_pb2 import Event

from dsmip.config import WatchTool
from dsmip.errors import UserError
from dsmip.runs.load_config import load_config
from dsmip.training.monitor import Outcome, Position, StepFigures, Watch, Writer, step_means, timed
from dsmip.training.trackers import ProgressFile, Watched, check_tools

CPU = torch.device("cpu")
CONFIG = {"model": "dsmip", "train": {"epochs": 2}}
STEP_FIGURES = {"loss", "gradient_norm", "learning_rate", "samples_per_second", "data_wait_share"}


def figures(loss: float, seconds: float = 2.0, wait_seconds: float = 0.5) -> StepFigures:
    return StepFigures(loss, torch.tensor(loss * 10), 0.01, 8, seconds, wait_seconds)


class Recorder(Writer):
    def __init__(self) -> None:
        self.written: list[tuple[int, dict[str, float]]] = []
        self.outcome = ""
        self.alive_calls = 0

    def alive(self) -> None:
        self.alive_calls += 1

    def write(self, position: Position, figures: Mapping[str, float]) -> None:
        self.written.append((position.total_step, dict(figures)))

    def close(self, outcome: Outcome) -> None:
        self.outcome = outcome


class Breaks(Recorder):
    def write(self, position: Position, figures: Mapping[str, float]) -> None:
        super().write(position, figures)
        raise ConnectionError("no route to host")


def train(watch: Watch, epochs: range) -> None:
    """Epochs of three steps."""
    for epoch in epochs:
        for step in range(3):
            watch.step_done(epoch, step, 3, figures(epoch + step / 4))
        watch.epoch_done({"epoch": float(epoch), "loss": epoch + 0.25, "hits@1": 0.5})


def watched(folder: Path, tool: WatchTool, name: str = "text") -> Watch:
    return Watch(Watched(folder, name, (tool,), CONFIG).writers(), CPU, pytest.fail, write_seconds=0)


def test_rates_are_of_the_whole_time() -> None:
    means = step_means([figures(1.0, 1.0, 0.0), figures(3.0, 3.0, 2.0)])
    expected = {"loss": 2.0, "gradient_norm": 20.0, "learning_rate": 0.01, "samples_per_second": 4.0}
    assert means == pytest.approx({**expected, "data_wait_share": 0.5})


def test_every_step_or_means_of_many() -> None:
    each, seldom = Recorder(), Recorder()
    train(Watch([each], CPU, pytest.fail, write_seconds=0), range(2))
    assert [step for step, _ in each.written] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert each.written[1][1].keys() == {f"step/{name}" for name in STEP_FIGURES}
    assert each.written[-1] == (6, {"epoch/loss": 1.25, "epoch/hits_at_1": 0.5})
    watch = Watch([seldom], CPU, pytest.fail, write_seconds=1000)
    train(watch, range(2))
    watch.close("finished")
    assert [step for step, _ in seldom.written] == [3, 3, 6, 6]
    assert seldom.written[0][1]["step/loss"] == pytest.approx(0.25)
    assert seldom.outcome == "finished"


def test_a_tool_that_fails_is_given_up_and_no_other() -> None:
    sound, broken, said = Recorder(), Breaks(), list[str]()
    watch = Watch([broken, sound], CPU, said.append, write_seconds=0)
    train(watch, range(2))
    watch.close("failed")
    assert said == ["warning: Breaks failed and is given up: ConnectionError: no route to host"]
    assert len(broken.written) == 1
    assert len(sound.written) == 8
    assert (broken.outcome, sound.outcome) == ("", "failed")


def test_what_cannot_be_read_at_the_end_hides_no_outcome(tmp_path: Path) -> None:
    """As after an error of the device: the steps' gradient norms are still there."""
    sound, said = Recorder(), list[str]()
    progress = ProgressFile(tmp_path / "progress.json", 1, {})
    watch = Watch([progress, sound], CPU, said.append, write_seconds=1000)
    unreadable = torch.empty((), device="meta")
    watch.step_done(0, 0, 3, StepFigures(0.5, unreadable, 0.01, 8, 2.0, 0.5))
    watch.close("failed")
    assert [line.partition(": ")[2].partition(":")[0] for line in said] == ["figures of the last steps are lost"]
    assert sound.outcome == "failed"
    assert json.loads((tmp_path / "progress.json").read_text())["state"] == "failed"


def test_a_sign_of_life_is_given_at_once_and_then_seldom() -> None:
    each, seldom = Recorder(), Recorder()
    for recorder, seconds in ((each, 0.0), (seldom, 1000.0)):
        watch = Watch([recorder], CPU, pytest.fail, alive_seconds=seconds)
        for _ in range(3):
            watch.alive()
    assert (each.alive_calls, seldom.alive_calls) == (3, 1)
    assert each.written == []


def test_waiting_is_measured_per_item() -> None:
    assert [item for item, _ in timed([5, 6])] == [5, 6]
    assert all(seconds >= 0 for _, seconds in timed([5, 6]))
    assert list(timed([])) == []


def events(folder: Path) -> Iterator[Event]:
    """Records of TensorBoard's files, oldest file first: length, its checksum, the message, its checksum."""
    for path in sorted(folder.iterdir()):
        content, start = path.read_bytes(), 0
        while start < len(content):
            (length,) = struct.unpack_from("<Q", content, start)
            yield Event.FromString(content[start + 12 : start + 12 + length])
            start += 12 + length + 4


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for event in events(folder):
        for value in event.summary.value:
            if value.WhichOneof("value") == "simple_value":
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def test_tensorboard_reads_what_was_trained(tmp_path: Path) -> None:
    watch = watched(tmp_path, "tensorboard", "trial 3")
    train(watch, range(2))
    watch.close("finished")
    found = scalars(tmp_path / "tensorboard" / "trial-3")
    assert found.keys() == {f"step/{name}" for name in STEP_FIGURES} | {"epoch/loss", "epoch/hits_at_1"}
    assert found["step/loss"] == [(1, 0.0), (2, 0.25), (3, 0.5), (4, 1.0), (5, 1.25), (6, 1.5)]
    assert found["epoch/loss"] == [(3, 0.25), (6, 1.25)]
    texts = [
        v.tensor.string_val[0]
        for e in events(tmp_path / "tensorboard" / "trial-3")
        for v in e.summary.value
        if v.HasField("tensor")
    ]
    assert b"epochs: 2" in texts[0]


def test_a_resumed_training_hides_the_steps_that_it_repeats(tmp_path: Path) -> None:
    train(watched(tmp_path, "tensorboard"), range(2))
    resumed = watched(tmp_path, "tensorboard")
    train(resumed, range(1, 2))
    resumed.close("finished")
    starts = [event.step for event in events(tmp_path / "tensorboard" / "text") if event.HasField("session_log")]
    assert starts[-1] == 4  # TensorBoard drops what older files say of step 4 and later


def test_mlflow_holds_one_run_per_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for epochs, outcome in ((range(1), "failed"), (range(1, 2), "finished")):  # the second one resumes
        watch = watched(tmp_path, "mlflow")
        train(watch, epochs)
        watch.close(outcome)  # type: ignore[arg-type]
    other = watched(tmp_path, "mlflow", "visual")
    train(other, range(1))
    other.close("failed")
    client = mlflow.MlflowClient((tmp_path / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("dsmip").experiment_id
    runs = {run.data.tags["dsmip_training"]: run for run in client.search_runs([experiment])}
    assert {name: run.info.status for name, run in runs.items()} == {"text": "FINISHED", "visual": "FAILED"}
    assert runs["text"].data.params == {"model": "dsmip", "train.epochs": "2"}
    history = client.get_metric_history(runs["text"].info.run_id, "step/loss")
    assert sorted((metric.step, metric.value) for metric in history)[-3:] == [(4, 1.0), (5, 1.25), (6, 1.5)]
    assert runs["text"].data.metrics["epoch/hits_at_1"] == 0.5


def test_wandb_keeps_a_run_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    watch = watched(tmp_path, "wandb")
    train(watch, range(1))
    watch.close("finished")
    (record,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    content = record.read_bytes()
    assert b"epoch/hits_at_1" in content
    assert b"step/samples_per_second" in content


def test_a_tool_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check_tools(("tensorboard",))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for tool in ("mlflow", "wandb"):
        with pytest.raises(UserError, match=rf"watch: {tool} is not installed; pip install 'dsmip\[{tool}\]'"):
            Watched(tmp_path, "text", (tool,)).writers()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "said"), [("[tensorbord]", "watch"), ("[wandb, wandb]", "names a tool twice: wandb")]
)
def test_wrong_tools_are_named(value: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_config("demo", [f"watch={value}"])
    assert load_config("demo").watch == ()
    assert load_config("demo", ["watch=[mlflow, tensorboard]"]).watch == ("mlflow", "tensorboard")


def test_the_progress_file_is_there_before_the_first_figures(tmp_path: Path) -> None:
    tools = Watched(tmp_path, "text", ("tensorboard",)).writers()
    watch = Watch([ProgressFile(tmp_path / "progress.json", 7, {}), *tools], CPU, pytest.fail)
    watch.alive()
    found: dict[str, Any] = json.loads((tmp_path / "progress.json").read_text())
    assert (found["state"], found["epoch"], found["step"], found["figures"]) == ("training", 0, 0, {})
    assert [path.name for path in tmp_path.iterdir()] == ["progress.json"]  # no tool was opened


def test_the_progress_file_holds_the_latest_of_everything(tmp_path: Path) -> None:
    watch = Watch([ProgressFile(tmp_path / "progress.json", 7, {"device": "CPU"})], CPU, pytest.fail, write_seconds=0)
    train(watch, range(2))
    watch.step_done(2, 0, 3, figures(9.0))
    found: dict[str, Any] = json.loads((tmp_path / "progress.json").read_text())
    assert (found["state"], found["epoch"], found["step"], found["num_steps"], found["num_epochs"]) == (
        *("training", 2, 1, 3),
        7,
    )
    assert found["where"] == {"device": "CPU"}
    assert (found["figures"]["step/loss"], found["figures"]["epoch/loss"]) == (9.0, 1.25)
    watch.close("failed")
    assert json.loads((tmp_path / "progress.json").read_text())["state"] == "failed"
