"""Findings of a build: a line of a file each, and counts of each kind."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from data_prep.formats.release import Finding
from dsmip.storage.atomic import atomic_path

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
