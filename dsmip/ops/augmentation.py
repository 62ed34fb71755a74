"""Random changes of whole batches of pictures and token rows. Tensor operations only, no loop over items.

N items, S picture side, L tokens. Random numbers are drawn where the generator lives and moved to the data, so that a
CPU generator gives the same augmentation on every device; and for the whole batch, so that an item is changed in the
same way whoever of several workers holds it.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

_LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True, slots=True)
class ImageAugmentation:
    """Strengths; the defaults change nothing.

    Attributes:
        scale: (low, high) magnification, drawn log-uniformly.
        shift: Largest move as a fraction of the side.
        rotation: Largest angle in degrees.
        flip: Probability of mirroring left and right.
        brightness, contrast, saturation: Factor drawn from 1 - x .. 1 + x.
        hue: Largest turn as a fraction of the circle.
        grayscale, erase: Probabilities.
        erase_area: (low, high) fraction of the picture that the erased box covers.
        padding: What comes in from outside: the border pixels or white.
    """

    scale: tuple[float, float] = (1.0, 1.0)
    shift: float = 0.0
    rotation: float = 0.0
    flip: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    grayscale: float = 0.0
    erase: float = 0.0
    erase_area: tuple[float, float] = (0.05, 0.2)
    padding: Literal["border", "white"] = "border"


class Draws:
    """Independent uniform draws for the items `own_N` (int64 [N]) of a batch of `total` items.

    An item's numbers do not depend on which others are asked for.
    """

    def __init__(self, generator: torch.Generator, total: int, own_N: Tensor | None = None) -> None:
        self._generator, self._total = generator, total
        self._own_N = torch.arange(total) if own_N is None else own_N

    def unit(self, *shape: int, device: torch.device) -> Tensor:
        """Numbers in [0, 1): float32 [N, *shape] on `device`."""
        numbers = torch.rand(self._total, *shape, generator=self._generator, device=self._generator.device)
        return numbers[self._own_N.to(numbers.device)].to(device)


def augment_images(images: Tensor, has_image: Tensor, strength: ImageAugmentation, draws: Draws) -> Tensor:
    """uint8 [N, 3, S, S]: every picture moved, recoloured and erased independently; missing ones stay zero.

    Args:
        images: uint8 [N, 3, S, S].
        has_image: bool [N].
        draws: of these N items.
    """
    if len(images) == 0:
        return images
    random = _Random(draws, images.device)
    values = images.to(torch.float32) / 255
    values = _moved(values, strength, random)
    values = _recoloured(values, strength, random)
    values = _erased(values, strength, random)
    augmented = (values.clamp(0, 1) * 255).round().to(torch.uint8)
    return augmented.masked_fill(~has_image[:, None, None, None], 0)


def drop_tokens(
    token_ids: Tensor, token_mask: Tensor, probability: float, chance: Tensor, pad_id: int = 0
) -> tuple[Tensor, Tensor]:
    """int64 and bool [N, L]: each token but a text's first and last is dropped with `probability`.

    The rest moves left, and the end is padding (`pad_id`).

    Args:
        token_mask: bool [N, L], True from a text's first token to its last.
        chance: Uniform draws in [0, 1), float [N, at least L].

    Raises:
        ValueError: probability outside [0, 1].

    >>> ids, mask = torch.tensor([[90, 5, 6, 91, 0]]), torch.tensor([[True, True, True, True, False]])
    >>> drop_tokens(ids, mask, 1.0, torch.rand(1, 5))
    (tensor([[90, 91,  0,  0,  0]]), tensor([[ True,  True, False, False, False]]))
    """
    order, mask = kept_tokens(token_mask, probability, chance)
    return token_ids.gather(1, order).masked_fill(~mask, pad_id), mask


def kept_tokens(token_mask: Tensor, probability: float, chance: Tensor) -> tuple[Tensor, Tensor]:
    """As `drop_tokens`: int64 [N, L], which place's token comes to each place, and the new mask bool [N, L].

    Raises:
        ValueError: probability outside [0, 1].
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"probability {probability} is outside [0, 1]")
    position_L = torch.arange(token_mask.shape[1], device=token_mask.device)
    inner = (position_L > 0) & (position_L < token_mask.sum(dim=1, keepdim=True) - 1)
    kept = token_mask & ~(inner & (chance[:, : token_mask.shape[1]] < probability))
    return torch.argsort(~kept, dim=1, stable=True), position_L < kept.sum(dim=1, keepdim=True)


