"""The status of a run, read from its files alone: while it is trained, when it was interrupted, when it is finished.

Damaged files are named among the problems and passed over; nothing is changed, and the data set is not opened.
"""

import json
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from dsmip.config import ExperimentConfig
from dsmip.errors import UserError
from dsmip.messages import masked
from dsmip.models import find_system
from dsmip.runs.checkpoints import MANIFEST, read_manifest
from dsmip.runs.cleanup import removable
from dsmip.runs.load_config import load_config
from dsmip.runs.loaded_model import CONFIG
from dsmip.runs.provenance import RECORDS, RUNNING
from dsmip.storage.locations import Location, open_run_storage
from dsmip.storage.parsing import NOT_AS_WRITTEN
from dsmip.storage.run_storage import STAMP, LocalRun, RunStorage

PROGRESS = "progress.json"  # of a running training, written by its trackers

State = Literal["finished", "training", "paused", "interrupted", "failed", "dropped", "starting", "not begun"]
_ENDED: dict[str, State] = {"failed": "failed", "finished": "paused"}  # a trial pauses between rungs
_ALIVE_SECONDS = 300.0  # a training that has written nothing for so long is taken for interrupted


@dataclass(frozen=True)
class TrainingState:
    """A part's training or a trial.

    Attributes:
        epochs_saved, step_saved: Of those done, what the newest checkpoint holds.
        figures: The latest of everything.
        note: What else there is to say.
    """

    name: str
    state: State
    epochs_done: int = 0
    num_epochs: int | None = None
    step: int | None = None
    num_steps: int | None = None
    updated: str | None = None
    figures: dict[str, float] = field(default_factory=dict)
    note: str = ""
    epochs_saved: int = 0
    step_saved: int = 0


@dataclass(frozen=True)
class Evaluation:
    """One metrics.json: figures over all mentions of a split."""

    model: str
    split: str
    mentions: int
    figures: dict[str, float]


@dataclass(frozen=True)
class Status:
    """All that is known of a run.

    Attributes:
        folder: Where it lies.
        disk: Bytes by entry there.
        removable: Bytes by folder of what nothing needs any more (`dsmip clean`).
        last_command: Its name and outcome.
    """

    folder: str
    model: str
    data: str
    parts: list[TrainingState]
    trials: list[TrainingState]
    evaluations: list[Evaluation]
    disk: dict[str, int]
    removable: dict[str, int]
    last_command: str
    problems: list[str]
    next: str


def read_status(location: Location, now: datetime | None = None) -> Status:
    """Reads the status of a run from its files.

    Args:
        now: What trainings' last signs of life are compared with (default: the present).

    Raises:
        UserError: There is no run; every other trouble is among the `problems`.
    """
    storage = open_run_storage(location)
    storage.refresh()
    if not (storage.folder / STAMP).is_file():
        raise UserError(f"no run at {storage} (no {STAMP}); 'dsmip train' makes one")
    return _Reader(storage, now or datetime.now(UTC)).status()


