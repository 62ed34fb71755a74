"""The job `dsmip features`: picture features of a whole data set beside its shards, as a Ray Data pipeline.

Chunks of the data set go to actors that hold the network; each chunk's features become a file. A job that is started
again keeps the finished chunks; the driver joins them, so that memory holds one chunk.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ray_jobs.cluster.connection import connected

# isort: split
import ray

from dsmip.config import ExperimentConfig
from dsmip.data.collate import ImageCollator
from dsmip.data.dataset import Dataset
from dsmip.data.images import CLIP_PIXELS, PixelForm
from dsmip.data.manifest import KB
from dsmip.data.table import Table
from dsmip.data.table_writer import TableWriter
from dsmip.encoders.architecture import resolve_architecture
from dsmip.encoders.clip import Backbone
from dsmip.encoders.feature_cache import BATCH_SIZE
from dsmip.encoders.image_features import (
    Data,
    DTypeName,
    ImageFeatures,
    Origin,
    Pixels,
    Weights,
    features_file,
    features_name,
    forget,
    image_rows,
    network_hash,
    read_features,
    write_manifest,
)
from dsmip.encoders.image_networks import ImageNetwork, NetworkChoice, find_network
from dsmip.encoders.vgg import BY_HASH
from dsmip.errors import UserError
from dsmip.models.dsmip import DsmipConfig
from dsmip.parallel import map_alone
from dsmip.runs.checks import enlarged_warnings
from dsmip.runs.load_config import job_config
from dsmip.storage.dataset_storage import DatasetStorage
from dsmip.units.gate import GateConfig
from ray_jobs.cluster.events import StepEvents
from ray_jobs.cluster.resources import Request, check_before_start, check_feasible
from ray_jobs.cluster.workers import set_threads, worker_device
from ray_jobs.jobs.pipeline import Row, outcome, run_on_actors
from ray_jobs.terminal.display import Display

CHUNK_ITEMS = BATCH_SIZE  # as many as the gate encodes at once: the last bits depend on the size of a batch
NAME = "picture features"
_CHUNKS = "pieces-"  # the word that is stored


@dataclass(frozen=True, slots=True)
class FeatureRequest:
    """Which features are to be computed.

    Attributes:
        size: Side that pictures are fitted to before the network, as a run's gate does it.
        form: How they are fitted.
    """

    choice: NetworkChoice
    size: int
    dtype: DTypeName
    form: PixelForm = CLIP_PIXELS


@dataclass(frozen=True, slots=True)
class Plan:
    """What each actor works from. `data`: the dataset directory, or its URI."""

    data: str
    request: FeatureRequest


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows start .. stop of a split or of the kb, and the file of their features, below the data set."""

    split: str
    start: int
    stop: int
    file: str


def feature_request(
    kind: str, config: str | None, overrides: Sequence[str], weights: str | None, random_seed: int | None
) -> FeatureRequest:
    """From the command line; what is not said there is the configuration's.

    Raises:
        UserError: What is said does not go together.
    """
    if weights is not None and random_seed is not None:
        raise UserError("--weights and --random-weights exclude each other")
    network = find_network(kind)
    if network.of_backbone:
        return _of_backbone(kind, config, overrides, weights, random_seed)
    size, form, named = network.side, CLIP_PIXELS, GateConfig().vgg_weights
    dtype: DTypeName = "float32"
    if config is not None:
        settings = job_config(config, overrides)
        dtype, form = settings.cache_dtype, _pixels(settings)
        size = resolve_architecture(settings.backbone.architecture).image_size
        if isinstance(settings.system, DsmipConfig):
            named = settings.system.gate.vgg_weights
    elif overrides:
        raise UserError("--set changes a configuration: name one by --config")
    if random_seed is not None:
        return FeatureRequest(NetworkChoice(kind, None, seed=random_seed), size, dtype, form)
    named = weights or named
    if named.startswith(BY_HASH):
        raise UserError(
            f"the configuration names the weights of {network.title} by their hash ({named}); say where by --weights"
        )
    return FeatureRequest(NetworkChoice(kind, _absolute(named)), size, dtype, form)


