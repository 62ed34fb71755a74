"""Close pairs in double precision, with a matcher whose single-precision errors are known."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dsmip.data.table import Table
from dsmip.evaluation.index import EntityIndex
from dsmip.evaluation.ranking import RankedModel, rank, rank_unrefined
from dsmip.evaluation.ranks import NotRankable, Ranking, check_golds, merge_gold_scores, merge_rankings
from dsmip.evaluation.refinement import GRID, PairScorer, scored_together
from dsmip.evaluation.tiles import TileSize
from dsmip.units.matcher import Scores
from tests.support.scoring.matchers import CPU, NoisyMatcher, TableMatcher, numbered, ranks_by_sorting, weighted


def refined(matcher: TableMatcher, shape: tuple[int, int], gold_M: Tensor, **options: Any) -> Ranking:
    return rank(of(matcher, shape, gold_M), CPU, **options)


def of(matcher: TableMatcher, shape: tuple[int, int], gold_M: Tensor) -> RankedModel:
    return RankedModel(matcher, weighted(shape[0]), EntityIndex([weighted(shape[1])]), gold_M)


def example(seed: int, shape: tuple[int, int], error: float) -> tuple[NoisyMatcher, Tensor]:
    """Scores on a coarse grid (ties), errors of at most `error`, golds."""
    generator = torch.Generator().manual_seed(seed)
    scores_ME = torch.randint(0, 50, shape, generator=generator).double() / 16
    errors_ME = (torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1) * error
    return NoisyMatcher(scores_ME, errors_ME), torch.randint(shape[1], shape[:1], generator=generator)


@given(seed=st.integers(0, 10**6), tiles=st.integers(1, 9), error=st.sampled_from([0.0, 1e-4, 0.05, 0.5]))
@settings(max_examples=60, deadline=None)
def test_ranks_and_top_k_are_the_exact_ones(seed: int, tiles: int, error: float) -> None:
    shape = (5, 40)
    matcher, gold_M = example(seed, shape, error)
    scores_ME = matcher.scores_ME
    ranking = refined(matcher, shape, gold_M, top_k=4, tile_size=TileSize(tiles, 3 * tiles))
    assert ranking.rank_M.tolist() == ranks_by_sorting(scores_ME, gold_M)
    best_ME = scores_ME.sort(dim=1, descending=True, stable=True)
    assert torch.equal(ranking.top_row_Mk, best_ME.indices[:, :4])
    assert torch.equal(ranking.top_score_Mk, best_ME.values[:, :4])
    assert ranking.cost.refinement is not None
    assert 2 * ranking.cost.refinement.largest_error <= ranking.cost.refinement.band


def test_only_close_pairs_are_scored_again() -> None:
    shape = (3, 2000)
    matcher, gold_M = example(1, shape, 1e-6)
    matcher.scores_ME = torch.rand(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ranking = refined(matcher, shape, gold_M)
    assert ranking.cost.refinement is not None
    assert ranking.cost.refinement.largest_error <= 1.1e-6
    assert 3 <= ranking.cost.refinement.num_pairs < 30  # the golds, and what is within some millionths of them


@given(seed=st.integers(0, 10**6), tiles=st.integers(1, 9), error=st.sampled_from([0.0, 1e-4, 0.05]))
@settings(max_examples=40, deadline=None)
def test_ranks_without_refinement_differ_by_the_pairs_that_are_counted(seed: int, tiles: int, error: float) -> None:
    shape = (5, 40)
    matcher, gold_M = example(seed, shape, error)
    ranking = rank_unrefined(of(matcher, shape, gold_M), CPU, tile_size=TileSize(tiles, 3 * tiles))
    assert ranking.cost.refinement is None
    assert ranking.cost.unrefined is not None
    band, close_M = ranking.cost.unrefined.band, ranking.cost.unrefined.close_M
    assert 4 * error <= band <= max(8 * error, 1e-4) + 1e-5
    exact_M = torch.tensor(ranks_by_sorting(matcher.scores_ME, gold_M))
    assert bool(((ranking.rank_M - exact_M).abs() <= close_M).all())
    single_ME = (matcher.scores_ME + matcher.errors_ME).float()
    near_ME = (single_ME - single_ME.gather(1, gold_M[:, None])).abs() <= band
    assert torch.equal(close_M, near_ME.sum(dim=1) - 1)
    metrics = ranking.cost.unrefined.metrics()
    assert metrics == {"band": band, "close_pairs": close_M.sum(), "close_mentions": (close_M > 0).sum()}


class WithTowers(NoisyMatcher):
    """Its towers cannot be copied, as little as they fit into memory a second time."""

    def __init__(self, scores_ME: Tensor) -> None:
        super().__init__(scores_ME, torch.zeros_like(scores_ME))
        self.encoder = nn.ModuleDict({"tower": Uncopied()})

    def pretrained_towers(self) -> list[nn.Module]:
        return [self.encoder["tower"]]


class Uncopied(nn.Module):
    def __deepcopy__(self, memo: object) -> None:
        raise AssertionError("towers take no part in scoring")


def test_towers_are_not_copied() -> None:
    """A validation during training ranks with the matcher that is trained, towers and all."""
    scores_ME, gold_M = torch.tensor([[1.0, 2.0, 3.0]]).double(), torch.tensor([1])
    assert PairScorer(WithTowers(scores_ME), weighted(1), EntityIndex([weighted(3)]), CPU).gold_scores(gold_M) == 2


@pytest.mark.parametrize("alike", [False, True])
def test_half_precision_scores_close_pairs_and_few_beside_them(alike: bool) -> None:
    """Scores rounded to half precision have a wide band. Mentions with the same close entities are scored together."""
    generator = torch.Generator().manual_seed(3)
    shape = (48, 3000)
    scores_ME = 14 * torch.randn(1 if alike else 48, 3000, generator=generator, dtype=torch.float64).expand(shape)
    matcher = NoisyMatcher(scores_ME, scores_ME.half().double() - scores_ME)
    gold_M = scores_ME.abs().argmin(dim=1)  # in the thick of all
    ranking = refined(matcher, shape, gold_M)
    assert ranking.rank_M.tolist() == ranks_by_sorting(scores_ME, gold_M)
    assert ranking.cost.refinement is not None
    num_pairs, num_scored = ranking.cost.refinement.num_pairs, ranking.cost.refinement.num_scored
    assert num_pairs > 48 * 10
    assert num_scored <= num_pairs + 48 * 256
    if alike:
        assert num_scored < 1.5 * num_pairs + 2 * 32 * 48  # with each mention's probe for all


@given(data=st.data(), num_mentions=st.integers(1, 70), call=st.integers(0, 40))
@settings(max_examples=40, deadline=None)
def test_mentions_are_scored_together_while_little_is_needless(
    data: st.DataObject, num_mentions: int, call: int
) -> None:
    seed, share = data.draw(st.integers(0, 10**6)), data.draw(st.sampled_from([0.0, 0.05, 0.9]))
    close_ME = torch.rand(num_mentions, 20, generator=torch.Generator().manual_seed(seed)) < share
    groups = list(scored_together(close_ME, call))
    assert torch.cat(groups).tolist() == list(range(num_mentions))
    for row_m in groups:
        needless = len(row_m) * int(close_ME[row_m].any(dim=0).sum()) - int(close_ME[row_m].sum())
        assert needless <= call
        assert len(row_m) <= 32
    assert len(list(scored_together(close_ME[:1].expand(32, 20), 0))) == 1


def test_an_error_that_the_sample_missed_widens_the_band() -> None:
    """The band is measured on every 32nd entity or so; a close pair that errs more must not pass."""
    scores_ME = torch.linspace(0, 1, 2001, dtype=torch.float64)[None]
    errors_ME = torch.zeros(1, 2001, dtype=torch.float64)
    errors_ME[0, 1000] = -0.1  # the gold: scored exactly at once, so it tells what single precision does
    errors_ME[0, 1040] = -0.05
    ranking = refined(NoisyMatcher(scores_ME, errors_ME), (1, 2001), torch.tensor([1000]), top_k=3)
    assert ranking.rank_M.tolist() == [1001.0]
    assert ranking.cost.refinement is not None


def test_equal_features_tie_in_slices_that_are_ranked_apart() -> None:
    """Scores that differ in the last bits of double precision are equal."""
    scores_ME = torch.full((2, 9), 0.7, dtype=torch.float64) + torch.arange(9) * 1e-15
    matcher, gold_row_M = NoisyMatcher(scores_ME, torch.zeros(2, 9, dtype=torch.float64)), torch.tensor([0, 8])
    index = EntityIndex([weighted(9)])
    slices = [index.slice(part, 2) for part in range(2)]
    golds = torch.stack([PairScorer(matcher, weighted(2), each, CPU).gold_scores(gold_row_M) for each in slices])
    assert golds.isnan().tolist() == [[False, True], [True, False]]
    gold_score_M = golds.nan_to_num(-torch.inf).amax(dim=0)
    parts = [
        rank(RankedModel(matcher, weighted(2), each, gold_row_M), CPU, top_k=3, gold_score_M=gold_score_M)
        for each in slices
    ]
    merged = merge_rankings(parts, 3)
    assert merged.rank_M.tolist() == [5.0, 5.0]
    assert merged.top_row_Mk.tolist() == [[0, 1, 2]] * 2
    assert gold_score_M.tolist() == pytest.approx([0.7, 0.7], abs=GRID)


def test_a_gold_outside_the_index_is_refused() -> None:
    matcher, _ = example(0, (2, 5), 0.0)
    with pytest.raises(ValueError, match="mention 1: its gold, kb row 5, is not in the index"):
        refined(matcher, (2, 5), torch.tensor([0, 5]))


@pytest.mark.parametrize("row", [-1, 5])
def test_a_gold_in_no_slice_is_refused_without_refinement_too(row: int) -> None:
    matcher, _ = example(0, (2, 5), 0.0)
    with pytest.raises(ValueError, match=f"mention 1: its gold, kb row {row}, is in no worker's index"):
        rank_unrefined(of(matcher, (2, 5), torch.tensor([0, row])), CPU)


def test_gold_scores_of_slices_are_merged_and_checked() -> None:
    nan = torch.nan
    parts = [torch.tensor([1.0, nan, nan, -torch.inf]).double(), torch.tensor([nan, 2.0, nan, nan]).double()]
    merged = merge_gold_scores(parts)
    assert merged[[0, 1, 3]].tolist() == [1.0, 2.0, -torch.inf]
    assert bool(merged[2].isnan())
    with pytest.raises(NotRankable, match="mention 2 and entity row 4"):
        check_golds(merged, torch.tensor([0, 1, 4, 2]), range(5))
    with pytest.raises(ValueError, match="mention 2: its gold, kb row 9"):
        check_golds(merged, torch.tensor([0, 1, 9, 2]), range(5))


@pytest.mark.parametrize("ranked_by", [rank, rank_unrefined])
@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_nothing_to_rank_is_refused(ranked_by: Callable[..., Ranking], shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="nothing to rank"):
        ranked_by(of(example(0, (2, 3), 0.0)[0], shape, torch.zeros(shape[0]).long()), CPU)


def test_errors_that_carry_pairs_far_out_of_the_band_are_found_by_probes() -> None:
    """Each mention has one pair scored again wherever it lies; a matcher that errs so on every fifth pair is caught."""
    scores_ME = torch.rand(40, 500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    errors_ME = torch.zeros(40, 500, dtype=torch.float64)
    errors_ME[16:, ::5] = -0.3  # not in the first mentions, which the band is measured on
    gold_M = torch.arange(40) * 5 + 1
    ranking = refined(NoisyMatcher(scores_ME, errors_ME), (40, 500), gold_M)
    assert ranking.rank_M.tolist() == ranks_by_sorting(scores_ME, gold_M)


@pytest.mark.parametrize("score", [torch.inf, -torch.inf])
def test_infinite_scores_are_refused(score: float) -> None:
    matcher, gold_M = example(0, (3, 9), 0.0)
    matcher.scores_ME[1, 4] = score
    with pytest.raises(NotRankable, match="mention 1 and entity row 4 is NaN or infinite"):
        refined(matcher, (3, 9), gold_M)


@pytest.mark.parametrize("ranked_by", [rank, rank_unrefined])
@pytest.mark.parametrize("gold", [1, 7])
def test_nan_is_named(ranked_by: Callable[..., Ranking], gold: int) -> None:
    matcher, gold_M = example(0, (3, 9), 0.0)
    matcher.scores_ME[2, 7] = float("nan")
    gold_M[2] = gold
    index = EntityIndex([weighted(9).rows(slice(0, 5)), weighted(9).rows(slice(5, None))])
    with pytest.raises(NotRankable, match="mention 2 and entity row 7 is NaN") as raised:
        ranked_by(RankedModel(matcher, weighted(3), index, gold_M), CPU, tile_size=TileSize(2, 2))
    assert (raised.value.mention, raised.value.entity_row) == (2, 7)


class SmallDevice(TableMatcher):
    """Has memory for a few entities at a time."""

    def score(self, mentions: Table, entities: Table, *, noise: Tensor | None = None) -> Scores:
        if len(entities) > 3:
            raise torch.OutOfMemoryError("no memory left")
        return super().score(mentions, entities)


def test_tiles_are_halved_when_memory_runs_out() -> None:
    scores_ME = torch.randint(0, 5, (4, 20), generator=torch.Generator().manual_seed(0)).float()
    gold_M, notices = torch.tensor([3, 0, 19, 7]), list[str]()
    model = RankedModel(SmallDevice(scores_ME), numbered(4), EntityIndex([numbered(20)]), gold_M)
    ranking = rank_unrefined(model, CPU, top_k=5, notice=notices.append)
    assert ranking.rank_M.tolist() == ranks_by_sorting(scores_ME, gold_M)
    assert torch.equal(ranking.top_row_Mk, scores_ME.sort(dim=1, descending=True, stable=True).indices[:, :5])
    tiles = [int(notice.split()[-2]) for notice in notices if "tiles" in notice]
    assert tiles[-1] in (2, 3)
    assert all((larger + 1) // 2 == smaller for larger, smaller in pairwise(tiles))


def test_exact_scores_are_made_in_parts_when_memory_runs_out() -> None:
    scores_ME = torch.randint(0, 5, (9, 20), generator=torch.Generator().manual_seed(0)).double()
    gold_M, notices = torch.arange(9) * 2, list[str]()
    ranking = refined(SmallDevice(scores_ME), (9, 20), gold_M, top_k=5, notice=notices.append)
    assert ranking.rank_M.tolist() == ranks_by_sorting(scores_ME, gold_M)
    exact = [notice for notice in notices if "double precision" in notice]
    assert "going on with 5 mentions against 4096 entities at a time" in exact[0]
    assert exact[-1].endswith("1 mentions against 3 entities at a time")
    with pytest.raises(torch.OutOfMemoryError):
        PairScorer(NoMemory(scores_ME), weighted(9), EntityIndex([weighted(20)]), CPU).gold_scores(gold_M)


class NoMemory(TableMatcher):
    def score(self, mentions: Table, entities: Table, *, noise: Tensor | None = None) -> Scores:
        raise torch.OutOfMemoryError("no memory left")


def test_a_single_entity_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        rank_unrefined(
            RankedModel(NoMemory(torch.zeros(1, 4)), numbered(1), EntityIndex([numbered(4)]), torch.tensor([0])), CPU
        )
