"""Ranking by fused experts in two passes: equal to the full matrix's in float64, for any tiles and slices of the kb."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dsmip.config import ExperimentConfig
from dsmip.data.table import Table
from dsmip.evaluation.experts import survey as surveys
from dsmip.evaluation.experts.survey import (
    KeptScores,
    best_rows,
    cross_scores,
    informed,
    log_probabilities,
    merged_statistics,
    slice_statistics,
    survey,
    survey_of,
    surveyed,
)
from dsmip.evaluation.index import EntityIndex
from dsmip.evaluation.ranking import RankedModel, rank
from dsmip.evaluation.ranks import NotRankable, Ranking, merge_gold_scores, merge_rankings
from dsmip.evaluation.tiles import TileSize
from dsmip.models.dsmip import Dsmip
from dsmip.ops import ranking as ops
from dsmip.ops.experts.fusion import mixture_scores, product_scores
from dsmip.ops.experts.statistics import num_confidence
from dsmip.units.expert import Expert
from dsmip.units.fusion.gate import FusionGate
from dsmip.units.fusion.matcher import FusedMatcher, ScoringName
from dsmip.units.matcher import Scores
from tests.support.scoring.matchers import CPU
from tests.support.scoring.systems import features, seeded

NUM_MENTIONS, NUM_ENTITIES, TOP_K = 9, 37, 5
ALL_BYTES = 4 * NUM_MENTIONS * NUM_ENTITIES
EXPERTS = ("text", "visual", "multimodal")
SCALES = torch.tensor([1.7, 0.4, 1.1])


@torch.no_grad()
def fused(config: ExperimentConfig, scoring: ScoringName, *, gated: bool = True) -> FusedMatcher:
    def build() -> FusedMatcher:
        experts = {name: Dsmip.build_part(name, config, with_encoder=False) for name in EXPERTS}
        gate = FusionGate(0, 3, 8, 0.1, sees_confidence=True, sees_items=False) if gated else None
        matcher = FusedMatcher(experts, scoring, gate)
        for parameter in matcher.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
        return matcher.eval()

    matcher: FusedMatcher = seeded(1, build)
    matcher.scale_B.copy_(SCALES)
    return matcher


def opened(matcher: FusedMatcher, config: ExperimentConfig) -> RankedModel:
    """Some entities are the same, so that experts' best ones tie."""
    entities = features(config, NUM_ENTITIES, 3).take(torch.arange(NUM_ENTITIES) % 29)
    with torch.no_grad():
        mentions = matcher.prepare_mentions(features(config, NUM_MENTIONS, 2))
        index = EntityIndex([matcher.prepare_entities(entities)])
    return RankedModel(matcher, mentions, index, torch.arange(NUM_MENTIONS) * 11 % NUM_ENTITIES, EXPERTS)


@torch.no_grad()
def in_full(model: RankedModel) -> tuple[Tensor, Tensor]:
    """Scores [M, E] and the gate's log pi [M, B] from full matrices in float64, by the formulas."""
    matcher = model.matcher
    assert isinstance(matcher, FusedMatcher)
    entities = model.index.tables[0].cast(torch.float64)
    mentions = model.mentions.cast(torch.float64)
    raw = [e.double().score(mentions.under(n), entities.under(n)).total_ME for n, e in matcher.experts.items()]  # type: ignore[operator]
    matcher.float()
    score_BME = torch.stack(raw).div(2**-30).round().mul(2**-30) * matcher.scale_B.double()[:, None, None]
    log_p_BME = torch.log_softmax(score_BME, dim=2)
    best_BM = torch.tensor([[row.index(max(row)) for row in each] for each in score_BME.tolist()])
    numbers = []
    for each_ME in log_p_BME:
        best_M2 = each_ME.sort(dim=1, descending=True).values[:, :2]
        numbers += [best_M2[:, 0].exp(), best_M2[:, 0] - best_M2[:, 1], -(each_ME.exp() * each_ME).sum(dim=1)]
    numbers += [(best_BM[a] == best_BM[b]).double() for a, b in ((0, 1), (0, 2), (1, 2))]
    pairs = [(a, b) for a in range(3) for b in range(3) if a != b]
    numbers += [log_p_BME[a].gather(1, best_BM[b][:, None])[:, 0] for a, b in pairs]
    log_pi_MB = torch.full((NUM_MENTIONS, 3), -torch.tensor(3.0).double().log().item(), dtype=torch.float64)
    if matcher.gate is not None:
        log_pi_MB = matcher.gate(torch.stack(numbers, dim=1).float()).double()
    if matcher.scoring == "choice":
        return log_p_BME.gather(0, log_pi_MB.argmax(dim=1)[None, :, None].expand(1, -1, NUM_ENTITIES))[0], log_pi_MB
    fuse = mixture_scores if matcher.scoring == "mixture" else product_scores
    return fuse(log_p_BME, log_pi_MB), log_pi_MB