def _of_backbone(
    kind: str, config: str | None, overrides: Sequence[str], weights: str | None, random_seed: int | None
) -> FeatureRequest:
    if config is None:
        raise UserError(f"--kind {kind} takes the backbone of a configuration: name one by --config")
    if weights is not None:
        raise UserError(f"--weights are those of other networks; for --kind {kind} say --set backbone.pretrained=...")
    settings = job_config(config, overrides)
    backbone = settings.backbone
    if backbone.pretrained is None and random_seed is None:
        raise UserError(
            f"the backbone of {config} has no weights: say --set backbone.pretrained=FILE (a tag, an hf-hub: id),"
            " or --random-weights 0 for what a run with random weights has"
        )
    if backbone.pretrained is not None and random_seed is not None:
        raise UserError(f"the backbone of {config} has weights ({backbone.pretrained}): leave out --random-weights")
    architecture = _absolute(backbone.architecture)
    choice = NetworkChoice(kind, backbone.pretrained, architecture, random_seed or 0)
    vision = Backbone.checked(architecture, backbone.pretrained).vision
    if vision.is_absent:
        raise UserError(f"the backbone of {config} has no vision tower, so there are no features of its pictures")
    return FeatureRequest(choice, vision.image_size, settings.cache_dtype, _pixels(settings))


def _pixels(settings: ExperimentConfig) -> PixelForm:
    """How the gate of a run makes pictures squares."""
    of_backbone = resolve_architecture(settings.backbone.architecture).pixels
    return (isinstance(settings.system, DsmipConfig) and settings.system.pixels) or of_backbone


def _absolute(name: str) -> str:
    """File names as workers need them, which live in another folder."""
    return str(Path(name).resolve()) if Path(name).is_file() else name


def compute_features(
    dataset: Dataset,
    request: FeatureRequest,
    *,
    workers: int = 1,
    device: str = "auto",
    display: Display,
    verbose: bool = False,
) -> ImageFeatures:
    """Computes and writes the features of all pictures; finished ones of this data are kept. Returns them.

    Those of a view are computed for the data set that it is a view of, which all its views read.

    Args:
        device: auto (GPUs where the cluster has some), cpu or cuda; a worker asks for one CPU, and for one GPU.

    Raises:
        UserError: Weights not found or not fitting, more asked than the cluster can give.
        JobFailed: Some of it could not be computed.
    """
    dataset = Dataset.open(dataset.files.location) if dataset.kept else dataset
    origin = _origin(dataset, request)
    files, name = dataset.own, features_name(origin)
    address = files.address(name)
    found = read_features(files, name)
    if found and found.manifest.origin == origin:
        display.say(f"{address} is finished already")
        return found
    for line in enlarged_warnings(dataset, request.size, find_network(request.choice.kind).title):
        display.say(line)
    started = time.monotonic()
    forget(files, name)
    chunks_name = f"{name}/{_CHUNKS}{origin.data.sha256[:16]}"
    chunks = _chunks(dataset, chunks_name)
    _drop_outdated(files, name, chunks_name)
    there = {f"{chunks_name}/{each}" for each in files.children(chunks_name)}
    missing = [chunk for chunk in chunks if chunk.file not in there]
    if len(missing) < len(chunks):
        display.say(f"  {len(chunks) - len(missing)} of {len(chunks)} chunks are there already")
    if missing:
        plan = Plan(dataset.location, request)
        check_before_start([Request(NAME, min(workers, len(missing)), 1, int(device == "cuda"))])
        with connected(verbose=verbose):
            _encode_on_ray(plan, missing, workers, device, display, verbose=verbose)
    finished = _join(files, origin, chunks)
    files.remove(chunks_name)
    display.say(f"{address}: {_figures(finished)} in {time.monotonic() - started:.0f} s")
    return finished


def _figures(features: ImageFeatures) -> str:
    files = features.manifest.files.values()
    items, with_image = sum(file.items for file in files), sum(file.with_image for file in files)
    num_bytes = sum(file.bytes for file in files)
    width = features.manifest.width
    return f"{width} numbers for each of {items} items ({with_image} with a picture), {num_bytes / 2**20:.0f} MiB"


