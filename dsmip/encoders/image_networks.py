"""The networks that give the gate one vector per image: an entry each, found by being here.

An entry is a subclass of `ImageNetwork`; `gate.picture` of a configuration and `dsmip features --kind` then know it.
"""

import difflib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, ClassVar, Self

import torch
from pydantic import AfterValidator
from torch import Tensor, nn

from dsmip.encoders.architecture import resolve_architecture
from dsmip.encoders.base import FeatureSizes
from dsmip.encoders.clip import Backbone
from dsmip.encoders.vgg import MEAN, SIDE, STD, TORCHVISION, WIDTH, Vgg16Features
from dsmip.errors import UserError


@dataclass(frozen=True, slots=True)
class NetworkChoice:
    """Which network, for processes that build it themselves.

    Attributes:
        weights: As the builder of that kind takes them; None: random ones of `seed`.
        architecture: Of a backbone.
    """

    kind: str
    weights: str | None
    architecture: str = ""
    seed: int = 0

    def build(self, device: torch.device | str = "cpu") -> "ImageNetwork":
        """The network, frozen.

        Raises:
            UserError: Its weights are not found, not readable or do not fit.
        """
        return find_network(self.kind).build(self, device)

    @property
    def weights_name(self) -> str:
        """What the weights are called where no path of this machine may stand."""
        if self.weights is None:
            return f"random, seed {self.seed}"
        if published := find_network(self.kind).published.get(self.weights):
            return published
        return Path(self.weights).name if Path(self.weights).is_file() else self.weights


@dataclass(frozen=True, slots=True)
class Identity:
    """All that a network's vectors depend on besides the images: its tensors and its form, pixel statistics too."""

    tensors: Mapping[str, Tensor]
    form: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    side: int


class ImageNetwork(ABC):
    """A built network, frozen: `module` makes one vector of each image.

    Attributes:
        kind: Its name in configurations and commands.
        title: Its name in messages.
        of_backbone: It is a part of the run's backbone, with no weights of its own (those of others are
            `gate.vgg_weights`).
        published: Weights that may be given by a name, and what that stands for: the same tensors for ever, so that
            nothing is loaded to compare them.
        side: Of the images that it is fed where no configuration says.
        state_name: Of its module in a gate's encoder; feature-cache keys hash it.
    """

    kind: ClassVar[str]
    title: ClassVar[str]
    of_backbone: ClassVar[bool] = False
    published: ClassVar[Mapping[str, str]] = {}
    side: ClassVar[int]
    state_name: ClassVar[str]

    module: nn.Module

    @classmethod
    @abstractmethod
    def build(cls, choice: NetworkChoice, device: torch.device | str = "cpu") -> Self:
        """The network with its weights.

        Raises:
            UserError: They are not found, not readable or do not fit.
        """

    @classmethod
    @abstractmethod
    def width(cls, sizes: FeatureSizes) -> int:
        """Numbers per vector, in a run whose backbone has these sizes."""

    @abstractmethod
    def vectors(self, images: Tensor, has_image: Tensor) -> Tensor:
        """float32 [N, width] of images uint8 [N, 3, S, S]; missing ones are zeros after normalisation."""

    @abstractmethod
    def identity(self) -> Identity:
        """What its vectors depend on: what has no part in them is not in it."""


class Vgg16(ImageNetwork):
    """VGG-16's fc7, as in the paper."""

    kind = "vgg16"
    title = "VGG-16"
    published: ClassVar[Mapping[str, str]] = {TORCHVISION: "torchvision IMAGENET1K_V1"}
    side = SIDE
    state_name = "vgg"

    def __init__(self, module: Vgg16Features) -> None:
        self.module: Vgg16Features = module

    @classmethod
    def build(cls, choice: NetworkChoice, device: torch.device | str = "cpu") -> Self:
        if choice.weights is None:
            return cls(Vgg16Features.random(choice.seed, device=device))
        return cls(Vgg16Features.build(choice.weights, device=device))

    @classmethod
    def width(cls, sizes: FeatureSizes) -> int:
        return WIDTH

    def vectors(self, images: Tensor, has_image: Tensor) -> Tensor:
        vectors: Tensor = self.module(images, has_image)
        return vectors

    def identity(self) -> Identity:
        """Its class layer has no part in it."""
        return Identity(self.module.state_dict(), "vgg16 fc7", MEAN, STD, SIDE)


class ClipImage(ImageNetwork):
    """The pooled image of the run's own backbone."""

    kind = "clip"
    title = "the backbone"
    of_backbone = True
    state_name = "backbone"

    def __init__(self, module: Backbone, architecture: str) -> None:
        self.module: Backbone = module
        self.architecture = architecture

    @classmethod
    def build(cls, choice: NetworkChoice, device: torch.device | str = "cpu") -> Self:
        backbone = Backbone.build(choice.architecture, choice.weights, device=device, seed=choice.seed)
        return cls(backbone, choice.architecture)

    @classmethod
    def width(cls, sizes: FeatureSizes) -> int:
        return sizes.embed_width

    def vectors(self, images: Tensor, has_image: Tensor) -> Tensor:
        return self.module.encode_image(self.module.normalise(images, has_image)).pooled

    def identity(self) -> Identity:
        """Its text tower has no part in it."""
        config, state = resolve_architecture(self.architecture).config, self.module.clip.state_dict()
        tensors = {name: tensor for name, tensor in state.items() if name.startswith("visual.")}
        form = repr([config["embed_dim"], sorted(config["vision_cfg"].items()), bool(config.get("quick_gelu", False))])
        mean, std = (tuple(value.flatten().tolist()) for value in (self.module.mean, self.module.std))
        return Identity(tensors, form, mean, std, self.module.image_size)


@cache
def image_networks() -> dict[str, type[ImageNetwork]]:
    """All image networks by kind."""
    return {network.kind: network for network in ImageNetwork.__subclasses__()}


def find_network(kind: str) -> type[ImageNetwork]:
    """The image network of that kind.

    Raises:
        UserError: There is none; the nearest one is named.
    """
    known = image_networks()
    if kind not in known:
        near = difflib.get_close_matches(kind, known, n=1, cutoff=0.0)
        raise UserError(f"unknown image network '{kind}'; did you mean '{near[0]}'? (known: {', '.join(known)})")
    return known[kind]


def _known(kind: str) -> str:
    if kind not in image_networks():
        raise ValueError(f"Input should be {' or '.join(map(repr, image_networks()))}")
    return kind


Kind = Annotated[str, AfterValidator(_known)]
