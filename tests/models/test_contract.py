"""The contract of `dsmip.models.base`, run over every registered system, every part of it and the whole.

A new file in `dsmip/models/` is tested by being there, with its default settings; a system whose defaults need
downloads or that has several forms is named in `FORMS` of `tests/support/scoring/contract.py`.
"""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsmip.data.collate import ItemBatch
from dsmip.data.table import Ragged, Table, concatenate
from dsmip.data.table_writer import TableWriter
from dsmip.evaluation.index import EntityIndex
from dsmip.evaluation.preparation import prepare_in_tiles
from dsmip.evaluation.ranking import RankedModel, rank, rank_unrefined
from dsmip.evaluation.ranks import Ranking, merge_rankings
from dsmip.evaluation.refinement import GRID, PairScorer
from dsmip.evaluation.tiles import TileSize
from dsmip.ops.ranking import count_against, top_k
from dsmip.runs.weights import load_own_weights, own_weights, save_weights
from dsmip.units.matcher import Scores
from tests.support.encoders.items import trimmed
from tests.support.scoring.contract import (
    CPU,
    DEEP,
    NUM_ENTITIES,
    NUM_MENTIONS,
    Encode,
    Subject,
    assert_close,
    assert_equal_bits,
    seeded,
    spread,
    tolerance,
)


def test_scores_are_finite_float32_and_differ(scores: Scores) -> None:
    for value in (scores.total_ME, *scores.parts.values()):
        assert value.shape == (NUM_MENTIONS, NUM_ENTITIES)
        assert value.dtype == torch.float32
        assert value.isfinite().all()
    # else nothing below could fail
    limits = tolerance(scores)
    assert spread(scores) > 2 * (limits["atol"] + limits["rtol"] * float(scores.total_ME.abs().max()))


def test_choices_name_the_experts(subject: Subject, scores: Scores) -> None:
    if scores.chosen_ME is None:
        return
    assert scores.chosen_ME.shape == (NUM_MENTIONS, NUM_ENTITIES)
    experts_MEB = torch.stack(list(scores.parts.values()), dim=-1)
    chosen_ME = experts_MEB.gather(-1, scores.chosen_ME.long()[..., None])[..., 0]
    assert torch.equal(chosen_ME, scores.total_ME)


@torch.no_grad()
def test_evaluation_is_deterministic(subject: Subject, scores: Scores) -> None:
    with seeded(99):  # nor does it depend on the global generator
        assert_equal_bits(subject.score(*subject.encode(subject.sample.mentions, subject.sample.entities)), scores)


@torch.no_grad()
def test_scores_do_not_depend_on_batch_composition(subject: Subject, scores: Scores) -> None:
    def one_by_one(encode: Encode, batch: ItemBatch) -> Table:
        return concatenate([encode(trimmed(batch.rows(n, n + 1))) for n in range(len(batch))])

    mentions = one_by_one(subject.encode_mentions, subject.sample.mentions)
    entities = one_by_one(subject.encode_entities, subject.sample.entities)
    assert_close(subject.score(mentions, entities), scores)


@torch.no_grad()
def test_scores_do_not_depend_on_padding(subject: Subject, scores: Scores) -> None:
    for items in subject.sample.padded():
        assert_close(subject.score(*subject.encode(*items)), scores)


@torch.no_grad()
def test_scores_do_not_depend_on_tiles(subject: Subject, features: tuple[Table, Table], scores: Scores) -> None:
    mentions, entities = subject.matcher.prepare_mentions(features[0]), subject.matcher.prepare_entities(features[1])
    order_M, order_E = torch.arange(NUM_MENTIONS).flip(0), torch.arange(NUM_ENTITIES).flip(0)
    for rows_M in order_M.split(3):
        for rows_E in order_E.split(4):
            tile = subject.matcher.score(mentions.rows(rows_M), entities.rows(rows_E))
            expected = {name: value[rows_M][:, rows_E] for name, value in scores.parts.items()}
            chosen = None if scores.chosen_ME is None else scores.chosen_ME[rows_M][:, rows_E]
            assert_close(tile, Scores(scores.total_ME[rows_M][:, rows_E], chosen, expected), tolerance(scores))


@torch.no_grad()
def test_prepare_is_row_wise(subject: Subject, features: tuple[Table, Table], scores: Scores) -> None:
    mentions = prepare_in_tiles(subject.matcher, features[0], "mentions", CPU, tile=2)
    entities = prepare_in_tiles(subject.matcher, features[1], "entities", CPU, tile=3)
    assert_close(subject.matcher.score(mentions, entities), scores)


