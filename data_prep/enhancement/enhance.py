"""The enhancement of a dataset directory: the same data, with a description in the field `desc` of each mention.

<out>/enhancement/settings.json   what was chosen from, and how; written first
<out>/enhancement/answers.jsonl   what a language model has answered (`data_prep.enhancement.answers`)
<out>/manifest.json               written last: present means complete

The kb's files are hard links where the disk has them, else copies. Mentions are read without their pictures first; of
a mention a chooser sees its word and its sentence.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from data_prep.enhancement.bm25 import Bm25
from data_prep.enhancement.candidates import NameIndex
from data_prep.enhancement.choosers import Chooser, Question
from data_prep.enhancement.descriptions import Description, words_of
from dsmip.data.dataset import Dataset
from dsmip.data.manifest import KB, MENTION_DESC, REJECTS_FILE, Manifest, ShardInfo, read_manifest
from dsmip.data.records import described
from dsmip.data.tar import Fields, json_field, read_samples, write_shard
from dsmip.errors import UserError
from dsmip.private import lock_file
from dsmip.progress import Progress, counting, no_progress
from dsmip.storage.atomic import atomic_path, write_json
from dsmip.storage.dataset_storage import MANIFEST_FILE, StoredFile, open_file
from dsmip.storage.parsing import read_json
from dsmip.version import VERSION

FOLDER, SETTINGS, ANSWERS = "enhancement", "settings.json", "answers.jsonl"
_LOCK = ".lock"

MakeChooser = Callable[[Bm25, Path], Chooser]
"""Makes the chooser, before the table is read: of statistics that the table then fills, and a file for answers."""


@dataclass(frozen=True, slots=True)
class Enhanced:
    """What became of a dataset.

    Attributes:
        manifest: Of the new one.
        counts: By kind: `mentions`, those with some `candidates`, with one of the `exact` name, and `described`. None:
            it was complete already.
    """

    manifest: Manifest
    counts: dict[str, int] | None


def enhance(
    dataset: Dataset,
    out: Path,
    table: Iterable[Description],
    settings: dict[str, Any],
    make_chooser: MakeChooser,
    *,
    title: str,
    num_candidates: int,
    progress: Progress = no_progress,
) -> Enhanced:
    """Writes the dataset with descriptions into `out`; a complete one of equal settings is kept.

    Args:
        dataset: What to enhance.
        out: A folder; one that was interrupted goes on, with all answers that it had.
        table: The descriptions, read once.
        settings: All that the choices depend on, as plain values: they are written beside the data.
        make_chooser: Makes what chooses.
        title: Of the chooser, for the manifest.
        num_candidates: How many a mention has at most.
        progress: Told what is under way.

    Raises:
        UserError: The dataset is a view or has descriptions already, or `out` holds something else.
    """
    if dataset.files != dataset.own:
        raise UserError(f"{dataset.location}: is a view; enhance the dataset that it is a view of, then make the view")
    if MENTION_DESC in dataset.manifest.choices:
        raise UserError(f"{dataset.location}: has descriptions already; enhance the dataset that it was made from")
    settings = {**settings, "candidates": num_candidates, "data_sha256": dataset.manifest_hash}
    text = json.dumps(settings, sort_keys=True)
    choice = f"{title}, settings {hashlib.sha256(text.encode()).hexdigest()[:16]}"
    if (complete := _complete(out, settings, choice)) is not None:
        return Enhanced(complete, None)
    mentions = [
        (each.mention_id, each.word, each.sentence)
        for name in dataset.manifest.sections
        for each in dataset.texts(name)
    ]
    bm25 = Bm25({part for _, _, sentence in mentions for part in words_of(sentence)})
    chooser = make_chooser(bm25, out / FOLDER / ANSWERS)
    write_json(out / FOLDER / SETTINGS, settings)
    with _locked(out):
        index = _read_table(table, NameIndex((word for _, word, _ in mentions), num_candidates), bm25, progress)
        questions = [Question(name, word, sentence, index.of(word)) for name, word, sentence in mentions]
        descriptions = _chosen(questions, chooser)
        _link_kb(dataset, out)
        shards = _write_splits(dataset, out, descriptions, progress)
        kept = dataset.manifest.shards_of(KB)
        changed = {"choices": {**dataset.manifest.choices, MENTION_DESC: choice}, "tool_version": VERSION}
        manifest = dataset.manifest.model_copy(update={"shards": (*kept, *shards), **changed})
        write_json(out / MANIFEST_FILE, manifest.model_dump(mode="json"))
    (out / FOLDER / _LOCK).unlink(missing_ok=True)
    return Enhanced(manifest, _counts(questions, descriptions))


def _complete(out: Path, settings: dict[str, Any], choice: str) -> Manifest | None:
    """The manifest of a complete dataset with these settings; None when there is something to do.

    Raises:
        UserError: The folder has something else.
    """
    if (out / MANIFEST_FILE).is_file():
        manifest, _ = read_manifest(out)
        if manifest.choices.get(MENTION_DESC) != choice:
            raise UserError(f"{out}: holds another dataset, or one enhanced in another way; choose another folder")
        Dataset.open(out)
        return manifest
    path = out / FOLDER / SETTINGS
    if path.is_file():
        same = read_json(path, dict, "; remove the folder") == settings
        if not same and (out / FOLDER / ANSWERS).exists():  # without answers there is nothing to lose
            raise UserError(f"{out}: was begun with other settings ({path}); choose another folder, or remove this one")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is not empty and no enhancement; choose another folder")
    return None


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    try:
        with FileLock(lock_file(out / FOLDER / _LOCK), blocking=False):
            yield
    except Timeout as error:
        raise UserError(f"{out}: is being made by another process; wait for it or choose another folder") from error


def _read_table(table: Iterable[Description], index: NameIndex, bm25: Bm25, progress: Progress) -> NameIndex:
    for count, description in enumerate(table, start=1):
        index.add(description)
        bm25.add(words_of(description.text))
        if count % 1000 == 0:
            progress("descriptions", count, 0)
    return index


def _chosen(questions: Sequence[Question], chooser: Chooser) -> list[str]:
    """The description of each mention, empty where none is chosen."""
    return [
        "" if choice is None else question.candidates[choice].description.text
        for question, choice in zip(questions, chooser(questions), strict=True)
    ]


def _counts(questions: Sequence[Question], descriptions: Sequence[str]) -> dict[str, int]:
    return {
        "mentions": len(questions),
        "candidates": sum(bool(question.candidates) for question in questions),
        "exact": sum(any(each.exact for each in question.candidates) for question in questions),
        "described": sum(map(bool, descriptions)),
    }


def _link_kb(dataset: Dataset, out: Path) -> None:
    """The kb's shards and table, and the list of rejects: links, or copies where the disk has none."""
    files: list[StoredFile] = [*dataset.manifest.shards_of(KB), dataset.manifest.entities_file]
    for file in files:
        with atomic_path(out / file.path) as temporary:
            dataset.files.use(file, partial(_link, target=temporary))
    with dataset.files.fresh(REJECTS_FILE) as rejects, atomic_path(out / REJECTS_FILE) as temporary:
        _link(rejects, temporary)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except FileNotFoundError:
        raise
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, target)


def _write_splits(dataset: Dataset, out: Path, descriptions: Sequence[str], progress: Progress) -> list[ShardInfo]:
    """The shards of mentions, with the descriptions; what the manifest says of them."""
    remaining, written = iter(descriptions), list[ShardInfo]()
    add = counting(progress, "mentions", len(descriptions))
    for name in dataset.manifest.sections:
        for shard in dataset.manifest.shards_of(name):
            made = write_shard(out / shard.path, _described(dataset, shard, remaining))
            written.append(ShardInfo(path=shard.path, samples=made.samples, bytes=made.bytes, sha256=made.sha256))
            add(made.samples)
    return written


def _described(dataset: Dataset, shard: ShardInfo, descriptions: Iterator[str]) -> Iterator[tuple[str, Fields]]:
    with open_file(dataset.files, shard) as stream:
        for sample in read_samples(stream, dataset.files.address(shard.path), lambda index: True):
            record = {**json.loads(sample.fields["json"]), **described(next(descriptions))}
            yield sample.key, {**sample.fields, "json": json_field(record)}