def hide_tokens(
    token_ids: Tensor, token_mask: Tensor, share: float, mask_id: int, vocabulary: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Tokens to be guessed: ids int64 [N, L], and which of them were hidden, bool [N, L].

    Each token but a text's first and last is hidden with probability `share`: behind `mask_id` (8 of 10), behind a
    random token (1 of 10), or left as it is (1 of 10), as in BERT.

    Args:
        token_mask: bool [N, L], True from a text's first token to its last.
        vocabulary: Number of tokens.
        generator: Of the CPU: draws are the same on every device.

    >>> ids, mask = torch.tensor([[90, 5, 6, 91, 0]]), torch.tensor([[True, True, True, True, False]])
    >>> hide_tokens(ids, mask, 1.0, 7, 99, torch.Generator().manual_seed(0))
    (tensor([[90,  7,  7, 91,  0]]), tensor([[False,  True,  True, False, False]]))
    """
    device = token_ids.device
    chance = torch.rand(token_ids.shape, generator=generator).to(device)
    other = torch.randint(vocabulary, token_ids.shape, generator=generator).to(device)
    position_L = torch.arange(token_ids.shape[1], device=device)
    inner = token_mask & (position_L > 0) & (position_L < token_mask.sum(dim=1, keepdim=True) - 1)
    hidden = inner & (chance < share)
    changed = torch.where(chance < 0.8 * share, mask_id, torch.where(chance < 0.9 * share, other, token_ids))
    return torch.where(hidden, changed, token_ids), hidden


class _Random:
    """Draws in the forms that the changes of pictures need, where the pictures are."""

    def __init__(self, draws: Draws, device: torch.device) -> None:
        self._draws, self._device = draws, device

    def between(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * self._draws.unit(*shape, device=self._device)

    def happens(self, probability: float) -> Tensor:
        return self.between(0, 1) < probability


def _moved(values: Tensor, strength: ImageAugmentation, random: _Random) -> Tensor:
    """Scale, rotation, shift and mirroring by one bilinear resampling."""
    zoom = torch.exp(random.between(math.log(strength.scale[0]), math.log(strength.scale[1])))
    angle = random.between(-1, 1) * math.radians(strength.rotation)
    mirror = torch.where(random.happens(strength.flip), -1.0, 1.0)
    # grid_sample asks where each output pixel comes from: the inverse of the motion, in coordinates -1 .. 1.
    shift = random.between(-2 * strength.shift, 2 * strength.shift, 2)
    cosine, sine = torch.cos(angle) / zoom, torch.sin(angle) / zoom
    rows = [
        torch.stack([cosine * mirror, -sine, shift[:, 0]], dim=1),
        torch.stack([sine * mirror, cosine, shift[:, 1]], dim=1),
    ]
    grid = functional.affine_grid(torch.stack(rows, dim=1), list(values.shape), align_corners=False)
    if strength.padding == "border":
        return functional.grid_sample(values, grid, padding_mode="border", align_corners=False)
    # Zero padding of (value - white) is white padding of the value.
    return functional.grid_sample(values - 1, grid, padding_mode="zeros", align_corners=False) + 1


def _recoloured(values: Tensor, strength: ImageAugmentation, random: _Random) -> Tensor:
    """Saturation, hue and grayscale as one 3 x 3 matrix per picture, then contrast and brightness."""
    luma = torch.tensor(_LUMA, device=values.device)
    identity = torch.eye(3, device=values.device)
    to_gray = luma.expand(3, 3)
    saturation = _factor(random, strength.saturation)[:, None, None]
    saturate = saturation * identity + (1 - saturation) * to_gray
    turn = _hue_turn(random.between(-1, 1) * (2 * math.pi * strength.hue))
    colour = torch.where(random.happens(strength.grayscale)[:, None, None], to_gray, turn @ saturate)
    values = torch.einsum("nij,njhw->nihw", colour, values)
    mean = torch.einsum("i,nihw->n", luma, values)[:, None, None, None] / values[0, 0].numel()
    contrast = _factor(random, strength.contrast)[:, None, None, None]
    brightness = _factor(random, strength.brightness)[:, None, None, None]
    return (mean + contrast * (values - mean)) * brightness


def _factor(random: _Random, strength: float) -> Tensor:
    return random.between(max(0.0, 1 - strength), 1 + strength)


def _hue_turn(angle: Tensor) -> Tensor:
    """[N, 3, 3] rotations of RGB about its grey axis: an approximate hue change that keeps greys as they are."""
    cross = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]], device=angle.device) / math.sqrt(3)
    cosine, sine = torch.cos(angle)[:, None, None], torch.sin(angle)[:, None, None]
    return cosine * torch.eye(3, device=angle.device) + sine * cross + (1 - cosine) / 3


def _erased(values: Tensor, strength: ImageAugmentation, random: _Random) -> Tensor:
    """One box per chosen picture, filled with one random colour."""
    side = values.shape[-1]
    area = random.between(*strength.erase_area)
    ratio = torch.exp(random.between(-math.log(2), math.log(2)))
    height, width = (torch.sqrt(area * ratio).clamp(max=1), torch.sqrt(area / ratio).clamp(max=1))
    top, left = random.between(0, 1) * (1 - height), random.between(0, 1) * (1 - width)
    centre = (torch.arange(side, device=values.device) + 0.5) / side
    in_rows = (centre >= top[:, None]) & (centre < (top + height)[:, None])
    in_columns = (centre >= left[:, None]) & (centre < (left + width)[:, None])
    box = in_rows[:, :, None] & in_columns[:, None, :] & random.happens(strength.erase)[:, None, None]
    return torch.where(box[:, None], random.between(0, 1, 3)[:, :, None, None], values)
