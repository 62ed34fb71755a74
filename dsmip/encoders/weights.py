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

from dsmip.encoders.architecture import Architecture
from dsmip.encoders.formats import hugging_face
from dsmip.encoders.formats.pickled import FAULTS
from dsmip.encoders.formats.sizes import networks_of_such_sizes
from dsmip.encoders.formats.statistics import Statistic, pixel_statistics
from dsmip.encoders.formats.torchscript import is_archive, read_archive
from dsmip.errors import UserError, first_line
from dsmip.storage.parsing import NOT_AS_WRITTEN

HUB = "hf-hub:"
_FILE_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
_TEXT_TOWER = ("text_projection", "positional_embedding", "token_embedding", "transformer", "ln_final")
_PREPROCESS = "preprocess_cfg"  # key of a file's metadata; the name of that section in open_clip's configurations
_MODEL = "model_cfg"  # likewise, of a file beside the weights
_ACTIVATION = "quick_gelu"
# Names that a hub's repository gives the one weights file beside the configuration of that name.
_HUB_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_HUB_CONFIG = "open_clip_config.json"
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
        pretrained: local file of weights, folder of a Hugging Face model, "hf-hub:<owner>/<model>", or an open_clip
            tag of the architecture.

    Raises:
        UserError: no such file or tag, no network, or published weights whose activation differs from the
            architecture's (of files see `check_weights`).
    """
    path = Path(pretrained)
    if path.is_dir():
        path = weights_in(path)
    if path.is_file():
        return Weights(path, *_stored_statistics(path))
    if pretrained.startswith(HUB):
        return _from_hub(architecture, pretrained)
    if path.suffix in _FILE_SUFFIXES:
        raise UserError(f"weights file {pretrained} does not exist")
    return _from_tag(architecture, pretrained)


def described(mean: Sequence[float], std: Sequence[float], *, quick_gelu: bool) -> dict[str, str]:
    """Metadata of a .safetensors file: pixel statistics, which `locate_weights` finds again, and the activation."""
    # one entry: several are written in any order, and the same weights must be the same bytes
    return {_PREPROCESS: json.dumps({"mean": list(mean), "std": list(std), _ACTIVATION: quick_gelu})}


def check_weights(clip: nn.Module, architecture: Architecture, pretrained: str) -> None:
    """Checks weights against a network before anything is built with them.

    Runs that have begun with weights of the other activation still open: `load_weights` does not look at it.

    Raises:
        UserError: as `locate_weights`, `read_weights` and `load_weights`; a file whose activation is known and another.
    """
    path = locate_weights(architecture, pretrained).path
    state = read_weights(path)
    if Path(pretrained).exists() and (known := stored_activation(path)):
        _check_activation(architecture, pretrained, *known)
    fitting(clip, state, f"{pretrained} ({architecture.name})")


def stored_activation(path: Path) -> tuple[bool, str] | None:
    """Whether a weights file is of a QuickGELU network, and what says so. None: nothing does, the tensors are alike.

    Raises:
        UserError: the file, or the configuration beside it, cannot be read.
    """
    try:
        model = json.loads(_metadata(path).get(_PREPROCESS, "{}"))
        if _ACTIVATION in model:
            return bool(model[_ACTIVATION]), "so its metadata say"
        beside = path.with_name(_HUB_CONFIG)
        if path.name in _HUB_FILES and beside.is_file():
            model = json.loads(beside.read_text(encoding="utf-8"))[_MODEL]
            return bool(model.get(_ACTIVATION, False)), f"so {beside} says"
    except NOT_AS_WRITTEN as error:
        raise UserError(f"weights file {path}, or {_HUB_CONFIG} beside it, cannot be read: {error!r}") from None
    if (published := _published_activations().get(path.name)) is not None:
        return published, "those published under this name were"
    if path.name in hugging_face.FILES:
        known = hugging_face.quick_gelu(hugging_face.read_model_config(path))
        if known is not None:
            return known, f"so {path.with_name(hugging_face.CONFIG)} says"
    if path.suffix != ".safetensors" and set(_LEGACY_KEYS) <= _stored(path).keys():
        return True, "it is a state dict of OpenAI's"
    if is_archive(path) and "QuickGELU" in read_archive(path).classes:
        return True, "so its program says"
    return None


def _published_activations() -> dict[str, bool]:
    """By file name, of weights that open_clip knows by tag. Not OpenAI's: their names are everybody's (ViT-B-32.pt)."""
    from open_clip import pretrained as catalogue

    found: dict[str, bool] = {}
    for name, tag in catalogue.list_pretrained():
        config = catalogue.get_pretrained_cfg(name, tag)
        file = str(config.get("url", "")).rpartition("/")[2]
        if file and tag != "openai":
            found[file] = bool(config.get("quick_gelu", False))
    return found


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict from .safetensors, a torch file read with weights_only=True, or a TorchScript archive.

    A training checkpoint's `state_dict` entry and a `module.` prefix are unwrapped.

    Raises:
        UserError: unreadable file, or one that holds anything but tensors.
    """
    return {key: value for key, value in _stored(path).items() if key not in _LEGACY_KEYS}