def expected_counts(model: RankedModel, scores_ME: Tensor) -> ops.Counts:
    """Ties are those of equal features: the formulas' differ in their last bits."""
    gold_M1 = scores_ME.gather(1, model.gold_row_M[:, None])
    tied_ME = (scores_ME - gold_M1).abs() < 1e-9
    better_M = ((scores_ME > gold_M1) & ~tied_ME).sum(dim=1)
    return ops.Counts(better_M, tied_ME.sum(dim=1) - 1)


def ranked_in_slices(model: RankedModel, num_slices: int) -> Ranking:
    """As several workers do it."""
    slices = [model.index.slice(number, num_slices) for number in range(num_slices)]
    found = merged_statistics([slice_statistics(model, each, CPU) for each in slices])
    cross = [cross_scores(model, each, best_rows(found), CPU) for each in slices]
    model = informed(model, survey_of(found, cross))
    golds = merge_gold_scores([model.gold_scores(each, CPU) for each in slices])
    rankings = [rank(replace(model, index=each), CPU, top_k=TOP_K, gold_score_M=golds) for each in slices]
    return merge_rankings(rankings, TOP_K)


@pytest.mark.parametrize(
    ("scoring", "gated"),
    [
        ("mixture", True),
        ("choice", False),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in (("choice", True), ("product", True), ("mixture", False), ("product", False))
        ),
    ],
)
def test_ranks_are_those_of_the_full_matrix_for_any_tiles_and_slices(
    small_config: ExperimentConfig, scoring: ScoringName, gated: bool
) -> None:
    model = opened(fused(small_config, scoring, gated=gated), small_config)
    scores_ME, log_pi_MB = in_full(model)
    expected = expected_counts(model, scores_ME)
    assert int(expected.tied_M.sum()) > 0
    rankings = [
        rank(surveyed(model, CPU, tile_size=size), CPU, top_k=TOP_K, tile_size=size)
        for size in (TileSize(128, 2048), TileSize(4, 13))
    ]
    rankings.append(rank(surveyed(model, CPU, kept=KeptScores(most_bytes=0)), CPU, top_k=TOP_K))
    rankings.append(rank(surveyed(model, CPU, tile_size=TileSize(4, 13)), CPU, tile_size=TileSize(5, 8), top_k=TOP_K))
    rankings.append(ranked_in_slices(model, 3))
    for found in rankings:
        assert torch.equal(found.counts.better_M, expected.better_M)
        assert torch.equal(found.counts.tied_M, expected.tied_M)
        assert torch.equal(found.top_row_Mk, rankings[0].top_row_Mk)
        torch.testing.assert_close(found.top_score_Mk, scores_ME.gather(1, found.top_row_Mk), atol=1e-5, rtol=1e-5)
        assert (found.choices is None) == (not gated)
        if found.choices is not None:
            assert torch.equal(found.choices.gold_M, log_pi_MB.argmax(dim=1))


def test_what_tells_experts_apart_is_found_exactly(small_config: ExperimentConfig) -> None:
    """Tops, seconds and best rows are the same numbers in any slices; sums agree to single precision."""
    model = opened(fused(small_config, "mixture"), small_config)
    whole = slice_statistics(model, model.index, CPU)
    parts = [slice_statistics(model, model.index.slice(n, 4), CPU, tile_size=TileSize(5, 8)) for n in range(4)]
    found = merged_statistics(parts)
    for name in EXPERTS:
        for exact in ("top_M", "second_M", "row_M"):
            assert torch.equal(getattr(found[name], exact), getattr(whole[name], exact))
        torch.testing.assert_close(found[name].mass_M, whole[name].mass_M, atol=0, rtol=1e-5)
    assert survey_of(found, [cross_scores(model, model.index, best_rows(found), CPU)]).confidence_MF.shape == (
        NUM_MENTIONS,
        num_confidence(3),
    )


def test_an_expert_is_as_sure_of_its_own_best_entity_as_its_top_says(small_config: ExperimentConfig) -> None:
    model = opened(fused(small_config, "mixture"), small_config)
    found = slice_statistics(model, model.index, CPU)
    cross_MBB = cross_scores(model, model.index, best_rows(found), CPU)
    for b, name in enumerate(EXPERTS):
        assert torch.equal(cross_MBB[:, b, b], found[name].top_M)