class _Reader:
    """Reads one run's files and collects what is wrong with them."""

    def __init__(self, storage: RunStorage, now: datetime) -> None:
        self.storage, self.folder, self.now = storage, storage.folder, now
        self.problems: list[str] = []
        self._records: dict[Path, dict[str, str] | None] = {}
        self.config = self._config()
        self.data = self._json(self.folder / STAMP, lambda stamp: (stamp["data"]["name"], stamp["data"]["folder"]))

    def status(self) -> Status:
        parts = self._parts()
        if self.config:  # the gated whole, and parts of a sweep's other settings, are the work of 'tune'
            names = find_system(self.config.model).part_names(self.config.system)
            own = [each for each in parts if each.name in names]
            parts = [*self._shown_starting(own, "train"), *(each for each in parts if each not in own)]
        trials = self._shown_starting(self._trials(), "tune")
        evaluations = sorted(self._evaluations(), key=lambda e: e.split)
        last = self._last_record()
        return Status(
            folder=self.storage.location,
            model=self.config.model if self.config else "unknown",
            data=f"{self.data[0]} ({self.data[1]})" if self.data else "unknown",
            parts=parts,
            trials=trials,
            evaluations=evaluations,
            disk=dict(self.storage.sizes()),
            removable=removable(self.storage, self.config.model) if self.config else {},
            last_command=f"{_begun(last)}: {last['outcome']}" if last else "none",
            problems=self.problems,
            next=self._next(parts, trials, evaluations, last),
        )

    def _config(self) -> ExperimentConfig | None:
        path = self.folder / "config.yaml"
        if not path.is_file():
            self.problems.append(f"{path} is missing")
            return None
        try:
            return load_config(str(path))
        except UserError as error:
            self.problems.append(f"{path} is damaged: {error}")
            return None

    def _json(self, path: Path, take: Callable[[Any], Any]) -> Any:
        """What `take` finds in a JSON file; None when there is no file or, among the problems, when it is damaged."""
        try:
            return take(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except OSError as error:
            self.problems.append(f"{path} cannot be read: {error.strerror}")
        except NOT_AS_WRITTEN as error:
            self.problems.append(f"{path} is damaged: {' '.join(repr(error).split())[:200]}")
        return None

    def _parts(self) -> list[TrainingState]:
        """The system's parts, the gated whole, and the parts of other settings that a sweep asked for."""
        if self.config is not None:
            names = list(find_system(self.config.model).part_names(self.config.system))
        else:
            names = sorted(path.parent.name for path in self.folder.glob("*/part.json"))
        if self.config is not None and find_system(self.config.model).gated:
            names.append(find_system(self.config.model).name)
        found = [self._part(self.folder, name, name) for name in names]
        for home in sorted(self.folder.glob("variants/*")):
            named = {path.parent.name for path in home.glob("*/part.json")}
            named |= {path.name.split("-")[0] for path in home.glob(f"ray/*.{PROGRESS}")}
            found += [self._part(home, name, f"{name}-{home.name}") for name in sorted(named)]
        return found

    def _part(self, home: Path, part: str, training: str) -> TrainingState:
        known = self.config is not None and part in find_system(self.config.model).part_names(self.config.system)
        epochs = self.config.train_of(part).epochs if self.config is not None and known else None
        best = self._json(home / part / "part.json", lambda report: (_numbers(report["best"]), len(report["history"])))
        if best is not None:
            return TrainingState(training, "finished", best[1], epochs, figures=best[0])
        progress = home / "ray" / f"{training}.{PROGRESS}"
        error = home / "ray" / f"{training}.error.txt"
        return self._training(training, progress, home / "ray" / training, error, epochs)

    def _shown_starting(self, found: list[TrainingState], command: str) -> list[TrainingState]:
        """Those of a running command that have shown no sign of life since it began are starting."""
        last = self._last_record(command)
        if not last or last["outcome"] != RUNNING:
            return found
        begun = datetime.fromisoformat(last["started"])
        seconds = max((self.now - begun).total_seconds(), 0.0)
        if seconds > _ALIVE_SECONDS and not any(each.state == "training" for each in found):
            return found  # it may have been killed
        note = f"'dsmip {command}' began {seconds:.0f} s ago: workers start (imports, weights) or wait for room"
        return [replace(each, state="starting", note=note) if _silent(each, begun) else each for each in found]

    def _training(self, name: str, progress: Path, checkpoints: Path, error: Path, epochs: int | None) -> TrainingState:
        """A training that is not finished, from its progress file and else from its newest checkpoint."""
        found = self._json(progress, _position)
        manifest = self._newest_manifest(checkpoints)
        if found is None and manifest is None:
            return TrainingState(name, "not begun", num_epochs=epochs)
        done, step = (manifest["epoch"], manifest["step"]) if manifest else (0, 0)
        stored = _numbers(manifest["history"][-1]) if manifest and manifest["history"] else {}
        figures = {f"epoch/{key}": value for key, value in stored.items()}
        if found is None:
            return TrainingState(name, "interrupted", done, epochs, figures=figures, epochs_saved=done, step_saved=step)
        age = (self.now - datetime.fromisoformat(found["updated"])).total_seconds()
        alive: State = "training" if age < _ALIVE_SECONDS else "interrupted"
        state = _ENDED.get(found["state"], alive)
        seconds = f"last sign of life {max(age, 0):.0f} s ago"
        return TrainingState(
            name,
            state,
            max(done, found["epoch"]),
            found["num_epochs"],
            found["step"],
            found["num_steps"],
            found["updated"],
            found["figures"] or figures,  # a training that goes on has none of its own before its first step
            note=f"see {error}" if state == "failed" and error.is_file() else seconds,
            epochs_saved=done,
            step_saved=step,
        )

    def _newest_manifest(self, folder: Path) -> dict[str, Any] | None:
        """Of the newest checkpoint whose manifest is sound; Ray's and ours are numbered or dated by name."""
        for checkpoint in sorted(folder.glob("*/" + MANIFEST), reverse=True):
            try:
                return read_manifest(checkpoint.parent)
            except UserError as error:
                if checkpoint.exists():  # else a training has just replaced it
                    self.problems.append(str(error))
        return None

    def _trials(self) -> list[TrainingState]:
        home = self.folder / "tune"
        changes = self._json(home / "sweep.json", lambda sweep: {int(n): c for n, c in sweep["trials"].items()}) or {}
        rungs = [rung for path in sorted(home.glob("rung-*.json")) if (rung := self._json(path, _rung)) is not None]
        return [self._trial(number, changes[number], rungs) for number in sorted(changes)]

    def _trial(self, number: int, changes: Mapping[str, Any], rungs: list[dict[str, Any]]) -> TrainingState:
        folder, name = self.folder / "tune" / "trials" / str(number), f"trial {number}"
        settings = ", ".join(f"{key}={value}" for key, value in changes.items()) or "the configuration unchanged"
        if self._swept() and rungs and number in rungs[-1]["mrr"]:
            figures = {"epoch/mrr": rungs[-1]["mrr"][number]}
            return TrainingState(name, "finished", rungs[-1]["epochs"], figures=figures, note=settings)
        for rung in rungs:
            if number in rung["failed"]:
                return TrainingState(name, "failed", note=f"{settings}; {rung['failed'][number]}")
            if number in rung["mrr"] and number not in rung["survivors"]:
                figures = {"epoch/mrr": rung["mrr"][number]}
                return TrainingState(name, "dropped", rung["epochs"], figures=figures, note=settings)
        found = self._training(name, folder / PROGRESS, folder / "checkpoints", folder / "error.txt", None)
        return replace(found, note="; ".join(filter(None, (settings, found.note))))

    def _swept(self) -> bool:
        """Whether a sweep has ended with its best trial as the whole system."""
        return self.config is not None and (self.folder / find_system(self.config.model).name / "part.json").is_file()

    def _evaluations(self) -> Iterator[Evaluation]:
        for path in sorted(self.folder.glob("evaluate/*/*/metrics.json")):
            found = self._json(path, lambda metrics: (_numbers(metrics["overall"]), int(metrics["mentions"])))
            if found is not None:
                yield Evaluation(path.parent.name, path.parent.parent.name, found[1], found[0])

    def _last_record(self, command: str = "*") -> dict[str, str] | None:
        """Name, start and outcome of the newest call of a command on the run; of any: `*`."""
        paths = sorted((self.folder / RECORDS).glob(f"*-{command}.json"))
        if not paths:
            return None
        if paths[-1] not in self._records:
            self._records[paths[-1]] = self._json(paths[-1], _record)
        return self._records[paths[-1]]

    def _next(
        self,
        parts: list[TrainingState],
        trials: list[TrainingState],
        evaluations: list[Evaluation],
        last: Mapping[str, str] | None,
    ) -> str:
        if self.config is None:
            return "the configuration cannot be read: put config.yaml back, or train into another --run folder"
        if any(each.state == "training" for each in parts + trials):
            return "a training is under way: wait for it"
        system = find_system(self.config.model)
        command = self._next_command(self.config, parts, evaluations)
        if not command:
            return "nothing: trained, tuned and evaluated" if system.gated else "nothing: trained and evaluated"
        if last and last["outcome"] == RUNNING:  # it may wait for room, or do what leaves no sign for long
            return f"a command may still be running ({_begun(last)}); if it is not: {command}"
        return command

    def _next_command(
        self, config: ExperimentConfig, parts: list[TrainingState], evaluations: list[Evaluation]
    ) -> str | None:
        run, system = self.storage.location, find_system(config.model)
        names = system.part_names(config.system)
        if any(each.state != "finished" for each in parts if each.name in names):
            data = masked(self.data[1]) if self.data else "DATA"
            if isinstance(self.storage, LocalRun):
                path = str(self.folder / CONFIG)
                return shlex.join(["dsmip", "train", "--config", path, "--data", data, "--run", run])
            # the copy of it here is of this machine alone
            command = shlex.join(["dsmip", "train", "--config", "FILE", "--data", data, "--run", run])
            return f"{command} (FILE: a copy of {self.storage}/{CONFIG})"
        if system.gated and not self._swept():
            return shlex.join(["dsmip", "tune", "--run", run])
        if not any((each.model, each.split) == (system.name, "test") for each in evaluations):
            return shlex.join(["dsmip", "evaluate", "--run", run, "--split", "test"])
        return None


def _silent(found: TrainingState, begun: datetime) -> bool:
    """Whether a training that is not finished has shown no sign of life since then."""
    if found.state not in ("not begun", "interrupted", "failed"):
        return False
    return found.updated is None or datetime.fromisoformat(found.updated) < begun


def _begun(record: Mapping[str, str]) -> str:
    return f"{record['command']}, begun {record['started']}"


def _position(found: Any) -> dict[str, Any]:
    """Checks a progress file's content."""
    numbers = {name: int(found[name]) for name in ("epoch", "step", "num_steps", "num_epochs")}
    datetime.fromisoformat(found["updated"])
    return {**numbers, "state": found["state"], "updated": found["updated"], "figures": _numbers(found["figures"])}


def _record(found: Any) -> dict[str, str]:
    """Checks what is shown of a record."""
    datetime.fromisoformat(found["started"])
    return {key: str(found[key]) for key in ("command", "started", "outcome")}


def _rung(found: Any) -> dict[str, Any]:
    return {
        "epochs": int(found["epochs"]),
        "mrr": {int(number): float(mrr) for number, mrr in found["mrr"].items()},
        "failed": {int(number): str(message) for number, message in found["failed"].items()},
        "survivors": [int(number) for number in found["survivors"]],
    }


def _numbers(figures: Any) -> dict[str, float]:
    return {str(name): float(value) for name, value in figures.items()}
