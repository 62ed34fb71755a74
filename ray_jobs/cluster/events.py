"""Events that workers send to the driver: progress, ends of epochs and lines to print, through a queue actor."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ray_jobs.cluster import connection  # noqa: F401  (first: Ray reads its variables when it is imported)

# isort: split
import ray

if TYPE_CHECKING:  # the queue's process holds failures and never looks into them
    from ray_jobs.cluster.failures import Failure

_STEP_EVENT_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Event:
    """Progress of one training or task: `done` of `total` steps of all epochs; `metrics` when an epoch has ended.

    `note`: a line to print, instead of progress.
    """

    name: str
    done: int
    total: int
    epoch: int
    metrics: dict[str, float] = field(default_factory=dict)
    note: str = ""


class EventQueue:
    """Holds events between a worker's push and the driver's next look; `start_event_queue` makes the actor.

    It also keeps the failures that workers noted, for those that are started in their place.
    """

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._failures: dict[str, Failure] = {}

    def note_failure(self, name: str, failure: "Failure") -> None:
        self._failures.setdefault(name, failure)

    def failure(self, name: str) -> "Failure | None":
        return self._failures.get(name)

    def push(self, event: Event) -> None:
        self._events.append(event)

    def drain(self) -> list[Event]:
        events, self._events = self._events, []
        return events


def start_event_queue() -> Any:
    """The handle of a new `EventQueue` actor, which costs no CPU share. It is on this process's node, and ends with it.

    Elsewhere it could be lost with a node, and this process with it.
    """
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}  # as Ray Train does with its controller
    return ray.remote(num_cpus=0, label_selector=here)(EventQueue).remote()


class StepEvents:
    """Sends an `EventQueue` actor steps (at most about two a second, and the last one) and every epoch.

    The first event is sent at once: it says that the worker has started. Without a queue (None) nothing is sent.
    """

    def __init__(self, name: str, num_epochs: int, events: Any) -> None:
        self._name, self._num_epochs, self._events = name, num_epochs, events
        self._num_steps = 1
        self._last = 0.0
        self._send(0, 0, {})

    def step_done(self, epoch: int, step: int, num_steps: int) -> None:
        self._num_steps = num_steps
        done = epoch * num_steps + step + 1
        if time.monotonic() - self._last >= _STEP_EVENT_SECONDS or done == self._num_epochs * num_steps:
            self._send(epoch, done, {})

    def epoch_done(self, metrics: Mapping[str, float]) -> None:
        epoch = int(metrics["epoch"])
        self._send(epoch, (epoch + 1) * self._num_steps, dict(metrics))

    def warn(self, line: str) -> None:
        """Has the driver print a line about this training."""
        say(self._events, self._name, line)

    def _send(self, epoch: int, done: int, metrics: dict[str, float]) -> None:
        if self._events is not None:
            self._last = time.monotonic()
            self._events.push.remote(Event(self._name, done, self._num_epochs * self._num_steps, epoch, metrics))


def say(events: Any, name: str, line: str) -> None:
    """Has the driver print a line about a training. Without an `EventQueue` actor (None) nothing is said."""
    if events is not None:
        events.push.remote(Event(name, 0, 0, 0, note=line))
