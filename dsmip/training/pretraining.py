"""Contrastive training of a backbone on a kb's own pairs of picture and text (CLIP, Radford et al., 2021).

An epoch has one pair per entity with a picture; of several pictures a random one. Order, choice and augmentation are
a pure function of (seed, epoch, step), split over workers by pair.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dsmip import distributed
from dsmip.config import PretrainConfig, TrainConfig
from dsmip.data.collate import ItemBatch
from dsmip.data.dataset import Dataset
from dsmip.data.images import decode, fit
from dsmip.data.records import Entity
from dsmip.data.sampler import count_steps, draw, permutation, step_bounds
from dsmip.data.text import Template, entity_text
from dsmip.encoders.architecture import Architecture, build_tokenizer
from dsmip.encoders.clip import Backbone, TowerName
from dsmip.errors import UserError
from dsmip.ops.augmentation import Draws
from dsmip.parallel import read_ahead
from dsmip.training.batches import augmented
from dsmip.training.loop import BatchSums, Context, Loop, Objective, Scale
from dsmip.training.optimizer import build_optimizer, learning_rate_factor

MAX_LOGIT_SCALE = math.log(100)
DECODED_BYTES = 1 << 30  # pictures of a smaller kb are decoded once per worker and kept
_READ_AHEAD = 4


class PairSource:
    """Batches of entities that have a picture, as items with the entity's text and one of its pictures.

    Raises:
        UserError: Fewer than two entities have a picture.
    """

    def __init__(
        self,
        dataset: Dataset,
        network: Architecture,
        template: Template,
        config: PretrainConfig,
        seed: int,
        decoded_bytes: int = DECODED_BYTES,
    ) -> None:
        self.dataset, self.config, self.seed = dataset, config, seed
        self.tokenizer, self.image_size, self.pixels = build_tokenizer(network.name), network.image_size, network.pixels
        counts = dataset.entity_texts()["num_images"].to_pylist()
        self.rows = [row for row, count in enumerate(counts) if count]
        self.num_images = [counts[row] for row in self.rows]
        if len(self.rows) < 2:
            raise UserError(f"{dataset.location}: fewer than two entities have a picture: nothing to contrast")
        self.tokens = self.tokenizer([entity_text(e, template) for e in _without_images(dataset, self.rows)])
        fits = sum(self.num_images) * 3 * self.image_size**2 <= decoded_bytes
        self.decoded = self._decode_all() if fits else None

    def num_steps(self) -> int:
        """Steps of an epoch, the same on every worker."""
        return count_steps(len(self.rows), self.config.batch_size)

    def steps(self, epoch: int, start: int = 0) -> Iterator[ItemBatch]:
        """This worker's share of every batch of an epoch, from step `start` on."""
        batches = self._steps(epoch, start)
        return batches if self.decoded is not None else read_ahead(batches, _READ_AHEAD)

    def _steps(self, epoch: int, start: int) -> Iterator[ItemBatch]:
        order = permutation(len(self.rows), "pairs", self.seed, epoch).tolist()
        rank, world_size = distributed.rank(), distributed.world_size()
        for step in range(start, self.num_steps()):
            whole = step_bounds(len(order), self.num_steps(), step, 0, 1)
            share = step_bounds(len(order), self.num_steps(), step, rank, world_size)
            generator = torch.Generator().manual_seed(draw(2**63, "augment", self.seed, epoch, step))
            position_N = torch.arange(share.start - whole.start, share.stop - whole.start)
            draws = Draws(generator, len(whole), position_N)
            batch = self._batch([order[p] for p in share], epoch)
            yield augmented(batch, self.config.augment, draws, self.tokenizer, self.tokens.ids.shape[1])

    def _batch(self, items: Sequence[int], epoch: int) -> ItemBatch:
        images = torch.zeros(len(items), 3, self.image_size, self.image_size, dtype=torch.uint8)
        for slot, item in enumerate(items):
            number = draw(self.num_images[item], "pair", self.seed, epoch, self.rows[item])
            images[slot] = self._image(item, number)
        ids, mask = (each[list(items)] for each in self.tokens)
        if items and not self.tokenizer.fills_context:
            longest = int(mask.sum(dim=1).max())
            ids, mask = ids[:, :longest], mask[:, :longest]
        return ItemBatch(ids, mask, images, torch.ones(len(items), dtype=torch.bool))

    def _image(self, item: int, number: int) -> Tensor:
        if self.decoded is not None:
            return self.decoded[item][number]
        return fit(decode(self.dataset.entity_images(self.rows[item])[number]), self.image_size, self.pixels)

    def _decode_all(self) -> list[Tensor]:
        """uint8 [num_images, 3, S, S] of every pictured entity."""
        return [
            torch.stack([fit(decode(image), self.image_size, self.pixels) for image in entity.images])
            for entity in self.dataset.entities()
            if entity.images
        ]


