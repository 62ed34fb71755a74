"""Bootstrap and randomisation test against exact enumeration over all resamples and all sign flips."""

import itertools
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmip.ops import significance
from dsmip.ops.significance import count_extreme, percentile_interval, randomisation_p_values, resamples

ranks = st.integers(1, 30)
rank_pairs = st.lists(st.tuples(ranks, ranks), min_size=1, max_size=8)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def all_signs(num_mentions: int) -> torch.Tensor:
    return torch.tensor(list(itertools.product([1.0, -1.0], repeat=num_mentions)), dtype=torch.float64)


def exact_extreme(differences: list[Fraction]) -> int:
    """Sign patterns with a sum at least as far from 0 as the observed one, in exact arithmetic."""
    patterns = itertools.product([1, -1], repeat=len(differences))
    sums = [sum(sign * each for sign, each in zip(signs, differences, strict=True)) for signs in patterns]
    return sum(abs(each) >= abs(sum(differences)) for each in sums)


@settings(max_examples=60, deadline=None)
@given(pairs=rank_pairs)
def test_extreme_sums_equal_an_exact_enumeration(pairs: list[tuple[int, int]]) -> None:
    """Reciprocal ranks and hits@1 at once; sums that are equal but for rounding must not be lost."""
    reciprocal = [Fraction(1, second) - Fraction(1, first) for first, second in pairs]
    hit = [Fraction(int(second == 1) - int(first == 1)) for first, second in pairs]
    as_floats = [[1 / second - 1 / first, float(each)] for (first, second), each in zip(pairs, hit, strict=True)]
    found = count_extreme(torch.tensor(as_floats, dtype=torch.float64), all_signs(len(pairs)))
    assert found.tolist() == [exact_extreme(reciprocal), exact_extreme(hit)]


@pytest.mark.parametrize("seed", range(5))
def test_drawn_flips_come_close_to_all_flips(seed: int) -> None:
    differences_MK = torch.randn(10, 3, generator=seeded(seed), dtype=torch.float64) + 0.3
    exact_K = count_extreme(differences_MK, all_signs(10)).double() / 2**10
    num_flips = 20_000
    found_K = randomisation_p_values(differences_MK, num_flips, seeded(seed))
    error_K = (exact_K * (1 - exact_K) / num_flips).sqrt()
    assert bool(((found_K - exact_K).abs() < 4 * error_K + 1 / num_flips).all())


@pytest.mark.parametrize(("wins", "losses"), [(8, 2), (30, 15), (5, 5), (1, 0)])
def test_for_hits_it_is_the_exact_mcnemar_test(wins: int, losses: int) -> None:
    """Mentions on which both systems agree add nothing; of the others as many are won as a coin would win."""
    differences = [1.0] * wins + [-1.0] * losses + [0.0] * 50
    num, extreme = wins + losses, abs(wins - losses)
    exact = sum(math.comb(num, k) for k in range(num + 1) if abs(2 * k - num) >= extreme) / 2**num
    found = randomisation_p_values(torch.tensor(differences).double()[:, None], 20_000, seeded()).item()
    assert found == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 20_000) + 1e-4)


def test_p_values_of_no_difference_and_of_the_smallest_p() -> None:
    assert randomisation_p_values(torch.zeros(5, 2).double(), 99, seeded()).tolist() == [1.0, 1.0]
    assert randomisation_p_values(torch.ones(60, 1).double(), 99, seeded()).tolist() == [0.01]


def test_p_values_of_chance_are_spread_evenly() -> None:
    """Under no difference p <= a happens in about a share a of cases: the test keeps its level."""
    cases_KM = torch.randn(200, 40, generator=seeded(3), dtype=torch.float64)
    p_K = randomisation_p_values(cases_KM.T, 2000, seeded())
    for level in (0.05, 0.25, 0.5):
        assert float((p_K <= level).double().mean()) == pytest.approx(level, abs=4 * math.sqrt(level / 200))


def test_resamples_have_the_distribution_of_all_resamples() -> None:
    """Means of 3 values over all 27 resamples against the drawn ones."""
    values = [0.0, 1.0, 5.0]
    exact = Counter(sum(values[i] for i in rows) for rows in itertools.product(range(3), repeat=3))
    drawn = torch.cat(list(resamples(3, 27_000, seeded())))
    found = Counter(torch.tensor(values)[drawn].sum(dim=1).tolist())
    assert found.keys() == exact.keys()
    for value, times in exact.items():
        assert found[value] / 1000 == pytest.approx(times, abs=4 * math.sqrt(times / 1000))


def test_the_interval_of_a_share_is_that_of_the_normal_approximation() -> None:
    share, num_mentions = 0.3, 2000
    hit_M = torch.arange(num_mentions) < share * num_mentions
    means_R = torch.cat([hit_M[rows].double().mean(dim=1) for rows in resamples(num_mentions, 4000, seeded())])
    low, high = percentile_interval(means_R[:, None], 0.95)[:, 0].tolist()
    half = 1.96 * math.sqrt(share * (1 - share) / num_mentions)
    assert (low, high) == pytest.approx((share - half, share + half), abs=0.1 * half)


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.floats(-100, 100), min_size=1, max_size=30),
    level=st.floats(0.01, 0.99),
    columns=st.integers(1, 3),
)
def test_percentiles_are_numpys(values: list[float], level: float, columns: int) -> None:
    resampled = np.stack([np.array(values) * (k + 1) for k in range(columns)], axis=1)
    found = percentile_interval(torch.from_numpy(resampled), level)
    np.testing.assert_allclose(
        found.numpy(), np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2], axis=0), rtol=1e-9, atol=1e-9
    )


def test_draws_come_in_pieces_that_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(significance, "DRAWS_AT_ONCE", 100)
    chunks = list(resamples(30, 10, seeded()))
    assert [tuple(chunk.shape) for chunk in chunks] == [(3, 30), (3, 30), (3, 30), (1, 30)]
    assert torch.equal(torch.cat(chunks), torch.cat(list(resamples(30, 10, seeded()))))
    differences_MK = torch.randn(30, 1, generator=seeded(1), dtype=torch.float64) + 0.2
    exact = randomisation_p_values(differences_MK, 4000, seeded()).item()
    monkeypatch.setattr(significance, "DRAWS_AT_ONCE", 10**6)
    assert randomisation_p_values(differences_MK, 4000, seeded()).item() == pytest.approx(exact, abs=0.04)


@pytest.mark.parametrize("level", [0.0, 1.0, 95.0])
def test_levels_are_shares(level: float) -> None:
    with pytest.raises(ValueError, match="not between 0 and 1"):
        percentile_interval(torch.zeros(3, 1), level)


def test_nothing_cannot_be_drawn() -> None:
    with pytest.raises(ValueError, match="0 mentions"):
        list(resamples(0, 10, seeded()))
    with pytest.raises(ValueError, match="0 draws"):
        randomisation_p_values(torch.zeros(3, 1).double(), 0, seeded())
