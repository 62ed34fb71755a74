"""Mentions of a section on their way into shards: spooled as they are read, then cut into each shard's records."""

from array import array
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from types import TracebackType

from data_prep.build.staged_records import write_mention
from data_prep.formats.release import RawMention
from dsmip.data.manifest import TRAIN, shard_path
from dsmip.data.sampler import permutation
from dsmip.storage.atomic import atomic_path

MAX_MENTIONS_PER_SHARD = 1000
MIN_TRAIN_SHARDS = 16


def training_order(count: int, seed: int) -> list[int]:
    """Which place in the release's order each of the training mentions in the shards has, counted among those kept."""
    order: list[int] = permutation(count, "build", seed).tolist()
    return order


class MentionSpool:
    """Mentions in the order they come in, in a file that is there as long as this is open; memory holds offsets."""

    def __init__(self, path: Path) -> None:
        self._path, self._offsets, self._end = path, array("q"), 0

    def __enter__(self) -> "MentionSpool":
        self._stream = self._path.open("w+", encoding="ascii")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()
        self._path.unlink(missing_ok=True)

    def __len__(self) -> int:
        return len(self._offsets)

    def add(self, mention: RawMention, gold_row: int) -> None:
        """Takes one more."""
        self._offsets.append(self._end)
        self._end += write_mention(self._stream, mention, gold_row)

    def write_shards(self, section: str, seed: int, records_of: Callable[[str], Path]) -> Iterator[tuple[str, range]]:
        """Writes the records of every shard; yields the shards' paths with the positions that they hold.

        Training mentions are shuffled once, so that a window of shards is a fair sample; others keep their order.

        Args:
            section: What the mentions are of.
            seed: Of the order of training mentions.
            records_of: Where a shard's records go.
        """
        self._stream.flush()
        is_train = section == TRAIN
        order: Sequence[int] = training_order(len(self), seed) if is_train else range(len(self))
        with self._path.open("rb") as lines:
            for index, positions in enumerate(
                _cut(len(self), MAX_MENTIONS_PER_SHARD, MIN_TRAIN_SHARDS if is_train else 1)
            ):
                path = shard_path(section, index)
                with atomic_path(records_of(path)) as temporary, temporary.open("wb") as stream:
                    for position in positions:
                        lines.seek(self._offsets[order[position]])
                        stream.write(lines.readline())
                yield path, positions


def _cut(count: int, max_size: int, min_ranges: int) -> list[range]:
    """`count` items in ranges of nearly equal size: none above `max_size`, at least `min_ranges` where counts allow."""
    num_ranges = max(-(-count // max_size), min(min_ranges, count))
    bounds = [count * index // num_ranges for index in range(num_ranges + 1)] if num_ranges else []
    return [range(start, stop) for start, stop in pairwise(bounds)]
