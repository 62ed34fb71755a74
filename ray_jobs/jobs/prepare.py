"""The job `dsmip prepare`: a raw release becomes a dataset directory, in processes of this machine or on Ray."""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from filelock import FileLock, Timeout
from pydantic import ByteSize, TypeAdapter, ValidationError

from data_prep.build.build import prepare
from data_prep.build.plan import SHARD_BYTES, DatasetOptions
from data_prep.build.publish import published_manifest, upload_dataset
from data_prep.build.runners import Result, Runner, Task, Tick, run_in_processes, run_serially
from data_prep.build.view import make_view
from data_prep.demo.release import DemoConfig, write_demo_release
from data_prep.formats.mimic import MimicRelease
from data_prep.formats.registry import layouts
from data_prep.formats.release import Release, ReleaseOptions
from dsmip.data.dataset import Dataset
from dsmip.data.image_preparation import IMAGES
from dsmip.data.manifest import REJECTS_FILE, SPLITS, ImageSettings, Manifest, Take
from dsmip.errors import UserError, refuse_secret
from dsmip.private import lock_file
from dsmip.progress import Progress
from dsmip.runs.provenance import write_record
from dsmip.storage.atomic import sha256_file
from dsmip.storage.dataset_storage import MANIFEST_FILE
from dsmip.storage.locations import local_path
from dsmip.storage.object_store import private_cache
from dsmip.storage.parsing import parse_yaml
from ray_jobs.terminal.lines import say


@dataclass(frozen=True)
class BuildOptions:
    """How a dataset directory is made, as the command line has it.

    Attributes:
        name: Its name; None: that of the release's folder.
        licence: Its licence.
        images: How images are stored.
        shard_bytes: About the size of the kb's shards.
        seed: Orders the training mentions.
        keep_nil: Keep mentions that have no gold in the kb.
        workers: Processes, or with `on_ray` tasks of a cluster at a time.
        on_ray: Whether a Ray cluster does the work.
    """

    name: str | None = None
    licence: str = "unknown"
    images: ImageSettings = IMAGES
    shard_bytes: int = SHARD_BYTES
    seed: int = 0
    keep_nil: bool = False
    workers: int = 1
    on_ray: bool = False


Published = tuple[str, Manifest] | None


def prepare_release(
    release: Release,
    out: str | Path,
    options: BuildOptions,
    progress: Progress,
    warn: Callable[[str], None] = lambda line: None,
) -> Manifest:
    """Builds `out`, a folder or a URI, from a release; `warn` gets lines for the user.

    Raises:
        UserError: For a wrong release or location.
    """
    manifest = _built(
        out, progress, lambda folder, published: _build(release, folder, options, progress, published, warn)
    )
    for line in _warnings(manifest, f"{str(out).rstrip('/')}/{REJECTS_FILE}"):
        warn(line)
    return manifest


def _warnings(manifest: Manifest, rejects: str) -> Iterator[str]:
    """What a user should know of a dataset before training on it."""
    layout = layouts().get(manifest.layout)
    for split in SPLITS:
        if manifest.splits[split].mentions:
            continue
        remedy = f"see {rejects}"
        if "split_groups" in manifest.choices:
            remedy = "--split keeps mentions of equal sentence or picture together, and there are too few others"
        elif layout and layout.can_split:
            remedy = "--split 70/10/20 cuts all mentions of the release anew, into another directory"
        need = "" if split == "test" else ", and 'dsmip train' needs some"
        yield f"warning: no mention of {split} is left{need}; {remedy}"


def prepare_demo(config: DemoConfig, out: str | Path, options: BuildOptions, progress: Progress) -> Manifest:
    """Draws the demo release beside `out` (of a URI: on this node), builds `out` from it and removes the release."""
    images = options.images.model_copy(update={"size": config.picture_size})
    options = replace(options, name=options.name or f"demo-{config.seed}", images=images, seed=config.seed)

    def build(out: Path, published: Published) -> Manifest:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=out.absolute().parent, prefix=".release-") as folder:
            release = Path(folder) / f"demo-{config.seed}"
            write_demo_release(config, release, progress)
            return _build(MimicRelease(release), out, options, progress, published)

    return _built(out, progress, build)


def _built(out: str | Path, progress: Progress, build: Callable[[Path, Published], Manifest]) -> Manifest:
    """Builds in the folder `out` and records how, or builds on this node and uploads.

    The arguments of `build`: where, and what is published.
    """
    folder = local_path(out)
    if folder is not None:
        started, before = datetime.now(UTC), _manifest_sha256(folder)
        manifest = build(folder, None)
        if (made := _manifest_sha256(folder)) != before:  # or it was kept as it is
            write_record(folder, "prepare", started, data_sha256=made)
        return manifest
    uri = str(out).rstrip("/")
    published = published_manifest(uri)
    work = private_cache("prepare") / hashlib.sha256(uri.encode()).hexdigest()[:16]
    work.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(lock_file(work.with_suffix(".lock")), blocking=False):
            manifest = build(work / "data", (uri, published) if published else None)
            if published is None:
                upload_dataset(work / "data", uri, work / "uploaded.json", progress)
            shutil.rmtree(work, ignore_errors=True)
    except Timeout as error:
        raise UserError(f"{uri}: is being prepared by another process; wait for it or choose another place") from error
    return manifest


