"""The build of a dataset directory from a raw release: read it once, make its shards, write the manifest.

The kb's shards come first, because the shards of mentions copy their gold entities' images from there. Any runner of
tasks will do; the result does not depend on it. What is finished stays finished (see `data_prep.build.plan`).
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from data_prep.build.findings import merged_counts
from data_prep.build.kb_table import write_entities_file
from data_prep.build.plan import (
    SCAN_FINDINGS,
    STAGE,
    DatasetOptions,
    FinishedShard,
    Plan,
    PlannedShard,
    Warn,
    make_plan,
    read_finished,
    read_finished_chunk,
    read_plan,
    staged,
)
from data_prep.build.runners import Result, Runner, Task, run_serially
from data_prep.build.tasks import HashTask, JoinTask, KbTask, SplitTask
from data_prep.formats.release import Release
from dsmip.data.dataset import Dataset
from dsmip.data.manifest import (
    ENTITIES_FILE,
    KB,
    NIL,
    REJECTS_FILE,
    SECTIONS,
    SPLITS,
    UNKNOWN_OF,
    ImageSettings,
    Manifest,
    Source,
    SplitCounts,
    read_manifest,
)
from dsmip.errors import UserError
from dsmip.private import lock_file
from dsmip.progress import Progress, no_progress
from dsmip.storage.atomic import join_files, sha256_file, write_json
from dsmip.storage.dataset_storage import MANIFEST_FILE
from dsmip.version import VERSION

_FILES_PER_TASK = 10_000


def prepare(
    source: Release,
    out: Path,
    options: DatasetOptions,
    *,
    run: Runner = run_serially,
    progress: Progress = no_progress,
    warn: Warn = lambda line: None,
    published: tuple[str, Manifest] | None = None,
) -> Manifest:
    """Builds a dataset directory; a complete one of equal source and options is kept.

    Equal inputs give equal bytes, however often the build was interrupted and run again: it goes on from the shards
    that are finished. The manifest is written last.

    Args:
        source: The release.
        out: The folder to build.
        options: How, and what the manifest says of it.
        run: Does the tasks.
        progress: Called while files of the source are hashed, records are read (total 0: not known) and samples made.
        warn: Gets a line for the user where most of the images that records name were not found.
        published: Where the dataset is complete already, and its manifest, which is checked and returned.

    Returns:
        The manifest.

    Raises:
        UserError: The release is wrong, `published` or `out` holds something else, `out` is being built, or it cannot
            be written.
    """
    # Absolute: a runner's workers may live in another folder.
    out = out.absolute()
    settings = _settings(source, options, _source_digest(source, run, progress))
    if published is not None:
        location, complete = published
        _refuse_others(complete, settings, location)
        return complete
    try:
        if (finished := _finished(out, settings)) is not None and not (out / STAGE).exists():
            return finished
        _refuse_foreign(out)
        with _locked(out):
            manifest = _finished(out, settings)  # perhaps since a moment ago
            if manifest is None:
                plan = _plan(source, out, options, settings, progress, warn)
                built = _build(out, plan, options.images, run, progress)
                manifest = _describe(out, settings, plan, built)
            # Under the lock, or another build would lose the plan that it has just begun with.
            shutil.rmtree(out / STAGE, ignore_errors=True)
        return manifest
    except OSError as error:
        raise UserError(
            f"{error.filename or out}: cannot be written: {error.strerror or error}; mend that and run the command "
            f"again: it goes on from what is finished in {out}"
        ) from error


def _settings(source: Release, options: DatasetOptions, source_sha256: str) -> dict[str, Any]:
    """The fields of the manifest that are known before anything is built; datasets of equal ones are equal."""
    return {
        "name": _writable(options.name),
        "licence": _writable(options.licence),
        "source": Source(name=_writable(Path(os.path.abspath(source.folder)).name), sha256=source_sha256),
        "layout": source.layout,
        "choices": {**source.choices, **({NIL: "kept"} if options.keep_nil else {})},
        "tool_version": VERSION,
        "seed": options.seed,
        "shard_bytes": options.shard_bytes,
        "image": options.images,
    }


def _writable(name: str) -> str:
    """A name as a file can hold it: names of folders may be no UTF-8."""
    return name.encode("utf-8", "replace").decode()


def _source_digest(source: Release, run: Runner, progress: Progress) -> str:
    """Digest of the names and contents of everything that the dataset depends on."""
    files = sorted(source.files())
    starts = range(0, len(files), _FILES_PER_TASK)
    tasks = [HashTask(start, tuple(path for _, path in files[start : start + _FILES_PER_TASK])) for start in starts]
    try:
        hashed = sorted(_ticking(run, tasks, "source files", len(files), progress))
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror or error}") from error
    digests = (digest for _, of_task in hashed for digest in of_task)
    whole = hashlib.sha256()
    for (name, _), digest in zip(files, digests, strict=True):
        encoded = name.encode("utf-8", "surrogateescape")
        whole.update(len(encoded).to_bytes(8, "little") + encoded + digest)
    return whole.hexdigest()


def _plan(
    source: Release,
    out: Path,
    options: DatasetOptions,
    settings: dict[str, Any],
    progress: Progress,
    warn: Warn,
) -> Plan:
    """The plan that an interrupted build left, or a new one in an empty folder."""
    # The plan names the source's files, so its folder belongs to the key.
    values = {name: value.model_dump() if hasattr(value, "model_dump") else value for name, value in settings.items()}
    key_text = json.dumps([values, str(source.folder.absolute())], sort_keys=True)
    key = hashlib.sha256(key_text.encode()).hexdigest()
    plan = read_plan(out, key)
    if plan is None:
        _empty(out)
        plan = make_plan(
            source,
            out,
            key=key,
            options=options,
            scanned=lambda split, count: progress(f"reading {split}", count, 0),
            warn=warn,
        )
    folders = dict.fromkeys([KB, *SPLITS, *(shard.split for shard in plan.shards)])
    for name in folders:
        (out / name).mkdir(exist_ok=True)
    for folder in (out, *(out / name for name in folders)):
        for leftover in folder.glob(".*.tmp"):
            leftover.unlink()
    return plan


def _build(out: Path, plan: Plan, images: ImageSettings, run: Runner, progress: Progress) -> dict[str, FinishedShard]:
    """Makes the shards that are not finished, and the kb's table.

    Returns:
        All shards by path.
    """
    finished = {shard.path: done for shard in plan.shards if (done := read_finished(out, shard))}
    _build_kb(out, plan.of(KB), finished, images, run, progress)
    kb = tuple(plan.of(KB))
    write_entities_file((staged(out, shard.path, "rows") for shard in kb), out / ENTITIES_FILE)
    shards = plan.of(*SECTIONS)
    total = sum(shard.count for shard in shards)
    tasks = [SplitTask(out, shard, images, kb) for shard in shards if shard.path not in finished]
    before = total - sum(task.shard.count for task in tasks)
    finished |= {made.info.path: made for made in _ticking(run, tasks, "mentions", total, progress, before)}
    return finished


def _build_kb(
    out: Path,
    shards: Sequence[PlannedShard],
    finished: dict[str, FinishedShard],
    images: ImageSettings,
    run: Runner,
    progress: Progress,
) -> None:
    """Makes the chunks that are not finished, then the shards of them; adds to `finished`."""
    chunks = [chunk for shard in shards if shard.path not in finished for chunk in shard.chunks]
    ready = [made for chunk in chunks if (made := read_finished_chunk(out, chunk))]
    there = {(chunk.path, chunk.number) for chunk in ready}
    tasks = [KbTask(out, chunk, images) for chunk in chunks if (chunk.path, chunk.number) not in there]
    total = sum(shard.count for shard in shards)
    done = total - sum(task.chunk.count for task in tasks)
    ready += _ticking(run, tasks, "entities", total, progress, done)
    of_shard = {
        path: tuple(sorted(made, key=lambda chunk: chunk.number))
        for path, made in groupby(sorted(ready, key=lambda chunk: chunk.path), lambda chunk: chunk.path)
    }
    joins = [JoinTask(out, shard, of_shard[shard.path]) for shard in shards if shard.path not in finished]
    finished |= {made.info.path: made for made in run(joins, lambda count: None)}


def _ticking(
    run: Runner, tasks: Sequence[Task[Result]], stage: str, total: int, progress: Progress, done: int = 0
) -> Iterator[Result]:
    """What the tasks make, while `progress` is called with the stage and how far it is."""

    def tick(count: int) -> None:
        nonlocal done
        done += count
        progress(stage, done, total)

    if total:
        progress(stage, done, total)
    return run(tasks, tick)


def _describe(out: Path, settings: dict[str, Any], plan: Plan, built: dict[str, FinishedShard]) -> Manifest:
    """Writes the findings, then the manifest, and returns it."""
    findings = [staged(out, shard.path, "findings") for shard in plan.shards]
    join_files([out / STAGE / SCAN_FINDINGS, *findings], out / REJECTS_FILE)
    counts = merged_counts([plan.findings, *(shard.findings for shard in built.values())])
    samples = {name: sum(shard.count for shard in plan.of(name)) for name in (KB, *SECTIONS)}
    with_image = {name: sum(built[shard.path].num_with_image for shard in plan.of(name)) for name in (KB, *SECTIONS)}
    counts_of = {name: SplitCounts(mentions=samples[name], with_image=with_image[name]) for name in SECTIONS}
    manifest = Manifest.model_validate(
        settings
        | {
            "entities": samples[KB],
            "entities_with_image": with_image[KB],
            "splits": {split: counts_of[split] for split in SPLITS},
            "unknown": {split: counts_of[name] for split, name in UNKNOWN_OF.items() if samples[name]},
            "entities_sha256": sha256_file(out / ENTITIES_FILE),
            "shards": tuple(built[shard.path].info for shard in plan.shards),
            "rejects": counts.get("rejected", {}),
            "repaired": counts.get("repaired", {}),
            "degraded": counts.get("degraded", {}),
        }
    )
    write_json(out / MANIFEST_FILE, manifest.model_dump(mode="json"))
    return manifest


def _finished(out: Path, settings: dict[str, Any]) -> Manifest | None:
    """The manifest of a complete dataset with these settings; None when there is something to build."""
    if not (out / MANIFEST_FILE).exists():
        return None
    try:
        manifest, _ = read_manifest(out)
    except UserError as error:
        raise UserError(f"{error}; remove {out} first") from error
    _refuse_others(manifest, settings, str(out))
    try:
        Dataset.open(out)
    except UserError:
        return None
    return manifest


def _refuse_others(manifest: Manifest, settings: dict[str, Any], location: str) -> None:
    """Checks that a manifest is of this source and these settings.

    Raises:
        UserError: It is not.
    """
    # The folder's name and the tool's version say where the data came from; the content does not depend on them.
    found = {key: getattr(manifest, key) for key in settings} | {"source": manifest.source.sha256}
    asked = settings | {"source": settings["source"].sha256, "tool_version": manifest.tool_version}
    different = [key for key in asked if found[key] != asked[key]]
    if different:
        raise UserError(
            f"{location}: holds another dataset ({', '.join(different)} differ); remove it or choose another"
        )


def _refuse_foreign(out: Path) -> None:
    """Checks that a folder is empty or of this tool: nothing else is ever removed.

    Raises:
        UserError: It is not.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; choose another folder")
    ours = (out / STAGE).is_dir() or (out / MANIFEST_FILE).exists()
    if out.is_dir() and any(out.iterdir()) and not ours:
        raise UserError(f"{out}: is not empty and no dataset; choose another folder")


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Holds the lock of a build.

    Raises:
        UserError: Another process has it, or there is a link in its place.
    """
    if (out / STAGE).is_symlink():  # what it leads to would be emptied
        raise UserError(f"{out / STAGE}: is a link; remove it")
    (out / STAGE).mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(lock_file(out / STAGE / "lock"), blocking=False):
            yield
    except Timeout as error:
        raise UserError(f"{out}: is being prepared by another process; wait for it or choose another folder") from error


def _empty(out: Path) -> None:
    """Removes what an earlier build made, but for the lock that this one holds."""
    for file in (MANIFEST_FILE, REJECTS_FILE):
        (out / file).unlink(missing_ok=True)
    for name in (KB, *SECTIONS):
        shutil.rmtree(out / name, ignore_errors=True)
    for path in (out / STAGE).iterdir():
        if path.name != "lock":
            path.unlink()
