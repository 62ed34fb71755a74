"""Pruned rankings are those that compute every pair: with systems of random weights, and with a double that prunes all
that it may."""

import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsmip import evaluation
from dsmip.config import ExperimentConfig
from dsmip.evaluation import NotRankable, Ranking, TileSize, rank
from dsmip.index import EntityIndex
from dsmip.merging import merge_rankings
from dsmip.models.base import Scores
from dsmip.models.dsmip import Dsmip
from dsmip.rank_options import RankOptions
from dsmip.ranked_model import RankedModel
from dsmip.refinement import Floor, PairScorer
from dsmip.reports import evaluate_model
from dsmip.runs import Run
from dsmip.table import Ragged, Table
from ray_jobs.evaluate import evaluate_run
from tests.support.matchers import CPU, NoisyMatcher, ranks_by_sorting, weighted
from tests.support.ranking_cases import FORMS, Case, assert_equal, case_of, random_matcher
from tests.support.systems import features

NUM_MENTIONS, NUM_ENTITIES = 9, 90


def make_case(form: str, config: ExperimentConfig, seed: int = 0) -> Case:
    sides = features(config, NUM_MENTIONS, 2 * seed), features(config, NUM_ENTITIES, 2 * seed + 1)
    return case_of(form, random_matcher(form, config, seed), *sides)


@pytest.fixture(scope="module", params=FORMS)
def case(request: pytest.FixtureRequest, small_config: ExperimentConfig) -> Case:
    return make_case(request.param, small_config)


@pytest.mark.parametrize(
    ("tiles", "top_k"), [((100, 100), 5), ((4, 16), 0), ((4, 16), 5), ((1, 7), 5), ((9, 40), NUM_ENTITIES + 1)]
)
def test_pruning_changes_no_ranking(case: Case, tiles: tuple[int, int], top_k: int) -> None:
    expected = case.rank(case.golds(), TileSize(100, 100), top_k, prune=False)
    found = case.rank(case.golds(), TileSize(*tiles), top_k, prune=True)
    assert_equal(found, expected)
    assert expected.pruned_pairs_M is None


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", range(1, 5))
def test_other_weights_and_items(small_config: ExperimentConfig, form: str, seed: int) -> None:
    case = make_case(form, small_config, seed)
    expected = case.rank(case.golds(), TileSize(9, 16), 2, prune=False)
    assert_equal(case.rank(case.golds(), TileSize(9, 16), 2, prune=True), expected)


def test_pairs_are_pruned_and_counted(case: Case) -> None:
    ranking = case.rank(case.golds(), TileSize(9, 10), 2, prune=True)
    assert ranking.pruned_pairs_M is not None
    assert ranking.token_pairs_M2 is not None
    pruned_M, (computed_M, all_M) = ranking.pruned_pairs_M, ranking.token_pairs_M2.T
    assert pruned_M.sum() > 0.1 * (pruned_M + computed_M).sum()
    chosen = case.score().chosen_ME
    if chosen is None:
        assert torch.equal(pruned_M + computed_M, torch.full_like(pruned_M, NUM_ENTITIES))
        assert torch.equal(all_M, torch.full_like(pruned_M, NUM_ENTITIES))
    else:
        assert torch.equal(pruned_M + computed_M, (chosen != 1).sum(dim=1))  # all but the visual expert's
        assert torch.equal(all_M, torch.full_like(pruned_M, 2 * NUM_ENTITIES))


