"""Candidates: what global vectors hold of a score, the search against its full-matrix twin, scores of the found."""

import copy
import json
import sys
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from typer.testing import CliRunner

from dsmip.config import ExperimentConfig
from dsmip.data.table import Table
from dsmip.encoders.base import Side
from dsmip.errors import UserError
from dsmip.evaluation.candidates import CandidateSearch, GlobalVectors, VectorSearch, link
from dsmip.evaluation.index import EntityIndex
from dsmip.evaluation.index_builder import OpenedEvaluation, RankingFiles
from dsmip.evaluation.metrics import HITS_AT
from dsmip.evaluation.ranking import RankedModel, rank
from dsmip.evaluation.ranks import NotRankable, Ranking
from dsmip.evaluation.report import NO_COLUMNS, Evaluated, RankingWorkers, evaluate_model
from dsmip.models.dsmip import Dsmip, DsmipMatcher
from dsmip.models.mimic import Mimic
from dsmip.ops import visual_unit
from dsmip.ops.experts.statistics import Survey
from dsmip.ops.ranking import largest_products, ranks_among, recall_at, top_k
from dsmip.runs.load_config import parse_config
from dsmip.runs.run import Run
from dsmip.units.cross_unit import CrossUnit
from dsmip.units.expert import Expert
from dsmip.units.matcher import Matcher
from dsmip.units.text_unit import TextUnit
from dsmip.units.unit_scorer import UnitScorer
from dsmip.units.visual_unit import DualUnit, VisualUnit
from ray_jobs.cli import app
from tests.support.scoring.dual_units import direct, random_items, random_weights
from tests.support.scoring.matchers import CPU, TableMatcher, numbered
from tests.support.scoring.matching_units import random_features, random_units
from tests.support.scoring.systems import features, seeded, with_system

NUM_MENTIONS, NUM_ENTITIES = 6, 13
M = TypeVar("M", bound=nn.Module)
SYSTEMS = ["mimic", "dsmip pair", "dsmip mention"]


