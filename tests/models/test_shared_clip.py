"""Systems over one CLIP, without their towers: a score is of its pair alone, vectors for a search, and learning."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsmip.data.table import Ragged, Table
from dsmip.encoders.base import FeatureSizes
from dsmip.models.m3el import M3elConfig, M3elMatcher
from dsmip.models.mimic import MimicMatcher
from dsmip.models.mmoe import MmoeConfig, MmoeMatcher
from dsmip.units.matcher import BatchGold
from dsmip.units.shared_clip import SharedClipMatcher
from dsmip.units.unit_scorer import UnitScorer

SIZES, WIDTH, NUM_TOKENS = FeatureSizes(text_width=10, vision_width=12, embed_width=10), 8, 6
M3EL_FORMS: dict[str, dict[str, Any]] = {
    "m3el": {},
    "m3el tokens": {"match_keys": "tokens"},
    "m3el bidirectional": {"cross": "bidirectional"},
    "m3el bidirectional tokens": {"cross": "bidirectional", "match_keys": "tokens"},
}
FORMS = ["mimic", *M3EL_FORMS, "mmoe"]


def random_matcher(form: str, seed: int = 0) -> SharedClipMatcher:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if form == "mimic":
            return MimicMatcher(UnitScorer(("text", "image"), SIZES, WIDTH, mask_padding=False))
        if form == "mmoe":
            return MmoeMatcher(MmoeConfig(width=WIDTH), SIZES)
        return M3elMatcher(M3elConfig(width=WIDTH, **M3EL_FORMS[form]), SIZES)


def random_items(count: int, seed: int, dtype: torch.dtype = torch.float32) -> Table:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    return Table(
        {
            "text_global": normal(count, 10),
            "text_tokens": Ragged.from_padded(normal(count, NUM_TOKENS, 10)),
            "image_global": normal(count, 10),
            "image_tokens": Ragged.from_padded(normal(count, NUM_TOKENS - 1, 12)),
        }
    )


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**16), num_mentions=st.integers(1, 4), num_entities=st.integers(1, 5), data=st.data())
def test_a_score_depends_on_its_pair_alone(
    form: str, seed: int, num_mentions: int, num_entities: int, data: st.DataObject
) -> None:
    matcher = random_matcher(form, seed)
    mentions, entities = random_items(num_mentions, seed), random_items(num_entities, seed + 1)
    whole_ME = matcher.score(matcher.prepare_mentions(mentions), matcher.prepare_entities(entities)).total_ME
    m, e = data.draw(st.integers(0, num_mentions - 1)), data.draw(st.integers(0, num_entities - 1))
    mention, entity = mentions.take(slice(m, m + 1)), entities.take(slice(e, e + 1))
    alone = matcher.prepare_mentions(mention), matcher.prepare_entities(entity)
    torch.testing.assert_close(matcher.score(*alone).total_ME[0, 0], whole_ME[m, e], atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS[1:])  # MIMIC's: tests/evaluation/test_candidates.py
def test_products_of_global_vectors_are_scores_without_token_level_halves(form: str) -> None:
    matcher = random_matcher(form)
    for parameter in matcher.parameters():  # norms' biases start at 0, which would hide mistakes
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    mentions, entities = matcher.prepare_mentions(random_items(4, 1)), matcher.prepare_entities(random_items(6, 2))
    found_ME = matcher.global_vectors(mentions, "mentions") @ matcher.global_vectors(entities, "entities").T
    parts = matcher.scorer.score(mentions, entities, torch.zeros(4, 6, dtype=torch.bool))
    torch.testing.assert_close(found_ME, torch.stack(list(parts.values())).mean(dim=0), atol=1e-4, rtol=1e-4)


def seen_again(items: Table, seed: int) -> Table:
    """The same items: little noise in the first half of their channels, and nothing of them left in the other."""
    other = random_items(len(items), seed)

    def again(values: Tensor, noise: Tensor) -> Tensor:
        told = torch.arange(values.shape[1]) < values.shape[1] // 2
        return torch.where(told, values + 0.3 * noise, 3 * noise)

    columns: dict[str, Tensor | Ragged] = {}
    for name, column in items.columns.items():
        if isinstance(column, Ragged):
            values = again(column.values, other.ragged(name).values)
            columns[name] = Ragged(values, column.starts, column.lengths)
        else:
            columns[name] = again(items.dense(name), other.dense(name))
    return Table(columns)


@pytest.mark.parametrize("form", [pytest.param("m3el", marks=pytest.mark.slow), "m3el bidirectional tokens", "mmoe"])
def test_it_learns_which_channels_tell_entities_apart(form: str) -> None:
    """On half of the kb, and then finds those of the other half, among all."""
    matcher, entities = random_matcher(form), random_items(96, 1)
    seen, unseen = torch.arange(48), torch.arange(48, 96)
    unseen_mentions = seen_again(entities.take(unseen), 99)

    @torch.no_grad()
    def hits() -> float:
        prepared = matcher.prepare_mentions(unseen_mentions), matcher.prepare_entities(entities)
        return float((matcher.score(*prepared).total_ME.argmax(dim=1) == unseen).float().mean())

    untrained = hits()
    optimizer = torch.optim.Adam(matcher.parameters(), lr=0.02)
    gold = BatchGold.from_rows(seen, seen, seen)
    for step in range(30):
        optimizer.zero_grad()
        (matcher(seen_again(entities.take(seen), step + 2), entities.take(seen), gold) / len(seen)).backward()
        optimizer.step()
    assert untrained < 0.2
    assert hits() > 0.6