@torch.no_grad()
def test_features_may_be_stored_in_half_precision(
    subject: Subject, features: tuple[Table, Table], scores: Scores
) -> None:
    """What is made of them is in single precision again."""
    mentions, entities = (each.cast(torch.float16) for each in features)
    prepared = (
        prepare_in_tiles(subject.matcher, mentions, "mentions", CPU),
        prepare_in_tiles(subject.matcher, entities, "entities", CPU),
    )
    found = subject.matcher.score(*prepared)
    assert all(value.dtype == torch.float32 for value in (found.total_ME, *found.parts.values()))
    rounded = [each.cast(torch.float16).cast(torch.float32) for each in features]
    assert_close(found, subject.score(*rounded), tolerance(scores))


@torch.no_grad()
def test_saved_tables_give_the_same_scores(
    subject: Subject, features: tuple[Table, Table], scores: Scores, tmp_path: Path
) -> None:
    """The same bits are read back; products over mapped memory, aligned otherwise, may differ in their last ones."""

    def reloaded(table: Table) -> Table:
        table.save(tmp_path / "table.safetensors")
        stored = Table.load(tmp_path / "table.safetensors")
        for name, column in table.columns.items():
            again = stored.columns[name]
            if isinstance(column, Ragged):
                assert isinstance(again, Ragged)
                assert all(torch.equal(a, b) for a, b in zip(again.padded(), column.padded(), strict=True))
            else:
                assert isinstance(again, Tensor)
                assert torch.equal(again, table.dense(name))
        return stored

    assert_close(subject.score(*map(reloaded, features)), scores)
    mentions, entities = subject.matcher.prepare_mentions(features[0]), subject.matcher.prepare_entities(features[1])
    assert_close(subject.matcher.score(reloaded(mentions), reloaded(entities)), scores)


@torch.no_grad()
def test_missing_pictures_may_be_stored_once(
    subject: Subject, features: tuple[Table, Table], scores: Scores, tmp_path: Path
) -> None:
    stored = []
    for table, items in zip(features, (subject.sample.mentions, subject.sample.entities), strict=True):
        with TableWriter(tmp_path / f"{len(stored)}.safetensors") as writer:
            writer.append(table, dict.fromkeys(subject.image_token_columns, ~items.has_image))
        stored.append(Table.load(tmp_path / f"{len(stored)}.safetensors"))
    assert_close(subject.score(*stored), scores)


@torch.no_grad()
def test_token_rows_of_a_picture_are_declared(subject: Subject, features: tuple[Table, Table]) -> None:
    """What the feature cache stores once for all items without a picture is what does not change with the text."""
    of_image, sample = set(), subject.sample
    for items, encode, table in (
        (sample.mentions, subject.encode_mentions, features[0]),
        (sample.entities, subject.encode_entities, features[1]),
    ):
        again = encode(replace(items, token_ids=items.token_ids.flip(0), token_mask=items.token_mask.flip(0)))
        ragged = [name for name, column in table.columns.items() if isinstance(column, Ragged)]
        padded = {name: [each.ragged(name).padded()[0] for each in (table, again)] for name in ragged}
        alike = {
            name for name, (x, y) in padded.items() if x.shape == y.shape and torch.allclose(x, y, atol=1e-4, rtol=1e-4)
        }
        declared = set(subject.image_token_columns) & set(ragged)
        assert declared <= alike
        assert declared == alike or items is sample.mentions  # GHMFC's mentions have one row then, which nothing saves
        of_image |= alike
    assert set(subject.image_token_columns) <= of_image


@torch.no_grad()
def test_columns_of_a_picture_do_not_depend_on_the_text(subject: Subject, features: tuple[Table, Table]) -> None:
    """What entities without a picture share (`dsmip.evaluation.preparation`)."""
    entities = subject.sample.entities
    other = replace(entities, token_ids=entities.token_ids.flip(0), token_mask=entities.token_mask.flip(0))
    prepared, again = map(subject.matcher.prepare_entities, (features[1], subject.encode_entities(other)))
    declared = subject.matcher.image_columns(prepared)
    assert bool(declared) == any(name in features[1].columns for name in subject.image_token_columns)
    for name in declared:
        column, same = prepared.columns[name], again.columns[name]
        if isinstance(column, Ragged):
            assert isinstance(same, Ragged)
            torch.testing.assert_close(same.padded(), column.padded(), atol=1e-3, rtol=1e-5)
        else:
            torch.testing.assert_close(again.dense(name), prepared.dense(name), atol=1e-3, rtol=1e-5)


@torch.no_grad()
def test_saved_weights_give_the_same_scores(
    subject: Subject, features: tuple[Table, Table], scores: Scores, tmp_path: Path
) -> None:
    save_weights(tmp_path / "weights.safetensors", own_weights(subject.matcher))
    with seeded(7):
        again = subject.rebuild()
    again.matcher.eval()
    if set(subject.matcher.state_dict()) - subject.matcher.tower_tensors():  # else features are compared as they are
        assert not torch.equal(again.score(*features).total_ME, scores.total_ME)
    load_own_weights(again.matcher, tmp_path / "weights.safetensors")
    assert_equal_bits(again.score(*again.encode(subject.sample.mentions, subject.sample.entities)), scores)


