"""Towers that do not train keep nothing for a backward pass but what a gradient goes through."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsmip.config import BackboneConfig
from dsmip.data.collate import ItemBatch
from dsmip.data.table import Table
from dsmip.encoders.clip import Tuning
from dsmip.planning.probing.measure import kept_for_backward
from dsmip.units.expert import Expert, ExpertConfig

NUM_ITEMS, NUM_TOKENS, SIZE = 6, 11, 16


def expert(backbone: Path, tune: Tuning, prompts: int) -> Expert:
    config = ExpertConfig(tune=tune, prompt_length=prompts, prompt_depth=prompts)
    architecture = BackboneConfig(architecture=str(backbone))
    return Expert.build("multimodal", config, architecture, 8, mask_padding=True, with_encoder=True)


def items() -> ItemBatch:
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(1, 49000, (NUM_ITEMS, NUM_TOKENS), generator=generator)
    token_ids[:, -1] = 49407
    images = torch.randint(0, 256, (NUM_ITEMS, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
    return ItemBatch(
        token_ids, torch.ones_like(token_ids, dtype=torch.bool), images, torch.ones(NUM_ITEMS, dtype=torch.bool)
    )


def encoded(of: Expert) -> tuple[Table, int]:
    """Features, and the bytes that their backward pass waits for."""
    features: list[Table] = []
    kept = kept_for_backward(lambda: features.append(of.encode_mentions(items())), of.parameters())
    return features[0], sum(tensor.untyped_storage().nbytes() for tensor in kept)


def test_wholly_frozen_towers_keep_nothing(narrow_backbone: Path) -> None:
    features, num_bytes = encoded(expert(narrow_backbone, "frozen", prompts=0))
    assert num_bytes == 0
    assert not any(features.dense(name).requires_grad for name in ("text_global", "image_global"))


def test_projections_keep_their_own_inputs_alone(narrow_backbone: Path) -> None:
    _, num_bytes = encoded(expert(narrow_backbone, "projection", prompts=0))
    assert num_bytes == NUM_ITEMS * (16 + 32) * 4  # pooled tokens of both towers' widths


def test_frozen_layers_that_prompts_pass_keep_no_inputs_of_their_products(narrow_backbone: Path) -> None:
    """A weight's gradient would need them, and they are the widest of all."""
    frozen, full = expert(narrow_backbone, "frozen", prompts=2), expert(narrow_backbone, "full", prompts=2)
    found = {id(of): inputs_kept(of) for of in (frozen, full)}
    assert found[id(frozen)] == 0
    assert found[id(full)] == 2 * 2 * 2  # both products of the MLPs, of two layers in two towers
    features, kept = encoded(frozen)
    assert kept < 0.8 * encoded(full)[1]
    (features.dense("text_global").sum() + features.dense("image_global").sum()).backward()
    prompts: Any = frozen.get_submodule("encoder.mention_prompts")
    assert all(parameter.grad is not None for parameter in prompts.parameters())
    towers: Any = frozen.get_submodule("encoder.backbone")
    assert all(parameter.grad is None for parameter in towers.parameters())


def inputs_kept(of: Expert) -> int:
    """How many of the towers' linear layers have their inputs kept."""
    inputs: list[Tensor] = []
    for module in of.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    kept = kept_for_backward(lambda: of.encode_mentions(items()), of.parameters())
    storages = {tensor.untyped_storage().data_ptr() for tensor in kept}
    return sum(tensor.untyped_storage().data_ptr() in storages for tensor in inputs)


@pytest.mark.parametrize("requires_grad", [True, False])
def test_what_is_kept_is_counted_once_and_without_parameters(requires_grad: bool) -> None:
    layer = nn.Linear(4, 3).requires_grad_(requires_grad)
    x = torch.ones(5, 4, requires_grad=True)

    def work() -> Tensor:
        y = layer(x).exp()
        return y * y

    kept = kept_for_backward(work, layer.parameters())
    assert sorted(tuple(tensor.shape) for tensor in kept) == ([(5, 3), (5, 4)] if requires_grad else [(5, 3)])