def test_an_expert_that_says_nan_is_named(small_config: ExperimentConfig) -> None:
    model = opened(fused(small_config, "product"), small_config)
    for name, column in model.mentions.under("visual").columns.items():
        if isinstance(column, Tensor):
            model.mentions.dense(f"visual.{name}")[4] = torch.nan
    with pytest.raises(NotRankable) as error:
        surveyed(model, CPU)
    assert (error.value.mention, error.value.part) == (4, "visual")


def test_mentions_that_nobody_has_surveyed_are_refused(small_config: ExperimentConfig) -> None:
    model = opened(fused(small_config, "product"), small_config)
    with pytest.raises(RuntimeError, match="surveyed"):
        rank(model, CPU)


def test_the_columns_of_a_survey_stay_apart_from_the_experts(small_config: ExperimentConfig) -> None:
    model = opened(fused(small_config, "product"), small_config)
    added = set(surveyed(model, CPU).mentions.columns) - set(model.mentions.columns)
    assert added == {"fusion.log_pi", "fusion.log_normaliser"}
    assert isinstance(model.mentions, Table)


@pytest.mark.parametrize(("most_bytes", "passes"), [(3 * ALL_BYTES, 3), (3 * ALL_BYTES - 1, 3 * 3)])
def test_scores_that_fit_are_computed_once(
    small_config: ExperimentConfig, monkeypatch: pytest.MonkeyPatch, most_bytes: int, passes: int
) -> None:
    """Room for all experts' scores, or none is kept; what is said of mentions is the same to the bit."""
    model = opened(fused(small_config, "product"), small_config)
    expected = survey(model, CPU), list(log_probabilities(model, CPU))
    scored, calls = surveys.scored_by_tile, list[str]()

    def counted(model: RankedModel, device: torch.device, **how: Any) -> Iterator[tuple[int, Tensor]]:
        calls.append("pass")
        return scored(model, device, **how)

    monkeypatch.setattr(surveys, "scored_by_tile", counted)
    kept = KeptScores(most_bytes)
    found = survey(model, CPU, kept=kept)
    assert torch.equal(found.confidence_MF, expected[0].confidence_MF)
    assert torch.equal(found.log_normaliser_MB, expected[0].log_normaliser_MB)
    for _ in range(2):
        for (start, log_p_BME), (first, expected_BME) in zip(
            log_probabilities(model, CPU, kept), expected[1], strict=True
        ):
            assert start == first
            assert torch.equal(log_p_BME, expected_BME)
    assert len(calls) == passes


def test_models_that_fuse_the_same_experts_score_them_once(
    small_config: ExperimentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both passes of a product and of a mixture take one scoring of all pairs, and ranks are those of each alone."""
    scorings: tuple[ScoringName, ...] = ("product", "mixture")
    models = [opened(fused(small_config, scoring), small_config) for scoring in scorings]
    alone = [rank(surveyed(model, CPU, kept=KeptScores(most_bytes=0)), CPU, top_k=TOP_K) for model in models]
    score, scored = Expert.score, list[int]()

    def counted(self: Expert, mentions: Table, entities: Table, **how: Any) -> Scores:
        found = score(self, mentions, entities, **how)
        if found.total_ME.dtype == torch.float32:  # not close pairs, which are exact
            scored.append(found.total_ME.numel())
        return found

    monkeypatch.setattr(Expert, "score", counted)
    kept = KeptScores()
    for model, expected in zip(models, alone, strict=True):
        found = rank(surveyed(model, CPU, kept=kept), CPU, top_k=TOP_K)
        assert torch.equal(found.top_score_Mk, expected.top_score_Mk)
        assert torch.equal(found.top_row_Mk, expected.top_row_Mk)
        assert torch.equal(found.counts.better_M, expected.counts.better_M)
        assert found.choices is not None
        assert expected.choices is not None
        assert torch.equal(found.choices.pairs_MB, expected.choices.pairs_MB)
    assert sum(scored) == len(EXPERTS) * NUM_MENTIONS * NUM_ENTITIES


def test_experts_scores_of_other_pairs_are_refused(small_config: ExperimentConfig) -> None:
    model = opened(fused(small_config, "mixture"), small_config)
    kept = KeptScores()
    informed_model = surveyed(model, CPU, kept=kept)
    few = replace(informed_model, index=model.index.slice(0, 2))
    with pytest.raises(ValueError, match=r"text: scores \(9, 37\) are not of these pairs, \(9, 18\)"):
        rank(few, CPU, gold_score_M=torch.zeros(NUM_MENTIONS, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"text: kept scores \(9, 37\) are not of these pairs, \(4, 37\)"):
        survey(replace(model, mentions=model.mentions.take(slice(0, 4))), CPU, kept=kept)