def _manifest_sha256(data: Path) -> str | None:
    path = data / MANIFEST_FILE
    return sha256_file(path) if path.is_file() else None


def _build(
    release: Release,
    out: Path,
    options: BuildOptions,
    progress: Progress,
    published: Published,
    warn: Callable[[str], None] = lambda line: None,
) -> Manifest:
    for option, text in (("--name", options.name), ("--licence", options.licence)):
        refuse_secret(text or "", option)
    dataset = DatasetOptions(
        name=options.name or Path(os.path.abspath(release.folder)).name,
        licence=options.licence,
        images=options.images,
        shard_bytes=options.shard_bytes,
        seed=options.seed,
        keep_nil=options.keep_nil,
    )
    with _runner(options) as run:
        return prepare(release, out, dataset, run=run, progress=progress, warn=warn, published=published)


def prepare_view(base: str, out: str, fraction: float, seed: int, take: Take) -> Dataset:
    """Makes a view of a dataset.

    Raises:
        UserError: For a wrong fraction or location.
    """
    if not 0 < fraction <= 1:
        raise UserError(f"--train-fraction {fraction:g}: must be above 0 and at most 1")
    folder = local_path(base)
    if folder is not None and folder.is_dir() and not (folder / MANIFEST_FILE).is_file():
        raise UserError(
            f"{base}: --train-fraction takes a dataset directory; prepare the release without it, then a view of that"
        )
    return make_view(base, out, fraction, seed, take)


def _runner(options: BuildOptions) -> AbstractContextManager[Runner]:
    if options.on_ray:
        return run_on_ray(options.workers, say)
    return run_in_processes(options.workers) if options.workers > 1 else nullcontext(run_serially)


@contextmanager
def run_on_ray(num_workers: int, say: Callable[[str], None], *, verbose: bool = False) -> Iterator[Runner]:
    """A runner with `num_workers` tasks of one CPU at a time on the cluster of RAY_ADDRESS, or on a local one.

    All nodes see the release and the dataset's folder under the same paths.

    Args:
        say: Gets a line from time to time while no task can begin.
    """
    from ray_jobs.cluster.connection import connected  # these import Ray, which a build in processes does without

    # isort: split
    from ray_jobs.cluster.resources import Request, check_before_start, check_feasible
    from ray_jobs.cluster.tasks import run_each

    request = Request("prepare", 1, 1, 0, most=num_workers)
    check_before_start([request])
    with connected(verbose=verbose):
        check_feasible([request])

        def run(tasks: Sequence[Task[Result]], tick: Tick) -> Iterator[Result]:
            if tasks:  # else no node need be started
                for result, count in run_each(_made, tasks, request, say, "a shard could not be made"):
                    tick(count)
                    yield result

        yield run


def _made(task: Task[Result]) -> tuple[Result, int]:
    """What the task made, and of how many items."""
    count = 0

    def tick(items: int) -> None:
        nonlocal count
        count += items

    return task.run(tick), count


def image_settings(size: int, *, keep_original: bool) -> ImageSettings:
    """How pictures are stored."""
    return ImageSettings(size=size, quality=IMAGES.quality, keep_original=keep_original)


def parse_size(text: str) -> int:
    """Bytes of a size like 256MB or 64MiB.

    Raises:
        UserError: When it is none or below 1 MB.
    """
    try:
        size = int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError as error:
        raise UserError(f"--shard-size {text}: expected a size like 256MB") from error
    if size < 1_000_000:
        raise UserError(f"--shard-size {text}: at least 1MB")
    return size


def release_options(
    entity_text: Literal["attr", "desc"],
    mention_text: Literal["sentence", "sentence+desc"],
    kb: Path | None,
    split: str | None,
    seed: int,
) -> ReleaseOptions:
    """The choices of the command line.

    Raises:
        UserError: For a split that is no three percentages.
    """
    if split is None:
        return ReleaseOptions(entity_text, mention_text, kb, None, seed)
    try:
        train, validation, test = map(int, split.split("/"))
    except ValueError as error:
        raise UserError(f"--split {split}: expected percentages of train, validation and test, as 70/10/20") from error
    if min(train, validation, test) < 0 or train + validation + test != 100:
        raise UserError(f"--split {split}: the three must add up to 100")
    return ReleaseOptions(entity_text, mention_text, kb, (train, validation, test), seed)


def write_release_once(config: DemoConfig, folder: Path) -> None:
    """Draws the demo release into `folder`, or keeps what is there: a release under that name is complete."""
    if folder.exists():
        return
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    write_demo_release(config, unfinished)
    unfinished.rename(folder)


def demo_config(source: str) -> DemoConfig:
    """The generator's configuration from the command line: a seed, or a YAML file of its keys.

    Raises:
        UserError: When it is neither, or a key or value is wrong.
    """
    if source.isdecimal():
        return DemoConfig(seed=int(source))
    path = Path(source)
    if not path.is_file():
        raise UserError(f"--format demo takes a seed or a YAML file as SOURCE; '{source}' is neither")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    tree = parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise UserError(f"{path} must be a mapping of keys (of {', '.join(DemoConfig.model_fields)})")
    try:
        return DemoConfig.model_validate(tree)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(key) for key in first["loc"])
        known = ", ".join(DemoConfig.model_fields)
        raise UserError(f"{path}: {where}: {first['msg']} (keys: {known})") from error