def pretrain(
    backbone: Backbone, pairs: PairSource, config: PretrainConfig, context: Context, *, seed: int
) -> list[dict[str, float]]:
    """Trains both towers, or what joins them, in place; the metrics of every epoch: loss, accuracy of picture to text.

    Accuracy is the share of pictures whose own text scores best in the batch. Goes on from `context.restore()`.

    Raises:
        UserError: The training diverges.
        Left: This worker was told to leave, and has saved.
    """
    if config.towers == "tuned":
        backbone.tune("full")
    else:
        projected: dict[TowerName, bool] = {"text": bool(backbone.text.projection)}
        projected["vision"] = bool(backbone.vision.projection)
        backbone.tune("projection", [name for name, has_one in projected.items() if has_one])
    backbone.logit_scale.requires_grad_(True)
    backbone.to(context.device)
    settings = TrainConfig(
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        warmup_steps=config.warmup_steps,
        schedule="cosine",
    )
    total_steps = config.epochs * pairs.num_steps()
    loop = Loop(
        PairObjective(backbone, config),
        build_optimizer(backbone, settings),
        lambda step: learning_rate_factor(step, total_steps, settings),
        context,
        seed=seed,
        checkpoint_steps=config.checkpoint_steps,
    )
    state = loop.resume()
    while state.epoch < config.epochs:
        loop.epoch(pairs, state)
        metrics = state.end_epoch() | {"temperature": math.exp(-backbone.logit_scale.item())}
        state.history.append(metrics)
        context.epoch_done(metrics, loop.save(state))
    backbone.tune("frozen")
    return state.history


class PairObjective(Objective):
    """CLIP's loss over the pairs of a batch."""

    def __init__(self, backbone: Backbone, config: PretrainConfig) -> None:
        self.module: Backbone = backbone
        self._config = config

    def backward(self, batch: Any, device: torch.device, scale: Scale) -> BatchSums:
        loss, right = contrast(self.module, batch, self._config, device)
        scale(loss).backward()
        own = torch.stack([loss.detach().double(), right.double(), right.new_tensor(len(batch)).double()])
        mean, num_right, count = distributed.sum_over_workers(own).tolist()
        return BatchSums({"loss": mean * count, "accuracy": num_right}, int(count))

    def state(self) -> dict[str, Tensor]:
        return {name: tensor.detach() for name, tensor in self.module.clip.state_dict().items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.module.clip.load_state_dict(state)

    def after_step(self) -> None:
        with torch.no_grad():
            self.module.logit_scale.clamp_(0, MAX_LOGIT_SCALE)


def contrast(
    backbone: Backbone, batch: ItemBatch, config: PretrainConfig, device: torch.device
) -> tuple[Tensor, Tensor]:
    """A worker's share of CLIP's symmetric loss over the pairs of all workers, and of the number of right answers.

    Its own pictures against all texts, and its own texts against all pictures, divided by the number of all pairs: what
    the workers have adds up to the whole batch's loss, and so do the gradients.
    """
    batch = batch.to(device)
    with _precision(config, device):
        text_Nz = backbone.encode_text(batch.token_ids, batch.token_mask).pooled
        image_Nz = backbone.encode_image(backbone.normalise(batch.images, batch.has_image)).pooled
    text_Nz = nn.functional.normalize(text_Nz.float(), dim=-1)
    image_Nz = nn.functional.normalize(image_Nz.float(), dim=-1)
    text_Az, image_Az = distributed.gather_rows(text_Nz), distributed.gather_rows(image_Nz)
    first = sum(distributed.gather_ints(len(text_Nz), device)[: distributed.rank()])
    column_N = first + torch.arange(len(text_Nz), device=device)
    scale = backbone.logit_scale.exp()
    logits_NA = scale * image_Nz @ text_Az.T
    total = nn.functional.cross_entropy(logits_NA, column_N, reduction="sum")
    total = total + nn.functional.cross_entropy(scale * text_Nz @ image_Az.T, column_N, reduction="sum")
    return total / 2 / len(text_Az), (logits_NA.detach().argmax(dim=1) == column_N).sum()


@contextmanager
def _precision(config: PretrainConfig, device: torch.device) -> Iterator[None]:
    """Autocast for bf16. On a CPU attention is then plain products: the fused one's backward is 7 times slower."""
    if config.precision == "fp32":
        yield
        return
    backends = [SDPBackend.MATH] if device.type == "cpu" else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    with torch.autocast(device.type, dtype=torch.bfloat16), sdpa_kernel(backends):
        yield


def _without_images(dataset: Dataset, rows: Sequence[int]) -> list[Entity]:
    texts = dataset.entity_texts().select(["entity_row", "entity_id", "name", "attributes"])
    return [Entity(**record) for record in texts.take(list(rows)).to_pylist()]
