"""MMoE against its published scores and parameter names, with the released gate and with ours, and what it refuses."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dsmip.data.dataset import Dataset
from dsmip.data.images import PixelForm
from dsmip.data.table import Ragged, Table
from dsmip.encoders.base import FeatureSizes
from dsmip.encoders.clip import Backbone
from dsmip.errors import UserError
from dsmip.evaluation.index_builder import OpenedEvaluation, plan_files
from dsmip.models.mmoe import Mmoe, MmoeConfig, MmoeMatcher
from dsmip.runs.load_config import load_config, parse_config
from dsmip.runs.run import Run
from dsmip.units.mixture import MixedCrossUnit, Mixture
from tests.support.scoring.published import SIZES, WIDTH, golden_values, published_features, published_weights

GATES = ["per_token", "published"]


def loaded(golden: dict[str, Tensor], **settings: Any) -> MmoeMatcher:
    matcher = MmoeMatcher(MmoeConfig(width=WIDTH, **settings), SIZES)
    matcher.load_published_state_dict(published_weights(golden))
    return matcher


@torch.no_grad()
@pytest.mark.parametrize("gate", GATES)
def test_published_weights_give_the_published_scores(gate: str) -> None:
    golden = golden_values(f"mmoe_{gate}")
    matcher = loaded(golden, gate=gate, top_k=3)
    sides = published_features(golden, "mention"), published_features(golden, "entity")
    scores = matcher.score(matcher.prepare_mentions(sides[0]), matcher.prepare_entities(sides[1]))
    for name, value in {**scores.parts, "mean": scores.total_ME}.items():
        torch.testing.assert_close(value, golden[f"scores/{name}"], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(matcher.scores_in_published_batches(*sides), scores.total_ME)


def random_features(count: int, seed: int) -> Table:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return Table(
        {
            "text_global": F.normalize(normal(count, 6), dim=-1),
            "text_tokens": Ragged.from_padded(normal(count, 5, 6)),
            "image_global": F.normalize(normal(count, 6), dim=-1),
            "image_tokens": Ragged.from_padded(normal(count, 5, 8)),
        }
    )


@torch.no_grad()
def test_published_scores_are_of_20_mentions_and_6000_entities_at_a_time() -> None:
    torch.manual_seed(0)
    matcher = MmoeMatcher(MmoeConfig(width=4, gate="published"), FeatureSizes(6, 8, 6))
    mentions, entities = random_features(23, 1), random_features(3, 2)
    prepared = matcher.prepare_entities(entities)
    parts = [matcher.prepare_mentions(mentions.take(rows)) for rows in (slice(0, 20), slice(20, 23))]
    expected = torch.cat([matcher.score(part, prepared).total_ME for part in parts])
    torch.testing.assert_close(matcher.scores_in_published_batches(mentions, entities), expected)
    whole = matcher.score(matcher.prepare_mentions(mentions), prepared).total_ME
    assert not torch.allclose(whole, expected, atol=1e-3)


def test_the_published_gate_is_refused_where_items_are_prepared_one_by_one() -> None:
    config = parse_config({"model": "mmoe", "backbone": {"architecture": "tiny"}, "system": {"gate": "published"}})
    with pytest.raises(UserError, match=r"gate: published .*neither validated nor indexed; use per_token"):
        Mmoe.check(config, Backbone.build("tiny", None, device="meta"))
    reason = Mmoe.build_whole(config).why_not_indexed()
    assert reason is not None
    assert "use per_token" in reason
    with pytest.raises(UserError, match=r"top_k: 5 exceeds num_experts 4"):
        parse_config({"model": "mmoe", "backbone": {"architecture": "tiny"}, "system": {"top_k": 5}})


def test_a_run_with_the_published_gate_has_no_index(small_data: Dataset, narrow_backbone: Path, tmp_path: Path) -> None:
    backbone, system = {"architecture": str(narrow_backbone)}, {"gate": "published", "width": 4, "num_tokens": 8}
    config = parse_config({"model": "mmoe", "backbone": backbone, "system": system})
    run = Run.create(tmp_path / "run", config, small_data)
    run.save_part("mmoe", Mmoe.build_part("mmoe", config, with_encoder=True), {})
    with pytest.raises(UserError, match=r"run: mmoe has no index: system\.gate: published .*use per_token"):
        plan_files(OpenedEvaluation(run, "test"))


@torch.no_grad()
def test_mixture_is_the_sum_of_kept_experts() -> None:
    torch.manual_seed(0)
    mixture, tokens = Mixture(5, 3, num_experts=4, top_k=2, gate="per_token"), torch.randn(2, 6, 5)
    gated_by = torch.randn(2, 6, 5)
    found = mixture(tokens, gated_by)
    for item in range(2):
        for place in range(6):
            share = F.linear(gated_by[item, place], mixture.gate_fc.weight, mixture.gate_fc.bias).softmax(dim=0)
            best = sorted(range(4), key=lambda expert: -float(share[expert]))[:2]
            expected = torch.zeros(3)
            for expert in best:
                up, _, down = list(mixture.experts[expert].children())
                assert isinstance(up, nn.Linear)
                assert isinstance(down, nn.Linear)
                hidden = F.gelu(up.weight @ tokens[item, place] + up.bias)
                expected += share[expert] / sum(share[e] for e in best) * (down.weight @ hidden + down.bias)
            torch.testing.assert_close(found[item, place], expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_places_that_one_side_lacks_are_gated_by_its_pooled_vector() -> None:
    """Texts longer than a picture's tokens, and shorter: as if the shorter side had its pooled vector there."""
    torch.manual_seed(0)
    unit = MixedCrossUnit(Mixture(4, 4, num_experts=4, top_k=2, gate="per_token"), 4, 4, 4)
    pooled, tokens = torch.randn(3, 4), torch.randn(3, 7, 4)
    image, patches = torch.randn(3, 4), torch.randn(3, 5, 4)
    for each in (unit.text_fc, unit.image_fc):  # maps that change nothing: what is mixed is what is given
        each.weight.copy_(torch.eye(4))
        each.bias.zero_()
    found = unit.prepare_mentions(pooled, Ragged.from_padded(tokens), image, Ragged.from_padded(patches))
    mixed = unit.mixture(
        torch.cat([image[:, None], tokens], dim=1),
        torch.cat([pooled[:, None], patches, pooled[:, None], pooled[:, None]], dim=1),
    )
    share = torch.einsum("nd,npd->np", mixed[:, 0], mixed[:, 1:]).softmax(dim=1)
    context = (share[..., None] * mixed[:, 1:]).sum(dim=1)
    expected = unit.gate_layer_norm(image * torch.tanh(unit.gate_fc(image)) + context)
    torch.testing.assert_close(found.dense("fused")[:, 4:] * 2**0.5, expected)


@pytest.mark.parametrize(
    ("name", "top_k", "rate"), [("wikimel", 3, 5e-6), ("richpediamel", 4, 1e-5), ("wikidiverse", 2, 1e-5)]
)
def test_shipped_configurations_have_the_published_settings(name: str, top_k: int, rate: float) -> None:
    config = load_config(f"mmoe_{name}")
    assert config.system == MmoeConfig(top_k=top_k, pixels=PixelForm(resize="squash", filter="lanczos"))
    train = config.train_of("mmoe")
    assert (train.epochs, train.batch_size, train.learning_rate, train.weight_decay) == (20, 32, rate, 1e-4)
    assert (train.validate_every, train.patience, config.seed) == (2, 6, 43)