@torch.no_grad()
def test_ranks_do_not_depend_on_tiles(subject: Subject, features: tuple[Table, Table], scores: Scores) -> None:
    mentions, entities = subject.matcher.prepare_mentions(features[0]), subject.matcher.prepare_entities(features[1])
    gold_row_M = torch.arange(NUM_MENTIONS) * 3 % NUM_ENTITIES
    choices = tuple(scores.parts) if scores.chosen_ME is not None else ()
    model = RankedModel(subject.matcher, mentions, EntityIndex([entities]), gold_row_M, choices)

    def ranking(mention_tile: int, entity_tile: int) -> Ranking:
        return rank_unrefined(model, CPU, top_k=3, tile_size=TileSize(mention_tile, entity_tile))

    one, many = ranking(100, 100), ranking(3, 4)
    limits: Any = tolerance(scores)
    # Items without a picture score alike but for the last bits: only entities that close to the gold may differ.
    lead_ME = scores.total_ME - scores.total_ME.gather(1, gold_row_M[:, None])
    near_ME = (lead_ME.abs() < limits["atol"]).scatter(1, gold_row_M[:, None], False)
    best_M = 1 + ((lead_ME > 0) & ~near_ME).sum(dim=1)
    clear_M = ~near_ME.any(dim=1)
    assert clear_M.any()
    for result in (one, many):
        assert torch.equal(result.rank_M[clear_M], best_M[clear_M].double())
        assert bool(((result.rank_M >= best_M) & (result.rank_M <= best_M + near_ME.sum(dim=1))).all())
        torch.testing.assert_close(result.top_score_Mk, scores.total_ME.topk(3, dim=1).values, **limits)
        torch.testing.assert_close(scores.total_ME.gather(1, result.top_row_Mk), result.top_score_Mk, **limits)
    if choices:
        assert one.choices is not None
        assert many.choices is not None
        assert torch.equal(one.choices.pairs_MB, many.choices.pairs_MB)
        assert one.choices.pairs_MB.sum() == NUM_MENTIONS * NUM_ENTITIES


@torch.no_grad()
def test_refined_ranks_are_those_of_double_precision(subject: Subject, features: tuple[Table, Table]) -> None:
    """Whatever the tiles and the slices of the kb."""
    if subject.kind != DEEP:
        pytest.skip("prepared tables are refined alike, whatever encoder they come from")
    mentions, entities = subject.matcher.prepare_mentions(features[0]), subject.matcher.prepare_entities(features[1])
    gold_row_M = torch.arange(NUM_MENTIONS) * 3 % NUM_ENTITIES
    exact = copy.deepcopy(subject.matcher).double().score(mentions.cast(torch.float64), entities.cast(torch.float64))
    scores_ME = (exact.total_ME / GRID).round() * GRID
    best = top_k(scores_ME, 4)
    counts = count_against(scores_ME, scores_ME.gather(1, gold_row_M[:, None])[:, 0], gold_row_M)

    def ranked(index: EntityIndex, tiles: TileSize, gold_score_M: Tensor | None = None) -> Ranking:
        choices = () if exact.chosen_ME is None else tuple(exact.parts)
        model = RankedModel(subject.matcher, mentions, index, gold_row_M, choices)
        return rank(model, CPU, top_k=4, gold_score_M=gold_score_M, tile_size=tiles)

    index = EntityIndex([entities.rows(slice(0, 5)), entities.rows(slice(5, None))])
    slices = [index.slice(number, 3) for number in range(3)]
    golds = [PairScorer(subject.matcher, mentions, each, CPU).gold_scores(gold_row_M) for each in slices]
    gold_score_M = torch.stack(golds).nan_to_num(-torch.inf).amax(dim=0)
    merged = merge_rankings([ranked(each, TileSize(4, 2), gold_score_M) for each in slices], top_k=4)
    for result in (ranked(index, TileSize(100, 100)), ranked(index, TileSize(3, 4)), merged):
        assert torch.equal(result.counts.better_M, counts.better_M)
        assert torch.equal(result.counts.tied_M, counts.tied_M)
        assert torch.equal(result.top_row_Mk, best.rows_MK)
        assert torch.equal(result.top_score_Mk, best.scores_MK)
        if exact.chosen_ME is not None:
            assert result.choices is not None
            assert torch.equal(result.choices.gold_M, exact.chosen_ME.gather(1, gold_row_M[:, None])[:, 0])
            assert torch.equal(result.choices.top_Mk, exact.chosen_ME.gather(1, best.rows_MK))
            assert result.choices.pairs_MB.sum() == NUM_MENTIONS * NUM_ENTITIES
