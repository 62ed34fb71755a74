"""The probe of `dsmip pretrain`: a step of both towers on pictures and texts of the knowledge base."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from dsmip.config import ExperimentConfig, PretrainConfig, TrainConfig
from dsmip.data.collate import Collator, ItemBatch, ItemFormat
from dsmip.data.dataset import Dataset
from dsmip.data.text import Template
from dsmip.encoders.clip import Backbone
from dsmip.ops.augmentation import Draws
from dsmip.planning.probing.probe import SAMPLE, Meter, affordable, one_thread
from dsmip.planning.probing.steps import Stepped, Trained, whole_step
from dsmip.planning.sizes import module_bytes
from dsmip.runs.loaded_model import TrainedParts
from dsmip.training.batches import augmented
from dsmip.training.pretraining import PairObjective

_BACKWARD = 4.0


@dataclass(frozen=True)
class PretrainCosts:
    """What pretraining costs.

    Attributes:
        total: Parameters.
        module: Their bytes.
        image_bytes: Of a decoded picture.
    """

    total: int
    module: int
    image_bytes: int
    step: Stepped


def is_configured(config: ExperimentConfig) -> bool:
    """Whether a configuration has settings of a pretraining, and no weights yet."""
    return config.backbone.pretrained is None and config.pretrain != PretrainConfig()


def probe_pretraining(config: ExperimentConfig, dataset: Dataset, meter: Meter) -> PretrainCosts:
    """Probes a step of entities with a picture, from all over the knowledge base.

    Args:
        dataset: It has some.
    """
    backbone = Backbone.build(config.backbone.architecture, None)
    backbone.tune("full")
    backbone.logit_scale.requires_grad_(True)
    collator = TrainedParts(".", config).collator_of(ItemFormat(Template()))
    settings = config.pretrain
    with one_thread():
        pictured = list(dataset.entities(_pictured_rows(dataset, min(SAMPLE, settings.batch_size))))
        batch = collator.entities(pictured)
        few = batch.rows(0, min(4, len(batch))).to(meter.device)
        with torch.no_grad():
            backbone.to(meter.device)
            cost = meter.cost(lambda: (backbone.encode_text(few.token_ids, few.token_mask), _image(backbone, few)))
        count = max(affordable(_BACKWARD * cost.seconds / len(few), len(pictured), 2.0), min(2, len(pictured)))
        objective = PairObjective(backbone, settings)

        def probe(count: int) -> Trained:
            train = TrainConfig(batch_size=max(count, 2), weight_decay=settings.weight_decay)
            return Trained(objective, _Pairs(batch.rows(0, count), settings, collator), train, set())

        step = whole_step(probe, count, settings.batch_size, meter)
    total = sum(each.numel() for each in backbone.parameters())
    return PretrainCosts(total, module_bytes(backbone), 3 * collator.image_size**2, step)


def _pictured_rows(dataset: Dataset, most: int) -> list[int]:
    """Some kb rows of entities with a picture, ascending."""
    has_picture = dataset.entity_texts().column("num_images").to_numpy() > 0
    rows = np.flatnonzero(has_picture)
    return [int(rows[number * len(rows) // most]) for number in range(most)] if len(rows) > most else rows.tolist()


def _image(backbone: Backbone, batch: ItemBatch) -> object:
    return backbone.encode_image(backbone.normalise(batch.images, batch.has_image))


class _Pairs:
    """The same pairs again and again, changed at random as those of `PairSource`."""

    def __init__(self, batch: ItemBatch, config: PretrainConfig, collator: Collator) -> None:
        self._batch, self._config, self._tokenizer = batch, config, collator.tokenizer

    def num_steps(self) -> int:
        return 2

    def steps(self, epoch: int, start: int = 0) -> Iterator[ItemBatch]:
        for step in range(start, self.num_steps()):
            generator = torch.Generator().manual_seed(step)
            draws = Draws(generator, len(self._batch), torch.arange(len(self._batch)))
            width = self._batch.token_ids.shape[1]
            yield augmented(self._batch, self._config.augment, draws, self._tokenizer, width)
