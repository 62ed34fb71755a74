"""The gate: its split last layer, its choice, and the gradient that gets through the choice."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsmip.config import BackboneConfig
from dsmip.data.table import Table
from dsmip.encoders.base import feature_sizes
from dsmip.encoders.feature_keys import fingerprint
from dsmip.ops.gumbel import hard_choice, relaxed_choice, sample_gumbel
from dsmip.units.gate import Gate, GateConfig, GateEncoder, GateTextEncoder
from tests.support.scoring.contract import MENTIONS

M, E, B, TEXT, IMAGE = 4, 5, 3, 6, 7


def make_gate(**settings: Any) -> Gate:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return Gate(GateConfig(picture="clip", width=8, **settings), TEXT, IMAGE, B).eval()


def inputs(count: int, seed: int, dtype: torch.dtype = torch.float32) -> Table:
    generator = torch.Generator().manual_seed(seed)
    text, image = (torch.randn(count, width, generator=generator).to(dtype) for width in (TEXT, IMAGE))
    return Table({"text": text, "picture": image})


def log_pi(gate: Gate, mentions: Table, entities: Table) -> Tensor:
    return gate.log_pi(gate.prepare_mentions(mentions), gate.prepare_entities(entities))


@pytest.mark.parametrize("final", ["relu", "none"])
@torch.no_grad()
def test_split_logits_equal_one_layer_over_both_sides(final: Any) -> None:
    """Eq. 15 as printed: softmax(ReLU(W [h_m ; h_e] + b)) for every pair."""
    gate, mentions, entities = make_gate(final_activation=final), inputs(M, 2), inputs(E, 3)
    last = nn.Linear(16, B)
    last.weight.copy_(torch.cat([gate.mention_logits.weight, gate.entity_logits.weight], dim=1))
    last.bias.copy_(gate.mention_logits.bias)

    def hidden(mlp: nn.Module, table: Table) -> Tensor:
        h: Tensor = mlp(torch.cat([table.dense("text"), table.dense("picture")], dim=1))
        return h

    h_M, h_E = hidden(gate.mention_mlp, mentions), hidden(gate.entity_mlp, entities)
    pairs_MEh = torch.cat([h_M[:, None].expand(M, E, 8), h_E[None].expand(M, E, 8)], dim=-1)
    logits_MEB = last(pairs_MEh)
    expected = torch.log_softmax(logits_MEB.relu() if final == "relu" else logits_MEB, dim=-1)
    torch.testing.assert_close(log_pi(gate, mentions, entities), expected, atol=1e-6, rtol=1e-5)
    assert bool((logits_MEB < 0).any())  # else the two activations would not differ


def test_two_blocks_of_the_same_form_per_side() -> None:
    gate = make_gate()
    for mlp in (gate.mention_mlp, gate.entity_mlp):
        kinds = [type(module) for module in mlp]
        assert kinds == [nn.Linear, nn.LeakyReLU, nn.Dropout] * 2
        assert [m.in_features for m in mlp if isinstance(m, nn.Linear)] == [TEXT + IMAGE, 8]


@pytest.mark.parametrize(("seen", "factor"), [("raw", 1.0), ("normalised", 5.0)])
@torch.no_grad()
def test_a_shared_mlp_is_one_for_both_sides(seen: Any, factor: float) -> None:
    """What it says of an item does not depend on the side; each side's inputs are normalised by its own means."""
    gate, mentions = make_gate(mlp="shared", inputs=seen), inputs(64, 2)
    entities = Table({name: factor * mentions.dense(name) for name in mentions.columns})
    log_pi(gate.train(), mentions, entities)
    gate.eval().entity_logits.weight.copy_(gate.mention_logits.weight)
    gate.mention_logits.bias.zero_()
    assert not any("entity_mlp" in name for name in gate.state_dict())
    of_mentions, of_entities = (
        table.dense("logits") for table in (gate.prepare_mentions(mentions), gate.prepare_entities(entities))
    )
    torch.testing.assert_close(of_entities, of_mentions, atol=1e-5, rtol=1e-4)
    assert float(of_mentions.std(dim=0).min()) > 0.01


def test_mentions_that_choose_have_no_mlp_to_share() -> None:
    with pytest.raises(ValueError, match="mlp: shared needs choice: pair"):
        make_gate(mlp="shared", choice="mention")


