"""Verification of a dataset directory against its manifest: every digest, count, record and image.

Shards are read one by one, so memory holds one sample, and of the kb one digest per image. All problems are
collected: a damaged file does not hide the next one.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.inspection.shard_verification import Copy, Problem, ShardTask, check_shard, readable_table
from dsmip.data.dataset import Dataset
from dsmip.data.manifest import ENTITIES_FILE, KB, REJECTS_FILE, SECTIONS, Manifest, parse_manifest, parse_view
from dsmip.parallel import map_tasks
from dsmip.progress import Progress, counting, no_progress
from dsmip.storage.atomic import sha256_file
from dsmip.storage.dataset_storage import MANIFEST_FILE, DatasetStorage
from dsmip.storage.locations import open_dataset_storage

MAX_PROBLEMS = 100
_ACTIONS = {"rejected": "rejects", "repaired": "repaired", "degraded": "degraded"}


@dataclass(frozen=True, slots=True)
class Verification:
    """What was read, and what is wrong with it.

    Attributes:
        shards: How many were read.
        samples: How many were read.
        images: How many were read.
        num_problems: How many there are.
        problems: The first MAX_PROBLEMS of them, in the files' order.
    """

    shards: int
    samples: int
    images: int
    num_problems: int
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return self.num_problems == 0


def verify_dataset(location: str | Path, *, workers: int = 1, progress: Progress = no_progress) -> Verification:
    """Reads every byte of a dataset and compares it with the manifest and with itself.

    Of a view it is the dataset that it is a view of; in an object store it is what lies there now and not the copies
    here.

    Args:
        location: Its folder or URI.
        workers: Number of processes.
        progress: Called with the number of shards that are read.

    Raises:
        UserError: There is no manifest, or it cannot be read or contradicts itself: nothing to compare with. The same
            for a view that is not one of its dataset any more.
    """
    files, content = open_dataset_storage(location)
    if view := parse_view(content, files.address(MANIFEST_FILE)):
        Dataset.open(location)
        files, content = open_dataset_storage(files.relative(view.view_of))
    manifest, _ = parse_manifest(content, files.address(MANIFEST_FILE))
    with files.fresh(ENTITIES_FILE) as table:
        return _verified(files, manifest, table, workers, progress)


def _verified(files: DatasetStorage, manifest: Manifest, table: Path, workers: int, progress: Progress) -> Verification:
    problems = _Bounded()
    problems.add(_check_rejects(files, manifest))
    problems.add(_check_table(table, manifest))
    rows_from = None if readable_table(table) is None else table
    splits = (KB, *SECTIONS)
    tasks = [ShardTask(files, shard, split, rows_from) for split in splits for shard in manifest.shards_of(split)]
    records: dict[int, bytes] = {}
    images: dict[int, tuple[bytes, ...]] = {}
    with_image: Counter[str] = Counter()
    samples = num_images = 0
    add = counting(progress, "shards", len(tasks))
    for task, found in zip(tasks, map_tasks(check_shard, tasks, workers), strict=True):
        records |= found.records
        images |= found.images
        problems.add(found.problems)
        problems.add(_check_copies(task.shard.path, found.copies, records, images))
        with_image[task.split] += found.with_image
        samples, num_images = samples + found.samples, num_images + found.num_images
        add(1)
    problems.add(_check_with_image(manifest, with_image))
    return Verification(len(tasks), samples, num_images, problems.count, tuple(problems.kept))


class _Bounded:
    """Problems: the first ones and the number of all."""

    def __init__(self) -> None:
        self.count, self.kept = 0, list[Problem]()

    def add(self, problems: Sequence[Problem]) -> None:
        self.count += len(problems)
        self.kept += problems[: MAX_PROBLEMS - len(self.kept)]


def _check_rejects(files: DatasetStorage, manifest: Manifest) -> list[Problem]:
    """The lines of rejects.jsonl by action and reason against the manifest's counts."""
    found: dict[str, Counter[str]] = {action: Counter() for action in _ACTIONS}
    problems = []
    with files.fresh(REJECTS_FILE) as path:
        try:
            with path.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, start=1):
                    try:
                        record = json.loads(line)
                        found[record["action"]][record["reason"]] += 1
                    except (ValueError, KeyError, TypeError, RecursionError):
                        problems.append(Problem(REJECTS_FILE, None, f"line {number} is no finding of a preparation"))
        except FileNotFoundError:
            return [Problem(REJECTS_FILE, None, "the file is missing")]
        except UnicodeDecodeError:
            return [Problem(REJECTS_FILE, None, "the file is not UTF-8 text")]
    for action, section in _ACTIONS.items():
        counts: Mapping[str, int] = getattr(manifest, section)
        for reason in sorted({*counts, *found[action]}):
            lines_, said = found[action][reason], counts.get(reason, 0)
            if lines_ != said:
                what = f"{lines_} records {action} for {reason!r}, the manifest says {said}"
                problems.append(Problem(REJECTS_FILE, None, what))
    return problems


def _check_table(path: Path, manifest: Manifest) -> list[Problem]:
    """The table of entities against the manifest."""
    if not path.is_file():
        return [Problem(ENTITIES_FILE, None, "the file is missing")]
    problems = []
    if sha256_file(path) != manifest.entities_sha256:
        problems.append(Problem(ENTITIES_FILE, None, "its SHA-256 is not the manifest's"))
    table = readable_table(path)
    if table is None:
        return [*problems, Problem(ENTITIES_FILE, None, "it cannot be read as a table of entities")]
    if len(table) != manifest.entities:
        what = f"{len(table)} rows, the manifest says {manifest.entities} entities"
        problems.append(Problem(ENTITIES_FILE, None, what))
    for row, said in enumerate(table.column("entity_row").to_pylist()):
        if row != said:
            problems.append(Problem(ENTITIES_FILE, f"row {row}", f"its entity_row is {said}"))
    ids = Counter(table.column("entity_id").to_pylist())
    problems += [
        Problem(ENTITIES_FILE, f"entity {entity_id}", f"{count} rows have this entity_id")
        for entity_id, count in ids.items()
        if count > 1
    ]
    known = {shard.path for shard in manifest.shards_of(KB)}
    problems += [
        Problem(ENTITIES_FILE, None, f"names a shard that the manifest does not: {path!r}")
        for path in table.column("shard").unique().to_pylist()
        if path not in known
    ]
    return problems


def _check_with_image(manifest: Manifest, found: Mapping[str, int]) -> list[Problem]:
    """The manifest's counts of records with an image against those of the shards."""
    said = {KB: manifest.entities_with_image} | {name: each.with_image for name, each in manifest.sections.items()}
    return [
        Problem("manifest.json", None, f"says that {count} of {split} have a picture; the shards hold {found[split]}")
        for split, count in said.items()
        if found[split] != count
    ]


def _check_copies(
    path: str, copies: Sequence[Copy], records: Mapping[int, bytes], images: Mapping[int, tuple[bytes, ...]]
) -> list[Problem]:
    """The gold entities in a shard of mentions against those of the kb."""
    problems = []
    for copy in copies:
        if copy.row not in records:
            problems.append(Problem(path, copy.sample, f"its gold is row {copy.row}, which the kb does not have"))
            continue
        if copy.record != records[copy.row]:
            problems.append(Problem(path, copy.sample, f"entity.json is not the kb's record of row {copy.row}"))
        if copy.images != images[copy.row]:
            problems.append(Problem(path, copy.sample, f"its entity pictures are not the kb's of row {copy.row}"))
    return problems
