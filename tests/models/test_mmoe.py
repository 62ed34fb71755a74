"""MMoE against its published scores and parameter names, with the released gate and with ours, and what it refuses."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dsmip
from dsmip.config import ExperimentConfig
from dsmip.data.dataset import Dataset
from dsmip.data.images import PixelForm
from dsmip.data.table import Ragged
from dsmip.errors import UserError
from dsmip.evaluation.index_builder import OpenedEvaluation
from dsmip.evaluation.preparation import prepare_in_tiles
from dsmip.evaluation.report import evaluate_model
from dsmip.models.mmoe import Mmoe, MmoeConfig, MmoeMatcher
from dsmip.runs.checks import check_training
from dsmip.runs.load_config import load_config, parse_config
from dsmip.runs.run import Run
from dsmip.units.matcher import FixedBatches
from dsmip.units.mixture import MixedCrossUnit, Mixture
from tests.support.scoring.contract import CPU, seeded, shake
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


def published(backbone: str, **system: Any) -> ExperimentConfig:
    return parse_config(
        {"model": "mmoe", "backbone": {"architecture": backbone}, "system": {"gate": "published"} | system}
    )


def test_the_published_gate_is_not_trained(small_data: Dataset, narrow_backbone: Path) -> None:
    config = published(str(narrow_backbone), width=4, num_tokens=8)
    with pytest.raises(
        UserError, match=r"gate: published gives an item other scores .*\(per_token does not\), so it only ranks"
    ):
        check_training(config, small_data)
    with pytest.raises(UserError, match=r"top_k: 5 exceeds num_experts 4"):
        published("tiny", top_k=5)


@torch.no_grad()
@pytest.mark.parametrize("batches", [None, (3, 4)])
def test_the_published_gate_ranks_in_its_own_batches_and_links_nothing(
    batches: tuple[int, int] | None,
    small_data: Dataset,
    narrow_backbone: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those of the release, of which the 23 mentions of train need two; and small ones, of both sides."""
    notices: list[str] = []
    if batches is not None:
        monkeypatch.setattr(MmoeMatcher, "fixed_batches", lambda _: FixedBatches(*batches, reason="few at a time"))
        monkeypatch.setattr("dsmip.evaluation.preparation.TILE", 2)  # features are encoded in smaller ones
    num_mentions, num_entities = batches or (20, 6000)
    config = published(str(narrow_backbone), width=4, num_tokens=8)
    run = Run.create(tmp_path / "run", config, small_data)
    with seeded(3):
        matcher = Mmoe.build_part("mmoe", config, with_encoder=True).eval()
        shake(matcher)
    run.save_part("mmoe", matcher, {})
    evaluated = evaluate_model(OpenedEvaluation(Run.open(run.folder), "train"), CPU, notice=notices.append)
    assert evaluated.metrics["fixed_batches"] == {"mentions": num_mentions, "entities": num_entities}
    ranks = pq.read_table(evaluated.folder / "ranks.parquet")
    assert f"{num_mentions} mentions and {num_entities:,} entities at a time" in notices[0]

    make = run.collator("mmoe")
    mentions = matcher.encode_mentions(make.mentions(list(small_data.mentions("train"))))
    entities = matcher.encode_entities(make.entities(list(small_data.entities())))

    def scores(mention_batch: int, entity_batch: int) -> Tensor:
        prepared = (
            prepare_in_tiles(matcher, mentions, "mentions", CPU, mention_batch),
            prepare_in_tiles(matcher, entities, "entities", CPU, entity_batch),
        )
        return matcher.score(*prepared).total_ME

    score_ME = scores(num_mentions, num_entities)
    assert not torch.allclose(score_ME, scores(100, 100), atol=1e-3)
    best_Mk = score_ME.sort(dim=1, descending=True).values
    torch.testing.assert_close(torch.tensor(ranks["top_scores"].to_pylist()).float(), best_Mk, atol=1e-4, rtol=1e-4)
    with pytest.raises(UserError, match=r"run: mmoe ranks whole splits \('dsmip evaluate'\) and links no mention: "):
        dsmip.load(run.folder)


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
