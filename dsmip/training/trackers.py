"""The tools that `watch:` in a configuration names, each as a `Writer`; MLflow and W&B are imported when asked for.

<run>/tensorboard/<training>/   event files
<run>/mlruns/                   MLflow's files, unless MLFLOW_TRACKING_URI names a server
<run>/wandb/                    what W&B keeps on disk
"""

import hashlib
import importlib.util
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from dsmip.config import WatchTool, flat
from dsmip.errors import UserError
from dsmip.storage.atomic import write_json
from dsmip.storage.locations import Location, open_run_storage
from dsmip.storage.run_storage import RunStorage
from dsmip.training.monitor import Outcome, Position, Writer

_PROJECT = "dsmip"
_PACKAGES: Mapping[WatchTool, str] = {"tensorboard": "tensorboardX", "mlflow": "mlflow", "wandb": "wandb"}
SEND_SECONDS = 15.0  # what a killed node may lose of a run in an object store, where every request is paid
_PARAMETERS_A_CALL, _PARAMETER_LENGTH = 100, 500  # MLflow's limits
_MLFLOW_STATUS: dict[Outcome, str] = {"finished": "FINISHED", "failed": "FAILED", "left": "KILLED"}


@dataclass(frozen=True)
class Watched:
    """What is watched, and with what: a training by its name, its run (`at`), with its configuration."""

    at: Location
    name: str
    tools: tuple[WatchTool, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def storage(self) -> RunStorage:
        return open_run_storage(self.at)

    @property
    def folder(self) -> Path:
        return self.storage.folder

    @property
    def key(self) -> str:
        """The same for the same training, so that a resumed one goes on in the same place."""
        return hashlib.sha256(f"{self.storage.location}\n{self.name}".encode()).hexdigest()[:16]

    @property
    def title(self) -> str:
        return f"{PurePosixPath(self.storage.location).name} {self.name}"

    @property
    def event_files(self) -> str:
        """TensorBoard's folder, below the run."""
        return f"tensorboard/{self.name.replace(' ', '-')}"

    def writers(self) -> list[Writer]:
        """One per tool.

        Raises:
            UserError: As `check_tools` does.
        """
        check_tools(self.tools)
        return [_WRITERS[tool](self) for tool in self.tools]


def check_tools(tools: Sequence[WatchTool]) -> None:
    """Checks that the packages of tools are there, before anything starts.

    Raises:
        UserError: One is not installed.
    """
    for tool in tools:
        if importlib.util.find_spec(_PACKAGES[tool]) is None:
            raise UserError(f"watch: {tool} is not installed; pip install 'dsmip[{tool}]', or leave it out of 'watch'")


class TensorBoard(Writer):
    """Event files in a folder per training. A resumed training hides what was written of the steps that it repeats."""

    def __init__(self, watched: Watched) -> None:
        self._watched = watched
        self._writer: Any = None

    def write(self, position: Position, figures: Mapping[str, float]) -> None:
        step = position.total_step
        if self._writer is None:
            from tensorboardX import SummaryWriter

            folder = self._watched.folder / self._watched.event_files
            self._writer = SummaryWriter(logdir=str(folder), purge_step=step)
            self._writer.add_text("config", f"```\n{yaml.safe_dump(dict(self._watched.config))}```", step)
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, outcome: Outcome) -> None:
        if self._writer is not None:
            self._writer.close()