@pytest.fixture(autouse=True)
def without_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes any of several equal products; its own test brings a stand-in."""
    monkeypatch.setitem(sys.modules, "faiss", None)


class Prepared:
    """A matcher and its prepared tables, in single precision."""

    def __init__(self, name: str, config: ExperimentConfig) -> None:
        mentions, entities = features(config, NUM_MENTIONS, 2), features(config, NUM_ENTITIES, 3)
        self.matcher = seeded(1, lambda: self._build(name, config))
        if name == "mimic":
            mentions, entities = mentions.under("multimodal"), entities.under("multimodal")
        self._features = mentions, entities
        self.mentions, self.entities = self._tables(self.matcher)

    @torch.no_grad()
    def _tables(self, matcher: Matcher) -> tuple[Table, Table]:
        return matcher.prepare_mentions(self._features[0]), matcher.prepare_entities(self._features[1])

    @staticmethod
    def _build(name: str, config: ExperimentConfig) -> Matcher:
        if name == "mimic":
            backbone, system = {"architecture": config.backbone.architecture}, {"mask_padding": True, "width": 8}
            matcher: Matcher = Mimic.build_whole(
                parse_config({"model": "mimic", "backbone": backbone, "system": system})
            )
        else:
            gate = {"choice": name.split()[1], "calibration": "scale"}
            matcher = Dsmip.build_whole(with_system(config, gate=gate))
        with torch.no_grad():
            for parameter in matcher.parameters():  # norms and biases start at 1 and 0, which would hide mistakes
                parameter.add_(0.1 * torch.randn_like(parameter))
            if isinstance(matcher, DsmipMatcher):
                matcher.gate.mention_logits.weight.mul_(20)  # else one expert has all mentions
        return matcher.eval()

    def in_double(self, matcher: Matcher) -> tuple[Matcher, Table, Table]:
        """A copy of a matcher, and what it prepared."""
        mentions, entities = self._tables(matcher)
        return copy.deepcopy(matcher).double(), mentions.cast(torch.float64), entities.cast(torch.float64)


@pytest.fixture(params=SYSTEMS)
def prepared(request: pytest.FixtureRequest, small_config: ExperimentConfig) -> Prepared:
    return Prepared(request.param, small_config)


def candidate_search(matcher: Matcher, index: EntityIndex) -> CandidateSearch:
    return CandidateSearch(GlobalVectors(matcher, CPU), index)


@torch.no_grad()
def shut(module: M) -> M:
    """A copy whose dual units let nothing but pooled pictures through."""
    module = copy.deepcopy(module)
    for unit in module.modules():
        if isinstance(unit, DualUnit):
            unit.gate_fc.weight.zero_()
            unit.gate_fc.bias.zero_()
    return module


def documented_part(unit: nn.Module, mentions: Table, entities: Table) -> Tensor:
    """What the products of a unit's vectors are, by the unit's own scoring; it must be `shut`."""
    if isinstance(unit, TextUnit):
        return unit.score(mentions, entities, torch.zeros(len(mentions), len(entities), dtype=torch.bool))
    assert isinstance(unit, VisualUnit | CrossUnit)
    return unit.score(mentions, entities)


@pytest.mark.parametrize("name", ["text", "image", "cross"])
def test_products_of_a_units_vectors_are_its_documented_part(name: str) -> None:
    units = random_units()
    unit = getattr(units, name)
    mentions = units.prepare("mentions", random_features(5, 1))[name]
    entities = units.prepare("entities", random_features(7, 2))[name]
    found_ME = unit.global_vectors(mentions, "mentions") @ unit.global_vectors(entities, "entities").T
    assert found_ME.dtype == torch.float64
    assert torch.allclose(found_ME, unit.score(mentions, entities), atol=1e-3) == (name == "cross")
    units = shut(units)
    mentions = units.prepare("mentions", random_features(5, 1))[name]
    entities = units.prepare("entities", random_features(7, 2))[name]
    expected_ME = documented_part(getattr(units, name), mentions, entities)
    torch.testing.assert_close(found_ME, expected_ME, atol=1e-10, rtol=1e-10)


def mean_part(scorer: UnitScorer, mentions: Table, entities: Table) -> Tensor:
    parts = [documented_part(unit, mentions.under(n), entities.under(n)) for n, unit in scorer.units.items()]
    return torch.stack(parts).mean(dim=0)


@torch.no_grad()
def test_products_of_a_systems_vectors_join_those_of_its_units(prepared: Prepared) -> None:
    matcher, mentions, entities = prepared.in_double(prepared.matcher)
    found_ME = matcher.global_vectors(mentions, "mentions") @ matcher.global_vectors(entities, "entities").T
    shut_matcher, mentions, entities = prepared.in_double(shut(prepared.matcher))
    if isinstance(shut_matcher, DsmipMatcher):
        parts = []
        for name, expert in shut_matcher.experts.items():
            assert isinstance(expert, Expert)
            assert isinstance(expert.scorer, UnitScorer)
            parts.append(mean_part(expert.scorer, mentions.under(name), entities.under(name)))
        parts_MEB = torch.stack(parts, dim=-1) * shut_matcher.scale_B()
        expected_ME = parts_MEB.sum(dim=-1)
        if shut_matcher.gate.config.choice == "mention":
            chosen_ME = matcher.score(mentions, entities).chosen_ME
            assert chosen_ME is not None
            assert len(set(chosen_ME[:, 0].tolist())) > 1
            expected_ME = parts_MEB.gather(-1, chosen_ME[..., None])[..., 0]
    else:
        assert isinstance(shut_matcher.scorer, UnitScorer)
        expected_ME = mean_part(shut_matcher.scorer, mentions, entities)
    torch.testing.assert_close(found_ME, expected_ME, atol=1e-5, rtol=1e-5)  # prepared in single precision
    assert expected_ME.std(dim=1).min() > 1e-3  # else any vectors would do


def test_the_stand_in_of_a_dual_unit_is_its_score_with_the_gate_shut() -> None:
    weights, (query_Ad, value_Bd, key_Bd) = random_weights(8), random_items(8)
    a, b = visual_unit.query_side(query_Ad, weights), visual_unit.value_side(value_Bd, key_Bd, weights)
    found_AB = visual_unit.query_vectors(a) @ visual_unit.value_vectors(b, weights.eps).T
    no_gate = weights._replace(gate_weight=torch.zeros_like(weights.gate_weight), gate_bias=torch.zeros(()))
    torch.testing.assert_close(found_AB, direct(query_Ad, value_Bd, key_Bd, no_gate), atol=1e-10, rtol=1e-10)


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    shape=st.tuples(st.integers(1, 7), st.integers(1, 20), st.integers(1, 4)),
    k=st.integers(1, 25),
    tiles=st.tuples(st.integers(1, 8), st.integers(1, 25)),
)
def test_the_search_equals_the_full_matrix(
    seed: int, shape: tuple[int, int, int], k: int, tiles: tuple[int, int]
) -> None:
    """Of small whole numbers: products are exact in any order of summation, and many are equal."""
    generator = torch.Generator().manual_seed(seed)
    m_Mg, e_Eg = (torch.randint(-3, 4, (n, shape[2]), generator=generator).float() for n in shape[:2])
    found = largest_products(m_Mg, e_Eg, k, mention_tile=tiles[0], entity_tile=tiles[1])
    expected = top_k(m_Mg @ e_Eg.T, k)
    assert torch.equal(found.rows_MK, expected.rows_MK)
    assert torch.equal(found.scores_MK, expected.scores_MK)
    assert torch.equal(VectorSearch(e_Eg, first_row=5).search(m_Mg, k), expected.rows_MK + 5)


def test_all_entities_as_candidates_give_the_exact_ranking(prepared: Prepared) -> None:
    matcher, mentions, entities = prepared.matcher, prepared.mentions, prepared.entities
    index = EntityIndex([entities.rows(slice(0, 5)), entities.rows(slice(5, None))], first_row=40)
    gold_row_M = 40 + torch.arange(NUM_MENTIONS)
    choices = ("text", "visual", "multimodal") if isinstance(matcher, DsmipMatcher) else ()
    exact = rank(RankedModel(matcher, mentions, index, gold_row_M, choices), CPU, top_k=4)
    search = candidate_search(matcher, index)
    links = link(matcher, mentions, index, search, k=NUM_ENTITIES + 9, top=4)
    assert torch.equal(links.row_MT, exact.top_row_Mk)
    assert torch.equal(links.score_MT, exact.top_score_Mk)
    assert (links.chosen_MT is None) == (not choices)
    if links.chosen_MT is not None:
        assert exact.choices is not None
        assert torch.equal(links.chosen_MT, exact.choices.top_Mk)
    assert recall_at(exact.top_row_Mk, links.candidate_row_MK) == 1.0
    everything = link(matcher, mentions, index, search, k=NUM_ENTITIES, top=NUM_ENTITIES)
    ranks_M = ranks_among(everything.score_MT, everything.row_MT, gold_row_M)
    assert torch.equal(ranks_M, exact.rank_M)


class VectorMatcher(TableMatcher):
    """Looks scores up; its global vectors are other numbers, so that a search can miss."""

    def __init__(self, scores: Tensor, vectors_Mg: Tensor, vectors_Eg: Tensor) -> None:
        super().__init__(scores)
        self.vectors = {"mentions": vectors_Mg, "entities": vectors_Eg}

    def global_vectors(self, prepared: Table, side: Side) -> Tensor:
        return self.vectors[side][prepared.dense("row")]


def missing_one() -> VectorMatcher:
    """By the vectors entities are 0, 1, 2, 3 for both mentions; by the scores 3, 1, 0, 2 and 2, 0, 1, 3."""
    scores_ME = torch.tensor([[1.0, 3.0, 0.0, 4.0], [2.0, 1.0, 3.0, 0.0]])
    return VectorMatcher(scores_ME, torch.ones(2, 1), torch.tensor([[9.0], [8.0], [2.0], [1.0]]))


def test_candidates_are_those_of_the_vectors_and_their_order_that_of_the_scores() -> None:
    matcher, index = missing_one(), EntityIndex([numbered(4)])
    links = link(matcher, numbered(2), index, candidate_search(matcher, index), k=2, top=2)
    assert links.candidate_row_MK.tolist() == [[0, 1], [0, 1]]
    assert links.row_MT.tolist() == [[1, 0], [0, 1]]
    assert links.score_MT.tolist() == [[3.0, 1.0], [2.0, 1.0]]
    assert links.chosen_MT is None
    one = link(matcher, numbered(2), index, candidate_search(matcher, index), k=3, top=1)
    assert one.row_MT.tolist() == [[1], [2]]


def test_a_gold_outside_the_candidates_is_a_miss() -> None:
    matcher, index = missing_one(), EntityIndex([numbered(4)])
    links = link(matcher, numbered(2), index, candidate_search(matcher, index), k=2, top=2)
    ranks_M = ranks_among(links.score_MT, links.row_MT, torch.tensor([0, 3]))
    assert ranks_M.tolist() == [2.0, float("inf")]
    tied = ranks_among(torch.tensor([[1.0, 1.0, 2.0]]), torch.tensor([[4, 7, 5]]), torch.tensor([7]))
    assert tied.tolist() == [2.5]


@settings(max_examples=40, deadline=None)
@given(data=st.data(), num_mentions=st.integers(1, 4))
def test_recall_is_the_share_of_the_top_that_is_found(data: st.DataObject, num_mentions: int) -> None:
    k, c = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 9))

    def rows(width: int) -> list[list[int]]:
        row = st.lists(st.integers(0, 9), min_size=width, max_size=width, unique=True)
        return data.draw(st.lists(row, min_size=num_mentions, max_size=num_mentions))

    top, candidates = rows(k), rows(c)
    found = sum(len(set(a) & set(b)) for a, b in zip(top, candidates, strict=True))
    assert recall_at(torch.tensor(top), torch.tensor(candidates)) == pytest.approx(found / (k * num_mentions))


def test_recall_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no exact top"):
        recall_at(torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.int64))


def test_what_cannot_be_searched_is_refused() -> None:
    matcher, index = missing_one(), EntityIndex([numbered(4)])
    search = candidate_search(matcher, index)
    for k in (0, -3):
        with pytest.raises(ValueError, match=f"{k} candidates: at least one"):
            link(matcher, numbered(2), index, search, k=k, top=1)
    with pytest.raises(ValueError, match="a search among 4 entities for an index of 3"):
        link(matcher, numbered(2), EntityIndex([numbered(3)]), search, k=2, top=1)
    with pytest.raises(UserError, match="TableMatcher has no global vectors"):
        candidate_search(TableMatcher(torch.zeros(2, 4)), index)
    with pytest.raises(ValueError, match="vector of entity 9 is not finite"):
        VectorSearch(torch.tensor([[0.0], [0.0], [float("nan")]]), first_row=7)
    with pytest.raises(ValueError, match="vector of mention 1 is not finite"):
        search.search(torch.tensor([[0.0], [float("inf")]]), 2)


def test_a_candidate_that_scores_nan_is_named() -> None:
    matcher, index = missing_one(), EntityIndex([numbered(4)])
    matcher.scores_ME[1, 1] = float("nan")
    with pytest.raises(NotRankable, match="mention 1 and entity row 1 is NaN"):
        link(matcher, numbered(2), index, candidate_search(matcher, index), k=2, top=1)


class FlatIndex:
    """faiss.IndexFlatIP as documented: float32 arrays in, products and columns out, of equal products any."""

    def __init__(self, width: int) -> None:
        self.stored = np.zeros((0, width), dtype=np.float32)

    def add(self, vectors: Any) -> None:
        assert vectors.dtype == np.float32
        self.stored = np.concatenate([self.stored, vectors])

    def search(self, vectors: Any, k: int) -> tuple[Any, Any]:
        products = vectors @ self.stored.T
        columns = np.argsort(-products, axis=1)[:, :k]
        return np.take_along_axis(products, columns, axis=1), columns


def test_faiss_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    m_Mg, e_Eg = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (4, 30))
    plain = VectorSearch(e_Eg, first_row=3)
    faiss = ModuleType("faiss")
    faiss.__dict__["IndexFlatIP"] = FlatIndex
    monkeypatch.setitem(sys.modules, "faiss", faiss)
    search = VectorSearch(e_Eg, first_row=3)
    assert (plain.method, search.method, len(search)) == ("gemm", "faiss", 30)
    for k in (1, 7, 99):
        assert torch.equal(search.search(m_Mg, k), plain.search(m_Mg, k))


@pytest.fixture(scope="module")
def exact(run: Run) -> Evaluated:
    return evaluate_model(OpenedEvaluation(run, "test", "dsmip"), CPU)


def stored(evaluated: Evaluated) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads((evaluated.folder / "metrics.json").read_text())
    return metrics


@pytest.mark.slow
def test_an_evaluation_has_them_in_a_section_of_their_own(run: Run, exact: Evaluated) -> None:
    metrics = stored(evaluate_model(OpenedEvaluation(run, "test", "dsmip"), CPU, candidates=4))
    section = metrics.pop("candidates")
    assert metrics == json.loads(json.dumps(exact.metrics))
    assert section["note"].endswith("not metrics of the full ranking")
    assert (section["k"], section["search"]) == (4, "gemm")
    assert section["recall@11"] == pytest.approx(4 / 11)  # the kb has 11 entities: all are in the exact top 20
    assert section["hits@5"] == section["hits@20"] == section["gold_recall"] < 1
    assert section["hits@1"] <= section["mrr"] <= section["gold_recall"]
    assert not any("mean_rank" in name for name in section)


def test_no_candidates_are_refused_before_anything_is_ranked(run: Run) -> None:
    class NoWorkers(RankingWorkers):
        def build(self, files: RankingFiles) -> None:
            raise AssertionError("built")

        def survey(self, files: RankingFiles) -> Survey:
            raise AssertionError("surveyed")

        def rank(self, files: RankingFiles, added: Table = NO_COLUMNS) -> Ranking:
            raise AssertionError("ranked")

    with pytest.raises(UserError, match="candidates: 0 are none"):
        evaluate_model(OpenedEvaluation(run, "test", "dsmip"), CPU, workers=NoWorkers(), candidates=0)


def test_more_candidates_than_entities_are_all_of_them(run: Run, exact: Evaluated) -> None:
    opened, notices = OpenedEvaluation(run, "test", "dsmip"), list[str]()
    section = evaluate_model(opened, CPU, candidates=50, notice=notices.append).metrics["candidates"]
    assert "50 candidates of 11 entities: all entities are candidates" in notices
    assert (section["k"], section["recall@11"], section["gold_recall"]) == (11, 1.0, 1.0)
    for name in ("mrr", *(f"hits@{k}" for k in HITS_AT)):
        assert section[name] == exact.metrics["overall"][name]


def test_the_command_says_that_they_are_not_the_metrics(run: Run) -> None:
    command = ["evaluate", "--run", str(run.folder), "--model", "text", "--candidates"]
    result = CliRunner().invoke(app, [*command, "3"])
    assert result.exit_code == 0, result.output
    lines = [line for line in result.output.splitlines() if "candidates" in line]
    assert [("not the full ranking" in line, "never to be reported" in line) for line in lines] == [
        (True, False),
        (False, True),
    ]
    assert "candidates" in json.loads((run.folder / "evaluate/test/text/metrics.json").read_text())
    refused = CliRunner().invoke(app, [*command, "0"])
    assert refused.exit_code == 2
    assert "Invalid value for '--candidates'" in refused.output
