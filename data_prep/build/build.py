"""From a raw release to a dataset directory: read it once, make its shards, describe the result.

The kb's shards come first, because the shards of mentions copy their gold entities' pictures from there. Any runner
of tasks will do; the result does not depend on it. What is finished stays finished (see `data_prep.build.plan`).
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
from data_prep.build.images import JPEG_QUALITY
from data_prep.build.kb_table import join_pieces
from data_prep.build.plan import (
    SCAN_FINDINGS,
    STAGE,
    FinishedShard,
    Plan,
    PlannedShard,
    make_plan,
    read_finished,
    read_finished_part,
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
    REJECTS_FILE,
    SPLITS,
    Manifest,
    PictureSettings,
    Source,
    SplitCounts,
    read_manifest,
)
from dsmip.errors import UserError
from dsmip.progress import Progress, no_progress
from dsmip.storage.atomic import join_files, sha256_file, write_json
from dsmip.storage.dataset_storage import MANIFEST_FILE
from dsmip.version import VERSION

SHARD_BYTES = 256_000_000
PICTURES = PictureSettings(size=224, quality=JPEG_QUALITY)
_FILES_PER_TASK = 10_000


def prepare(
    source: Release,
    out: Path,
    *,
    name: str,
    licence: str = "unknown",
    pictures: PictureSettings = PICTURES,
    shard_bytes: int = SHARD_BYTES,
    seed: int = 0,
    run: Runner = run_serially,
    progress: Progress = no_progress,
    published: tuple[str, Manifest] | None = None,
) -> Manifest:
    """Builds the dataset directory `out` and returns its manifest; a complete one of equal source and settings is kept.

    `shard_bytes` is about the size of the kb's shards. `progress(part, done, total)` is called while files of the
    source are hashed, records are read (total 0: not known) and samples are made. `seed` orders the training mentions.
    Equal inputs give equal bytes, however often the build was interrupted and run again: it goes on from the shards
    that are finished. The manifest is written last. `published`: where the dataset is complete already, and its
    manifest, which is returned.

    Raises:
        UserError: the release is wrong, `published` or `out` holds something else, `out` is being built, or it cannot
            be written.
    """
    # Absolute: a runner's workers may live in another folder.
    out = out.absolute()
    settings: dict[str, Any] = {
        "name": _written(name),
        "licence": _written(licence),
        "source": Source(
            name=_written(Path(os.path.abspath(source.folder)).name), sha256=_source_digest(source, run, progress)
        ),
        "layout": source.layout,
        "choices": dict(source.choices),
        "tool_version": VERSION,
        "seed": seed,
        "shard_bytes": shard_bytes,
        "image": pictures,
    }
    if published is not None:
        place, complete = published
        _refuse_others(complete, settings, place)
        return complete
    try:
        if (finished := _finished(out, settings)) is not None and not (out / STAGE).exists():
            return finished
        _refuse_foreign(out)
        with _locked(out):
            manifest = _finished(out, settings)  # perhaps since a moment ago
            if manifest is None:
                plan = _plan(source, out, settings, progress)
                built = _build(out, plan, pictures, run, progress)
                manifest = _describe(out, settings, plan, built)
            # Under the lock, or another build would lose the plan that it has just begun with.
            shutil.rmtree(out / STAGE, ignore_errors=True)
        return manifest
    except OSError as error:
        raise UserError(
            f"{error.filename or out}: cannot be written: {error.strerror or error}; mend that and run the command "
            f"again: it goes on from what is finished in {out}"
        ) from error


def _written(name: str) -> str:
    """A name as a file can hold it: names of folders may be no UTF-8."""
    return name.encode("utf-8", "replace").decode()


def _source_digest(source: Release, run: Runner, progress: Progress) -> str:
    """Digest of the names and contents of everything that the dataset depends on."""
    files = sorted(source.files())
    starts = range(0, len(files), _FILES_PER_TASK)
    tasks = [HashTask(start, tuple(path for _, path in files[start : start + _FILES_PER_TASK])) for start in starts]
    try:
        parts = sorted(_ticking(run, tasks, "source files", len(files), progress))
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror or error}") from error
    digests = (digest for _, part in parts for digest in part)
    whole = hashlib.sha256()
    for (name, _), digest in zip(files, digests, strict=True):
        encoded = name.encode("utf-8", "surrogateescape")
        whole.update(len(encoded).to_bytes(8, "little") + encoded + digest)
    return whole.hexdigest()


def _plan(source: Release, out: Path, settings: dict[str, Any], progress: Progress) -> Plan:
    """The plan that an interrupted build left, or a new one in an empty folder."""
    place = str(source.folder.absolute())  # of the files that the plan names
    values = {name: value.model_dump() if hasattr(value, "model_dump") else value for name, value in settings.items()}
    key = hashlib.sha256(json.dumps([values, place], sort_keys=True).encode()).hexdigest()
    plan = read_plan(out, key)
    if plan is None:
        _empty(out)
        plan = make_plan(
            source,
            out,
            key=key,
            pictures=settings["image"],
            shard_bytes=settings["shard_bytes"],
            seed=settings["seed"],
            scanned=lambda part, count: progress(f"reading {part}", count, 0),
        )
    for part in (KB, *SPLITS):
        (out / part).mkdir(exist_ok=True)
    for folder in (out, *(out / part for part in (KB, *SPLITS))):
        for leftover in folder.glob(".*.tmp"):
            leftover.unlink()
    return plan


def _build(
    out: Path, plan: Plan, pictures: PictureSettings, run: Runner, progress: Progress
) -> dict[str, FinishedShard]:
    """Makes the shards that are not finished, then the kb's table; all shards by path."""
    finished = {shard.path: done for shard in plan.shards if (done := read_finished(out, shard))}
    _build_kb(out, plan.of(KB), finished, pictures, run, progress)
    kb = tuple(plan.of(KB))
    join_pieces((staged(out, shard.path, "rows") for shard in kb), out / ENTITIES_FILE)
    shards = plan.of(*SPLITS)
    total = sum(shard.count for shard in shards)
    tasks = [SplitTask(out, shard, pictures, kb) for shard in shards if shard.path not in finished]
    before = total - sum(task.shard.count for task in tasks)
    finished |= {made.info.path: made for made in _ticking(run, tasks, "mentions", total, progress, before)}
    return finished