class MLflow(Writer):
    """One MLflow run per training, in the experiment MLFLOW_EXPERIMENT_NAME, or `dsmip`."""

    def __init__(self, watched: Watched) -> None:
        self._watched = watched
        self._client: Any = None
        self._run_id = ""

    def write(self, position: Position, figures: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        if self._client is None:
            self._open()
        now, step = int(time.time() * 1000), position.total_step
        self._client.log_batch(self._run_id, metrics=[Metric(name, v, now, step) for name, v in figures.items()])

    def close(self, outcome: Outcome) -> None:
        if self._client is not None:
            self._client.set_terminated(self._run_id, _MLFLOW_STATUS[outcome])

    def _open(self) -> None:
        """Finds the training's run of an earlier process, or makes one."""
        from mlflow import MlflowClient
        from mlflow.entities import Param

        watched = self._watched
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if uri is None:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # else MLflow 3 refuses to write plain files
            uri = (watched.folder / "mlruns").as_uri()
        self._client = MlflowClient(uri)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        experiment = _experiment(self._client, name)
        found = self._client.search_runs([experiment], f"tags.dsmip_key = '{watched.key}'", max_results=1)
        if found:
            self._run_id = found[0].info.run_id
            self._client.update_run(self._run_id, status="RUNNING")
            return
        tags = {"dsmip_key": watched.key, "dsmip_run": watched.storage.location, "dsmip_training": watched.name}
        self._run_id = self._client.create_run(experiment, tags=tags, run_name=watched.title).info.run_id
        parameters = [Param(key, str(value)[:_PARAMETER_LENGTH]) for key, value in flat(watched.config).items()]
        for start in range(0, len(parameters), _PARAMETERS_A_CALL):
            self._client.log_batch(self._run_id, params=parameters[start : start + _PARAMETERS_A_CALL])


def _experiment(client: Any, name: str) -> str:
    """Id of an experiment, which is made if need be; several trainings begin at once and may all try."""
    from mlflow.exceptions import MlflowException

    if (known := client.get_experiment_by_name(name)) is None:
        try:
            return str(client.create_experiment(name))
        except MlflowException:
            if (known := client.get_experiment_by_name(name)) is None:
                raise
    return str(known.experiment_id)


class WeightsAndBiases(Writer):
    """One W&B run per training, in the project WANDB_PROJECT, or `dsmip`."""

    def __init__(self, watched: Watched) -> None:
        self._watched = watched
        self._run: Any = None

    def write(self, position: Position, figures: Mapping[str, float]) -> None:
        if self._run is None:
            import wandb

            watched = self._watched
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", _PROJECT),
                dir=str(watched.folder),
                id=watched.key,
                name=watched.title,
                config=dict(watched.config),
                resume="allow",
                reinit="create_new",  # a process that is used again has had other trials
            )
        self._run.log(dict(figures), step=position.total_step)

    def close(self, outcome: Outcome) -> None:
        if self._run is not None:
            self._run.finish(exit_code=0 if outcome == "finished" else 1)


_WRITERS: Mapping[WatchTool, Callable[[Watched], Writer]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "wandb": WeightsAndBiases,
}


class ProgressFile(Writer):
    """A small JSON file with the position and the latest figures, for `dsmip status`."""

    def __init__(self, path: Path, num_epochs: int, where: Mapping[str, Any]) -> None:
        """Makes no file yet.

        Args:
            where: The machine that trains, in the file as it is.
        """
        self._path, self._num_epochs, self._where = path, num_epochs, dict(where)
        self._figures: dict[str, float] = {}
        self._position = Position(0, 0, 1)

    def alive(self) -> None:
        self._save("training")

    def write(self, position: Position, figures: Mapping[str, float]) -> None:
        self._position = position
        self._figures |= figures
        self._save("training")

    def close(self, outcome: Outcome) -> None:
        self._save(outcome)

    def _save(self, state: str) -> None:
        position = {"epoch": self._position.epoch, "step": self._position.step, "num_steps": self._position.num_steps}
        updated = datetime.now(UTC).isoformat(timespec="seconds")
        about = {"state": state, "updated": updated, "num_epochs": self._num_epochs, "where": self._where}
        write_json(self._path, {**about, **position, "figures": self._figures})


class Sent(Writer):
    """Sends what the writers before it have written into a run in an object store, now and then and at the end.

    A thread sends, and what fails is sent later: a training does not wait for a store that is away.
    """

    def __init__(self, storage: RunStorage, name: str) -> None:
        """Starts the thread.

        Args:
            name: A file, or a folder, of the storage.
        """
        self._storage, self._name = storage, name
        self._last = 0.0
        self._pool = ThreadPoolExecutor(1)
        self._sending: Future[None] | None = None

    def write(self, position: Position, figures: Mapping[str, float]) -> None:
        self._send_if_due()

    def alive(self) -> None:
        self._send_if_due()

    def close(self, outcome: Outcome) -> None:
        self._pool.shutdown()
        self._storage.push(self._name)

    def _send_if_due(self) -> None:
        due = time.monotonic() - self._last >= SEND_SECONDS
        if due and (self._sending is None or self._sending.done()):
            self._sending = self._pool.submit(self._storage.push, self._name)
            self._last = time.monotonic()
