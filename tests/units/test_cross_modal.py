"""Cross-modal pairs: a mention's text against an entity's picture, and the reverse."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dsmip.data.collate import Modality
from dsmip.data.table import Ragged, Repeated, Table
from dsmip.encoders.base import FeatureSizes
from dsmip.units.unit_scorer import CrossModalScorer, SharedSpaceNorm
from tests.support.scoring.systems import seeded

SIZES, WIDTH = FeatureSizes(text_width=10, vision_width=12, embed_width=6), 8
NUM_MENTIONS, NUM_ENTITIES, PATCHES = 4, 5, 5
PAIRS: list[tuple[Modality, Modality]] = [("text", "image"), ("image", "text")]


def random_scorer(mentions: Modality, entities: Modality, *, mask_padding: bool = True) -> CrossModalScorer:
    def build() -> CrossModalScorer:
        scorer = CrossModalScorer(mentions, entities, SIZES, WIDTH, mask_padding=mask_padding)
        for parameter in scorer.parameters():
            nn.init.normal_(parameter, std=0.5)
        return scorer

    scorer: CrossModalScorer = seeded(3, build)
    return scorer


def random_features(modality: Modality, count: int, seed: int) -> Table:
    """Texts of one to six tokens; pictures of five."""
    generator = torch.Generator().manual_seed(seed)
    is_text = modality == "text"
    lengths_N = torch.randint(1, 7, (count,), generator=generator) if is_text else torch.full((count,), PATCHES)
    width = SIZES.text_width if is_text else SIZES.vision_width
    values = torch.randn(int(lengths_N.sum()), width, generator=generator)
    tokens = Ragged(values, lengths_N.cumsum(0) - lengths_N, lengths_N)
    pooled_Nz = torch.randn(count, SIZES.embed_width, generator=generator)
    return Table({f"{modality}_global": pooled_Nz, f"{modality}_tokens": tokens})


def prepared(scorer: CrossModalScorer, mentions: Table, entities: Table) -> tuple[Table, Table]:
    return scorer.prepare_mentions(mentions), scorer.prepare_entities(entities)


def scored(scorer: CrossModalScorer, mentions: Table, entities: Table) -> Tensor:
    (scores_ME,) = scorer.score(*prepared(scorer, mentions, entities)).values()
    return scores_ME


def normed(norm: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(norm, nn.LayerNorm)
    return F.layer_norm(x, x.shape[-1:], norm.weight.double(), norm.bias.double(), norm.eps)


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(layer, nn.Linear)
    return x @ layer.weight.double().T + layer.bias.double()


def slow_scores(scorer: CrossModalScorer, mentions: Table, entities: Table) -> Tensor:
    """Pair by pair and token by token, in float64."""

    def item(table: Table, norm: SharedSpaceNorm, modality: Modality, row: int) -> tuple[Tensor, Tensor]:
        one = table.rows(slice(row, row + 1)).cast(torch.float64)
        tokens_Td = one.ragged(f"{modality}_tokens").padded()[0][0]
        return normed(norm.global_norm, one.dense(f"{modality}_global")[0]), normed(norm.tokens_norm, tokens_Td)

    unit, scores_ME = scorer.unit, torch.zeros(len(mentions), len(entities), dtype=torch.float64)
    for m in range(len(mentions)):
        pooled_m, tokens_m = item(mentions, scorer.mention_norm, scorer.mentions, m)
        for e in range(len(entities)):
            pooled_e, tokens_e = item(entities, scorer.entity_norm, scorer.entities, e)
            contexts = []
            for token in tokens_e:
                logits_T = linear(unit.fc_key, tokens_m) @ linear(unit.fc_query, token) / WIDTH**0.5
                contexts.append((torch.softmax(logits_T, 0)[:, None] * linear(unit.fc_value, tokens_m)).sum(0))
            context = normed(unit.layer_norm, torch.stack(contexts).mean(0))
            scores_ME[m, e] = (pooled_m @ pooled_e + linear(unit.fc_cls, pooled_e) @ context) / 2
    return scores_ME


@pytest.mark.parametrize(("mentions", "entities"), PAIRS)
@torch.no_grad()
def test_scores_equal_the_slow_twin(mentions: Modality, entities: Modality) -> None:
    scorer = random_scorer(mentions, entities)
    sides = random_features(mentions, NUM_MENTIONS, 1), random_features(entities, NUM_ENTITIES, 2)
    torch.testing.assert_close(scored(scorer, *sides).double(), slow_scores(scorer, *sides), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("swaps", "expected"), [(False, -2.0), (True, 0.0)])
@torch.no_grad()
def test_a_case_by_hand(swaps: bool, expected: float) -> None:
    """Of two numbers a norm leaves their order: text (3, 1) is (1, -1), picture (0, 4) is (-1, 1); product -2.

    The one token (5, 3) of the text is (1, -1) too, and is all that the picture's one token finds: its product with
    the mapped picture is -2, or 2 where the map swaps the numbers.
    """
    scorer = CrossModalScorer("text", "image", FeatureSizes(2, 2, 2), 2)
    same = torch.eye(2)
    for layer, weight in ((scorer.unit.fc_value, same), (scorer.unit.fc_cls, same.flip(0) if swaps else same)):
        assert isinstance(layer, nn.Linear)
        layer.weight.copy_(weight)
        layer.bias.zero_()

    def item(modality: Modality, pooled: list[float], token: list[float]) -> Table:
        tokens = Ragged.from_padded(torch.tensor([[token]]))
        return Table({f"{modality}_global": torch.tensor([pooled]), f"{modality}_tokens": tokens})

    score_11 = scored(scorer, item("text", [3.0, 1.0], [5.0, 3.0]), item("image", [0.0, 4.0], [7.0, 9.0]))
    torch.testing.assert_close(score_11, torch.tensor([[expected]]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("mentions", "entities"), PAIRS)
def test_what_the_other_modality_says_is_not_read(mentions: Modality, entities: Modality) -> None:
    """A table may have it, as that of an item with both."""
    scorer = random_scorer(mentions, entities)
    sides = random_features(mentions, NUM_MENTIONS, 1), random_features(entities, NUM_ENTITIES, 2)
    both = [
        side.merged(random_features(other, len(side), 7))
        for side, other in zip(sides, (entities, mentions), strict=True)
    ]
    assert torch.equal(scored(scorer, *sides), scored(scorer, *both))


@torch.no_grad()
def test_entities_without_a_picture_are_scored_once() -> None:
    """As an index holds them: dense columns and token rows that are shared; with some of the pairs wanted, too."""
    scorer = random_scorer("text", "image")
    mentions, entities = prepared(
        scorer, random_features("text", NUM_MENTIONS, 1), random_features("image", NUM_ENTITIES, 2)
    )
    place_E = torch.tensor([0, 1, 0, 2, 0])
    shared = {
        name: column.rows(place_E) if isinstance(column, Ragged) else Repeated(column, place_E.int())
        for name, column in entities.columns.items()
        if not isinstance(column, Repeated)
    }
    (found_ME,) = scorer.score(mentions, Table(shared)).values()
    (each_ME,) = scorer.score(mentions, entities).values()
    torch.testing.assert_close(found_ME, each_ME[:, place_E])
    assert torch.equal(found_ME[:, 0], found_ME[:, 2])
    assert torch.equal(found_ME[:, 0], found_ME[:, 4])
    wanted_ME = torch.rand(NUM_MENTIONS, NUM_ENTITIES, generator=torch.Generator().manual_seed(1)) < 0.5
    (some_ME,) = scorer.score(mentions, Table(shared), wanted_ME).values()
    torch.testing.assert_close(some_ME[wanted_ME], found_ME[wanted_ME])


def test_padding_is_seen_where_it_is_not_masked() -> None:
    """Texts then hold all places; pictures always do."""
    text, image = random_features("text", NUM_MENTIONS, 1), random_features("image", NUM_ENTITIES, 2)
    padded = Ragged.from_padded(text.ragged("text_tokens").padded()[0])
    full = text.merged(Table({"text_tokens": padded}))
    masked, unmasked = (random_scorer("text", "image", mask_padding=mask) for mask in (True, False))
    torch.testing.assert_close(scored(unmasked, full, image), scored(masked, full, image))
    assert not torch.allclose(scored(unmasked, full, image), scored(masked, text, image), atol=1e-3)


@pytest.mark.parametrize(("mentions", "entities"), PAIRS)
def test_gradients_reach_all_that_it_learns(mentions: Modality, entities: Modality) -> None:
    scorer = random_scorer(mentions, entities)
    scored(scorer, random_features(mentions, 4, 1), random_features(entities, 5, 2)).sin().sum().backward()
    without = {name for name, p in scorer.named_parameters() if p.grad is None or float(p.grad.abs().sum()) < 1e-5}
    assert without <= {"unit.fc_key.bias"}  # shifts all logits of a softmax alike
