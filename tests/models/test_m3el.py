"""M3EL against its published scores, loss and parameter names, and the faults of its release that a setting mends."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from dsmip.data.images import PixelForm
from dsmip.data.table import Ragged, Table
from dsmip.errors import UserError
from dsmip.models.m3el import M3elConfig, M3elMatcher
from dsmip.runs.load_config import load_config
from dsmip.units.match_unit import BidirectionalMatch, MatchKeys, OneWayMatch
from dsmip.units.matcher import BatchGold
from tests.support.scoring.published import SIZES, WIDTH, golden_values, published_features, published_weights


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return golden_values("m3el_units")


def loaded(golden: dict[str, Tensor], **settings: Any) -> M3elMatcher:
    matcher = M3elMatcher(M3elConfig(width=WIDTH, **settings), SIZES)
    matcher.load_published_state_dict(published_weights(golden))
    return matcher


@torch.no_grad()
@pytest.mark.parametrize(("cross", "folder"), [("one_way", "scores"), ("bidirectional", "scores_bidirectional")])
def test_published_weights_give_the_published_scores(golden: dict[str, Tensor], cross: str, folder: str) -> None:
    matcher = loaded(golden, cross=cross)
    mentions = matcher.prepare_mentions(published_features(golden, "mention"))
    entities = matcher.prepare_entities(published_features(golden, "entity"))
    scores = matcher.score(mentions, entities)
    found = {**scores.parts, "mean": scores.total_ME}
    expected = {name.removeprefix(f"{folder}/"): t for name, t in golden.items() if name.startswith(f"{folder}/")}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_contrast_within_modalities_is_the_published_one(golden: dict[str, Tensor]) -> None:
    mentions, entities = published_features(golden, "mention"), published_features(golden, "entity").rows(slice(0, 5))
    gold = BatchGold.from_rows(torch.arange(5), torch.arange(5), torch.arange(5))
    with_contrast, without = (loaded(golden, contrast_weight=weight)(mentions, entities, gold) for weight in (2.0, 0.0))
    expected = 2 * 5 * golden["losses/contrastive"].float()  # published is the mean over mentions
    torch.testing.assert_close(with_contrast - without, expected, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"matcher.cmm.fusion_module.linear.bias": None}, r"matcher\.cmm\.fusion_module\.linear\.bias is missing"),
        ({"matcher.iimm.fc_key.bias": None}, r"of M3EL .*matcher\.iimm\.fc_key\.bias is missing"),
        ({"matcher.imm.fc_key.bias": torch.zeros(24)}, r"matcher\.imm\.fc_key\.bias is not part"),
    ],
)
def test_wrong_published_weights_are_named(
    golden: dict[str, Tensor], change: dict[str, Tensor | None], message: str
) -> None:
    state = {name: t for name, t in {**published_weights(golden), **change}.items() if t is not None}
    with pytest.raises(UserError, match=message):
        M3elMatcher(M3elConfig(width=WIDTH), SIZES).load_published_state_dict(state)


def random_side(seed: int) -> tuple[Tensor, Ragged, Tensor, Ragged]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return normal(3, 6), Ragged.from_padded(normal(3, 5, 6)), normal(3, 8), Ragged.from_padded(normal(3, 4, 8))


@torch.no_grad()
@pytest.mark.parametrize("kind", [OneWayMatch, BidirectionalMatch])
def test_only_token_keys_let_the_pooled_branch_see_tokens(kind: type[OneWayMatch | BidirectionalMatch]) -> None:
    """What patches find of a single pooled text is the same for every patch; of its tokens it is not."""
    torch.manual_seed(0)
    text, words, image, patches = random_side(1)
    others = Ragged.from_padded(words.padded()[0].flip(0))

    def fused(unit: OneWayMatch | BidirectionalMatch, tokens: Ragged) -> Table:
        return unit.prepare_entities(text, tokens, image, patches)

    reads_words: Mapping[MatchKeys, bool] = {"pooled": False, "tokens": True}
    for match_keys, expected in reads_words.items():
        unit = kind(6, 6, 8, match_keys)
        name = unit.vectors[0]  # of the text's direction
        same = torch.equal(fused(unit, words).dense(name), fused(unit, others).dense(name))
        assert same != expected


@pytest.mark.parametrize(
    ("name", "cross"), [("wikimel", "one_way"), ("richpediamel", "one_way"), ("wikidiverse", "bidirectional")]
)
def test_shipped_configurations_train_the_unit_that_ranks(name: str, cross: str) -> None:
    config = load_config(f"m3el_{name}")
    assert config.system == M3elConfig(cross=cross, pixels=PixelForm(resize="squash", filter="lanczos"))
    train = config.train_of("m3el")
    assert (train.epochs, train.batch_size, train.learning_rate, train.weight_decay) == (20, 128, 1e-5, 1e-4)
    assert (train.validate_every, train.patience, config.seed) == (2, 6, 43)
