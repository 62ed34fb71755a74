"""Ray Train runs side by side: each watched by a thread, failures kept apart, progress shown while they run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from ray_jobs.cluster.environment import starts_own_cluster  # first: Ray reads its variables when it is imported

# isort: split
import ray
from ray.train import CheckpointConfig, FailureConfig, RunConfig, WorkerGroupError
from ray.train.backend import BackendConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2.api.config import ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from dsmip import distributed
from dsmip.config import Running
from dsmip.errors import ReportedError, no_room
from dsmip.runs.checkpoints import KEPT
from dsmip.storage.locations import Location, open_run_storage
from dsmip.storage.run_storage import LocalRun, RunStorage
from dsmip.training.loop import Left
from dsmip.training.trackers import Watched
from ray_jobs.cluster.failures import Failure, JobFailed, exit_code_of, failure_of, traced
from ray_jobs.cluster.resources import Request, check_feasible
from ray_jobs.cluster.tasks import Call, run_watched
from ray_jobs.terminal.display import Display
from ray_jobs.training.checkpoint_list import mend_snapshot
from ray_jobs.training.context import RayContext
from ray_jobs.training.process_group import group_config

_RESIZE_SECONDS = 30.0  # how often an elastic training looks whether there is room for more workers

LEFT: Literal["left"] = "left"
Outcome = Failure | Literal["left"] | None
"""What a worker returns: its failure, or that it has left its machine, or None at the training's end."""
Loop = Callable[[RayContext, Mapping[str, Any]], None]


@dataclass(frozen=True)
class Training:
    """One Ray Train run. `loop` is called in every worker with its context and `settings`.

    The same name and location again resumes the run. `watched` without tools, the default, still keeps the progress
    file beside the checkpoints.

    Attributes:
        location: Where the checkpoints go.
    """

    name: str
    loop: Loop
    settings: Mapping[str, Any]
    num_epochs: int
    location: Location
    plan: Running = field(default_factory=Running)
    watched: Watched | None = None

    @property
    def storage(self) -> RunStorage:
        return open_run_storage(self.location)

    @property
    def request(self) -> Request:
        workers, resources = self.plan.workers, self.plan.resources
        return Request(self.name, workers.least, resources.cpu, resources.gpu, most=workers.most)

    @property
    def stall_seconds(self) -> float:
        return 60 * self.plan.stall_minutes


def run_trainings(trainings: Sequence[Training], display: Display) -> None:
    """Runs all trainings at once (they queue where resources are short) and waits for every one of them.

    Raises:
        UserError: When the cluster can never run one.
        JobFailed: After the last has ended if some failed.
    """
    check_feasible([training.request for training in trainings])
    for training in trainings:
        if not isinstance(training.storage, LocalRun):
            continue  # a store has no half files
        if mended := mend_snapshot(training.storage.folder / training.name):
            display.say(f"  {training.name}: warning: {mended}")
    failures: dict[str, Failure] = {}
    storages = {training.name: training.storage for training in trainings}
    calls = {training.name: Call(partial(_fit, training), [training.request]) for training in trainings}
    for name, call in run_watched(calls, display):
        if failure := call.result():
            failures[name] = failure
            where = traced(failure, storages[name], f"{name}.error.txt")
            display.say(f"  {name}: failed: {failure.message}{where}")
    if failures:
        message = f"failed: {', '.join(failures)}; run the same command again to resume"
        raise JobFailed(message, exit_code_of(failures.values()))


class _Trainer(DataParallelTrainer):
    """Without helper processes (5 s and 0.2 GB each) that would do nothing.

    One serves Ray Data sets: there are none. One frees a lost training's resources: a cluster of this process ends
    with it.
    """

    def _create_default_callbacks(self) -> list[Any]:
        idle = (DatasetsCallback, PlacementGroupCleanerCallback) if starts_own_cluster() else (DatasetsCallback,)
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, idle)]


def _fit(training: Training, events: Any) -> Failure | None:
    """One training from start to end, in a thread of the driver: a process of its own would only import torch again.

    Workers that leave a machine which is about to go all return. For Ray the training has then ended well, so it is
    started again, and goes on from its checkpoint on other machines.
    """
    outcome: Outcome = LEFT
    while outcome == LEFT:
        try:
            outcome = _trainer(training, events).fit().return_value
        except WorkerGroupError as error:
            errors: list[BaseException] = [*error.worker_failures.values()]
            outcome = _worst(errors or [error], training.storage)
        except Exception as error:  # the other trainings go on
            outcome = failure_of(error, training.storage)
    return outcome if isinstance(outcome, Failure) else None


def _trainer(training: Training, events: Any) -> Any:
    """Ray's trainer.

    Ray's controller process unpickles backend and loop configuration, but not the loop. So the loop carries its
    arguments, and a lone worker has no process group: the controller then need not import torch (6 s, 0.3 GB).
    """
    path, file_system = training.storage.arrow_filesystem()
    plan, workers = training.plan, training.plan.workers
    asked = {"CPU": plan.resources.cpu, "GPU": plan.resources.gpu}
    loop: Any = partial(_guarded_loop, training, events)  # Ray's annotation does not know that it may return a value
    return _Trainer(
        loop,
        # Workers end themselves when one of them hangs; the collectives' own limit comes after that.
        backend_config=group_config(int(2 * training.stall_seconds) + 1) if workers.most > 1 else BackendConfig(),
        scaling_config=ScalingConfig(
            num_workers=workers.most if workers.least == workers.most else (workers.least, workers.most),
            use_gpu=plan.resources.gpu > 0,
            resources_per_worker={name: amount for name, amount in asked.items() if amount} or {"CPU": 0.01},
            elastic_resize_monitor_interval_s=_RESIZE_SECONDS,
        ),
        run_config=RunConfig(
            name=training.name,
            storage_path=path,
            storage_filesystem=file_system,
            failure_config=FailureConfig(max_failures=plan.restarts),
            checkpoint_config=CheckpointConfig(num_to_keep=KEPT),
        ),
    )


def _guarded_loop(training: Training, events: Any) -> Outcome:
    """The training's loop. A lone worker returns its failure: it would fail again, so Ray must not restart it.

    With several workers the error is raised, because the others may wait for this one in a collective. A user's mistake
    is noted first: the restarted workers return it.
    """
    noted: Failure | None = ray.get(events.failure.remote(training.name))
    if noted:
        return noted
    try:
        watched = training.watched or Watched(training.location, training.name)
        with RayContext(watched, training.num_epochs, events, training.storage, training.stall_seconds) as context:
            training.loop(context, training.settings)
    except Left:
        return LEFT
    except Exception as error:
        failure = failure_of(error, training.storage)
        if distributed.world_size() == 1:
            return failure
        if failure.user_error:
            ray.get(events.note_failure.remote(training.name, failure))
        raise
    return None


def _worst(errors: Sequence[BaseException], storage: RunStorage) -> Failure:
    """What a user can mend, else what is known in one line, else the first: others may be another worker's loss."""
    failures = [failure_of(_cause(error), storage) for error in errors]
    return min(failures, key=lambda failure: (not failure.user_error, bool(failure.trace)))


def _cause(error: BaseException) -> BaseException:
    inner: BaseException | None = getattr(error, "_base_exc", None) or getattr(error, "cause", None) or error.__cause__
    return inner if inner and (isinstance(inner, ReportedError) or no_room(inner)) else error
