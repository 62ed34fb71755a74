"""Contrastive pretraining: every pair once per epoch, resume and workers that change nothing, pairs that are learnt."""

import math
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsmip import distributed
from dsmip.config import PretrainConfig
from dsmip.data.collate import ItemBatch
from dsmip.data.dataset import Dataset
from dsmip.data.text import Template
from dsmip.encoders.architecture import resolve_architecture
from dsmip.encoders.clip import Backbone
from dsmip.errors import UserError
from dsmip.training.local_context import LocalContext
from dsmip.training.monitor import StepFigures
from dsmip.training.pretraining import MAX_LOGIT_SCALE, PairSource, contrast, pretrain
from tests.support.training.workers import run_workers

CPU = torch.device("cpu")
CONFIG = PretrainConfig(epochs=3, batch_size=4, learning_rate=3e-3, warmup_steps=2)


def source(data: Dataset, backbone: Path, config: PretrainConfig = CONFIG, decoded_bytes: int = 1 << 20) -> PairSource:
    return PairSource(
        data, resolve_architecture(str(backbone)), Template(), config, seed=3, decoded_bytes=decoded_bytes
    )


def rows_of(batches: Iterable[ItemBatch], pairs: PairSource) -> list[int]:
    """Which entity each item is, by its text."""
    known = {tuple(ids[ids > 0].tolist()): row for ids, row in zip(pairs.tokens.ids, pairs.rows, strict=True)}
    return [known[tuple(ids[ids > 0].tolist())] for batch in batches for ids in batch.token_ids]


def weights(backbone: Backbone) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in backbone.clip.state_dict().items()}


def test_an_epoch_has_every_pictured_entity_once_in_a_new_order(small_data: Dataset, narrow_backbone: Path) -> None:
    pairs = source(small_data, narrow_backbone)
    with_image = [entity.entity_row for entity in small_data.entities() if entity.images]
    epochs = [rows_of(pairs.steps(epoch), pairs) for epoch in range(3)]
    assert all(sorted(rows) == with_image for rows in epochs)
    assert epochs[0] != epochs[1]
    sizes = [len(batch) for batch in pairs.steps(0)]
    assert len(sizes) == pairs.num_steps()
    assert max(sizes) <= 4
    assert max(sizes) - min(sizes) <= 1


def test_streamed_pictures_are_those_in_memory(small_data: Dataset, narrow_backbone: Path) -> None:
    kept, streamed = (source(small_data, narrow_backbone, decoded_bytes=size) for size in (1 << 20, 0))
    assert kept.decoded is not None
    assert streamed.decoded is None
    for one, other in zip(kept.steps(1), streamed.steps(1), strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.token_ids, other.token_ids)
        assert one.images.any()
        assert one.has_image.all()


class Killed(Exception):
    pass


class KilledContext(LocalContext):
    """Breaks off after a step, as a killed process would; (epoch, step)."""

    def __init__(self, folder: Path, last: tuple[int, int]) -> None:
        super().__init__(folder)
        self.last = last

    def step_done(self, epoch: int, step: int, num_steps: int, figures: StepFigures) -> None:
        if (epoch, step) == self.last:
            raise Killed


@pytest.mark.parametrize("last", [(0, 0), (0, 1), (1, 0), (2, 1)])
def test_a_resumed_training_equals_an_unbroken_one(
    small_data: Dataset, narrow_backbone: Path, tmp_path: Path, last: tuple[int, int]
) -> None:
    augment = CONFIG.augment.model_copy(update={"shift": 0.1, "drop_tokens": 0.3})
    config = CONFIG.model_copy(update={"augment": augment, "checkpoint_steps": 1})
    pairs = source(small_data, narrow_backbone, config)
    whole = Backbone.build(str(narrow_backbone), None)
    expected = pretrain(whole, pairs, config, LocalContext(tmp_path / "whole"), seed=3)
    first, second = (Backbone.build(str(narrow_backbone), None) for _ in range(2))
    with pytest.raises(Killed):
        pretrain(first, pairs, config, KilledContext(tmp_path / "broken", last), seed=3)
    history = pretrain(second, pairs, config, LocalContext(tmp_path / "broken"), seed=3)
    assert history == expected
    assert all(torch.equal(tensor, weights(second)[name]) for name, tensor in weights(whole).items())


@pytest.mark.slow
def test_pairs_are_learnt(small_data: Dataset, narrow_backbone: Path, tmp_path: Path) -> None:
    config = PretrainConfig(epochs=60, batch_size=8, learning_rate=5e-3, weight_decay=0.0, warmup_steps=2)
    backbone = Backbone.build(str(narrow_backbone), None)
    history = pretrain(backbone, source(small_data, narrow_backbone, config), config, LocalContext(tmp_path), seed=0)
    assert history[-1]["accuracy"] == 1.0
    assert history[-1]["loss"] < 0.1 < history[0]["loss"]
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


def test_the_temperature_stays_at_a_hundredth_or_above(
    small_data: Dataset, narrow_backbone: Path, tmp_path: Path
) -> None:
    backbone = Backbone.build(str(narrow_backbone), None)
    with torch.no_grad():
        backbone.logit_scale.fill_(MAX_LOGIT_SCALE + 1)
    history = pretrain(backbone, source(small_data, narrow_backbone), CONFIG, LocalContext(tmp_path), seed=0)
    assert all(epoch["temperature"] >= 1 / 100 - 1e-6 for epoch in history)


def test_bf16_is_close_to_fp32(small_data: Dataset, narrow_backbone: Path) -> None:
    backbone = Backbone.build(str(narrow_backbone), None)
    batch = next(source(small_data, narrow_backbone).steps(0))
    losses = [contrast(backbone, batch, PretrainConfig(precision=p), CPU)[0].item() for p in ("fp32", "bf16")]
    assert losses[0] != losses[1]
    assert math.isclose(*losses, rel_tol=0.05)


def test_a_kb_without_pictures_is_refused(small_data: Dataset, narrow_backbone: Path) -> None:
    texts = small_data.entity_texts()
    column = texts.schema.get_field_index("num_images")
    bare = texts.set_column(column, "num_images", [[0] * len(texts)])

    class Bare(Dataset):
        def entity_texts(self) -> object:
            return bare

    with pytest.raises(UserError, match="fewer than two entities have a picture"):
        source(Bare(small_data.own, small_data.manifest, small_data.manifest_hash), narrow_backbone)


def gradients(folder: Path, backbone_path: Path) -> dict[str, Tensor]:
    """The summed gradients of the first batch, after which all workers hold the same."""
    backbone = Backbone.build(str(backbone_path), None)
    backbone.tune("full")
    backbone.logit_scale.requires_grad_(True)
    batch = next(source(Dataset.open(folder), backbone_path).steps(0))
    contrast(backbone, batch, CONFIG, CPU)[0].backward()
    distributed.sum_gradients(backbone.parameters())
    return {name: parameter.grad for name, parameter in backbone.named_parameters() if parameter.grad is not None}


@pytest.mark.slow
def test_two_workers_have_the_gradient_of_one(small_data: Dataset, narrow_backbone: Path, tmp_path: Path) -> None:
    alone = gradients(small_data.folder, narrow_backbone)
    both = run_workers(gradients, 2, tmp_path / "workers", small_data.folder, narrow_backbone)
    for found in both:
        for name, gradient in alone.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
