"""A training step of the multimodal expert: the share of the device's matrix rate that it achieves, and what it keeps.

Operations are those of products, counted by torch while the step runs: forward and backward, prompts and units too.
The matrix rate is that of a large product of the same type, measured in the same round.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.roofline import matrix_rate
from dsmip.config import BackboneConfig, TrainConfig
from dsmip.data.collate import ItemBatch
from dsmip.encoders.clip import Backbone, Tuning
from dsmip.planning.probing.measure import kept_for_backward, measured
from dsmip.training.batches import Step
from dsmip.training.gradients import batch_backward
from dsmip.training.optimizer import build_optimizer
from dsmip.units.expert import Expert, ExpertConfig

WIDTH = 96  # of the units, as in the paper
_DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
_END_OF_TEXT = 49407


@dataclass(frozen=True)
class TowerCase:
    """What of the multimodal expert trains: `tune` of its towers, and prompts."""

    name: str
    tune: Tuning
    prompt_length: int = 0
    prompt_depth: int = 0


CASES = (TowerCase("frozen, prompts", "frozen", 2, 9), TowerCase("all trains", "full"))


@dataclass(frozen=True)
class TowerRate:
    """Figures of one case; middles over rounds. step_s: on a CPU processor time. share: of the device's matrix rate.

    kept_bytes: what one step stores for its backward pass, at once. first_s: of the first step, which compiles.
    """

    case: str
    compiled: bool
    step_s: float
    samples_per_s: float
    operations: int
    share: float
    kept_bytes: int
    peak_bytes: int | None
    first_s: float


def tower_rates(
    architecture: str, batch_size: int, precision: str, device: torch.device, rounds: int, *, compiled: bool = True
) -> list[TowerRate]:
    """All cases, as they are and with compiled layers (unless `compiled` is False)."""
    found = []
    for case in CASES:
        for compile_it in (False, True)[: 1 + compiled]:
            found.append(_rate(case, architecture, batch_size, precision, device, rounds, compiled=compile_it))
    return found


def _rate(
    case: TowerCase,
    architecture: str,
    batch_size: int,
    precision: str,
    device: torch.device,
    rounds: int,
    *,
    compiled: bool,
) -> TowerRate:
    step, matcher = training_step(case, architecture, batch_size, precision, device)
    operations = count_operations(step)
    if compiled:
        matcher.get_submodule("encoder.backbone").compile_layers()  # type: ignore[operator]
    _, first = measured(step, device)
    kept = kept_for_backward(step, matcher.parameters())
    num_bytes = sum(tensor.untyped_storage().nbytes() for tensor in kept)
    del kept
    costs, shares = [], []
    for _ in range(rounds):
        rate = matrix_rate(device, _DTYPES[precision])
        costs.append(measured(step, device)[1])
        shares.append(operations / costs[-1].seconds(device) / rate)
    seconds = median(cost.seconds(device) for cost in costs)
    peaks = [cost.peak_bytes for cost in costs if cost.peak_bytes is not None]
    return TowerRate(
        case=case.name,
        compiled=compiled,
        step_s=seconds,
        samples_per_s=batch_size / seconds,
        operations=operations,
        share=median(shares),
        kept_bytes=num_bytes,
        peak_bytes=max(peaks, default=None),
        first_s=first.wall_s,
    )


def training_step(
    case: TowerCase, architecture: str, batch_size: int, precision: str, device: torch.device
) -> tuple[Callable[[], None], Expert]:
    """An update on one drawn batch of the longest texts, and the expert with random weights that it updates."""
    sizes = Backbone.build(architecture, None, device="meta")
    depth = min(case.prompt_depth, len(sizes.text.layers), len(sizes.vision.layers))
    expert_config = ExpertConfig(tune=case.tune, prompt_length=case.prompt_length, prompt_depth=depth)
    backbone = BackboneConfig(architecture=architecture)
    matcher = Expert.build("multimodal", expert_config, backbone, WIDTH, mask_padding=True, with_encoder=True)
    matcher.to(device).train()
    config = TrainConfig.model_validate({"batch_size": batch_size, "precision": precision})
    optimizer = build_optimizer(matcher, config, matcher.tower_tensors())
    length = sizes.context_length - expert_config.num_prompts
    mentions, entities = (drawn_items(batch_size, length, sizes.image_size, seed).to(device) for seed in range(2))
    rows = torch.arange(batch_size, device=device)
    batch = Step(mentions, entities, rows, rows)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        batch_backward(matcher, batch, config, device)
        optimizer.step()

    return step, matcher


def drawn_items(count: int, num_tokens: int, image_size: int, seed: int) -> ItemBatch:
    """Random texts of `num_tokens` and random pictures."""
    generator = torch.Generator().manual_seed(seed)
    token_ids = torch.randint(1, _END_OF_TEXT - 1, (count, num_tokens), generator=generator)
    token_ids[:, -1] = _END_OF_TEXT
    images = torch.randint(0, 256, (count, 3, image_size, image_size), generator=generator, dtype=torch.uint8)
    return ItemBatch(
        token_ids, torch.ones_like(token_ids, dtype=torch.bool), images, torch.ones(count, dtype=torch.bool)
    )


def count_operations(step: Callable[[], None]) -> int:
    """Operations of the products of a step (a multiplication and an addition are two), which must not be compiled."""
    with FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())
