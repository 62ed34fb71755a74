"""Bounds against what they bound: points of random hulls, and hulls whose bound is known."""

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsmip.ops.bounds import least_norm, local_bound
from dsmip.ops.matching import local_scores

EPS = 1e-5
ROUNDED = 1 - 2.0**-40  # what double precision may lose in the points' own norms


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def chosen(generator: torch.Generator, num: int, values: list[float]) -> Tensor:
    """One of the values for each item, [num, 1, 1]."""
    return torch.tensor(values, dtype=torch.float64)[
        torch.randint(len(values), (num,), generator=generator), None, None
    ]


def random_hulls(seed: int, num_hulls: int, t: int, d: int) -> tuple[Tensor, Tensor]:
    """Rows float64 [N, t, d] and mask: near the origin and far, of equal rows and different ones, tiny and huge."""
    generator = torch.Generator().manual_seed(seed)
    centre = normal(generator, num_hulls, 1, d) * chosen(generator, num_hulls, [0.0, 0.3, 1.0, 5.0])
    rows = centre + normal(generator, num_hulls, t, d) * chosen(generator, num_hulls, [0.0, 1e-3, 1.0, 1.0])
    opposite = chosen(generator, num_hulls, [0.0, 0.0, 1.0])
    rows[:, 1:2] -= opposite * (rows[:, 1:2] + rows[:, :1])  # the second row is minus the first: the origin is inside
    lengths = torch.randint(1, t + 1, (num_hulls, 1), generator=generator)
    mask = torch.arange(t) < lengths
    return rows * chosen(generator, num_hulls, [1e-6, 1.0, 1.0, 1e9]), mask


def random_weights(seed: int, mask: Tensor, num_points: int) -> Tensor:
    """Weights of points of each hull, [N, points, t]: from the middle to the faces."""
    generator = torch.Generator().manual_seed(seed + 1)
    weights = torch.rand((len(mask), num_points, mask.shape[1]), generator=generator, dtype=torch.float64)
    weights = (weights + 1e-3) ** torch.tensor([1.0, 5.0, 20.0]).repeat(num_points)[:num_points, None] * mask[:, None]
    return weights / weights.sum(dim=-1, keepdim=True)


@given(seed=st.integers(0, 10**6), t=st.integers(2, 9), d=st.integers(2, 12), num_steps=st.sampled_from([1, 5, 256]))
@settings(max_examples=15, deadline=None)
def test_no_point_of_a_hull_is_nearer_to_the_origin(seed: int, t: int, d: int, num_steps: int) -> None:
    rows, mask = random_hulls(seed, 400, t, d)
    found = least_norm(rows, mask, num_steps)
    points = random_weights(seed, mask, 30) @ rows
    assert bool((found >= 0).all())
    assert bool((found[:, None] * ROUNDED <= points.norm(dim=-1)).all())


def least_norm_in_the_plane(rows_t2: Tensor) -> float:
    """The nearest of all sides and diagonals, 0 if the origin is in a triangle."""

    def cross(a: Tensor, b: Tensor) -> float:
        return float(a[0] * b[1] - a[1] * b[0])

    for a, b, c in combinations(rows_t2, 3):
        turns = [cross(a, b), cross(b, c), cross(c, a)]
        if min(turns) >= 0 or max(turns) <= 0:
            return 0.0
    nearest = float(rows_t2.norm(dim=1).min())
    for a, b in combinations(rows_t2, 2):
        along = b - a
        share = (-(a @ along) / (along @ along).clamp_min(1e-300)).clamp(0, 1)
        nearest = min(nearest, float((a + share * along).norm()))
    return nearest


@pytest.mark.parametrize("t", [1, 2, 5])
def test_the_least_norm_in_the_plane(t: int) -> None:
    generator = torch.Generator().manual_seed(t)
    rows = normal(generator, 60, t, 2) + 1.5 * normal(generator, 60, 1, 2)
    exact = torch.tensor([least_norm_in_the_plane(each) for each in rows], dtype=torch.float64)
    found = least_norm(rows, torch.ones(60, t, dtype=torch.bool))
    torch.testing.assert_close(found, exact, atol=1e-3, rtol=1e-3)
    assert t == 1 or bool((exact == 0).any()) == (t == 5)


def test_known_hulls() -> None:
    def least(rows: Tensor) -> float:
        return float(least_norm(rows[None], torch.ones(1, len(rows), dtype=torch.bool)))

    assert least(torch.eye(16)) == pytest.approx(0.25)  # the middle of all
    assert least(torch.tensor([[3.0, 4.0]])) == pytest.approx(5)
    assert least(torch.tensor([[3.0, 4.0]] * 7)) == pytest.approx(5)
    assert least(torch.cat([torch.tensor([[0.0, 1.0]]), 5 + torch.rand(40, 2)])) == pytest.approx(1)  # one corner
    assert least(torch.cat([torch.eye(5), -torch.eye(5)])) == 0
    assert least(torch.zeros(2, 3)) == 0
    assert least(torch.tensor([[1e18, 0.0], [1e18, 1e18]])) == pytest.approx(1e18)


def test_more_steps_are_never_worse_and_the_default_is_tight() -> None:
    """40 tokens of width 96 in one direction more than in others, as texts have them."""
    generator = torch.Generator().manual_seed(0)
    rows = normal(generator, 20, 40, 96) + 1.5 * normal(generator, 20, 1, 96)
    mask = torch.arange(40) < torch.randint(1, 41, (20, 1), generator=generator)
    few, default, many = (least_norm(rows, mask, steps) for steps in (4, 256, 2000))
    assert bool((few <= default).all())
    assert bool((default <= many).all())
    torch.testing.assert_close(default, many, atol=0, rtol=0.05)


