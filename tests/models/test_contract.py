"""The contract of `dsmip.models.base`, run over every registered system, every part of it and the whole.

A new file in `dsmip/models/` is tested by being there, with its default settings; a system whose defaults need
downloads or that has several forms is named in `FORMS`.
"""

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsmip.config import ExperimentConfig
from dsmip.data.collate import ItemBatch
from dsmip.data.table import Ragged, Table, concatenate
from dsmip.data.table_writer import TableWriter
from dsmip.encoders.feature_cache import whole_features
from dsmip.evaluation.index import EntityIndex
from dsmip.evaluation.preparation import prepare_in_tiles
from dsmip.evaluation.ranking import RankedModel, TileSize, rank, rank_unrefined
from dsmip.evaluation.ranks import Ranking, merge_rankings
from dsmip.evaluation.refinement import GRID, PairScorer
from dsmip.models import systems
from dsmip.models.base import System
from dsmip.ops.ranking import count_against, top_k
from dsmip.runs.load_config import parse_config
from dsmip.runs.weights import load_own_weights, own_weights, save_weights
from dsmip.units.matcher import BatchGold, Matcher, Scores

FORMS: dict[str, list[dict[str, Any]]] = {
    "dsmip": [
        {"gate": {"picture": "clip"}},
        {"gate": {"picture": "clip", "choice": "mention"}},
        {"gate": {"picture": "clip"}, "mask_padding": False},
    ],
    "mimic": [{}, {"mask_padding": True}],
}
# Deep enough for every default (nine layers of prompts), and narrow.
BACKBONE = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 16, "layers": 9, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 9},
}
CPU = torch.device("cpu")
START, END, IMAGE_SIZE = 49406, 49407, 16
NUM_MENTIONS, NUM_ENTITIES, LONGEST = 7, 11, 20
# Scores are sums over tens of channels with values of order one: float32 in another order of summation.
TOLERANCE: dict[str, Any] = {"atol": 1e-3, "rtol": 1e-5}

Encode = Callable[[ItemBatch], Table]


@dataclass(frozen=True)
class Subject:
    """A matcher under test, and how its features are made from raw items. `rebuild`: the same with fresh weights."""

    matcher: Matcher
    encode_mentions: Encode
    encode_entities: Encode
    rebuild: Callable[[], "Subject"]
    draws_noise: bool = False

    def encode(self, mentions: ItemBatch, entities: ItemBatch) -> tuple[Table, Table]:
        return self.encode_mentions(mentions), self.encode_entities(entities)

    def score(self, mentions: Table, entities: Table) -> Scores:
        """From features."""
        return self.matcher.score(self.matcher.prepare_mentions(mentions), self.matcher.prepare_entities(entities))


def cases() -> Iterator[Any]:
    for name, system in systems().items():
        for number, form in enumerate(FORMS.get(name, [{}])):
            tree = {"model": name, "backbone": {"architecture": "tiny"}, "system": form}
            for part in (*system.part_names(parse_config(tree).system), None):
                yield pytest.param((name, form, part), id=f"{name}{number}-{part or 'whole'}")


@pytest.fixture(scope="module")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("backbone") / "contract.json"
    path.write_text(json.dumps(BACKBONE))
    return str(path)


@pytest.fixture(scope="module", params=cases())
def subject(request: pytest.FixtureRequest, architecture: str) -> Subject:
    name, form, part = request.param
    system = systems()[name]
    config = parse_config({"model": name, "backbone": {"architecture": architecture}, "system": form})
    with seeded(1):
        made = _whole(system, config) if part is None else _part(system, part, config)
        shake(made.matcher)
    made.matcher.eval()
    return made


def _part(system: type[System], part: str, config: ExperimentConfig) -> Subject:
    matcher = system.build_part(part, config, with_encoder=True)
    return Subject(
        matcher, matcher.encode_mentions, matcher.encode_entities, rebuild=lambda: _part(system, part, config)
    )


