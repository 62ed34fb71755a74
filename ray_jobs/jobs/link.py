"""The job `dsmip link --workers`: links of many mentions, as a Ray Data pipeline.

Places of blocks of mentions go to actors that hold the model, their links come back to the driver, which writes each
block at once: a job that is started again keeps what was finished, and no storage but the driver's is written.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ray_jobs.cluster.connection import connected

# isort: split
import pyarrow as pa
import torch

from dsmip.errors import UserError
from dsmip.linking.bulk import BulkOptions
from dsmip.linking.found_bundles import HUB
from dsmip.rank_options import named_device
from dsmip.storage.locations import Location, local_path
from dsmip.storage.run_storage import RunStorage
from ray_jobs.cluster.events import StepEvents
from ray_jobs.cluster.resources import Request, check_before_start, check_feasible
from ray_jobs.cluster.workers import set_threads, worker_device
from ray_jobs.jobs.pipeline import Row, outcome, run_on_actors
from ray_jobs.local_jobs.linking.many import NAME, BlockLinker, BulkJob, BulkWork, plan_links
from ray_jobs.local_jobs.linking.one import LinkModel
from ray_jobs.local_jobs.linking.sources import Block, MentionFile
from ray_jobs.terminal.display import Display


def link_on_ray(
    model: LinkModel,
    source: str | Path,
    out: str | Path,
    options: BulkOptions,
    display: Display,
    *,
    workers: int,
    verbose: bool = False,
) -> None:
    """Links files of mentions on Ray workers; the file of links is that of `link_mentions`, to the last byte.

    Args:
        model: What is linked with; the device is that of each worker, who asks for one CPU, and for one GPU with cuda.
        source: As for `plan_links`.
        out: Likewise.
        options: How they are linked.
        display: Shows progress.
        workers: How many hold the model at the same time.
        verbose: Shows Ray's own log.

    Raises:
        UserError: For files or a model that cannot be used, or workers that the cluster can never give.
        JobFailed: When a worker fails.
    """
    device = named_device(model.device)
    if device.index is not None:
        raise UserError(
            f"--device {device} with {workers} workers: Ray gives each worker its device; say {device.type}"
        )
    gpu = device.type == "cuda"
    check_before_start([Request(NAME, workers, 1, int(gpu))])
    here = replace(_anywhere(model), device="cuda" if gpu and torch.cuda.is_available() else "cpu")
    planned = plan_links(here, source, out, options, display)
    if planned is None:
        return
    job = planned[0]
    del planned  # the model that was opened here: workers may need the room
    if job.missing:
        request = Request(NAME, min(workers, len(job.missing)), 1, int(gpu))
        with connected(verbose=verbose):
            check_feasible([request])
            _link_missing(job, request, display, verbose=verbose)
    job.finish(display)


def _anywhere(model: LinkModel) -> LinkModel:
    """With names that workers understand, which have another working folder."""
    options = replace(model.options, data=None if model.options.data is None else _absolute(model.options.data))
    return replace(model, location=_absolute(model.location), options=options)


def _absolute(location: Location) -> Location:
    if isinstance(location, RunStorage) or str(location).startswith(HUB):
        return location
    path = local_path(location)
    return location if path is None else str(path.absolute())


def _link_missing(job: BulkJob, request: Request, display: Display, *, verbose: bool) -> None:
    missing, done = {block.number: block for block in job.missing}, job.done

    def take(row: Row) -> tuple[int, int]:
        nonlocal done
        block = missing[row["number"]]
        with pa.ipc.open_stream(row["links"]) as reader:
            job.file.write_block(block.number, reader.read_all())
        done += block.num_rows
        return done, job.total

    places = [{"block": json.dumps(asdict(block))} for number, block in missing.items()]
    run_on_actors(_Linker, (job.work,), places, request, take, display, verbose=verbose)


class _Linker:
    """An actor of the pipeline: the model, opened when it is first needed."""

    def __init__(self, work: BulkWork, events: Any) -> None:
        set_threads()
        self._work = work
        self._link: BlockLinker | None = None
        StepEvents(NAME, 1, events)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Links one block, given by its place."""
        place = json.loads(str(batch["block"][0]))
        block = Block(**{**place, "file": MentionFile(**place["file"])})
        return outcome(lambda: {"number": block.number, "links": self._links(block)}, {"number": 0, "links": b""})

    def _links(self, block: Block) -> bytes:
        if self._link is None:
            model = replace(self._work.model, device=str(worker_device()))
            self._link = BlockLinker(self._work, model.opened(_silent, _silent))
        sink = pa.BufferOutputStream()
        table = self._link(block)
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        content: bytes = sink.getvalue().to_pybytes()
        return content


def _silent(*_: object) -> None:
    """Takes progress and notices, which the driver has shown."""
