"""Ranking by fused experts in two passes: equal to the full matrix's in float64, for any tiles and slices of the kb."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any, Literal, get_args

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

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
from dsmip.ops.experts.statistics import Survey, num_confidence
from dsmip.units.expert import Expert
from dsmip.units.fusion.matcher import FusedMatcher, ScoringName
from dsmip.units.gate import PRESETS
from dsmip.units.matcher import Scores
from tests.support.scoring.matchers import CPU
from tests.support.scoring.systems import features, seeded, with_system

InputsName = Literal["raw", "normalised", "confidence", "both"]

NUM_MENTIONS, NUM_ENTITIES, TOP_K = 9, 37, 5
SAME_AS = torch.arange(NUM_ENTITIES) % 29  # entities are the same as earlier ones, so that experts' best ones tie
ALL_BYTES = 4 * NUM_MENTIONS * NUM_ENTITIES
EXPERTS = ("text", "visual", "multimodal")
ALL_EXPERTS = (*EXPERTS, "text_image", "image_text")
SCALES = torch.tensor([1.7, 0.4, 1.1, 0.7, 2.3])
MEAN, DEVIATION = 0.5, 2.0  # of the mentions that a gate's normalisation was fitted to, the same for all inputs


@torch.no_grad()
def fused(
    config: ExperimentConfig,
    scoring: ScoringName,
    inputs: InputsName = "confidence",
    *,
    gated: bool = True,
    num_experts: int = 3,
) -> FusedMatcher:
    gate = {**PRESETS["confidence"], "width": 8, "inputs": inputs, "scoring": scoring}
    use = ALL_EXPERTS[:num_experts]
    config = with_system(config, experts={"text_image": {}, "image_text": {}}, use=use, gate=gate)

    def build() -> FusedMatcher:
        matcher = Dsmip.build_whole(config)
        assert isinstance(matcher, FusedMatcher)
        for parameter in matcher.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
        return matcher.eval()

    matcher: FusedMatcher = seeded(1, build)
    matcher.scale_B.copy_(SCALES[:num_experts])
    assert matcher.gate is not None
    fitted_to_2 = torch.tensor([MEAN - DEVIATION, MEAN + DEVIATION])
    matcher.gate.fit_normalisation(fitted_to_2[:, None].expand(2, len(matcher.gate.mean_F)))
    if not gated:
        matcher.gate = None
    return matcher


def opened(matcher: FusedMatcher, config: ExperimentConfig) -> RankedModel:
    with torch.no_grad():
        mentions = matcher.prepare_mentions(features(config, NUM_MENTIONS, 2))
        index = EntityIndex([matcher.prepare_entities(features(config, NUM_ENTITIES, 3)).take(SAME_AS)])
    return RankedModel(matcher, mentions, index, torch.arange(NUM_MENTIONS) * 11 % NUM_ENTITIES, tuple(matcher.experts))


@torch.no_grad()
def in_full(model: RankedModel, items: Table, inputs: InputsName = "confidence") -> tuple[Tensor, Tensor]:
    """Scores [M, E] and the gate's log pi [M, B] from full matrices in float64, by the formulas.

    Args:
        items: Features of the mentions, of which the gate sees those of its own.
    """
    matcher = model.matcher
    assert isinstance(matcher, FusedMatcher)
    num_experts = len(matcher.experts)
    entities = model.index.tables[0].cast(torch.float64)
    mentions = model.mentions.cast(torch.float64)
    raw = [e.double().score(mentions.under(n), entities.under(n)).total_ME for n, e in matcher.experts.items()]  # type: ignore[operator]
    matcher.float()
    score_BME = torch.stack(raw).div(2**-30).round().mul(2**-30) * matcher.scale_B.double()[:, None, None]
    log_p_BME = torch.log_softmax(score_BME, dim=2)
    log_pi_MB = torch.full((NUM_MENTIONS, num_experts), -math.log(num_experts), dtype=torch.float64)
    if matcher.gate is not None:
        seen = [confidences(score_BME, log_p_BME).float()] if inputs in ("confidence", "both") else []
        seen += [items.dense(f"gate.{name}") for name in ("text", "picture")] if inputs != "confidence" else []
        inputs_MF = torch.cat(seen, dim=1)
        log_pi_MB = matcher.gate.mlp(inputs_MF if inputs == "raw" else (inputs_MF - MEAN) / DEVIATION).double()
        log_pi_MB = torch.log_softmax(log_pi_MB, dim=1)
    pi_BM1 = log_pi_MB.exp().T[:, :, None]
    if matcher.scoring == "choice":
        total_ME = log_p_BME[log_pi_MB.argmax(dim=1), torch.arange(NUM_MENTIONS)]
    elif matcher.scoring == "mixture":
        total_ME = (pi_BM1 * log_p_BME.exp()).sum(dim=0).log()
    else:
        total_ME = (pi_BM1 * log_p_BME).sum(dim=0)
    return total_ME[:, SAME_AS], log_pi_MB  # columns of equal features differ in their last bits


def confidences(score_BME: Tensor, log_p_BME: Tensor) -> Tensor:
    """The numbers [M, F] that a gate sees of scores and log probabilities over all entities."""
    experts = range(len(score_BME))
    best_BM = torch.tensor([[row.index(max(row)) for row in each] for each in score_BME.tolist()])
    numbers = []
    for each_ME in log_p_BME:
        best_M2 = each_ME.sort(dim=1, descending=True).values[:, :2]
        numbers += [best_M2[:, 0].exp(), best_M2[:, 0] - best_M2[:, 1], -(each_ME.exp() * each_ME).sum(dim=1)]
    numbers += [(best_BM[a] == best_BM[b]).double() for a in experts for b in experts if a < b]
    numbers += [log_p_BME[a].gather(1, best_BM[b][:, None])[:, 0] for a in experts for b in experts if a != b]
    return torch.stack(numbers, dim=1)


def expected_counts(model: RankedModel, scores_ME: Tensor) -> ops.Counts:
    gold_M1 = scores_ME.gather(1, model.gold_row_M[:, None])
    return ops.Counts((scores_ME > gold_M1).sum(dim=1), (scores_ME == gold_M1).sum(dim=1) - 1)


def surveyed_in_slices(model: RankedModel, num_slices: int) -> Survey:
    """As several workers do it."""
    slices = [model.index.slice(number, num_slices) for number in range(num_slices)]
    found = merged_statistics([slice_statistics(model, each, CPU) for each in slices])
    return survey_of(found, [cross_scores(model, each, best_rows(found), CPU) for each in slices])


def ranked_in_slices(model: RankedModel, num_slices: int) -> Ranking:
    """As several workers do it."""
    slices = [model.index.slice(number, num_slices) for number in range(num_slices)]
    golds = merge_gold_scores([model.gold_scores(each, CPU) for each in slices])
    rankings = [rank(replace(model, index=each), CPU, top_k=TOP_K, gold_score_M=golds) for each in slices]
    return merge_rankings(rankings, TOP_K)


@dataclass(frozen=True)
class Surveyed:
    """Experts, what they say of all mentions in one go, in tiles and in slices of the kb, and their scores."""

    model: RankedModel
    surveys: tuple[Survey, ...]
    kept: KeptScores


@pytest.fixture(scope="module")
def experts(small_config: ExperimentConfig) -> Callable[[int], Surveyed]:
    """So many experts; no survey depends on what is made of it."""

    @cache
    def made(num_experts: int) -> Surveyed:
        model = opened(fused(small_config, "mixture", "both", num_experts=num_experts), small_config)
        kept = KeptScores()
        in_tiles = survey(model, CPU, tile_size=TileSize(4, 13))
        return Surveyed(model, (survey(model, CPU, kept=kept), in_tiles, surveyed_in_slices(model, 3)), kept)

    return made


SCORINGS, INPUTS, COUNTS = get_args(ScoringName), (*get_args(InputsName), None), (2, 3, 5)  # inputs None: no gate
FORMS = list(product(SCORINGS, INPUTS, COUNTS))


def is_quick(scoring: ScoringName, inputs: InputsName | None, num_experts: int) -> bool:
    """A third of all forms, in which each scoring meets all inputs and counts, and all inputs each count."""
    return (SCORINGS.index(scoring) + INPUTS.index(inputs) + COUNTS.index(num_experts)) % 3 == 0


@pytest.mark.parametrize(
    ("scoring", "inputs", "num_experts"),
    [pytest.param(*form, marks=() if is_quick(*form) else pytest.mark.slow) for form in FORMS],
)
def test_ranks_are_those_of_the_full_matrix_for_any_tiles_and_slices(
    small_config: ExperimentConfig,
    experts: Callable[[int], Surveyed],
    scoring: ScoringName,
    inputs: InputsName | None,
    num_experts: int,
) -> None:
    """Each form has tiles of its own."""
    known = experts(num_experts)
    gate: dict[str, Any] = {"inputs": inputs} if inputs else {"gated": False}
    matcher = fused(small_config, scoring, num_experts=num_experts, **gate)
    matcher.experts.load_state_dict(known.model.matcher.get_submodule("experts").state_dict())
    model = replace(known.model, matcher=matcher)
    scores_ME, log_pi_MB = in_full(model, features(small_config, NUM_MENTIONS, 2), inputs or "confidence")
    expected, best = expected_counts(model, scores_ME), ops.top_k(scores_ME, TOP_K)
    assert int(expected.tied_M.sum()) > 0
    whole, in_tiles, in_slices = known.surveys
    number = FORMS.index((scoring, inputs, num_experts))
    for found in (
        rank(informed(model, whole, known.kept), CPU, top_k=TOP_K),
        rank(informed(model, in_tiles), CPU, top_k=TOP_K, tile_size=TileSize(4 + number % 6, 10 + number)),
        ranked_in_slices(informed(model, in_slices), 2),
    ):
        assert torch.equal(found.counts.better_M, expected.better_M)
        assert torch.equal(found.counts.tied_M, expected.tied_M)
        assert torch.equal(found.top_row_Mk, best.rows_MK)
        torch.testing.assert_close(found.top_score_Mk, best.scores_MK, atol=1e-5, rtol=1e-5)
        assert (found.choices is None) == (inputs is None)
        if found.choices is not None:
            chosen_M = log_pi_MB.argmax(dim=1)
            assert torch.equal(found.choices.gold_M, chosen_M)
            assert torch.equal(found.choices.top_Mk, chosen_M[:, None].expand(-1, TOP_K))
            assert torch.equal(found.choices.pairs_MB, NUM_ENTITIES * one_hot(chosen_M, num_experts))


@pytest.mark.parametrize("num_experts", [*(pytest.param(few, marks=pytest.mark.slow) for few in (2, 3)), 5])
@pytest.mark.parametrize("inputs", get_args(InputsName))
def test_a_gate_says_what_the_full_matrix_makes_it_say(
    small_config: ExperimentConfig, inputs: InputsName, num_experts: int
) -> None:
    model = opened(fused(small_config, "mixture", inputs, num_experts=num_experts), small_config)
    _, log_pi_MB = in_full(model, features(small_config, NUM_MENTIONS, 2), inputs)
    found = surveyed(model, CPU, tile_size=TileSize(4, 13)).mentions.dense("fusion.log_pi")
    torch.testing.assert_close(found, log_pi_MB, atol=1e-5, rtol=1e-5)


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
