"""Thousands of mentions ranked with and without pruning, by systems of random and of trained weights.

Small items of every kind: texts of one to a dozen tokens, padding hidden or not, missing pictures that share their
features, entities that are alike and tie, scores that differ much or hardly.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsmip.config import ExperimentConfig, TrainConfig
from dsmip.evaluation import TileSize
from dsmip.expert import feature_sizes
from dsmip.local_context import LocalContext
from dsmip.sources import CachedSource
from dsmip.table import Column, Ragged, Table
from dsmip.trainer import train
from tests.support.matchers import CPU
from tests.support.ranking_cases import FORMS, Case, assert_equal, case_of, random_matcher, seen_by
from tests.support.systems import with_system

pytestmark = pytest.mark.slow

NUM_TIED = 10
PICTURE_TOKENS = 5
LONGEST_TEXT = 12
SCALES = (0.3, 1.0, 3.0)


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
    has_picture = torch.rand(count, generator=generator) >= kind.missing

    def normal(*shape: int) -> Tensor:
        return kind.scale * torch.randn(shape, generator=generator)

    def pictures(width: int) -> Tensor:
        return torch.where(has_picture[:, None], normal(count, width), 0.1)

    columns: dict[str, Column] = {
        "gate.text": normal(count, sizes.text_width),
        "gate.picture": pictures(sizes.embed_width),
    }
    for part in ("text", "multimodal"):
        lengths = torch.randint(1, LONGEST_TEXT + 1, (count,), generator=generator)
        mask = (torch.arange(LONGEST_TEXT) < lengths[:, None]) | (not kind.masked)
        columns[f"{part}.text_global"] = normal(count, sizes.embed_width)
        columns[f"{part}.text_tokens"] = Ragged.from_padded(normal(count, LONGEST_TEXT, sizes.text_width), mask)
    # items without a picture share the first rows
    starts = PICTURE_TOKENS * torch.where(has_picture, torch.arange(count) + 1, 0)
    for part in ("visual", "multimodal"):
        columns[f"{part}.image_global"] = pictures(sizes.embed_width)
        values = normal(PICTURE_TOKENS * (count + 1), sizes.vision_width)
        columns[f"{part}.image_tokens"] = Ragged(values, starts, torch.full_like(starts, PICTURE_TOKENS))
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
        else changed(column)
        for name, column in items.columns.items()
    }
    return Table(columns)


def num_pruned(case: Case, seed: int) -> int:
    """Asserts that pruning changes nothing, with tiles and a top-k that depend on the seed; pairs that it spared."""
    tiles, top_k = TileSize((5, 50)[seed % 2], (16, 48, 100)[seed % 3]), (0, 1, 5, 20)[seed % 4]
    golds = case.golds()
    expected = case.rank(golds, TileSize(100, 1000), top_k, prune=False)
    found = case.rank(golds, tiles, top_k, prune=True)
    assert_equal(found, expected)
    assert found.pruned_pairs_M is not None
    return int(found.pruned_pairs_M.sum())


def seed_of(form: str, number: int) -> int:
    """Another one for each form: some have the same weights and would rank the same."""
    return 1000 * list(FORMS).index(form) + number


@pytest.mark.parametrize("form", FORMS)
def test_systems_of_random_weights(small_config: ExperimentConfig, form: str) -> None:
    pruned = {True: 0, False: 0}
    for number, kind in enumerate(KINDS * 4):
        seed = seed_of(form, number)
        generator = torch.Generator().manual_seed(seed)
        config = with_system(small_config, mask_padding=kind.masked)
        mentions = random_items(config, kind, 10 + number % 15, generator)
        entities = with_twins(random_items(config, kind, 60 + number * 7 % 80, generator))
        case = case_of(form, random_matcher(form, config, seed), mentions, entities)
        pruned[kind.masked] += num_pruned(case, number)
    assert min(pruned.values()) > 0


@pytest.mark.parametrize("form", FORMS)
def test_systems_that_were_trained(small_config: ExperimentConfig, form: str, tmp_path: Path) -> None:
    """They learn to find entities by what noise leaves of them, and rank mentions that they have not seen."""
    pruned = {True: 0, False: 0}
    settings = TrainConfig(epochs=4, batch_size=16, learning_rate=0.01)
    seen, others = torch.arange(64), torch.arange(60, 90)
    for number, kind in enumerate(KINDS):
        seed = seed_of(form, number)
        generator = torch.Generator().manual_seed(seed)
        config = with_system(small_config, mask_padding=kind.masked)
        entities = random_items(config, kind, 90, generator)
        learned = noisy(entities.take(seen), 0.5, generator)
        source = CachedSource(seen_by(form, learned), seen_by(form, entities), seen, settings, seed)
        matcher, folder = random_matcher(form, config, seed), tmp_path / str(number)
        history = train(matcher, source, settings, LocalContext(folder, CPU), lambda _: {"mrr": 0.0}, seed=seed).history
        assert history[-1]["loss"] < history[0]["loss"]
        mentions = noisy(entities.take(others), 0.5, generator)
        pruned[kind.masked] += num_pruned(case_of(form, matcher, mentions, with_twins(entities)), number)
    assert min(pruned.values()) > 0
