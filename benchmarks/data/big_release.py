"""A release of any size in the MIMIC layout, with real JPEG files made on the spot, faultless or not.

    uv run python -m benchmarks.big_release FOLDER --entities 160000 --mentions 18000 --size 384 [--faults 2]

Every entity and every mention has a picture. `--faults N` makes N in a thousand records faulty in each of the ways in
`FAULTS`; the counts are printed and come back from `write_big_release`. The same arguments give the same bytes.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Any, TextIO

import torch
from PIL import Image

from benchmarks.data.big_images import BROKEN_IMAGES, ODD_IMAGES, ImageDrawer
from data_prep.build.build import prepare
from data_prep.build.plan import DatasetOptions
from data_prep.build.runners import run_in_processes
from data_prep.formats.mimic import MimicRelease
from dsmip.errors import UserError
from dsmip.storage.atomic import atomic_path

MISSING = "missing"
ENTITY_FAULTS = ("duplicate entity", "no entity id", "wrong type", "empty attributes")
MENTION_FAULTS = ("nil gold", "unknown gold", "null gold", "empty word", "broken text", "no mention id")
_REJECTED_ENTITIES = frozenset({"duplicate entity", "no entity id", "wrong type"})
_IMAGE_FAULTS = (*ODD_IMAGES, *BROKEN_IMAGES, MISSING)
FAULTS = {"kb": (*ENTITY_FAULTS, *_IMAGE_FAULTS), "mentions": (*MENTION_FAULTS, *_IMAGE_FAULTS)}
"""Every way of being faulty, of entities and of mentions. A record has one at most."""

_FOLDERS = {"kb": "kb_image", "mentions": "mention_image"}
_SPLITS = (("train", 0.7), ("dev", 0.1), ("test", 0.2))
_IMAGES_PER_TASK = 500
_SYLLABLES = (
    "ba",
    "ce",
    "di",
    "fo",
    "gu",
    "ka",
    "le",
    "mi",
    "no",
    "pu",
    "ra",
    "se",
    "ti",
    "vo",
    "zu",
    "an",
    "er",
    "is",
)


@dataclass(frozen=True)
class BigRelease:
    """What to write. faults: of each kind, in a thousand records. size: of the pictures' sides, in pixels."""

    entities: int
    mentions: int
    size: int = 384
    seed: int = 0
    faults: int = 0

    def fault(self, side: str, number: int) -> str | None:
        """What is wrong with a record of "kb" or "mentions"; its first record is faultless."""
        draw = self._rng("fault", side, number).random() * 1000
        kinds = FAULTS[side]
        return kinds[int(draw / self.faults)] if number and draw < self.faults * len(kinds) else None

    def entity(self, row: int) -> dict[str, Any]:
        """A record of kb_entity.json."""
        rng, fault = self._rng("entity", row), self.fault("kb", row)
        facts = "".join(
            f"{self._text(rng, 1)}: {self._text(rng, rng.randint(1, 5))}. " for _ in range(rng.randint(2, 9))
        )
        record: dict[str, Any] = {
            "qid": f"Q{row}",
            "entity_name": self._text(rng, rng.randint(1, 4)).title(),
            "attr": facts.strip(),
            "image_list": [f"Q{row}.jpg"],
        }
        changes: dict[str, dict[str, Any]] = {
            "duplicate entity": {"qid": "Q0"},
            "no entity id": {"qid": ""},
            "wrong type": {"qid": row},
            "empty attributes": {"attr": ""},
        }
        return record | changes.get(fault or "", {})

    def mention(self, number: int) -> dict[str, Any]:
        """A record of one of the splits."""
        rng, fault = self._rng("mention", number), self.fault("mentions", number)
        gold = rng.randrange(self.entities)
        while self.fault("kb", gold) in _REJECTED_ENTITIES:
            gold = rng.randrange(self.entities)
        words = min(60, 3 + int(rng.lognormvariate(2.3, 0.7)))  # as captions: mostly short, a few very long
        record: dict[str, Any] = {
            "id": f"m{number}",
            "sentence": self._text(rng, words),
            "mentions": self._text(rng, rng.randint(1, 2)).title(),
            "imgPath": f"m{number}.jpg",
            "answer": f"Q{gold}",
        }
        changes: dict[str, dict[str, Any]] = {
            "nil gold": {"answer": "nil"},
            "unknown gold": {"answer": f"Q{self.entities + number}"},
            "null gold": {"answer": None},
            "empty word": {"mentions": " "},
            "broken text": {"sentence": "cut in half \ud83d"},
            "no mention id": {"id": ""},
        }
        return record | changes.get(fault or "", {})

    def _rng(self, *label: object) -> Random:
        return Random("/".join(map(str, (self.seed, *label))))

    def _text(self, rng: Random, num_words: int) -> str:
        return " ".join(rng.choices(self._words[0], cum_weights=self._words[1], k=num_words))

    @cached_property
    def _words(self) -> tuple[list[str], list[float]]:
        """A vocabulary and its cumulated frequencies, which fall as in any language."""
        rng = self._rng("words")
        words = ["".join(rng.choices(_SYLLABLES, k=rng.randint(1, 4))) for _ in range(4000)]
        return words, list(accumulate(1 / rank for rank in range(1, len(words) + 1)))


