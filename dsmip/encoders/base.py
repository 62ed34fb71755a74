"""The contract of encoders: features of one side's items, their widths, and those stored beside the shards."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from operator import index
from pathlib import Path
from typing import Literal, Protocol, Self

import torch
from torch import Tensor

from dsmip.data.collate import ItemBatch, ItemFormat
from dsmip.data.table import Table
from dsmip.encoders.architecture import read_architecture, resolve_architecture
from dsmip.errors import UserError

Side = Literal["mentions", "entities"]


@dataclass(frozen=True, slots=True)
class FeatureSizes:
    """Widths of features: text tokens d_t, picture tokens d_v, pooled vectors d_z."""

    text_width: int
    vision_width: int
    embed_width: int


@cache
def feature_sizes(architecture: str) -> FeatureSizes:
    """Widths of a backbone's features, from its configuration alone.

    Raises:
        UserError: It does not state them.
    """
    config = read_architecture(architecture).config
    try:
        return FeatureSizes(
            *map(index, (config["text_cfg"]["width"], config["vision_cfg"]["width"], config["embed_dim"]))
        )
    except (KeyError, TypeError):
        resolve_architecture(architecture)  # says what is wrong with it, if more than this
        message = f"backbone {architecture} must state the integers embed_dim, vision_cfg.width and text_cfg.width"
        raise UserError(message) from None


class FeatureEncoder(Protocol):
    """What the feature cache needs: a module such as a part, or a gate's inputs."""

    def to(self, device: torch.device) -> Self: ...

    def encode_mentions(self, batch: ItemBatch) -> Table: ...

    def encode_entities(self, batch: ItemBatch) -> Table: ...

    def encoder_state(self) -> Mapping[str, Tensor]: ...

    def image_token_columns(self) -> Sequence[str]:
        """Ragged columns of its features that depend on the picture alone: stored once for all items without one."""


@dataclass(frozen=True, slots=True)
class StoredFeatures:
    """Features of a part that lie beside the shards, and what is left to encode.

    Attributes:
        file_of: The table of a split or of the kb.
        rest, rest_format: The encoder of the columns that it has not, and what that reads of an item.
    """

    folder: Path
    file_of: Callable[[str], Path]
    rest: FeatureEncoder
    rest_format: ItemFormat