def _whole(system: type[System], config: ExperimentConfig) -> Subject:
    """A gated system scores its parts' features side by side; any other is its one part without towers."""
    names = system.feature_parts(config.system)
    encoders = {name: system.build_encoder(name, config) for name in names}

    def encode(batch: ItemBatch, method: str) -> Table:
        tables = {name: getattr(encoder, method)(batch) for name, encoder in encoders.items()}
        return whole_features(tables, names) if system.gated else tables[names[0]]

    def build() -> Subject:
        return Subject(
            system.build_whole(config),
            lambda batch: encode(batch, "encode_mentions"),
            lambda batch: encode(batch, "encode_entities"),
            rebuild=build,
            draws_noise=system.gated,
        )

    return build()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def shake(matcher: Matcher) -> None:
    """Norms and biases start at 1 and 0, which would hide mistakes. A frozen tower stays as its configuration says."""
    for tensor in own_weights(matcher).values():
        if tensor.is_floating_point():
            tensor += 0.1 * torch.randn_like(tensor)


def make_items(count: int, seed: int) -> ItemBatch:
    """Texts of different length, every third item without a picture."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, LONGEST + 1, (count,), generator=generator).tolist()
    token_ids = torch.zeros(count, max(lengths), dtype=torch.int64)
    for row, length in enumerate(lengths):
        token_ids[row, 0], token_ids[row, length - 1] = START, END
        token_ids[row, 1 : length - 1] = torch.randint(1, 49000, (length - 2,), generator=generator)
    shape = (count, 3, IMAGE_SIZE, IMAGE_SIZE)
    images = torch.randint(0, 256, shape, generator=generator).to(torch.uint8)
    has_image = torch.arange(count) % 3 != 1
    images[~has_image] = 0
    return ItemBatch(token_ids, images, has_image)


def trimmed(batch: ItemBatch) -> ItemBatch:
    """Without columns that are padding in every row."""
    longest = int(batch.token_ids.argmax(dim=1).max()) + 1
    return ItemBatch(batch.token_ids[:, :longest], batch.images, batch.has_image)


def padded(batch: ItemBatch, columns: int) -> ItemBatch:
    zeros = batch.token_ids.new_zeros(len(batch), columns)
    return ItemBatch(torch.cat([batch.token_ids, zeros], dim=1), batch.images, batch.has_image)


MENTIONS, ENTITIES = make_items(NUM_MENTIONS, seed=2), make_items(NUM_ENTITIES, seed=3)


@pytest.fixture(scope="module")
def features(subject: Subject) -> tuple[Table, Table]:
    with torch.no_grad():
        return subject.encode(MENTIONS, ENTITIES)


@pytest.fixture(scope="module")
def scores(subject: Subject, features: tuple[Table, Table]) -> Scores:
    with torch.no_grad():
        return subject.score(*features)


def assert_equal_bits(actual: Scores, expected: Scores) -> None:
    assert torch.equal(actual.total_ME, expected.total_ME)
    assert actual.parts.keys() == expected.parts.keys()
    assert all(torch.equal(actual.parts[name], expected.parts[name]) for name in expected.parts)
    if expected.chosen_ME is not None:
        assert actual.chosen_ME is not None
        assert torch.equal(actual.chosen_ME, expected.chosen_ME)


def assert_close(actual: Scores, expected: Scores) -> None:
    for name, value in expected.parts.items():
        torch.testing.assert_close(actual.parts[name], value, **TOLERANCE)
    if expected.chosen_ME is not None:
        assert actual.chosen_ME is not None
        assert torch.equal(actual.chosen_ME, expected.chosen_ME)
    torch.testing.assert_close(actual.total_ME, expected.total_ME, **TOLERANCE)


def test_scores_are_finite_float32_and_differ(scores: Scores) -> None:
    for value in (scores.total_ME, *scores.parts.values()):
        assert value.shape == (NUM_MENTIONS, NUM_ENTITIES)
        assert value.dtype == torch.float32
        assert value.isfinite().all()
    # else nothing below could fail
    assert scores.total_ME.std(dim=0).min() > 10 * TOLERANCE["atol"]
    assert scores.total_ME.std(dim=1).min() > 10 * TOLERANCE["atol"]


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
        assert_equal_bits(subject.score(*subject.encode(MENTIONS, ENTITIES)), scores)


@torch.no_grad()
def test_scores_do_not_depend_on_batch_composition(subject: Subject, scores: Scores) -> None:
    def one_by_one(encode: Encode, batch: ItemBatch) -> Table:
        return concatenate([encode(trimmed(batch.rows(n, n + 1))) for n in range(len(batch))])

    mentions = one_by_one(subject.encode_mentions, MENTIONS)
    entities = one_by_one(subject.encode_entities, ENTITIES)
    assert_close(subject.score(mentions, entities), scores)


@torch.no_grad()
def test_scores_do_not_depend_on_padding(subject: Subject, scores: Scores) -> None:
    for columns in (1, 30):
        assert_close(subject.score(*subject.encode(padded(MENTIONS, columns), padded(ENTITIES, columns))), scores)


@torch.no_grad()
def test_scores_do_not_depend_on_tiles(subject: Subject, features: tuple[Table, Table], scores: Scores) -> None:
    mentions, entities = subject.matcher.prepare_mentions(features[0]), subject.matcher.prepare_entities(features[1])
    order_M, order_E = torch.arange(NUM_MENTIONS).flip(0), torch.arange(NUM_ENTITIES).flip(0)
    for rows_M in order_M.split(3):
        for rows_E in order_E.split(4):
            tile = subject.matcher.score(mentions.rows(rows_M), entities.rows(rows_E))
            expected = {name: value[rows_M][:, rows_E] for name, value in scores.parts.items()}
            chosen = None if scores.chosen_ME is None else scores.chosen_ME[rows_M][:, rows_E]
            assert_close(tile, Scores(scores.total_ME[rows_M][:, rows_E], chosen, expected))


@torch.no_grad()
def test_prepare_is_row_wise(subject: Subject, features: tuple[Table, Table], scores: Scores) -> None:
    mentions = prepare_in_tiles(subject.matcher, features[0], "mentions", CPU, tile=2)
    entities = prepare_in_tiles(subject.matcher, features[1], "entities", CPU, tile=3)
    assert_close(subject.matcher.score(mentions, entities), scores)


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
    for table, items in zip(features, (MENTIONS, ENTITIES), strict=True):
        images = [name for name in table.columns if name.split(".")[-1] == "image_tokens"]
        with TableWriter(tmp_path / f"{len(stored)}.safetensors") as writer:
            writer.append(table, dict.fromkeys(images, ~items.has_image))
        stored.append(Table.load(tmp_path / f"{len(stored)}.safetensors"))
    assert_close(subject.score(*stored), scores)


@torch.no_grad()
def test_columns_of_a_picture_do_not_depend_on_the_text(subject: Subject, features: tuple[Table, Table]) -> None:
    """What entities without a picture share (`dsmip.evaluation.preparation`)."""
    other = ItemBatch(ENTITIES.token_ids.flip(0), ENTITIES.images, ENTITIES.has_image)
    prepared, again = map(subject.matcher.prepare_entities, (features[1], subject.encode_entities(other)))
    declared = subject.matcher.image_columns(prepared)
    assert bool(declared) == any(name.split(".")[-1] == "image_tokens" for name in features[1].columns)
    for name in declared:
        torch.testing.assert_close(again.dense(name), prepared.dense(name), **TOLERANCE)


@torch.no_grad()
def test_saved_weights_give_the_same_scores(
    subject: Subject, features: tuple[Table, Table], scores: Scores, tmp_path: Path
) -> None:
    save_weights(tmp_path / "weights.safetensors", own_weights(subject.matcher))
    with seeded(7):
        again = subject.rebuild()
    again.matcher.eval()
    assert not torch.equal(again.score(*features).total_ME, scores.total_ME)
    load_own_weights(again.matcher, tmp_path / "weights.safetensors")
    assert_equal_bits(again.score(*again.encode(MENTIONS, ENTITIES)), scores)


@torch.no_grad()
def test_ranks_do_not_depend_on_tiles(subject: Subject, features: tuple[Table, Table], scores: Scores) -> None:
    mentions, entities = subject.matcher.prepare_mentions(features[0]), subject.matcher.prepare_entities(features[1])
    gold_row_M = torch.arange(NUM_MENTIONS) * 3 % NUM_ENTITIES
    choices = tuple(scores.parts) if scores.chosen_ME is not None else ()
    model = RankedModel(subject.matcher, mentions, EntityIndex([entities]), gold_row_M, choices)

    def ranking(mention_tile: int, entity_tile: int) -> Ranking:
        return rank_unrefined(model, CPU, top_k=3, tile_size=TileSize(mention_tile, entity_tile))

    one, many = ranking(100, 100), ranking(3, 4)
    # Items without a picture score alike but for the last bits: only entities that close to the gold may differ.
    lead_ME = scores.total_ME - scores.total_ME.gather(1, gold_row_M[:, None])
    near_ME = (lead_ME.abs() < TOLERANCE["atol"]).scatter(1, gold_row_M[:, None], False)
    best_M = 1 + ((lead_ME > 0) & ~near_ME).sum(dim=1)
    clear_M = ~near_ME.any(dim=1)
    assert clear_M.any()
    for result in (one, many):
        assert torch.equal(result.rank_M[clear_M], best_M[clear_M].double())
        assert bool(((result.rank_M >= best_M) & (result.rank_M <= best_M + near_ME.sum(dim=1))).all())
        torch.testing.assert_close(result.top_score_Mk, scores.total_ME.topk(3, dim=1).values, **TOLERANCE)
        torch.testing.assert_close(scores.total_ME.gather(1, result.top_row_Mk), result.top_score_Mk, **TOLERANCE)
    if choices:
        assert one.choices is not None
        assert many.choices is not None
        assert torch.equal(one.choices.pairs_MB, many.choices.pairs_MB)
        assert one.choices.pairs_MB.sum() == NUM_MENTIONS * NUM_ENTITIES


@torch.no_grad()
def test_refined_ranks_are_those_of_double_precision(subject: Subject, features: tuple[Table, Table]) -> None:
    """Whatever the tiles and the slices of the kb."""
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
    slices = [index.slice(part, 3) for part in range(3)]
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


def loss_of(subject: Subject, features: tuple[Table, Table], rows_M: list[int], gold_rows: list[int]) -> Tensor:
    """Loss of some mentions against as many entities, of which the n-th is the n-th mention's gold."""
    gold_M = torch.tensor(gold_rows)
    gold = BatchGold.from_rows(gold_M, gold_M, torch.arange(len(rows_M)))
    columns = features[1].take(torch.arange(len(rows_M)))
    with seeded(4):
        loss: Tensor = subject.matcher(features[0].take(torch.tensor(rows_M)), columns, gold)
    return loss


