"""The job `dsmip features`: picture features of a whole data set beside its shards, as a Ray Data pipeline.

Pieces of the data set go to actors that hold the network; each piece's features become a file. A job that is started
again keeps the finished pieces; the driver joins them, so that memory holds one piece.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any

from ray_jobs.connection import connected

# isort: split
import ray
import ray.data

from dsmip.collate import PictureCollator
from dsmip.dataset import Dataset
from dsmip.dataset_storage import DatasetStorage
from dsmip.encoders.image_networks import PictureNetwork, identity
from dsmip.errors import ReportedError, UserError
from dsmip.feature_cache import BATCH_SIZE
from dsmip.image_features import (
    PARTS,
    Data,
    Origin,
    PictureFeatures,
    Pixels,
    Weights,
    features_file,
    features_name,
    forget,
    network_hash,
    picture_rows,
    read_features,
    write_manifest,
)
from dsmip.manifest import KB
from dsmip.parallel import map_alone
from dsmip.table import Table
from dsmip.table_writer import TableWriter
from ray_jobs.events import Event, StepEvents, start_event_queue
from ray_jobs.failures import JobFailed
from ray_jobs.feature_request import FeatureRequest
from ray_jobs.lines import ProgressLines
from ray_jobs.progress import Display, run_watched
from ray_jobs.resources import Request, WaitingLine, check_feasible
from ray_jobs.workers import set_threads, worker_device

PIECE_ITEMS = BATCH_SIZE  # as many as the gate encodes at once: the last bits depend on the size of a batch
NAME = "picture features"
_PIECES = "pieces-"


@dataclass(frozen=True, slots=True)
class Plan:
    """What each actor works from. `data`: the dataset directory, or its URI."""

    data: str
    request: FeatureRequest


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows start .. stop of a split or of the kb, and the file of their features, below the data set."""

    part: str
    start: int
    stop: int
    file: str


def compute_features(
    dataset: Dataset,
    request: FeatureRequest,
    *,
    workers: int = 1,
    device: str = "auto",
    display: Display,
    verbose: bool = False,
) -> PictureFeatures:
    """Computes and writes the features of all pictures; finished ones of this data are kept. Returns them.

    device: auto (GPUs where the cluster has some), cpu or cuda; a worker asks for one CPU, and for one GPU.
    Raises UserError (weights not found or not fitting, more asked than the cluster can give) and JobFailed.
    """
    origin = _origin(dataset, request)
    files, name = dataset.own, features_name(origin)
    place = files.address(name)
    found = read_features(files, name)
    if found and found.manifest.origin == origin:
        display.say(f"{place} is finished already")
        return found
    started = time.monotonic()
    forget(files, name)
    pieces_name = f"{name}/{_PIECES}{origin.data.sha256[:16]}"
    pieces = _pieces(dataset, pieces_name)
    _drop_outdated(files, name, pieces_name)
    there = {f"{pieces_name}/{each}" for each in files.children(pieces_name)}
    missing = [piece for piece in pieces if piece.file not in there]
    if len(missing) < len(pieces):
        display.say(f"  {len(pieces) - len(missing)} of {len(pieces)} pieces are there already")
    if missing:
        plan = Plan(dataset.location, request)
        with connected(verbose=verbose):
            _encode_on_ray(plan, missing, workers, device, display, verbose=verbose)
    finished = _join(files, origin, pieces)
    files.remove(pieces_name)
    display.say(f"{place}: {_figures(finished)} in {time.monotonic() - started:.0f} s")
    return finished


def _figures(features: PictureFeatures) -> str:
    files = features.manifest.files.values()
    items, with_image = sum(file.items for file in files), sum(file.with_image for file in files)
    num_bytes = sum(file.bytes for file in files)
    width = features.manifest.width
    return f"{width} numbers for each of {items} items ({with_image} with a picture), {num_bytes / 2**20:.0f} MiB"


def _origin(dataset: Dataset, request: FeatureRequest) -> Origin:
    """Loads the network once, here: what is wrong with its weights is said before anything starts."""
    choice = request.choice
    described = identity(choice, choice.build())
    return Origin(
        kind=choice.kind,
        weights=Weights(name=choice.weights_name, sha256=network_hash(described)),
        pixels=Pixels(size=request.size, side=described.side, mean=described.mean, std=described.std),
        dtype=request.dtype,
        data=Data(name=dataset.manifest.name, sha256=dataset.manifest_hash),
    )


