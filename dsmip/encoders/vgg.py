"""VGG-16 fc7 features, the picture part of the paper's gate input (DSMIP eq. 15)."""

from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from dsmip.encoders.weights import load_weights, read_weights
from dsmip.errors import UserError

SIDE = 224
WIDTH = 4096
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
TORCHVISION = "torchvision"  # IMAGENET1K_V1
BY_HASH = "sha256:"  # names the features that `dsmip features` made, in place of weights
RANDOM = "random"  # draws weights, to try what the network costs
_AT_ONCE = 32  # pictures: their first layers' activations take 25 MB each


class Vgg16Features(nn.Module):
    """Frozen VGG-16 up to the second fully connected layer and its ReLU; no dropout. Make one with `build`."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models import vgg16

        network = vgg16(weights=None, init_weights=False)
        self.features = network.features
        self.avgpool = network.avgpool
        # Kept under torchvision's names, without dropout and without the class layer.
        self.classifier = nn.Sequential(OrderedDict((name, network.classifier[int(name)]) for name in "0134"))
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)
        self.requires_grad_(False)

    @staticmethod
    def build(weights: str | Path, *, device: torch.device | str = "cpu") -> "Vgg16Features":
        """Loads the network.

        Args:
            weights: "torchvision" (its ImageNet weights, downloaded or cached) or a local .pt/.pth/.safetensors file
                with torchvision's tensor names.

        Raises:
            UserError: weights not found, not readable, not fitting, or no network to download them.
        """
        state = _downloaded() if weights == TORCHVISION else _local(weights)
        network = _empty()
        used = {key: value for key, value in state.items() if not key.startswith("classifier.6.")}
        load_weights(network, used, f"{weights} (VGG-16)")
        return network.to(device).eval()

    @staticmethod
    def random(seed: int, *, device: torch.device | str = "cpu") -> "Vgg16Features":
        """The network with random weights (Kaiming's initialisation), for trials; equal seeds give equal weights."""
        network, generator = _empty(), torch.Generator().manual_seed(seed)
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.kaiming_normal_(parameter, nonlinearity="relu", generator=generator)
        return network.to(device).eval()

    def forward(self, images: Tensor, has_image: Tensor) -> Tensor:
        """float32 [N, 4096] fc7 activations, of a few pictures at a time.

        Args:
            images: uint8 [N, 3, S, S], resized to 224 x 224 here.
            has_image: bool [N]; a missing picture is all zeros after normalisation, and computed once for all.
        """
        width = self.classifier.get_parameter("3.bias").shape[0]
        vectors_NW = torch.empty(len(images), width, device=self.mean.device)
        if not bool(has_image.all()):
            vectors_NW[~has_image] = self.fc7(self.mean.new_zeros(1, 3, SIDE, SIDE)).float()
        for row_n in has_image.nonzero()[:, 0].split(_AT_ONCE):
            vectors_NW[row_n] = self.fc7(self._pixels(images[row_n])).float()
        return vectors_NW

    def fc7(self, pixels: Tensor) -> Tensor:
        """[N, 4096] of normalised pixels [N, 3, 224, 224]."""
        fc7: Tensor = self.classifier(self.avgpool(self.features(pixels)).flatten(1))
        return fc7

    def _pixels(self, images: Tensor) -> Tensor:
        values = images.to(self.mean.dtype) / 255
        if values.shape[-1] != SIDE:
            values = functional.interpolate(values, size=(SIDE, SIDE), mode="bilinear", antialias=True)
        return (values - self.mean) / self.std


def _empty() -> Vgg16Features:
    with torch.device("meta"):
        network = Vgg16Features()
    network = network.to_empty(device="cpu")
    network.mean.copy_(torch.tensor(MEAN).view(3, 1, 1))
    network.std.copy_(torch.tensor(STD).view(3, 1, 1))
    return network


def _local(weights: str | Path) -> dict[str, Tensor]:
    if str(weights).startswith(BY_HASH):
        raise UserError(
            f"beside the shards are no VGG-16 features by the weights {weights} that fit this run; make them with"
            " 'dsmip features --kind vgg16' from those weights and the run's configuration, or name a weights file"
        )
    path = Path(weights)
    if not path.is_file():
        raise UserError(
            f"VGG-16 weights {path} do not exist; give torchvision's vgg16 file, or set gate.picture to clip"
        )
    return read_weights(path)


def _downloaded() -> dict[str, Tensor]:
    from torchvision.models import VGG16_Weights

    url = VGG16_Weights.IMAGENET1K_V1.url
    try:
        return dict(torch.hub.load_state_dict_from_url(url, check_hash=True, progress=False, weights_only=True))
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"torchvision's VGG-16 weights could not be downloaded ({error}); give a local file of them,"
            " or set gate.picture to clip"
        ) from None