def _origin(dataset: Dataset, request: FeatureRequest) -> Origin:
    """Loads the network once, here: what is wrong with its weights is said before anything starts."""
    choice = request.choice
    described = choice.build().identity()
    return Origin(
        kind=choice.kind,
        weights=Weights(name=choice.weights_name, sha256=network_hash(described)),
        pixels=Pixels(
            size=request.size, side=described.side, mean=described.mean, std=described.std, form=request.form
        ),
        dtype=request.dtype,
        data=Data(name=dataset.manifest.name, sha256=dataset.manifest_hash),
    )


def _chunks(dataset: Dataset, name: str) -> list[Chunk]:
    chunks = []
    for split in (KB, *dataset.manifest.sections):
        total = dataset.num_entities if split == KB else dataset.num_mentions(split)
        for start in range(0, max(total, 1), CHUNK_ITEMS):  # of an empty split, one empty chunk
            file = f"{name}/{split}-{start:010d}.safetensors"
            chunks.append(Chunk(split, start, min(start + CHUNK_ITEMS, total), file))
    return chunks


def _drop_outdated(files: DatasetStorage, name: str, own: str) -> None:
    """Chunks of data that was prepared anew."""
    for each in files.children(name):
        if each.startswith(_CHUNKS) and f"{name}/{each}" != own:
            files.remove(f"{name}/{each}")


def _encode_on_ray(
    plan: Plan, chunks: Sequence[Chunk], workers: int, device: str, display: Display, *, verbose: bool
) -> None:
    gpus = int(device == "cuda" or (device == "auto" and ray.cluster_resources().get("GPU", 0) >= 1))
    request = Request(NAME, min(workers, len(chunks)), 1, gpus)
    check_feasible([request])
    done, total = 0, sum(chunk.stop - chunk.start for chunk in chunks)

    def take(row: Row) -> tuple[int, int]:
        nonlocal done
        done += row["items"]
        return done, total

    run_on_actors(_Encoder, (plan,), [asdict(chunk) for chunk in chunks], request, take, display, verbose=verbose)


class _Encoder:
    """An actor of the pipeline: the network, and the data set's pictures."""

    def __init__(self, plan: Plan, events: Any) -> None:
        set_threads()
        StepEvents(NAME, 1, events)
        self._request, self._device = plan.request, worker_device()
        self._dataset = Dataset.open(plan.data)
        self._images = ImageCollator(plan.request.size, plan.request.form)
        self._network: ImageNetwork = plan.request.choice.build(self._device)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Encodes one chunk, given as columns of its fields; tells how many items it has."""
        chunk = Chunk(*(_plain(batch[field.name][0]) for field in fields(Chunk)))
        return outcome(lambda: self._encode(chunk), {"items": 0})

    def _encode(self, chunk: Chunk) -> dict[str, int]:
        def encode(rows: range) -> Table:
            dtype = self._request.dtype
            return image_rows(self._network, self._dataset, chunk.split, rows, self._images, dtype, self._device)

        # as the gate's own encoder computes, to the last bit
        for table in map_alone(encode, [range(chunk.start, chunk.stop)], self._device):
            files = self._dataset.own
            table.save(files.folder / chunk.file)
            files.send(chunk.file)
        return {"items": chunk.stop - chunk.start}


def _plain(value: Any) -> Any:
    return value if isinstance(value, str) else int(value)


def _join(files: DatasetStorage, origin: Origin, chunks: Sequence[Chunk]) -> ImageFeatures:
    """The chunks become one table per split; the manifest comes last."""
    sections = list(dict.fromkeys(chunk.split for chunk in chunks))
    for split in sections:
        with TableWriter(files.folder / features_file(features_name(origin), split)) as writer:
            for chunk in chunks:
                if chunk.split == split:
                    with files.fresh(chunk.file) as path:
                        writer.append(Table.load(path))
    return write_manifest(files, origin, sections)
