"""Entities without a picture: stored once, scored once, tied to the last bit in any slice of the index."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsmip.config import ExperimentConfig
from dsmip.data.dataset import Dataset
from dsmip.data.table import Column, Ragged, Repeated, Table
from dsmip.evaluation.index import EntityIndex, finish_index, index_slices
from dsmip.evaluation.preparation import (
    HAS_IMAGE,
    entities_with_image,
    prepare_entities,
    prepare_in_tiles,
    with_has_image,
)
from dsmip.evaluation.ranking import RankedModel, rank, rank_unrefined
from dsmip.evaluation.ranks import merge_rankings
from dsmip.evaluation.refinement import GRID, PairScorer
from dsmip.models.dsmip import Dsmip
from dsmip.units.matcher import Matcher
from dsmip.units.text_unit import TextUnit
from dsmip.units.visual_unit import DualUnit
from tests.support.scoring.matchers import CPU, TableMatcher, numbered, ranks_by_sorting
from tests.support.scoring.systems import features, whole, with_system

NUM_MENTIONS, NUM_ENTITIES = 6, 700  # more than one tile of preparing
LACKING = torch.arange(NUM_ENTITIES) % 3 == 1


def kb_features(config: ExperimentConfig) -> Table:
    """Every third entity has the picture of the second one, token rows and all, as the feature cache stores it."""
    columns: dict[str, Column] = dict(features(config, NUM_ENTITIES, 3).columns)
    of_image = torch.where(LACKING, 1, torch.arange(NUM_ENTITIES))
    for name, column in columns.items():
        if "image" in name:
            columns[name] = column.rows(of_image) if isinstance(column, Ragged) else column[of_image]  # type: ignore[index]
    return Table({**columns, HAS_IMAGE: ~LACKING})


def seen_by(part: str, kb: Table) -> Table:
    return kb.under(part).merged(Table({HAS_IMAGE: kb.dense(HAS_IMAGE)}))


def with_text_image(config: ExperimentConfig) -> ExperimentConfig:
    return with_system(config, experts={"text_image": {}})


def index_of(matcher: Matcher, kb: Table, folder: Path) -> EntityIndex:
    slices = index_slices(folder, len(kb), slice_rows=293)
    for path, rows in slices.items():
        prepare_entities(matcher, kb, rows, CPU).save(path)
    return finish_index(folder, {}, slices)


def test_who_has_a_picture(small_data: Dataset) -> None:
    """Of the data, whatever features were cached without that column."""
    expected = [len(entity.images) > 0 for entity in small_data.entities()]
    assert entities_with_image(small_data).tolist() == expected
    kb = with_has_image(numbered(len(expected)), small_data)
    assert kb.dense(HAS_IMAGE).tolist() == expected


@pytest.mark.parametrize(("part", "unit"), [("visual", DualUnit), ("text_image", TextUnit)])
@pytest.mark.parametrize("slices", [1, 3])
def test_they_tie_and_are_scored_once(
    small_config: ExperimentConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    slices: int,
    part: str,
    unit: type[DualUnit] | type[TextUnit],
) -> None:
    matcher = Dsmip.build_part(part, with_text_image(small_config), with_encoder=False).eval()
    kb = seen_by(part, kb_features(small_config))
    index = index_of(matcher, kb, tmp_path)
    mentions = prepare_in_tiles(matcher, features(small_config, NUM_MENTIONS, 2).under(part), "mentions", CPU)
    with torch.no_grad():
        twin = copy.deepcopy(matcher).double()
        entities = index.take(torch.arange(NUM_ENTITIES))
        dense = Table({n: c.dense() if isinstance(c, Repeated) else c for n, c in entities.columns.items()})
        dense = dense.cast(torch.float64)
        exact_ME = (twin.score(mentions.cast(torch.float64), dense).total_ME / GRID).round() * GRID
    gold_M = torch.tensor([1, 0, 4, 298, 9, 697])
    num_scored = list[int]()
    score: Any = unit.score

    def counting(unit: nn.Module, one: Table, other: Table, *wanted: Tensor | None) -> Tensor:
        num_scored.append(len(one) * len(other) * (next(unit.parameters()).dtype == torch.float64))
        scores: Tensor = score(unit, one, other, *wanted)
        return scores

    monkeypatch.setattr(unit, "score", counting)
    parts = [index.slice(number, slices) for number in range(slices)]
    golds = torch.stack([PairScorer(matcher, mentions, each, CPU).gold_scores(gold_M) for each in parts])
    gold_score_M = golds.nan_to_num(-torch.inf).amax(dim=0)
    models = [RankedModel(matcher, mentions, each, gold_M) for each in parts]
    ranking = merge_rankings([rank(model, CPU, top_k=1, gold_score_M=gold_score_M) for model in models], 1)
    assert ranking.rank_M.tolist() == ranks_by_sorting(exact_ME, gold_M)
    num_alike = int(LACKING.sum())
    assert ranking.counts.tied_M.tolist() == [num_alike - 1, 0, num_alike - 1, num_alike - 1, 0, num_alike - 1]
    assert ranking.cost.refinement is not None
    assert ranking.cost.refinement.num_pairs > 4 * num_alike
    calls = 2 if unit is DualUnit else 1  # of one scoring
    assert sum(num_scored) / calls < 0.5 * num_alike * len(gold_M) + 16 * 64 * slices  # the sample of each slice


def test_they_are_stored_once(small_config: ExperimentConfig, tmp_path: Path) -> None:
    matcher = whole(small_config)
    kb = kb_features(small_config)
    index = index_of(matcher, kb, tmp_path)
    plain = prepare_in_tiles(matcher, kb, "entities", CPU)
    for table in index.tables:
        alike = [name for name, column in table.columns.items() if isinstance(column, Repeated)]
        assert {name.split(".")[0] for name in alike} == {"visual", "multimodal"}
        assert {name.split(".")[1] for name in alike} == {"image"}
    entities = index.take(torch.arange(NUM_ENTITIES))
    for name in plain.columns:
        if isinstance(plain.columns[name], Tensor):
            torch.testing.assert_close(entities.dense(name), plain.dense(name), atol=1e-5, rtol=1e-5)
            if "image" in name.split("."):
                assert len(entities.dense(name)[LACKING].unique(dim=0)) == 1
    image = sum(plain.dense(name)[0].nbytes for name in plain.columns if "image" in name.split("."))
    num_columns = sum("image" in name.split(".") for name in plain.columns)
    saved = plain.num_bytes - index.num_bytes
    shared = int(LACKING.sum()) - len(index.tables)
    assert saved == pytest.approx(shared * image - NUM_ENTITIES * num_columns * 4, rel=0.01)


@torch.no_grad()
def test_validation_without_refinement_ties_them_too(small_config: ExperimentConfig) -> None:
    matcher = Dsmip.build_part("visual", small_config, with_encoder=False).eval()
    kb = seen_by("visual", kb_features(small_config))
    mentions = prepare_in_tiles(matcher, features(small_config, 2, 2).under("visual"), "mentions", CPU)
    index = EntityIndex([prepare_entities(matcher, kb, range(NUM_ENTITIES), CPU)])
    ranking = rank_unrefined(RankedModel(matcher, mentions, index, torch.tensor([1, 0])), CPU)
    assert ranking.counts.tied_M.tolist() == [int(LACKING.sum()) - 1, 0]


def test_preparing_in_tiles_keeps_rows() -> None:
    table = prepare_in_tiles(TableMatcher(torch.zeros(1, 1)), numbered(7), "entities", CPU, tile=3)
    assert table.dense("row").tolist() == list(range(7))