def _stored(path: Path) -> dict[str, Any]:
    """A file's tensors by name, and OpenAI's numbers."""
    try:
        path.open("rb").close()  # safetensors says of a file that is closed to a user that there is none
        if path.suffix == ".safetensors":
            stored: Any = load_file(path, device="cpu")
        elif is_archive(path):
            stored = read_archive(path).tensors
        else:
            stored = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        # weights_only refused the content; it was not executed.
        raise UserError(f"weights file {path} is not a plain file of tensors") from None
    except (SafetensorError, *FAULTS) as error:
        raise UserError(f"weights file {path} cannot be read: {first_line(error)}") from None
    if isinstance(stored, dict) and isinstance(stored.get("state_dict"), dict):
        stored = stored["state_dict"]
    if not isinstance(stored, dict) or not stored:
        raise UserError(f"weights file {path} holds no state dict")
    tensors = {str(key).removeprefix("module."): value for key, value in stored.items()}
    for key, value in tensors.items():
        if key not in _LEGACY_KEYS and not isinstance(value, Tensor):
            raise UserError(f"weights file {path}: {key} is not a tensor")
    return tensors


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
    state = hugging_face.open_clip_names(state, label)
    if hasattr(clip, "text") and "positional_embedding" in state:
        state = {f"text.{key}" if key.startswith(_TEXT_TOWER) else key: value for key, value in state.items()}
    try:
        check_fit(state, clip.state_dict(), label)
    except UserError as error:
        if names := networks_of_such_sizes(state):
            raise UserError(f"{error}; they have the sizes of {', '.join(names[:4])}") from None
        raise
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


def weights_in(path: Path) -> Path:
    """The file in a folder that was named as weights: a Hugging Face model's.

    Raises:
        UserError: There is none; what the folder is, and what to name instead.
    """
    files = [name for name in _HUB_FILES if (path / name).is_file()]
    if (path / _HUB_CONFIG).is_file() and files:
        raise UserError(
            f"weights {path} is a folder of an open_clip repository; name its file {path / files[0]}, and "
            f"{path / _HUB_CONFIG} as architecture"
        )
    if not (path / hugging_face.CONFIG).is_file():
        raise UserError(f"weights {path} is a folder; name a .safetensors or .pt file in it")
    return hugging_face.weights_file(path)


def _stored_statistics(path: Path) -> tuple[Statistic, Statistic]:
    if path.name in hugging_face.FILES:
        return hugging_face.statistics_beside(path)
    try:
        stated = json.loads(_metadata(path).get(_PREPROCESS, "{}"))
    except NOT_AS_WRITTEN as error:
        raise UserError(f"weights file {path} cannot be read: {first_line(error)}") from None
    return pixel_statistics(stated, f"weights file {path}: its {_PREPROCESS}")


def _metadata(path: Path) -> dict[str, str]:
    """Of a .safetensors file; others have none."""
    if path.suffix != ".safetensors":
        return {}
    try:
        path.open("rb").close()  # as in `_stored`
        with safe_open(path, framework="pt") as stored:
            return dict(stored.metadata() or {})
    except (SafetensorError, OSError, *NOT_AS_WRITTEN) as error:
        raise UserError(f"weights file {path} cannot be read: {first_line(error)}") from None


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
    mean, std = pixel_statistics(config, f"tag {tag!r}")
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
    mean, std = pixel_statistics(config.get(_PREPROCESS, {}), f"{config_path}: {_PREPROCESS}")
    return Weights(Path(path), mean, std)


def _check_activation(architecture: Architecture, pretrained: str, trained_with_it: bool, because: str = "") -> None:
    """Weights of a QuickGELU network load into a GELU network without a sign, and score worse: refused."""
    if trained_with_it == architecture.quick_gelu:
        return
    if not architecture.is_open_clip:
        advice = f'set "quick_gelu": {str(trained_with_it).lower()} in it'
    elif trained_with_it:
        advice = f"use architecture {architecture.name}-quickgelu"
    else:
        advice = f"use architecture {architecture.name.removesuffix('-quickgelu')}"
    with_or_without = {True: "with", False: "without"}
    raise UserError(
        f"weights {pretrained!r} were trained {with_or_without[trained_with_it]} QuickGELU"
        f"{because and f' ({because})'} but the architecture {architecture.name} is "
        f"{with_or_without[not trained_with_it]} it; {advice}"
    )


def _download_failed(what: str, error: Exception) -> str:
    return (
        f"weights {what} could not be downloaded ({first_line(error)});"
        " without internet give a local .safetensors or .pt file as pretrained"
    )
