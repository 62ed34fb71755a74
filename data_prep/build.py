"""From a raw release to a dataset directory: list tasks, run them, describe the result.

The kb's shards come first, because the shards of mentions copy their gold entities' pictures from there. Any runner
that maps `build_shard` over the tasks will do; the result does not depend on it.
"""

import json
import multiprocessing
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from data_prep.pictures import JPEG_QUALITY
from data_prep.release import Action, Finding, RawMention, Release, checked_entities, checked_mentions
from data_prep.tasks import BuiltShard, KbTask, ShardTask, SplitTask, StoredEntity, build_shard, entity_key
from dsmip import __version__
from dsmip.errors import UserError
from dsmip.files import atomic_path, sha256_file, write_json, write_text
from dsmip.manifest import (
    ENTITIES_FILE,
    KB,
    MANIFEST_FILE,
    REJECTS_FILE,
    SPLITS,
    Manifest,
    PictureSettings,
    Source,
    SplitCounts,
    read_manifest,
    shard_path,
)
from dsmip.shards import ENTITY_SCHEMA, Dataset
from dsmip.streams import permutation

Runner = Callable[[Callable[[ShardTask], BuiltShard], Sequence[ShardTask]], Iterable[BuiltShard]]
Progress = Callable[[str, int, int], None]

MAX_MENTIONS_PER_SHARD = 1000
MIN_TRAIN_SHARDS = 16
MAX_ENTITIES_PER_SHARD = 5000
_UNFINISHED = ".unfinished"


def run_serially(build: Callable[[ShardTask], BuiltShard], tasks: Sequence[ShardTask]) -> Iterator[BuiltShard]:
    """One task after the other, in this process."""
    return map(build, tasks)


def run_in_processes(num_workers: int) -> Runner:
    """A runner with a pool of `num_workers` processes of its own."""

    def run(build: Callable[[ShardTask], BuiltShard], tasks: Sequence[ShardTask]) -> Iterator[BuiltShard]:
        # Forking a process that has loaded torch or Ray may hang.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(num_workers, max(len(tasks), 1)), mp_context=context) as pool:
            for future in as_completed([pool.submit(build, task) for task in tasks]):
                yield future.result()

    return run


def prepare(
    source: Release,
    out: Path,
    *,
    name: str,
    licence: str = "unknown",
    image_size: int = 224,
    seed: int = 0,
    run: Runner = run_serially,
    progress: Progress = lambda part, done, total: None,
) -> Manifest:
    """Builds the dataset directory `out` and returns its manifest; a complete one of equal source and settings is kept.

    `progress(part, done, total)` is called with samples done after each shard. `seed` orders the training mentions.
    Equal inputs give equal bytes. The manifest is written last; a build that was interrupted starts again from nothing.

    Raises:
        UserError: the release is wrong, `out` holds something else, or it cannot be written.
    """
    # Absolute: a runner's workers may live in another folder.
    out = out.absolute()
    settings: dict[str, Any] = {
        "name": name,
        "licence": licence,
        "source": Source(name=source.folder.absolute().name, sha256=source.sha256()),
        "tool_version": __version__,
        "seed": seed,
        "image": PictureSettings(size=image_size, quality=JPEG_QUALITY),
    }
    if (finished := _finished(out, settings)) is not None:
        return finished
    findings: list[Finding] = []
    entities = checked_entities(source.entities(), findings)
    if not entities:
        raise UserError(f"{source.folder}: no usable entity; {_reasons(findings)}")
    row_of = {entity.entity_id: row for row, entity in enumerate(entities)}
    mentions = {split: checked_mentions(source.mentions(split), row_of, findings) for split in SPLITS}
    try:
        _start_clean(out)
        tasks: list[ShardTask] = [
            KbTask(out, shard_path(KB, index), rows.start, tuple(entities[rows.start : rows.stop]), image_size)
            for index, rows in enumerate(_cut(len(entities), MAX_ENTITIES_PER_SHARD, 1))
        ]
        built = _run(run, tasks, [KB], progress)
        stored = [entity for shard in built[KB] for entity in shard.entities]
        _write_entities(out / ENTITIES_FILE, stored)
        tasks = []
        for split in SPLITS:
            golds = [(mention, stored[row_of[mention.gold or ""]]) for mention in mentions[split]]
            tasks += _split_tasks(out, split, golds, seed, image_size)
        built |= _run(run, tasks, SPLITS, progress)
        findings += [finding for shards in built.values() for shard in shards for finding in shard.findings]
        return _finish(out, settings, built, findings)
    except OSError as error:
        raise UserError(f"{error.filename or out}: cannot be written: {error.strerror or error}") from error


def _split_tasks(
    out: Path, split: str, golds: Sequence[tuple[RawMention, StoredEntity]], seed: int, image_size: int
) -> list[ShardTask]:
    """Training mentions are shuffled once, so that a window of shards is a fair sample; the others keep their order."""
    is_train = split == "train"
    if is_train:
        golds = [golds[index] for index in permutation(len(golds), "build", seed).tolist()]
    parts = _cut(len(golds), MAX_MENTIONS_PER_SHARD, MIN_TRAIN_SHARDS if is_train else 1)
    return [
        SplitTask(out, shard_path(split, index), rows.start, tuple(golds[rows.start : rows.stop]), image_size)
        for index, rows in enumerate(parts)
    ]