def test_padding_does_not_matter_and_nan_does() -> None:
    rows, mask = random_hulls(3, 50, 6, 4)
    garbage = rows.masked_fill(~mask[..., None], torch.nan)
    assert torch.equal(least_norm(garbage, mask), least_norm(rows, mask))
    rows[7, 0, 2] = torch.nan
    assert least_norm(rows, mask).isnan().nonzero().flatten().tolist() == [7]


def centred(values: Tensor) -> Tensor:
    return values - values.mean(dim=-1, keepdim=True)


def mentions_and_directions(seed: int, t: int, d: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """float32 values, mask, float64 least norms of the centred values, float32 directions."""
    values, mask = random_hulls(seed, 60, t, d)
    generator = torch.Generator().manual_seed(seed + 2)
    common = chosen(generator, 60, [0.0, 0.0, 30.0])  # to all channels: centring takes it away
    values = values + common * values.norm(dim=-1, keepdim=True)
    values = (values * mask[..., None]).float()
    directions = (normal(generator, 25, 1, d) * chosen(generator, 25, [1e-3, 1.0, 1e3]))[:, 0].float()
    return values, mask, least_norm(centred(values.double()), mask), directions


@given(seed=st.integers(0, 10**6), t=st.integers(2, 9), d=st.integers(2, 12))
@settings(max_examples=15, deadline=None)
def test_no_point_of_a_hull_scores_more(seed: int, t: int, d: int) -> None:
    """Without any tolerance: the bound in single precision against scores in double precision."""
    values, mask, least, directions = mentions_and_directions(seed, t, d)
    bound_ME = local_bound(values, mask, least, directions, EPS)
    assert bound_ME.dtype == torch.float32
    contexts_MPd = random_weights(seed, mask, 60) @ centred(values.double())
    scores_MPE = contexts_MPd @ directions.double().T / (contexts_MPd.square().mean(-1, keepdim=True) + EPS).sqrt()
    assert bool((scores_MPE.amax(dim=1) <= bound_ME).all())


@pytest.mark.parametrize("seed", range(5))
def test_no_attention_scores_more(seed: int) -> None:
    values, mask, least, directions = mentions_and_directions(seed, 6, 8)
    generator = torch.Generator().manual_seed(seed)
    keys, queries = 3 * normal(generator, 60, 6, 8), 3 * normal(generator, 25, 4, 8)
    scores_ME = local_scores(keys, values.double(), mask, queries, None, directions.double(), EPS)
    bound_ME = local_bound(values, mask, least, directions, EPS)
    assert bool((scores_ME <= bound_ME).all())
    assert bool((bound_ME < 0).any())


def test_the_bound_of_one_token_is_its_score() -> None:
    generator = torch.Generator().manual_seed(1)
    token_M1d = normal(generator, 20, 1, 16).float()
    directions = normal(generator, 30, 16).float()
    exact_ME = torch.nn.functional.layer_norm(token_M1d[:, 0], (16,), eps=EPS) @ centred(directions).T
    for copies in (1, 5):
        values, mask = token_M1d.expand(-1, copies, -1), torch.ones(20, copies, dtype=torch.bool)
        found_ME = local_bound(values, mask, least_norm(centred(values.double()), mask), directions, EPS)
        torch.testing.assert_close(found_ME, exact_ME, atol=1e-3, rtol=1e-3)


def test_the_bound_is_reached_where_the_nearest_point_is_as_far_along() -> None:
    """Two tokens, the middle of which is next to the origin; and never more than Cauchy and Schwarz allow."""
    middle, across = torch.tensor([1.0, -1, 1, -1]), torch.tensor([1.0, -1, -1, 1])
    values, mask = torch.stack([middle + across, middle - across])[None], torch.ones(1, 2, dtype=torch.bool)
    least = least_norm(values, mask)
    torch.testing.assert_close(local_bound(values, mask, least, middle[None], 0.0), torch.tensor([[4.0]]))
    around = torch.stack([across, -across])[None]
    limit = local_bound(around, mask, least_norm(around, mask), (middle + across)[None], 0.0)
    torch.testing.assert_close(limit, torch.tensor([[8.0**0.5 * 2]]))


def test_blocks_do_not_matter_and_nan_is_kept() -> None:
    values, mask, least, directions = mentions_and_directions(4, 6, 8)
    values, directions = values.double(), directions.double()
    expected = local_bound(values, mask, least, directions, EPS)
    for max_elements in (1, 700):
        found = local_bound(values, mask, least, directions, EPS, max_elements=max_elements)
        torch.testing.assert_close(found, expected)
    least[3], directions[5, 0] = torch.nan, torch.nan
    nan_ME = local_bound(values, mask, least, directions, EPS).isnan()
    assert bool(nan_ME[:, 5].all())
    assert bool(nan_ME[3][expected[3] > 0].all())
    assert not bool(nan_ME[:3, :5].any())


@pytest.mark.parametrize(("num_mentions", "num_entities"), [(0, 3), (3, 0)])
def test_no_items_give_no_bounds(num_mentions: int, num_entities: int) -> None:
    values, mask = torch.ones(num_mentions, 2, 4), torch.ones(num_mentions, 2, dtype=torch.bool)
    bound = local_bound(values, mask, torch.ones(num_mentions), torch.ones(num_entities, 4), EPS)
    assert bound.shape == (num_mentions, num_entities)
