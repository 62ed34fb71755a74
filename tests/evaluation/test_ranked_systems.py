"""Rankings of whole systems, of random and of trained weights: they depend neither on tiles nor on slices of the kb.

Items at scale are small ones of every kind: texts of one to a dozen tokens, padding hidden or not, missing pictures
that share their features, entities that are alike and tie, scores that differ much or hardly.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsmip.config import ExperimentConfig, TrainConfig
from dsmip.data.table import Column, Ragged, Table
from dsmip.encoders.base import feature_sizes
from dsmip.evaluation.index import EntityIndex
from dsmip.evaluation.ranking import RankedModel, rank, rank_unrefined
from dsmip.evaluation.ranks import NotRankable, merge_rankings
from dsmip.evaluation.refinement import PairScorer
from dsmip.evaluation.tiles import TileSize
from dsmip.training.batches import CachedSource
from dsmip.training.local_context import LocalContext
from dsmip.training.trainer import train
from tests.support.scoring.matchers import CPU
from tests.support.scoring.ranking_cases import FORMS, Case, assert_equal, case_of, random_matcher, seen_by
from tests.support.scoring.systems import features, with_system

NUM_MENTIONS, NUM_ENTITIES = 9, 90
NUM_TIED = 10
IMAGE_TOKENS = 5
LONGEST_TEXT = 12
SCALES = (0.3, 1.0, 3.0)


def make_case(form: str, config: ExperimentConfig, seed: int = 0) -> Case:
    sides = features(config, NUM_MENTIONS, 2 * seed), features(config, NUM_ENTITIES, 2 * seed + 1)
    return case_of(form, random_matcher(form, config, seed), *sides)


@pytest.fixture(scope="module", params=FORMS)
def case(request: pytest.FixtureRequest, small_config: ExperimentConfig) -> Case:
    return make_case(request.param, small_config)


@pytest.mark.parametrize(
    ("tiles", "top_k"),
    [
        ((4, 16), 5),
        ((9, 40), NUM_ENTITIES + 1),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in (((100, 30), 5), ((4, 16), 0), ((1, 7), 5))),
    ],
)
def test_tiles_change_no_ranking(case: Case, tiles: tuple[int, int], top_k: int) -> None:
    expected = case.rank(case.golds(), TileSize(100, 100), top_k)
    found = case.rank(case.golds(), TileSize(*tiles), top_k)
    assert_equal(found, expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (2, 3, 4))])
def test_other_weights_and_items(small_config: ExperimentConfig, form: str, seed: int) -> None:
    case = make_case(form, small_config, seed)
    expected = case.rank(case.golds(), TileSize(100, 100), 2)
    assert_equal(case.rank(case.golds(), TileSize(9, 16), 2), expected)


@pytest.mark.parametrize("top_k", [pytest.param(0, marks=pytest.mark.slow), 4])
def test_slices_of_the_kb_are_ranked_on_their_own(case: Case, top_k: int) -> None:
    gold_row_M, index = case.golds(), EntityIndex([case.entities])
    slices = [index.slice(part, 3) for part in range(3)]
    golds = [PairScorer(case.matcher, case.mentions, each, CPU).gold_scores(gold_row_M) for each in slices]
    gold_score_M = torch.stack(golds).nan_to_num(-torch.inf).amax(dim=0)
    parts = [
        rank(case.against(each, gold_row_M), CPU, top_k=top_k, gold_score_M=gold_score_M, tile_size=TileSize(4, 8))
        for each in slices
    ]
    merged = merge_rankings(parts, top_k)
    assert_equal(merged, case.rank(gold_row_M, TileSize(100, 100), top_k))


def test_token_level_scores_of_chosen_experts_are_counted(case: Case) -> None:
    ranking = case.rank(case.golds(), TileSize(9, 10), 2)
    chosen_ME = case.score().chosen_ME
    if chosen_ME is None:
        assert ranking.cost.token_pairs_M2 is None
        return
    assert ranking.cost.token_pairs_M2 is not None
    computed_M, all_M = ranking.cost.token_pairs_M2.T
    assert torch.equal(computed_M, (chosen_ME != 1).sum(dim=1))  # all but the visual expert's
    assert torch.equal(all_M, torch.full_like(computed_M, 2 * NUM_ENTITIES))


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
        Case(case.matcher, case.mentions, broken).rank(gold_row_M, TileSize(9, 10), 2)


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
    broken = Case(case.matcher, case.mentions, Table(columns), case.choices)
    with torch.no_grad():
        scores = broken.score()
    assert scores.broken_part(3, 5) == name
    first = int(scores.total_ME[:, 5].isnan().nonzero()[0, 0])
    elsewhere_M = torch.zeros(NUM_MENTIONS, dtype=torch.int64)
    with pytest.raises(NotRankable, match=rf"mention {first} and entity row 5 is NaN or infinite \({name}\)"):
        rank_unrefined(broken.against(EntityIndex([broken.entities]), elsewhere_M), CPU)
    model = RankedModel(case.matcher, case.mentions, EntityIndex([broken.entities]), elsewhere_M + 5)
    with pytest.raises(NotRankable) as raised:
        model.rank(CPU)
    assert model.broken_part(raised.value.mention, raised.value.entity_row) == name
    assert model.broken_part(0, 0) is None


@dataclass(frozen=True)
class Kind:
    """masked: texts have their own lengths, else all places. missing: share of items without a picture."""

    masked: bool
    missing: float
    scale: float


KINDS = [Kind(*each) for each in itertools.product((True, False), (0.0, 0.5), SCALES)]


def random_items(config: ExperimentConfig, kind: Kind, count: int, generator: torch.Generator) -> Table:
    """Features of all experts and of the gate."""
    sizes = feature_sizes(config.backbone.architecture)
    has_image = torch.rand(count, generator=generator) >= kind.missing

    def normal(*shape: int) -> Tensor:
        return kind.scale * torch.randn(shape, generator=generator)

    def images(width: int) -> Tensor:
        return torch.where(has_image[:, None], normal(count, width), 0.1)

    columns: dict[str, Column] = {
        "gate.text": normal(count, sizes.text_width),
        "gate.picture": images(sizes.embed_width),
    }
    for part in ("text", "multimodal"):
        lengths = torch.randint(1, LONGEST_TEXT + 1, (count,), generator=generator)
        mask = (torch.arange(LONGEST_TEXT) < lengths[:, None]) | (not kind.masked)
        columns[f"{part}.text_global"] = normal(count, sizes.embed_width)
        columns[f"{part}.text_tokens"] = Ragged.from_padded(normal(count, LONGEST_TEXT, sizes.text_width), mask)
    # items without a picture share the first rows
    starts = IMAGE_TOKENS * torch.where(has_image, torch.arange(count) + 1, 0)
    for part in ("visual", "multimodal"):
        columns[f"{part}.image_global"] = images(sizes.embed_width)
        values = normal(IMAGE_TOKENS * (count + 1), sizes.vision_width)
        columns[f"{part}.image_tokens"] = Ragged(values, starts, torch.full_like(starts, IMAGE_TOKENS))
    return Table(columns)


def with_twins(entities: Table) -> Table:
    """The last entities are the first ones again: their scores tie."""
    return entities.rows(torch.cat([torch.arange(len(entities)), torch.arange(NUM_TIED)]))


def noisy(items: Table, noise: float, generator: torch.Generator) -> Table:
    """The same items, every number changed a little."""

    def changed(values: Tensor) -> Tensor:
        return values + noise * values.std() * torch.randn(values.shape, generator=generator)

    columns: dict[str, Column] = {
        name: Ragged(changed(column.values), column.starts, column.lengths)
        if isinstance(column, Ragged)
        else changed(items.dense(name))
        for name, column in items.columns.items()
    }
    return Table(columns)


def assert_tiles_change_nothing(case: Case, seed: int) -> None:
    """With tiles and a top-k that depend on the seed."""
    tiles, top_k = TileSize((5, 50)[seed % 2], (16, 48, 100)[seed % 3]), (0, 1, 5, 20)[seed % 4]
    golds = case.golds()
    assert_equal(case.rank(golds, tiles, top_k), case.rank(golds, TileSize(100, 1000), top_k))


def seed_of(form: str, number: int) -> int:
    """Another one for each form: some have the same weights and would rank the same."""
    return 1000 * list(FORMS).index(form) + number


@pytest.mark.parametrize(
    "numbers", [pytest.param((0, 1), marks=pytest.mark.slow), pytest.param((1, 4), marks=pytest.mark.soak)]
)
@pytest.mark.parametrize("form", FORMS)
def test_systems_of_random_weights(small_config: ExperimentConfig, form: str, numbers: tuple[int, int]) -> None:
    start, end = (len(KINDS) * each for each in numbers)
    for number, kind in enumerate((KINDS * 4)[start:end], start=start):
        seed = seed_of(form, number)
        generator = torch.Generator().manual_seed(seed)
        config = with_system(small_config, mask_padding=kind.masked)
        mentions = random_items(config, kind, 10 + number % 15, generator)
        entities = with_twins(random_items(config, kind, 60 + number * 7 % 80, generator))
        case = case_of(form, random_matcher(form, config, seed), mentions, entities)
        assert_tiles_change_nothing(case, number)


@pytest.mark.parametrize(
    "numbers", [pytest.param((0, 1), marks=pytest.mark.slow), pytest.param((1, len(KINDS)), marks=pytest.mark.soak)]
)
@pytest.mark.parametrize("form", FORMS)
def test_systems_that_were_trained(
    small_config: ExperimentConfig, form: str, numbers: tuple[int, int], tmp_path: Path
) -> None:
    """They learn to find entities by what noise leaves of them, and rank mentions that they have not seen."""
    settings = TrainConfig(epochs=4, batch_size=16, learning_rate=0.01)
    seen, others = torch.arange(64), torch.arange(60, 90)
    for number in range(*numbers):
        kind, seed = KINDS[number], seed_of(form, number)
        generator = torch.Generator().manual_seed(seed)
        config = with_system(small_config, mask_padding=kind.masked)
        entities = random_items(config, kind, 90, generator)
        learned = noisy(entities.take(seen), 0.5, generator)
        source = CachedSource(seen_by(form, learned), seen_by(form, entities), seen, settings, seed)
        matcher, folder = random_matcher(form, config, seed), tmp_path / str(number)
        history = train(matcher, source, settings, LocalContext(folder, CPU), lambda _: {"mrr": 0.0}, seed=seed).history
        assert history[-1]["loss"] < history[0]["loss"]
        mentions = noisy(entities.take(others), 0.5, generator)
        assert_tiles_change_nothing(case_of(form, matcher, mentions, with_twins(entities)), number)
