"""A backbone's weights: where they come from, and whether they fit. Nothing here unpickles code."""

import json
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from dsmip.encoders.architecture import Architecture, pixel_statistics
from dsmip.errors import UserError
from dsmip.storage.parsing import NOT_AS_WRITTEN

HUB = "hf-hub:"
_FILE_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
_TEXT_TOWER = ("text_projection", "positional_embedding", "token_embedding", "transformer", "ln_final")
_PREPROCESS = "preprocess_cfg"  # key of a file's metadata; the name of that section in open_clip's configurations
# Numbers that OpenAI's own archives carry beside the tensors.
_LEGACY_KEYS = ("input_resolution", "context_length", "vocab_size")


@dataclass(frozen=True, slots=True)
class Weights:
    """A weights file on disk and what its publisher says of it (None: nothing is said)."""

    path: Path
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def locate_weights(architecture: Architecture, pretrained: str) -> Weights:
    """Finds or downloads the weights.

    Args:
        pretrained: local .safetensors/.pt file, "hf-hub:<owner>/<model>", or an open_clip tag of the architecture.

    Raises:
        UserError: no such file or tag, no network, or weights whose activation differs from the architecture's.
    """
    path = Path(pretrained)
    if path.is_file():
        return Weights(path, *_stored_statistics(path))
    if pretrained.startswith(HUB):
        return _from_hub(architecture, pretrained)
    if path.suffix in _FILE_SUFFIXES:
        raise UserError(f"weights file {pretrained} does not exist")
    return _from_tag(architecture, pretrained)


def statistics_metadata(mean: Sequence[float], std: Sequence[float]) -> dict[str, str]:
    """Pixel statistics as metadata of a .safetensors file, where `locate_weights` finds them again."""
    return {_PREPROCESS: json.dumps({"mean": list(mean), "std": list(std)})}


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict from .safetensors, or from a torch file read with weights_only=True.

    A training checkpoint's `state_dict` entry and a `module.` prefix are unwrapped.

    Raises:
        UserError: unreadable file, or one that holds anything but tensors.
    """
    try:
        if path.suffix == ".safetensors":
            stored: Any = load_file(path, device="cpu")
        else:
            stored = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        # weights_only refused the content; it was not executed.
        raise UserError(f"weights file {path} is not a plain file of tensors") from None
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise UserError(f"weights file {path} cannot be read: {_first_line(error)}") from None
    if isinstance(stored, dict) and isinstance(stored.get("state_dict"), dict):
        stored = stored["state_dict"]
    if not isinstance(stored, dict) or not stored:
        raise UserError(f"weights file {path} holds no state dict")
    tensors = {str(key).removeprefix("module."): value for key, value in stored.items()}
    for key, value in tensors.items():
        if key not in _LEGACY_KEYS and not isinstance(value, Tensor):
            raise UserError(f"weights file {path}: {key} is not a tensor")
    return {key: value for key, value in tensors.items() if key not in _LEGACY_KEYS}


def load_weights(clip: nn.Module, state: Mapping[str, Tensor], label: str) -> None:
    """Copies `state` into an open_clip model; every tensor must be there and fit.

    Raises:
        UserError: missing, unexpected or wrongly shaped tensors, the first of them named.
    """
    clip.load_state_dict(fitting(clip, state, label))


def fitting(clip: nn.Module, state: Mapping[str, Tensor], label: str) -> dict[str, Tensor]:
    """`state` under the names of an open_clip model's tensors; `label` is for the message.

    Raises:
        UserError: missing, unexpected or wrongly shaped tensors, the first of them named.
    """
    if hasattr(clip, "text") and "positional_embedding" in state:
        state = {f"text.{key}" if key.startswith(_TEXT_TOWER) else key: value for key, value in state.items()}
    check_fit(state, clip.state_dict(), label)
    return dict(state)


def check_fit(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], label: str) -> None:
    """Compares names and shapes of tensors with those of a network; `label` is for the message.

    Raises:
        UserError: Missing, unexpected or wrongly shaped tensors; the first of them are named.
    """
    faults = [f"{key} is missing" for key in expected if key not in state]
    faults += [f"{key} is not part of the network" for key in state if key not in expected]
    faults += [
        f"{key} has shape {tuple(value.shape)}, the network {tuple(expected[key].shape)}"
        for key, value in state.items()
        if key in expected and value.shape != expected[key].shape
    ]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise UserError(f"weights {label} do not fit the architecture: {'; '.join(faults[:3])}{more}")


def _stored_statistics(path: Path) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    if path.suffix != ".safetensors":
        return None, None
    try:
        with safe_open(path, framework="pt") as stored:
            metadata = stored.metadata() or {}
        return pixel_statistics(json.loads(metadata.get(_PREPROCESS, "{}")))
    except (SafetensorError, OSError, *NOT_AS_WRITTEN) as error:
        raise UserError(f"weights file {path} cannot be read: {_first_line(error)}") from None


def _from_tag(architecture: Architecture, tag: str) -> Weights:
    from open_clip import pretrained as catalogue

    tags = catalogue.list_pretrained_tags_by_model(architecture.name) if architecture.is_open_clip else []
    config = catalogue.get_pretrained_cfg(architecture.name, tag) if tags else {}
    if not config:
        known = f"known tags: {', '.join(tags)}" if tags else "it has no weights by tag"
        raise UserError(
            f"pretrained {tag!r} of {architecture.name} is neither a file nor a tag ({known});"
            " give a .safetensors or .pt file, an hf-hub:<owner>/<model> id, or null for random weights"
        )
    _check_activation(architecture, tag, bool(config.get("quick_gelu", False)))
    try:
        path = catalogue.download_pretrained(config)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(_download_failed(f"{tag!r} of {architecture.name}", error)) from None
    mean, std = pixel_statistics(config)
    return Weights(Path(path), mean, std)


def _from_hub(architecture: Architecture, pretrained: str) -> Weights:
    from open_clip.pretrained import download_pretrained_from_hf

    model_id = pretrained.removeprefix(HUB)
    try:
        config_path = download_pretrained_from_hf(model_id, filename="open_clip_config.json")
        config = json.loads(Path(config_path).read_text(encoding="utf-8"))
        _check_activation(architecture, pretrained, bool(config.get("model_cfg", {}).get("quick_gelu", False)))
        path = download_pretrained_from_hf(model_id)
    except (OSError, RuntimeError, *NOT_AS_WRITTEN) as error:
        raise UserError(_download_failed(f"{pretrained} for {architecture.name}", error)) from None
    mean, std = pixel_statistics(config.get("preprocess_cfg", {}))
    return Weights(Path(path), mean, std)


def _check_activation(architecture: Architecture, pretrained: str, trained_with_it: bool) -> None:
    """Weights of a QuickGELU network load into a GELU network without a sign, and score worse: refused."""
    if trained_with_it == architecture.quick_gelu:
        return
    if not architecture.is_open_clip:
        advice = f'set "quick_gelu": {str(trained_with_it).lower()} in it'
    elif trained_with_it:
        advice = f"use architecture {architecture.name}-quickgelu"
    else:
        advice = f"use architecture {architecture.name.removesuffix('-quickgelu')}"
    raise UserError(
        f"weights {pretrained!r} were trained {'with' if trained_with_it else 'without'} QuickGELU but the architecture"
        f" {architecture.name} is {'without' if trained_with_it else 'with'} it; {advice}"
    )


def _download_failed(what: str, error: Exception) -> str:
    return (
        f"weights {what} could not be downloaded ({_first_line(error)});"
        " without internet give a local .safetensors or .pt file as pretrained"
    )


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