def prepared_release(entities: int, mentions: int, work: Path, size: int = 224, workers: int = 2) -> Path:
    """The dataset directory of a faultless release, both in the folder `work`."""
    write_big_release(BigRelease(entities, mentions, size=size), work / "release", workers)
    with run_in_processes(workers) as run:
        prepare(MimicRelease(work / "release"), work / "data", DatasetOptions(name="big"), run=run)
    return work / "data"


def write_big_release(release: BigRelease, folder: Path, workers: int = 1) -> dict[str, Counter[str]]:
    """Writes the release into a new folder, kb_entity.json last; the number of records of each fault, by side.

    Raises:
        UserError: the folder already holds something.
    """
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} already holds something: name a new folder, or delete it")
    counts = {"kb": release.entities, "mentions": release.mentions}
    tasks = [
        (release, folder / _FOLDERS[side], side, start, min(start + _IMAGES_PER_TASK, count))
        for side, count in counts.items()
        for start in range(0, count, _IMAGES_PER_TASK)
    ]
    for name in _FOLDERS.values():
        (folder / name).mkdir(parents=True, exist_ok=True)
    if workers == 1:
        for task in tasks:
            _write_images(*task)
    else:
        context = multiprocessing.get_context("spawn")  # a fork after torch has started its threads may hang
        with ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,)) as pool:
            for done in [pool.submit(_write_images, *task) for task in tasks]:
                done.result()
    start = 0.0
    for split, share in _SPLITS:
        numbers = range(round(start * release.mentions), round((start + share) * release.mentions))
        _write_records(folder / f"BIG_{split}.json", (release.mention(number) for number in numbers))
        start += share
    _write_records(folder / "kb_entity.json", (release.entity(row) for row in range(release.entities)))
    faults = {side: Counter(release.fault(side, number) or "" for number in range(counts[side])) for side in counts}
    return {side: Counter({kind: count for kind, count in found.items() if kind}) for side, found in faults.items()}


def _write_images(release: BigRelease, folder: Path, side: str, start: int, stop: int) -> None:
    drawer = _drawer(release.size, release.seed)
    for number in range(start, stop):
        fault = release.fault(side, number)
        if fault == MISSING:
            continue
        letter, index = ("Q", number) if side == "kb" else ("m", release.entities + number)
        spoil = ODD_IMAGES.get(fault or "") or BROKEN_IMAGES.get(fault or "")
        content = spoil(Image.fromarray(drawer.pixels(index))) if spoil else drawer.jpeg(index)
        (folder / f"{letter}{number}.jpg").write_bytes(content)


_DRAWERS: dict[tuple[int, int], ImageDrawer] = {}


def _drawer(size: int, seed: int) -> ImageDrawer:
    """One per process: its fields cost a second to make."""
    return _DRAWERS.setdefault((size, seed), ImageDrawer(size, seed))


def _write_records(path: Path, records: Iterator[dict[str, Any]]) -> None:
    """A JSON array, a record a line, written as the records come."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
        _write_array(stream, records)


def _write_array(stream: TextIO, records: Iterator[dict[str, Any]]) -> None:
    stream.write("[")
    for number, record in enumerate(records):
        stream.write((",\n" if number else "\n") + json.dumps(record))
    stream.write("\n]\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes a release and says what is in it."""
    options = _options(arguments)
    release = BigRelease(options.entities, options.mentions, options.size, options.seed, options.faults)
    start = time.perf_counter()
    try:
        faults = write_big_release(release, options.folder, options.workers)
    except (UserError, OSError) as error:
        sys.exit(str(error))
    seconds = time.perf_counter() - start
    count = release.entities + release.mentions
    num_bytes = sum(path.stat().st_size for name in _FOLDERS.values() for path in (options.folder / name).iterdir())
    print(f"{count:,} records and pictures in {seconds:.0f} s: {count / seconds:,.0f} a second")
    print(f"{num_bytes / 2**30:.2f} GiB of pictures, {num_bytes / count / 1000:.1f} KB each")
    for side, found in faults.items():
        print(f"faulty {side}: " + (", ".join(f"{kind} {n}" for kind, n in sorted(found.items())) or "none"))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.big_release", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a new folder")
    parser.add_argument("--entities", type=positive, default=160_000, help="default: 160000")
    parser.add_argument("--mentions", type=positive, default=18_000, help="default: 18000")
    parser.add_argument("--size", type=positive, default=384, help="of a picture's sides, in pixels (default: 384)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--faults", type=int, choices=range(51), default=0, metavar="0..50", help="default: 0")
    parser.add_argument("--workers", type=positive, default=os.cpu_count() or 1, help="default: one per core")
    return parser.parse_args(arguments)


def positive(text: str) -> int:
    """An option's number, 1 at least."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number
