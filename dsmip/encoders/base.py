"""The contract of encoders: features of one side's items, their widths, and those stored beside the shards."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from operator import index
from pathlib import Path
from typing import Literal, Protocol, Self

import torch
from torch import Tensor

from dsmip.data.collate import ItemBatch, ItemFormat
from dsmip.data.table import Table
from dsmip.encoders.architecture import read_architecture
from dsmip.encoders.clip import Backbone

Side = Literal["mentions", "entities"]
_STATED = (("text_cfg", "width"), ("vision_cfg", "width"), ("", "embed_dim"))


@dataclass(frozen=True, slots=True)
class FeatureSizes:
    """Widths of features: text tokens d_t, picture tokens d_v, pooled vectors d_z."""

    text_width: int
    vision_width: int
    embed_width: int


@cache
def feature_sizes(architecture: str) -> FeatureSizes:
    """Widths of a backbone's features: as its configuration states them, else (it takes seconds) those of its towers.

    Raises:
        UserError: It is unknown or cannot be built.
    """
    network = read_architecture(architecture)
    config = network.config
    if network.is_plain:
        with suppress(KeyError, TypeError):
            return FeatureSizes(*(index(config[section][key] if section else config[key]) for section, key in _STATED))
    backbone = Backbone.build(architecture, None, device="meta")
    return FeatureSizes(backbone.text_width, backbone.vision_width, backbone.embed_width)


class FeatureEncoder(Protocol):
    """What the feature cache needs: a module such as a part, or a gate's inputs."""

    def to(self, device: torch.device) -> Self: ...

    def eval(self) -> Self: ...

    def encode_mentions(self, batch: ItemBatch) -> Table: ...

    def encode_entities(self, batch: ItemBatch) -> Table: ...

    def encoder_state(self) -> Mapping[str, Tensor]: ...

    def image_token_columns(self) -> Sequence[str]:
        """Ragged columns of its features that depend on the picture alone: stored once for all items without one.

        One side's features may lack some of them.
        """

    def shared_form(self) -> str | None:
        """What it makes of its tensors, which others may make too: a text of keys (`dsmip.encoders.feature_keys`).

        None: its features are its run's own, because it trains, or because it does not say what it makes.
        """


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
