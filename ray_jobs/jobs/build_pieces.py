"""Building on several Ray workers what a ranking reads: slices of the entity index and the mentions' table.

Each worker has its own pieces and writes them into the run. A lost worker's pieces are made again, but for those that
it had finished.
"""

from collections.abc import Sequence
from typing import Any

from ray_jobs.cluster.tasks import run_shares, start_share

# isort: split
from dsmip.evaluation.index_builder import Pieces
from ray_jobs.cluster.workers import worker_device
from ray_jobs.terminal.display import Display


def build_on_ray(pieces: Pieces, workers: int, *, gpu: bool, display: Display) -> None:
    """Makes the missing pieces. A worker asks for one CPU and, with `gpu`, for one GPU.

    Raises UserError when the data set is damaged, JobFailed when a worker fails, or is lost again and again.
    """
    missing = list(pieces.missing)
    shares = {f"builder {number + 1}": (pieces, missing[number::workers]) for number in range(workers)}
    begun = {name: share for name, share in shares.items() if share[1]}
    if begun:
        display.say(f"  building {len(missing)} missing pieces of the index on {len(begun)} workers")
        run_shares(_build, begun, gpu=gpu, display=display)


def _build(pieces: Pieces, names: Sequence[str], name: str, events: Any) -> None:
    step_events = start_share(name, events)
    pieces.files.storage.pull("")  # of a lost worker, perhaps on another node
    pieces.make(names, worker_device(), lambda what, done, total: step_events.step_done(0, done - 1, total))
    step_events.epoch_done({"epoch": 0})