def _pieces(dataset: Dataset, name: str) -> list[Piece]:
    pieces = []
    for part in PARTS:
        total = dataset.num_entities if part == KB else dataset.num_mentions(part)
        for start in range(0, max(total, 1), PIECE_ITEMS):  # of an empty split, one empty piece
            file = f"{name}/{part}-{start:010d}.safetensors"
            pieces.append(Piece(part, start, min(start + PIECE_ITEMS, total), file))
    return pieces


def _drop_outdated(files: DatasetStorage, name: str, own: str) -> None:
    """Pieces of data that was prepared anew."""
    for each in files.children(name):
        if each.startswith(_PIECES) and f"{name}/{each}" != own:
            files.remove(f"{name}/{each}")


def _encode_on_ray(
    plan: Plan, pieces: Sequence[Piece], workers: int, device: str, display: Display, *, verbose: bool
) -> None:
    gpus = int(device == "cuda" or (device == "auto" and ray.cluster_resources().get("GPU", 0) >= 1))
    workers = min(workers, len(pieces))
    request = Request(NAME, workers, 1, gpus)
    check_feasible([request])
    events = start_event_queue()
    encode = partial(_run_pipeline, plan, pieces, workers, gpus, events, verbose=verbose)
    waiting = WaitingLine({NAME: request}, display.say)
    with display:
        for _, call in run_watched({NAME: encode}, events, display, lambda running: waiting(running - display.started)):
            call.result()


def _run_pipeline(plan: Plan, pieces: Sequence[Piece], workers: int, gpus: int, events: Any, *, verbose: bool) -> None:
    """Only names of pieces travel through Ray's object store: pictures and features go from and to files."""
    _quieten(verbose)
    pipeline = ray.data.from_items([asdict(piece) for piece in pieces], override_num_blocks=len(pieces)).map_batches(
        _Encoder,
        fn_constructor_args=(plan, events),
        batch_size=1,
        num_cpus=1,
        num_gpus=gpus,
        compute=ray.data.ActorPoolStrategy(size=workers),
    )
    done, total, lines = 0, sum(piece.stop - piece.start for piece in pieces), ProgressLines()
    try:
        for row in pipeline.iter_rows():
            if row["failure"]:
                raise _error(row["failure"], row["exit_code"])
            done += row["items"]
            lines(NAME, done, total)
            events.push.remote(Event(NAME, done, total, 0))
    except ray.exceptions.RayError as error:
        raise JobFailed(f"{NAME}: {error}", 1) from error


def _error(message: str, exit_code: int) -> ReportedError:
    return UserError(message) if exit_code == UserError.exit_code else JobFailed(f"{NAME}: {message}", exit_code)


class _Encoder:
    """An actor of the pipeline: the network, and the data set's pictures."""

    def __init__(self, plan: Plan, events: Any) -> None:
        set_threads()
        StepEvents(NAME, 1, events)
        self._request, self._device = plan.request, worker_device()
        self._dataset = Dataset.open(plan.data)
        self._pictures = PictureCollator(plan.request.size)
        self._network: PictureNetwork = plan.request.choice.build(self._device)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Encodes one piece, given as columns of its fields; tells how many items it has, or what went wrong.

        An error is a result: raised, Ray Data would try again what fails again, and log it at length.
        """
        piece = Piece(*(_plain(batch[field.name][0]) for field in fields(Piece)))
        failure, exit_code = "", 1
        try:
            self._encode(piece)
        except ReportedError as error:
            failure, exit_code = str(error), error.exit_code
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
        return {"items": [piece.stop - piece.start], "failure": [failure], "exit_code": [exit_code]}

    def _encode(self, piece: Piece) -> None:
        def encode(rows: range) -> Table:
            dtype = self._request.dtype
            return picture_rows(self._network, self._dataset, piece.part, rows, self._pictures, dtype, self._device)

        # as the gate's own encoder computes, to the last bit
        for table in map_alone(encode, [range(piece.start, piece.stop)], self._device):
            files = self._dataset.own
            table.save(files.folder / piece.file)
            files.send(piece.file)


def _plain(value: Any) -> Any:
    return value if isinstance(value, str) else int(value)


def _join(files: DatasetStorage, origin: Origin, pieces: Sequence[Piece]) -> PictureFeatures:
    """The pieces become one table per split; the manifest comes last."""
    for part in PARTS:
        with TableWriter(files.folder / features_file(features_name(origin), part)) as writer:
            for piece in pieces:
                if piece.part == part:
                    with files.fresh(piece.file) as path:
                        writer.append(Table.load(path))
    return write_manifest(files, origin)


def _quieten(verbose: bool) -> None:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    if not verbose:
        logging.getLogger("ray.data").setLevel(logging.ERROR)


if __name__ == "__main__":
    from ray_jobs.cli import run_script

    run_script("features")
