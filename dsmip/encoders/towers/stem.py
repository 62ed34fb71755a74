"""A convolutional stem for the vision tower (Xiao et al., "Early Convolutions Help Transformers See Better", 2021).

It takes the place of the one large patch convolution. From few pictures and without pretrained weights a transformer
learns several times faster with it. N pictures, S picture side, n stages.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import nn

from dsmip.errors import UserError

STEM = "conv_stem"
"""Key of `vision_cfg` in a backbone's JSON: channels of the stages, each of which halves the picture's side."""
_GROUPS = 8


def conv_stem(channels: Sequence[int], width: int) -> nn.Sequential:
    """float [N, 3, S, S] to [N, width, S / 2^n, S / 2^n] for n stages.

    GroupNorm: what is said of a picture does not depend on its batch.
    """
    stages = [layer for before, c in pairwise((3, *channels)) for layer in _stage(before, c)]
    return nn.Sequential(*stages, nn.Conv2d(channels[-1], width, kernel_size=1))


def _stage(before: int, channels: int) -> list[nn.Module]:
    """Two 3 x 3 convolutions, the first with stride 2."""
    layers: list[nn.Module] = []
    for inputs, stride in ((before, 2), (channels, 1)):
        layers += [
            nn.Conv2d(inputs, channels, kernel_size=3, stride=stride, padding=1, bias=False),
            nn.GroupNorm(_GROUPS, channels),
            nn.GELU(),
        ]
    return layers


def check_stem(name: str, channels: Any, patch_size: object, image_size: Any) -> None:
    """Checks that `channels` are a stem whose grid of patches is the one that the tower expects.

    Raises:
        UserError: They are not.
    """
    is_list = isinstance(channels, list) and len(channels) > 0
    if not is_list or not all(isinstance(c, int) and c > 0 and c % _GROUPS == 0 for c in channels):
        raise UserError(f"backbone {name}: vision_cfg.{STEM} must be a list of positive multiples of {_GROUPS}")
    stride = 2 ** len(channels)
    if patch_size != stride or image_size % stride:
        raise UserError(
            f"backbone {name}: vision_cfg.{STEM} of {len(channels)} stages needs patch_size {stride}"
            f" and an image_size that is a multiple of it, not {patch_size} and {image_size}"
        )
