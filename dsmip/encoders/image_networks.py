"""The networks that give the gate one vector per picture: VGG-16's fc7, or the backbone's own pooled picture."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from dsmip.encoders.architecture import resolve_architecture
from dsmip.encoders.clip import Backbone
from dsmip.encoders.vgg import MEAN, SIDE, STD, TORCHVISION, Vgg16Features
from dsmip.keys import plain_text

Kind = Literal["vgg16", "clip"]
PictureNetwork = Vgg16Features | Backbone
TORCHVISION_WEIGHTS = "torchvision IMAGENET1K_V1"


@dataclass(frozen=True, slots=True)
class NetworkChoice:
    """Which network, for processes that build it themselves.

    weights: as `Vgg16Features.build` or `Backbone.build` (of `architecture`) takes them; None: random ones of `seed`.
    """

    kind: Kind
    weights: str | None
    architecture: str = ""
    seed: int = 0

    def build(self, device: torch.device | str = "cpu") -> PictureNetwork:
        """The network, frozen. Raises UserError as the builders do."""
        if self.kind == "clip":
            return Backbone.build(self.architecture, self.weights, device=device, seed=self.seed)
        if self.weights is None:
            return Vgg16Features.random(self.seed, device=device)
        return Vgg16Features.build(self.weights, device=device)

    @property
    def weights_name(self) -> str:
        """What the weights are called where no path of this machine may stand."""
        if self.weights is None:
            return f"random, seed {self.seed}"
        if self.kind == "vgg16" and self.weights == TORCHVISION:
            return TORCHVISION_WEIGHTS
        return Path(self.weights).name if Path(self.weights).is_file() else self.weights


@dataclass(frozen=True, slots=True)
class Identity:
    """All that a network's vectors depend on besides the pictures: its tensors and its form, pixel statistics too."""

    tensors: Mapping[str, Tensor]
    form: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    side: int


def picture_vectors(network: PictureNetwork, pictures: Tensor, has_image: Tensor) -> Tensor:
    """float32 [N, 4096] or [N, d_z] of pictures uint8 [N, 3, S, S]; missing ones are zeros after normalisation."""
    if isinstance(network, Vgg16Features):
        vectors: Tensor = network(pictures, has_image)
        return vectors
    return network.encode_image(network.normalise(pictures, has_image)).pooled


def identity(choice: NetworkChoice, network: PictureNetwork) -> Identity:
    """Of a built network; its text tower and class layer have no part in it."""
    if isinstance(network, Vgg16Features):
        return Identity(network.state_dict(), "vgg16 fc7", MEAN, STD, SIDE)
    config = resolve_architecture(choice.architecture).config
    tensors = {name: tensor for name, tensor in network.clip.state_dict().items() if name.startswith("visual.")}
    quick_gelu = bool(config.get("quick_gelu", False))
    form = plain_text([config["embed_dim"], sorted(config["vision_cfg"].items()), quick_gelu])  # goes into a key
    mean, std = (tuple(value.flatten().tolist()) for value in (network.mean, network.std))
    return Identity(tensors, form, mean, std, network.image_size)