def _build_kb(
    out: Path,
    shards: Sequence[PlannedShard],
    finished: dict[str, FinishedShard],
    pictures: PictureSettings,
    run: Runner,
    progress: Progress,
) -> None:
    """Makes the parts that are not finished, then the shards of them; adds to `finished`."""
    parts = [part for shard in shards if shard.path not in finished for part in shard.parts]
    ready = [made for part in parts if (made := read_finished_part(out, part))]
    there = {(part.path, part.number) for part in ready}
    tasks = [KbTask(out, part, pictures) for part in parts if (part.path, part.number) not in there]
    total = sum(shard.count for shard in shards)
    done = total - sum(task.part.count for task in tasks)
    ready += _ticking(run, tasks, "entities", total, progress, done)
    of_shard = {
        path: tuple(sorted(parts, key=lambda part: part.number))
        for path, parts in groupby(sorted(ready, key=lambda part: part.path), lambda part: part.path)
    }
    joins = [JoinTask(out, shard, of_shard[shard.path]) for shard in shards if shard.path not in finished]
    finished |= {made.info.path: made for made in run(joins, lambda count: None)}


def _ticking(
    run: Runner, tasks: Sequence[Task[Result]], part: str, total: int, progress: Progress, done: int = 0
) -> Iterator[Result]:
    """What the tasks make, while `progress` is told how far they are."""

    def tick(count: int) -> None:
        nonlocal done
        done += count
        progress(part, done, total)

    if total:
        progress(part, done, total)
    return run(tasks, tick)


def _describe(out: Path, settings: dict[str, Any], plan: Plan, built: dict[str, FinishedShard]) -> Manifest:
    """Writes the findings, then the manifest."""
    findings = [staged(out, shard.path, "findings") for shard in plan.shards]
    join_files([out / STAGE / SCAN_FINDINGS, *findings], out / REJECTS_FILE)
    counts = merged_counts([plan.findings, *(shard.findings for shard in built.values())])
    samples = {part: sum(shard.count for shard in plan.of(part)) for part in (KB, *SPLITS)}
    with_image = {part: sum(built[shard.path].num_with_image for shard in plan.of(part)) for part in (KB, *SPLITS)}
    manifest = Manifest.model_validate(
        settings
        | {
            "entities": samples[KB],
            "entities_with_image": with_image[KB],
            "splits": {split: SplitCounts(mentions=samples[split], with_image=with_image[split]) for split in SPLITS},
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


def _refuse_others(manifest: Manifest, settings: dict[str, Any], place: str) -> None:
    """Raises UserError unless a manifest is of this source and these settings."""
    # The folder's name and the tool's version say where the data came from; the content does not depend on them.
    found = {key: getattr(manifest, key) for key in settings} | {"source": manifest.source.sha256}
    asked = settings | {"source": settings["source"].sha256, "tool_version": manifest.tool_version}
    different = [key for key in asked if found[key] != asked[key]]
    if different:
        raise UserError(f"{place}: holds another dataset ({', '.join(different)} differ); remove it or choose another")


def _refuse_foreign(out: Path) -> None:
    """Only what this tool has made is ever removed."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; choose another folder")
    ours = (out / STAGE).is_dir() or (out / MANIFEST_FILE).exists()
    if out.is_dir() and any(out.iterdir()) and not ours:
        raise UserError(f"{out}: is not empty and no dataset; choose another folder")


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    (out / STAGE).mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out / STAGE / "lock", blocking=False):
            yield
    except Timeout as error:
        raise UserError(f"{out}: is being prepared by another process; wait for it or choose another folder") from error


def _empty(out: Path) -> None:
    """Removes what an earlier build made, but for the lock that this one holds."""
    for file in (MANIFEST_FILE, REJECTS_FILE):
        (out / file).unlink(missing_ok=True)
    for part in (KB, *SPLITS):
        shutil.rmtree(out / part, ignore_errors=True)
    for path in (out / STAGE).iterdir():
        if path.name != "lock":
            path.unlink()
