"""Splits by groups: nothing is shared between splits, sizes are as near as groups allow."""

from collections import Counter, defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.formats.splits import SplitItem, grouped_split, split_choices
from dsmip.data.manifest import SPLITS
from dsmip.errors import UserError

_ITEMS = st.lists(
    st.builds(
        SplitItem,
        sentence=st.sampled_from(
            ["", " ", *(f"Sentence  {n}" for n in range(12)), *(f"sentence {n}" for n in range(12))]
        ),
        image=st.none() | st.integers(0, 12).map(str),
        size=st.integers(1, 4),
    ),
    max_size=40,
)
_SHARES = st.tuples(st.integers(1, 100), st.integers(0, 100)).map(lambda p: (p[0], (100 - p[0]) * p[1] // 100))


def _slow_groups(items: list[SplitItem]) -> list[set[int]]:
    """Neighbours are collected until none is new."""

    def linked(one: SplitItem, other: SplitItem) -> bool:
        texts = [" ".join(item.sentence.lower().split()) for item in (one, other)]
        return bool(texts[0] and texts[0] == texts[1]) or (one.image is not None and one.image == other.image)

    groups: list[set[int]] = []
    for start in range(len(items)):
        if any(start in group for group in groups):
            continue
        group, size = {start}, 0
        while size < len(group):
            size = len(group)
            group |= {n for n in range(len(items)) if any(linked(items[n], items[member]) for member in group)}
        groups.append(group)
    return groups


@given(_ITEMS, _SHARES, st.integers(0, 9))
def test_groups_stay_whole_and_sizes_near(items: list[SplitItem], shares: tuple[int, int], seed: int) -> None:
    percentages = (*shares, 100 - sum(shares))
    found = grouped_split(iter(items), percentages, seed)
    assert found == grouped_split(items, percentages, seed)
    assert len(found) == len(items)
    assert set(found) <= set(SPLITS)
    groups = _slow_groups(items)
    assert all(len({found[member] for member in group}) == 1 for group in groups)
    sizes: Counter[str] = Counter()
    for split, item in zip(found, items, strict=True):
        sizes[split] += item.size
    largest = max((sum(items[member].size for member in group) for group in groups), default=0)
    for split, percentage in zip(SPLITS, percentages, strict=True):
        surplus = sizes[split] - sum(item.size for item in items) * percentage / 100
        assert surplus < largest or not items
        assert percentage or not sizes[split]
    wanted = sum(percentage > 0 for percentage in percentages)
    assert len(set(found)) == min(len(groups), wanted)


def test_single_records_are_cut_exactly_and_by_the_seed() -> None:
    items = [SplitItem(f"sentence {n}", f"{n}.jpg", 1) for n in range(1000)]
    first, second = (grouped_split(items, (70, 10, 20), seed) for seed in (1, 2))
    assert Counter(first) == Counter(second) == {"train": 700, "validation": 100, "test": 200}
    assert sum(one == other for one, other in zip(first, second, strict=True)) < 700
    by_half: dict[str, Counter[bool]] = defaultdict(Counter)
    for number, split in enumerate(first):
        by_half[split][number < 500] += 1
    assert all(min(counts.values()) > 0.3 * sum(counts.values()) for counts in by_half.values())


@pytest.mark.parametrize("wrong", [(70, 10, 10), (110, -10, 0), (0, 50, 50)])
def test_percentages_are_checked(wrong: tuple[int, int, int]) -> None:
    with pytest.raises(UserError, match=r"sum to 100, as 70/10/20"):
        split_choices(wrong, 0)