@torch.no_grad()
def test_the_texts_of_a_gate_are_embeddings_or_what_the_tower_says(narrow_backbone: Path) -> None:
    """Features that are cached for one are not taken for the other's, whether pictures lie beside the data or not."""
    backbone = BackboneConfig(architecture=str(narrow_backbone))
    keys = list[set[str]]()
    for text in ("embeddings", "tower"):
        config = GateConfig(picture="clip", text=text)  # type: ignore[arg-type]
        whole, texts_alone = GateEncoder(config, backbone), GateTextEncoder(config, backbone)
        found = whole.encode_mentions(MENTIONS).dense("text")
        assert found.shape[1] == config.text_width(feature_sizes(backbone.architecture))
        assert torch.equal(texts_alone.encode_entities(MENTIONS).dense("text"), found)
        tower = whole.backbone.encode_text(MENTIONS.token_ids, MENTIONS.token_mask).pooled
        assert (text == "tower") == (tower.shape == found.shape and torch.equal(tower, found))
        keys.append({fingerprint(encoder.encoder_state(), "()") for encoder in (whole, texts_alone)})
    assert keys[0].isdisjoint(keys[1])
    assert GateEncoder(GateConfig(picture="clip"), backbone).encoder_state().keys() == whole.state_dict().keys()


@torch.no_grad()
def test_choice_per_mention_knows_nothing_of_entities() -> None:
    gate = make_gate(choice="mention")
    first, second = (log_pi(gate, inputs(M, 2), inputs(count, seed)) for count, seed in ((E, 3), (2, 4)))
    assert first.shape == (M, 1, B)
    assert torch.equal(first, second)
    assert not any("entity" in name for name, _ in gate.named_parameters())
    torch.testing.assert_close(first.exp().sum(dim=-1), torch.ones(M, 1))


@torch.no_grad()
def test_dropout_is_for_training_alone() -> None:
    gate, mentions, entities = make_gate(dropout=0.5), inputs(M, 2), inputs(E, 3)
    assert torch.equal(log_pi(gate, mentions, entities), log_pi(gate, mentions, entities))
    gate.train()
    assert not torch.equal(log_pi(gate, mentions, entities), log_pi(gate, mentions, entities))


@torch.no_grad()
def test_half_precision_features_are_read_as_float32() -> None:
    gate = make_gate()
    found = log_pi(gate, inputs(M, 2, torch.float16), inputs(E, 3, torch.float16))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, log_pi(gate, inputs(M, 2), inputs(E, 3)), atol=5e-3, rtol=1e-2)


@pytest.mark.parametrize("tau", [0.5, 1.0])
def test_straight_through_gradient_is_that_of_the_relaxed_choice(tau: float) -> None:
    """Against central differences of sum_i softmax((log pi + g) / tau)_i S_i in the logits."""
    generator = torch.Generator().manual_seed(5)
    logits_MEB = torch.randn(M, E, B, generator=generator, dtype=torch.float64, requires_grad=True)
    scores_MEB = torch.randn(M, E, B, generator=generator, dtype=torch.float64)
    noise_MEB = sample_gumbel((M, E, B), generator).double()

    def relaxed_total(logits: Tensor) -> Tensor:
        return (relaxed_choice(torch.log_softmax(logits, -1), noise_MEB, tau) * scores_MEB).sum(-1)

    choice_MEB = hard_choice(torch.log_softmax(logits_MEB, -1), noise_MEB, tau)
    total_ME = (choice_MEB * scores_MEB).sum(-1)
    total_ME.sum().backward()
    assert logits_MEB.grad is not None
    for b in range(B):
        step = torch.zeros(B, dtype=torch.float64)
        step[b] = 1e-6
        with torch.no_grad():
            slope_ME = (relaxed_total(logits_MEB + step) - relaxed_total(logits_MEB - step)) / 2e-6
        torch.testing.assert_close(logits_MEB.grad[..., b], slope_ME, atol=1e-8, rtol=1e-6)
    best_ME = (torch.log_softmax(logits_MEB, -1) + noise_MEB).argmax(-1)
    assert torch.equal(total_ME.detach(), scores_MEB.gather(-1, best_ME[..., None])[..., 0])
