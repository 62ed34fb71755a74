"""The matching units against published golden values, and what a user relies on: padding, tiling, gradients."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dsmip.data.table import Ragged, Table
from dsmip.units.text_unit import TextUnit
from tests.support.paths import MIMIC_UNITS
from tests.support.scoring.matching_units import Units, random_features, random_units

PUBLISHED = {
    "matcher.tglu": "text",
    "matcher.vdlu": "image",
    "matcher.cmfu": "cross",
    "matcher.text": "text_norm.text",
    "matcher.image": "picture_norm.image",
    "encoder.image": "picture_norm.image",
}


@pytest.fixture(scope="module")
def golden() -> tuple[Units, Table, Table, dict[str, Tensor]]:
    stored = {name: torch.from_numpy(value) for name, value in np.load(MIMIC_UNITS).items()}
    units = Units(64, 96, 24)
    state = {}
    for name, value in stored.items():
        if name.startswith("weights/"):
            name = name.removeprefix("weights/")
            prefix = next(p for p in PUBLISHED if name.startswith(p))
            state[PUBLISHED[prefix] + name.removeprefix(prefix)] = value
    units.load_state_dict(state)  # strict: every published name has its place and no other is left

    def features(side: str) -> Table:
        x = {kind: stored[f"inputs/{side}_{kind}"] for kind in ("text_cls", "text_tokens", "image_cls", "image_tokens")}
        return Table(
            {
                "text": x["text_cls"],
                "text_tokens": Ragged.from_padded(x["text_tokens"]),
                "image": x["image_cls"],
                "image_tokens": Ragged.from_padded(x["image_tokens"]),
            }
        )

    scores = {name: stored[f"scores/{name}"] for name in ("text", "image", "cross", "mean")}
    return units, features("mention"), features("entity"), scores


def test_units_equal_the_published_scores(
    golden: tuple[Units, Table, Table, dict[str, Tensor]],
) -> None:
    units, mentions, entities, expected = golden
    scores = units.scores(mentions, entities)
    scores["mean"] = (scores["text"] + scores["image"] + scores["cross"]) / 3
    for name, value in expected.items():
        torch.testing.assert_close(scores[name], value, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", ["text", "image", "cross"])
def test_a_score_depends_on_its_pair_alone(name: str) -> None:
    units, mentions, entities = random_units(), random_features(5, 1), random_features(7, 2)
    whole_ME = units.scores(mentions, entities)[name]
    for m in range(5):
        for e in range(7):
            pair_11 = units.scores(mentions.rows(slice(m, m + 1)), entities.rows(slice(e, e + 1)))[name]
            torch.testing.assert_close(pair_11[0, 0], whole_ME[m, e], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", ["text", "image", "cross"])
def test_prepared_tables_survive_slicing_and_saving(name: str, tmp_path: Path) -> None:
    units, mentions, entities = random_units(), random_features(4, 3), random_features(6, 4)
    m, e = units.prepare("mentions", mentions)[name], units.prepare("entities", entities)[name]
    expected = getattr(units, name).score(m, e)
    e.save(tmp_path / "entities.safetensors")
    loaded = Table.load(tmp_path / "entities.safetensors")
    order = torch.tensor([5, 0, 3])
    torch.testing.assert_close(getattr(units, name).score(m, loaded.rows(order)), expected[:, order])


def test_items_that_share_token_rows_score_as_if_they_did_not() -> None:
    units, mentions, entities = random_units(), random_features(3, 5), random_features(4, 6)
    shared = dict(entities.columns)
    for name in ("text_tokens", "image_tokens"):
        shared[name] = entities.ragged(name).rows(torch.tensor([1, 1, 2, 1]))
    copied = {n: Ragged.from_padded(*c.padded()) if isinstance(c, Ragged) else c for n, c in shared.items()}
    expected = units.scores(mentions, Table(copied))
    for name, scores_ME in units.scores(mentions, Table(shared)).items():
        torch.testing.assert_close(scores_ME, expected[name])


def test_gradients_reach_every_parameter_but_the_unused_norm() -> None:
    units = random_units()
    scores = units.scores(random_features(3, 7), random_features(4, 8))
    torch.stack([s.sin() for s in scores.values()]).sum().backward()
    without = {name for name, p in units.named_parameters() if p.grad is None or float(p.grad.abs().sum()) < 1e-12}
    # a key bias shifts all logits of a softmax alike, so its gradient is zero up to rounding
    assert without - {"text.fc_key.bias"} == {"cross.context_layer_norm.weight", "cross.context_layer_norm.bias"}


def test_gradients_equal_finite_differences() -> None:
    units, sides = random_units(), (random_features(2, 9), random_features(3, 10))
    columns = [(name, column) for side in sides for name, column in side.columns.items()]

    def scores(*tensors: Tensor) -> tuple[Tensor, ...]:
        changed = [
            (name, Ragged(tensor, column.starts, column.lengths) if isinstance(column, Ragged) else tensor)
            for (name, column), tensor in zip(columns, tensors, strict=True)
        ]
        return tuple(units.scores(Table(dict(changed[:4])), Table(dict(changed[4:]))).values())

    inputs = [(c.values if isinstance(c, Ragged) else c).clone().requires_grad_() for _, c in columns]
    assert torch.autograd.gradcheck(scores, inputs, fast_mode=True)


def test_unmasked_text_unit_attends_over_padding() -> None:
    torch.manual_seed(0)
    unmasked, masked = TextUnit(10, 10, 8, mask_padding=False), TextUnit(10, 10, 8)
    masked.load_state_dict(unmasked.state_dict())
    features = random_features(4, 11, dtype=torch.float32)
    text, ragged = features.dense("text"), features.ragged("text_tokens")
    full = Ragged.from_padded(ragged.padded()[0])

    def score(unit: TextUnit, tokens: Ragged) -> Tensor:
        return unit.score(unit.prepare_mentions(text, tokens), unit.prepare_entities(text, tokens))

    torch.testing.assert_close(score(unmasked, full), score(masked, full))
    assert not torch.allclose(score(unmasked, full), score(masked, ragged), atol=1e-3)
    with pytest.raises(ValueError, match="every token place"):
        score(unmasked, ragged)