@torch.no_grad()
def test_only_pairs_below_the_floor_are_left_out(case: Case) -> None:
    """The floor just below each entity's score in turn: that entity stays, and whatever is above it."""
    scores_ME = case.score().total_ME
    for column in range(0, NUM_ENTITIES, 9):
        floor_M = scores_ME[:, column] - 1e-4
        found_ME = case.score(floor_M).total_ME
        above_ME = scores_ME >= floor_M[:, None]
        assert bool(found_ME[above_ME].isfinite().all())
        kept_ME = found_ME != -torch.inf
        torch.testing.assert_close(found_ME[kept_ME], scores_ME[kept_ME], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("top_k", [0, 4])
def test_slices_of_the_kb_are_pruned_on_their_own(case: Case, top_k: int) -> None:
    gold_row_M, index = case.golds(), EntityIndex([case.entities])
    slices = [index.slice(part, 3) for part in range(3)]
    golds = [PairScorer(case.matcher, case.mentions, each, CPU).gold_scores(gold_row_M) for each in slices]
    gold_score_M = torch.stack(golds).nan_to_num(-torch.inf).amax(dim=0)
    parts = [
        rank(
            case.matcher,
            case.mentions,
            each,
            gold_row_M,
            device=CPU,
            top_k=top_k,
            num_choices=case.num_choices,
            refine=True,
            prune=True,
            gold_score_M=gold_score_M,
            tile_size=TileSize(4, 8),
        )
        for each in slices
    ]
    merged = merge_rankings(parts, top_k)
    assert_equal(merged, case.rank(gold_row_M, TileSize(100, 100), top_k, prune=False))
    assert merged.pruned_pairs_M is not None
    assert merged.pruned_pairs_M.sum() > 0


def test_an_entity_whose_tokens_score_nan_is_named_although_it_matters_to_no_rank(
    small_config: ExperimentConfig,
) -> None:
    case = make_case("mimic", small_config)
    worst = int(case.score().total_ME.amax(dim=0).argmin())
    query = case.entities.ragged("text.query")
    values = query.values.clone()
    values[query.starts[worst]] = torch.nan
    broken = Table({**case.entities.columns, "text.query": Ragged(values, query.starts, query.lengths)})
    gold_row_M = case.golds()
    assert worst not in gold_row_M.tolist()
    with pytest.raises(NotRankable, match=f"entity row {worst} is NaN"):
        Case(case.matcher, case.mentions, broken, 0).rank(gold_row_M, TileSize(9, 10), 2, prune=True)


@pytest.mark.parametrize("form", ["pair", "mention", "multimodal"])
def test_the_part_whose_score_is_nan_is_named(small_config: ExperimentConfig, form: str) -> None:
    """The expert of a gated system, the unit of an expert: from a tile's scores, and for golds by asking once again."""
    case = make_case(form, small_config, 2)
    chosen = case.score().chosen_ME
    name = "image" if chosen is None else list(case.score().parts)[int(chosen[3, 5])]
    columns = dict(case.entities.columns)
    for column in columns:
        values = columns[column]
        if column.startswith(name) and isinstance(values, Tensor):
            columns[column] = values.index_fill(0, torch.tensor(5), torch.nan)
    broken = Case(case.matcher, case.mentions, Table(columns), case.num_choices)
    with torch.no_grad():
        scores = broken.score()
    assert scores.broken_part(3, 5) == name
    first = int(scores.total_ME[:, 5].isnan().nonzero()[0, 0])
    elsewhere_M = torch.zeros(NUM_MENTIONS, dtype=torch.int64)
    with pytest.raises(NotRankable, match=rf"mention {first} and entity row 5 is NaN or infinite \({name}\)"):
        rank(case.matcher, case.mentions, EntityIndex([broken.entities]), elsewhere_M, device=CPU)
    model = RankedModel(case.matcher, case.mentions, EntityIndex([broken.entities]), elsewhere_M + 5, ())
    with pytest.raises(NotRankable) as raised:
        model.rank(CPU, notice=lambda line: None)
    assert model.broken_part(raised.value.mention, raised.value.entity_row) == name
    assert model.broken_part(0, 0) is None


def test_nothing_is_pruned_without_token_level_scores(small_config: ExperimentConfig) -> None:
    matcher = Dsmip.build_part("visual", small_config, with_encoder=False).eval()
    sides = [features(small_config, count, count).under("visual") for count in (NUM_MENTIONS, NUM_ENTITIES)]
    with torch.no_grad():
        case = Case(matcher, matcher.prepare_mentions(sides[0]), matcher.prepare_entities(sides[1]), 0)
    found = case.rank(case.golds(), TileSize(4, 8), 3, prune=True)
    assert_equal(found, case.rank(case.golds(), TileSize(4, 8), 3, prune=False))
    assert found.pruned_pairs_M is not None
    assert found.pruned_pairs_M.sum() == 0
    assert found.token_pairs_M2 is None


class EagerMatcher(NoisyMatcher):
    """Leaves out every pair that scores below the floor, as it errs: no bound can be tighter."""

    def score(
        self, mentions: Table, entities: Table, *, noise: Tensor | None = None, at_least_M: Tensor | None = None
    ) -> Scores:
        total_ME = super().score(mentions, entities).total_ME
        if at_least_M is None:
            return Scores(total_ME)
        return Scores(total_ME.masked_fill(total_ME < at_least_M[:, None], -torch.inf))


def ranked_eagerly(matcher: NoisyMatcher, gold_M: Tensor, top_k: int, tiles: TileSize) -> Ranking:
    num_mentions, num_entities = matcher.scores_ME.shape
    return rank(
        matcher,
        weighted(num_mentions),
        EntityIndex([weighted(num_entities)]),
        gold_M,
        device=CPU,
        top_k=top_k,
        refine=True,
        prune=True,
        tile_size=tiles,
    )


@given(
    seed=st.integers(0, 10**6),
    tiles=st.integers(1, 9),
    top_k=st.integers(0, 5),
    error=st.sampled_from([0.0, 1e-4, 0.05]),
)
@settings(max_examples=80, deadline=None)
def test_the_floor_leaves_ranks_and_top_k_exact(seed: int, tiles: int, top_k: int, error: float) -> None:
    shape, generator = (5, 40), torch.Generator().manual_seed(seed)
    scores_ME = torch.randint(-200, 200, shape, generator=generator).double() / 16  # a coarse grid: ties
    errors_ME = (torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1) * error
    gold_M = torch.randint(shape[1], shape[:1], generator=generator)
    ranking = ranked_eagerly(EagerMatcher(scores_ME, errors_ME), gold_M, top_k, TileSize(tiles, 3 * tiles))
    assert ranking.rank_M.tolist() == ranks_by_sorting(scores_ME, gold_M)
    best_ME = scores_ME.sort(dim=1, descending=True, stable=True)
    assert torch.equal(ranking.top_row_Mk, best_ME.indices[:, :top_k])
    assert torch.equal(ranking.top_score_Mk, best_ME.values[:, :top_k])


def test_a_wider_band_lowers_the_floor() -> None:
    """A close pair errs more than the sample said: all is ranked again with other floors, twice."""
    scores_ME = torch.linspace(0, 1, 2001, dtype=torch.float64)[None]
    errors_ME = 1e-4 * (-1.0) ** torch.arange(2001, dtype=torch.float64)[None]  # the band is 8e-4
    errors_ME[0, 1000] = -6e-4  # the gold: it is refined, and tells that the band is too narrow
    errors_ME[0, 1001] = -4e-3  # below the first floor, and better than the gold
    ranking = ranked_eagerly(EagerMatcher(scores_ME, errors_ME), torch.tensor([1000]), 0, TileSize(1, 64))
    assert ranking.rank_M.tolist() == [1001.0]
    assert ranking.refinement is not None
    assert ranking.refinement.band == pytest.approx(3.2e-2, rel=1e-3)
    assert ranking.pruned_pairs_M is not None
    assert ranking.pruned_pairs_M.tolist() == [872]


def test_a_kb_of_one_tile_is_pruned_too() -> None:
    scores_ME = torch.linspace(1, 0, 500, dtype=torch.float64)[None]
    errors_ME = 1e-6 * (-1.0) ** torch.arange(500, dtype=torch.float64)[None]
    ranking = ranked_eagerly(EagerMatcher(scores_ME, errors_ME), torch.tensor([3]), 20, TileSize(1, 500))
    assert ranking.top_row_Mk.tolist() == [list(range(20))]
    assert ranking.pruned_pairs_M is not None
    assert ranking.pruned_pairs_M.tolist() == [500 - 80]  # the first four times k are scored whole


def test_the_floor_is_two_bands_below_the_gold_and_the_kth_best() -> None:
    floor = Floor(torch.tensor([1.0, 5.0], dtype=torch.float64), band=0.25, k=2)
    assert floor.at_least_M.tolist() == [-torch.inf, -torch.inf]  # any entity may be among the best
    floor.rise(torch.tensor([[0.0], [4.0]]))
    assert floor.at_least_M.tolist() == [-torch.inf, -torch.inf]
    floor.rise(torch.tensor([[2.0, -1.0, 3.0], [-torch.inf, 3.0, -torch.inf]]))
    assert floor.at_least_M.tolist() == pytest.approx([0.5, 2.5], abs=1e-5)
    assert bool((floor.at_least_M < torch.tensor([0.5, 2.5])).all())
    assert Floor(torch.tensor([1.0], dtype=torch.float64), 0.25, 0).at_least_M.tolist() == pytest.approx([0.5])


def test_golds_must_be_known_beforehand() -> None:
    with pytest.raises(ValueError, match="prune needs refine"):
        rank(
            NoisyMatcher(torch.zeros(1, 2), torch.zeros(1, 2)),
            weighted(1),
            EntityIndex([weighted(2)]),
            torch.tensor([0]),
            device=CPU,
            prune=True,
        )


@pytest.mark.parametrize("model", ["dsmip", "visual"])
def test_reports_are_the_same_and_say_how_many_pairs_survived(
    run: Run, model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_report = evaluate_model(run, "test", model, CPU, options=RankOptions(top_k=1))
    whole_ranks = pq.read_table(whole_report.folder / "ranks.parquet")
    monkeypatch.setattr(evaluation, "CPU_TILES", TileSize(128, 2))  # the best of a first tile tells what to prune
    pruned = evaluate_run(run.folder, "test", model, "cpu", options=RankOptions(top_k=1, prune="hull"))
    assert pruned["overall"] == whole_report.metrics["overall"]
    assert pruned.get("experts") == whole_report.metrics.get("experts")
    assert pq.read_table(whole_report.folder / "ranks.parquet").equals(whole_ranks)
    said = capsys.readouterr().out
    if model == "visual":
        assert "prune" not in pruned
        assert "nothing to prune: visual has no token-level scores" in said
        return
    assert pruned["prune"]["method"] == "hull"
    assert 0 < pruned["prune"]["survivor_rate"] < 1
    assert f"pruned by hull: token-level scores were computed for {pruned['prune']['survivor_rate']:.1%}" in said
