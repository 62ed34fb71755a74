"""Grouped randomisation tests, Holm's correction and the smallest difference, against slow obvious twins."""

import itertools
from collections.abc import Sequence
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsmip.suites.significance import LEVEL, POWER, grouped_test, holm

p_values = st.lists(st.floats(0, 1), max_size=8)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def naive_holm(values: Sequence[float], level: float) -> list[bool]:
    """Step by step: the smallest p-value that is left against level / number left, until one is too large."""
    left, rejected = list(range(len(values))), [False] * len(values)
    while left:
        best = min(left, key=lambda number: values[number])
        if len(left) * values[best] > level:
            break
        rejected[best] = True
        left.remove(best)
    return rejected


@given(p_values, st.floats(0.001, 0.999))
def test_holm_rejects_what_the_step_down_procedure_rejects(values: list[float], level: float) -> None:
    assert [adjusted <= level for adjusted in holm(values)] == naive_holm(values, level)


@given(p_values)
def test_holm_never_makes_a_p_value_smaller_and_keeps_their_order(values: list[float]) -> None:
    adjusted = holm(values)
    assert all(before <= after <= 1 for before, after in zip(values, adjusted, strict=True))
    for (a, b), (c, d) in itertools.combinations(zip(values, adjusted, strict=True), 2):
        assert not (a < c and b > d)


def exact_p_value(differences: Sequence[Fraction], groups: Sequence[int]) -> Fraction:
    """Over all ways to swap whole groups, in exact arithmetic."""
    patterns = list(itertools.product([1, -1], repeat=max(groups) + 1))
    sums = [sum(signs[group] * each for group, each in zip(groups, differences, strict=True)) for signs in patterns]
    extreme = [each for each in sums if abs(each) >= abs(sum(differences))]
    return Fraction(len(extreme), len(patterns))


@st.composite
def grouped(draw: st.DrawFn) -> tuple[list[Fraction], list[int]]:
    values = draw(st.lists(st.sampled_from([Fraction(k, 3) for k in range(-3, 4)]), min_size=1, max_size=10))
    numbers: dict[int, int] = {}
    labels = [draw(st.integers(0, 6)) for _ in values]
    return values, [numbers.setdefault(label, len(numbers)) for label in labels]


@given(grouped())
def test_few_groups_have_the_exact_p_value(case: tuple[list[Fraction], list[int]]) -> None:
    values, groups = case
    differences = torch.tensor([float(each) for each in values], dtype=torch.float64)
    found = grouped_test(differences, groups, seeded())
    assert found.p_value == pytest.approx(float(exact_p_value(values, groups)), abs=1e-12)
    assert found.difference == pytest.approx(float(sum(values, Fraction(0)) / len(values)))
    assert (found.num_groups, found.largest) == (max(groups) + 1, max(map(groups.count, groups)))


def test_many_groups_have_about_the_exact_p_value_of_their_sums() -> None:
    """Sixteen mentions in fourteen groups are drawn; the twin looks at all 16,384 swaps."""
    values = torch.randint(-3, 5, (16,), generator=seeded(3)).tolist()
    groups = [*range(14), 0, 5]
    found = grouped_test(torch.tensor(values, dtype=torch.float64), groups, seeded(), num_flips=40_000)
    assert found.p_value == pytest.approx(float(exact_p_value([Fraction(each) for each in values], groups)), abs=0.01)


def correlated(generator: torch.Generator, num_groups: int, size: int, shift: float = 0.0) -> torch.Tensor:
    """Differences of equal systems (but for `shift`) that are the same on all mentions of a group."""
    group_C = torch.randn(num_groups, 1, generator=generator, dtype=torch.float64) + shift
    return group_C.expand(num_groups, size).reshape(-1)


def test_groups_keep_the_level_that_single_mentions_break() -> None:
    """Of equal systems a test at 5 % finds a difference about every twentieth time: but not if it ignores groups."""
    generator, num_groups, size, tries = seeded(1), 30, 8, 300
    of_group = [group for group in range(num_groups) for _ in range(size)]
    alone = list(range(num_groups * size))
    found = {"groups": 0, "alone": 0}
    for _ in range(tries):
        differences = correlated(generator, num_groups, size)
        for name, groups in (("groups", of_group), ("alone", alone)):
            found[name] += grouped_test(differences, groups, generator, num_flips=200).p_value <= LEVEL
    assert 0.01 < found["groups"] / tries < 0.10
    assert found["alone"] / tries > 0.4


def test_the_smallest_difference_is_found_as_often_as_it_says() -> None:
    generator, num_groups, size, tries = seeded(2), 60, 4, 300
    groups = [group for group in range(num_groups) for _ in range(size)]
    smallest = grouped_test(correlated(seeded(9), 4000, size), [g for g in range(4000) for _ in range(size)], generator)
    assert smallest.smallest is not None
    shift = smallest.smallest * (4000 / num_groups) ** 0.5  # an error falls with the root of the number of groups
    hits = sum(
        grouped_test(correlated(generator, num_groups, size, shift), groups, generator, num_flips=400).p_value <= LEVEL
        for _ in range(tries)
    )
    assert hits / tries == pytest.approx(POWER, abs=0.08)


def test_no_smallest_difference_without_two_groups_or_any_difference() -> None:
    alike = grouped_test(torch.zeros(4, dtype=torch.float64), [0, 1, 2, 2], seeded())
    assert (alike.p_value, alike.smallest) == (1, None)
    one = grouped_test(torch.tensor([1.0, 0.5], dtype=torch.float64), [0, 0], seeded())
    assert (one.p_value, one.smallest) == (1, None)
    with pytest.raises(ValueError, match="nothing to test"):
        grouped_test(torch.zeros(0), [], seeded())
