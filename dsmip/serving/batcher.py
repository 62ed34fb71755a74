"""Dynamic batching: mentions of many requests are linked together, by one thread, in the order in which they came.

Whatever has come while one batch was linked makes up the next one. Clients that were just answered may ask again at
once: a batch waits for as many mentions as there were before, but no longer than a tenth of the last batch's time. A
single client whose requests are of one size never waits.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from dsmip.linking.linker import Linker
from dsmip.linking.links import Links
from dsmip.linking.mentions import Unreadable

Given = Mapping[str, Any] | Unreadable
"""A mention of a request, or why it is none."""


class Busy(Exception):
    """As many mentions wait as may wait."""


class Stopped(Exception):
    """The service ends and takes nothing more."""


@dataclass(frozen=True, eq=False)
class Job:
    """One request's mentions, and what they become."""

    mentions: Sequence[Given]
    top: int
    explain: bool
    links: "Future[list[Links]]" = field(default_factory=Future)


class Batcher:
    """A queue of mentions and the thread that links them.

    Args:
        linker: Gives the linker of the moment: one batch is linked by one linker.
        batch: Mentions that are linked at a time.
        waiting: Mentions that may wait.
        observe: Called with the number of mentions of each batch.
        candidates: Entities that are scored for each mention (`Linker.link_many`); None: all.
        linger: How long a batch may wait for those who were answered last, as a share of the last batch's time.
    """

    def __init__(
        self,
        linker: Callable[[], Linker],
        batch: int,
        waiting: int,
        observe: Callable[[int], None] = lambda count: None,
        candidates: int | None = None,
        linger: float = 0.1,
    ) -> None:
        self._linker, self._batch, self._most_waiting, self._observe = linker, batch, waiting, observe
        self._candidates, self._linger = candidates, linger
        self._expected, self._patient_until = 0, 0.0
        self._jobs: deque[Job] = deque()
        self._num_waiting, self._ends = 0, False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="linking", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """Mentions that wait now."""
        return self._num_waiting

    def submit(self, mentions: Sequence[Given], top: int, *, explain: bool = False) -> "Future[list[Links]]":
        """The links of mentions, in their order, once they are there. Cancelling it takes them out of the queue.

        A mention that cannot be read has `Links` with a `reason`. All of a request are by one linker.

        Raises:
            Busy: Too many wait. A request of more mentions than may wait is taken while nobody waits.
            Stopped: The service ends.
        """
        job = Job(mentions, top, explain)
        with self._changed:
            if self._ends:
                raise Stopped
            if self._num_waiting and self._num_waiting + len(mentions) > self._most_waiting:
                raise Busy
            self._jobs.append(job)
            self._num_waiting += len(mentions)
            self._changed.notify()
        job.links.add_done_callback(lambda links: self._forget(job) if links.cancelled() else None)
        return job.links

    def _forget(self, job: Job) -> None:
        """Makes room for others where a job is cancelled in the queue."""
        with self._changed:
            if job in self._jobs:
                self._jobs.remove(job)
                self._num_waiting -= len(job.mentions)

    def close(self) -> None:
        """Links what waits, then ends the thread."""
        with self._changed:
            self._ends = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while jobs := self._next():
            mentions = [mention for job in jobs for mention in job.mentions]
            self._observe(len(mentions))
            begun = time.monotonic()
            try:
                found = self._links(jobs, mentions)
                self._expected = len(mentions) + self._num_waiting
                for job in jobs:
                    job.links.set_result([next(found).first(job.top) for _ in job.mentions])
            except Exception as error:  # whatever it is, those who wait are told, and the next batch is linked
                for job in jobs:
                    if not job.links.done():
                        job.links.set_exception(error)
            ended = time.monotonic()
            self._patient_until = ended + self._linger * (ended - begun)

    def _links(self, jobs: Sequence[Job], mentions: Sequence[Given]) -> Iterator[Links]:
        """Of all mentions, once all are linked."""
        found = self._linker().link_many(
            mentions,
            top=max(job.top for job in jobs),
            explain=any(job.explain for job in jobs),
            on_error="report",
            batch_size=self._batch,
            candidates=self._candidates,
        )
        return iter(list(found))

    def _next(self) -> list[Job]:
        """Jobs of about one batch, whose clients still wait; none at the end."""
        with self._changed:
            while True:
                self._wait_for_the_answered()
                jobs, count = list[Job](), 0
                while self._jobs and (not jobs or count + len(self._jobs[0].mentions) <= self._batch):
                    job = self._jobs.popleft()
                    self._num_waiting -= len(job.mentions)
                    if job.links.set_running_or_notify_cancel():
                        jobs.append(job)
                        count += len(job.mentions)
                if jobs or self._ends:
                    return jobs
                self._changed.wait()

    def _wait_for_the_answered(self) -> None:
        """With the lock: until as many wait as there were when the last batch began, if they come soon."""
        while self._num_waiting < min(self._expected, self._batch) and not self._ends:
            left = self._patient_until - time.monotonic()
            if left <= 0 or not self._changed.wait(left):
                return