@torch.no_grad()
def test_pairs_with_the_same_gold_are_no_negatives(subject: Subject, features: tuple[Table, Table]) -> None:
    assert float(loss_of(subject, features, [0, 1, 2], [5, 5, 5])) == 0.0
    assert float(loss_of(subject, features, [0, 1, 2], [5, 6, 7])) > 1e-3


@torch.no_grad()
def test_loss_is_a_sum_over_mentions(subject: Subject, features: tuple[Table, Table]) -> None:
    """And of each mention over its own negatives alone: gathered batches and micro-batches rely on it."""
    if subject.draws_noise:
        pytest.skip("its loss draws noise per pair")
    gold_M = torch.tensor([4, 8, 4, 2])
    expected = torch.zeros(())
    for mention in range(4):
        columns = [n for n in range(4) if n == mention or gold_M[n] != gold_M[mention]]
        gold = BatchGold(torch.tensor([columns.index(mention)]), torch.zeros(1, len(columns), dtype=torch.bool))
        rows = torch.tensor(columns)
        expected += subject.matcher(features[0].take(slice(mention, mention + 1)), features[1].take(rows), gold)
    torch.testing.assert_close(
        loss_of(subject, features, [0, 1, 2, 3], gold_M.tolist()), expected, atol=5e-3, rtol=1e-4
    )


def test_every_trainable_parameter_gets_a_gradient(subject: Subject) -> None:
    mentions, entities = subject.encode(MENTIONS.rows(0, 4), ENTITIES.rows(0, 4))
    gold = BatchGold.from_rows(torch.arange(4), torch.arange(4), torch.arange(4))
    subject.matcher.train()
    with seeded(4):
        loss = subject.matcher(mentions, entities, gold)
    subject.matcher.zero_grad(set_to_none=True)
    loss.backward()
    subject.matcher.eval()
    trained = {name: p for name, p in subject.matcher.named_parameters() if p.requires_grad}
    assert trained
    assert [name for name, p in trained.items() if p.grad is None or not p.grad.isfinite().all()] == []
    subject.matcher.zero_grad(set_to_none=True)
