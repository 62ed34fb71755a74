"""Findings of a build: a line of a file each, and counts of each kind; and how many of the images were found."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TextIO, TypeVar

from data_prep.formats.image_files import where_images_lie
from data_prep.formats.release import OUTSIDE, Finding, RawEntity, RawMention
from dsmip.storage.atomic import atomic_path

Item = TypeVar("Item", bound=RawEntity | RawMention | Finding)
Counts = dict[str, dict[str, int]]  # action: {reason: count}


class FindingLog:
    """Findings, written as lines and counted.

    Args:
        stream: Takes a line of JSON each.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._counts: Counter[tuple[str, str]] = Counter()

    def note(self, finding: Finding) -> None:
        """Writes and counts a finding. Users count records from 1."""
        line = asdict(finding) | {"record": finding.record + 1}
        self._stream.write(json.dumps(line, sort_keys=True, ensure_ascii=False) + "\n")
        self._counts[finding.action, finding.reason] += 1

    @property
    def counts(self) -> Counts:
        """How many there are, by action and reason."""
        return merged_counts([{action: {reason: count}} for (action, reason), count in self._counts.items()])


class ImageCount:
    """How many of the images that records name were found, as records pass by.

    Args:
        owners: What the records are, in the plural.
    """

    def __init__(self, owners: str) -> None:
        self._owners = owners
        self._named = self._found = 0
        self._lost = ""

    def counted(self, items: Iterable[Item]) -> Iterator[Item]:
        """The same items."""
        for item in items:
            if isinstance(item, Finding):
                if item.reason == OUTSIDE:
                    self._count(item.detail, found=False)
            elif isinstance(item, RawEntity):
                for image in item.images:
                    self._count(image.name, found=image.path is not None)
            elif item.image:
                self._count(item.image.name, found=item.image.path is not None)
            yield item

    def _count(self, name: str, *, found: bool) -> None:
        self._named += 1
        self._found += found
        if not found:
            self._lost = self._lost or name

    def warning(self, folder: Path) -> str | None:
        """What to tell a user when no image or under half of them was found; `folder`: the release's."""
        if 2 * self._found >= self._named:
            return None
        found = f"only {self._found}" if self._found else "none"
        return (
            f"warning: of {self._named} pictures that {self._owners} name {found} "
            f"{'was' if self._found < 2 else 'were'} found, and not {self._lost}: "
            f"{where_images_lie(folder, self._lost)}; docs/data.md says where pictures are looked for"
        )


@contextmanager
def finding_log(path: Path) -> Iterator[FindingLog]:
    """A log that appears, whole, when the block ends without an error."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
        yield FindingLog(stream)


def merged_counts(counts: Iterable[Counts]) -> Counts:
    """Sums by action and reason, sorted."""
    sums: dict[str, Counter[str]] = {}
    for one in counts:
        for action, reasons in one.items():
            sums.setdefault(action, Counter()).update(reasons)
    return {action: dict(sorted(reasons.items())) for action, reasons in sorted(sums.items())}