def _cut(count: int, max_size: int, min_parts: int) -> list[range]:
    """`count` items in parts of nearly equal size: none above `max_size`, at least `min_parts` where counts allow."""
    num_parts = max(-(-count // max_size), min(min_parts, count))
    bounds = [count * part // num_parts for part in range(num_parts + 1)] if num_parts else []
    return [range(start, stop) for start, stop in pairwise(bounds)]


def _run(
    run: Runner, tasks: Sequence[ShardTask], parts: Sequence[str], progress: Progress
) -> dict[str, list[BuiltShard]]:
    """The shards of each part, in order."""
    built: dict[str, list[BuiltShard]] = {part: [] for part in parts}
    total: Counter[str] = Counter()
    for task in tasks:
        total[_part_of(task.path)] += len(task.entities if isinstance(task, KbTask) else task.mentions)
    for shard in run(build_shard, tasks):
        part = _part_of(shard.info.path)
        built[part].append(shard)
        progress(part, sum(done.info.samples for done in built[part]), total[part])
    return {part: sorted(shards, key=lambda shard: shard.info.path) for part, shards in built.items()}


def _part_of(path: str) -> str:
    return path.split("/")[0]


def _finished(out: Path, settings: dict[str, Any]) -> Manifest | None:
    """The manifest of a complete dataset with these settings; None when there is something to build."""
    if not (out / MANIFEST_FILE).exists():
        return None
    try:
        manifest, _ = read_manifest(out)
    except UserError as error:
        raise UserError(f"{error}; remove {out} first") from error
    # The folder's name and the tool's version say where the data came from; the content does not depend on them.
    found = {key: getattr(manifest, key) for key in settings} | {"source": manifest.source.sha256}
    asked = settings | {"source": settings["source"].sha256, "tool_version": manifest.tool_version}
    different = [key for key in asked if found[key] != asked[key]]
    if different:
        raise UserError(f"{out}: holds another dataset ({', '.join(different)} differ); remove it or choose another")
    try:
        Dataset.open(out)
    except UserError:
        return None
    return manifest


def _start_clean(out: Path) -> None:
    """An empty folder marked as unfinished. Only what this tool has made is ever removed."""
    marker = out / _UNFINISHED
    ours = marker.exists() or (out / MANIFEST_FILE).exists()
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; choose another folder")
    if out.is_dir() and any(out.iterdir()) and not ours:
        raise UserError(f"{out}: is not empty and no dataset; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    marker.touch()
    for file in (MANIFEST_FILE, REJECTS_FILE):
        (out / file).unlink(missing_ok=True)
    for part in (KB, *SPLITS):
        shutil.rmtree(out / part, ignore_errors=True)
        (out / part).mkdir()


def _write_entities(path: Path, entities: Sequence[StoredEntity]) -> None:
    rows = [
        {
            "entity_row": entity.entity_row,
            "entity_id": entity.entity_id,
            "name": entity.name,
            "attributes": entity.attributes,
            "num_images": len(entity.places),
            "shard": entity.shard,
            "key": entity_key(entity.entity_row),
            "image_offsets": [offset for offset, _ in entity.places],
            "image_sizes": [size for _, size in entity.places],
        }
        for entity in entities
    ]
    with atomic_path(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, ENTITY_SCHEMA), temporary, compression="zstd")


def _finish(
    out: Path, settings: dict[str, Any], built: dict[str, list[BuiltShard]], findings: list[Finding]
) -> Manifest:
    """Writes the findings, then the manifest."""
    findings = sorted(findings, key=lambda finding: (finding.source, finding.record, finding.reason, finding.detail))
    lines = [json.dumps(asdict(finding), sort_keys=True, ensure_ascii=False) + "\n" for finding in findings]
    write_text(out / REJECTS_FILE, "".join(lines))
    counts = {part: sum(shard.info.samples for shard in shards) for part, shards in built.items()}
    with_image = {part: sum(shard.num_with_image for shard in shards) for part, shards in built.items()}
    manifest = Manifest.model_validate(
        settings
        | {
            "entities": counts[KB],
            "entities_with_image": with_image[KB],
            "splits": {split: SplitCounts(mentions=counts[split], with_image=with_image[split]) for split in SPLITS},
            "entities_sha256": sha256_file(out / ENTITIES_FILE),
            "shards": tuple(shard.info for shards in built.values() for shard in shards),
            "rejects": _by_reason(findings, "rejected"),
            "repaired": _by_reason(findings, "repaired"),
            "degraded": _by_reason(findings, "degraded"),
        }
    )
    write_json(out / MANIFEST_FILE, manifest.model_dump(mode="json"))
    (out / _UNFINISHED).unlink()
    return manifest


def _by_reason(findings: Iterable[Finding], action: Action) -> dict[str, int]:
    return dict(sorted(Counter(finding.reason for finding in findings if finding.action == action).items()))


def _reasons(findings: Iterable[Finding]) -> str:
    counts = _by_reason(findings, "rejected")
    return (
        "rejected: " + ", ".join(f"{reason} {count}" for reason, count in counts.items()) if counts else "it is empty"
    )
