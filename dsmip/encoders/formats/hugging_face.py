"""Weights of Hugging Face models: the file in a folder, what its config.json says, and open_clip's names for them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dsmip.encoders.formats import hugging_face_clip, hugging_face_siglip
from dsmip.encoders.formats.statistics import Statistic, pixel_statistics
from dsmip.errors import UserError
from dsmip.storage.parsing import parse_json

CONFIG = "config.json"
_PREPROCESSOR = "preprocessor_config.json"
FILES = ("model.safetensors", "pytorch_model.bin")
_TWO_TOWERS = {"clip": "CLIPModel", "siglip": "SiglipModel"}
# Tensors that one kind of model alone has, whatever stands before their names.
_SIGNS = (
    ("vision_model.pre_layrnorm.weight", "CLIPModel"),
    ("vision_model.head.probe", "SiglipModel"),
    ("embeddings.word_embeddings.weight", "text encoder"),
    ("shared.weight", "text encoder"),
    ("vision_model.embeddings.patch_embedding.weight", "vision tower"),
    ("text_model.embeddings.token_embedding.weight", "CLIPTextModel"),
)

_PLACES = {"text encoder": "a text encoder such as BERT belongs to backbone.text: hf:<its folder>"}


def weights_file(folder: Path) -> Path:
    """The file of weights in a folder that has a config.json.

    Raises:
        UserError: There is none, or it is in several parts.
    """
    for name in FILES:
        if (folder / name).is_file():
            return folder / name
    if parts := sorted(path.name for path in folder.glob("*.index.json")):
        raise UserError(f"weights {folder} are in several files ({parts[0]}); needed is one: save the model unsharded")
    raise UserError(f"weights {folder} is a folder of a Hugging Face model without {' or '.join(FILES)}")


def read_model_config(path: Path) -> dict[str, Any]:
    """The config.json of a folder, or beside a file of weights; empty where there is none.

    Raises:
        UserError: It cannot be read.
    """
    return _read_object((path if path.is_dir() else path.parent) / CONFIG)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        found = parse_json(path.read_bytes(), path)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} must hold a JSON object")
    return found


def quick_gelu(config: Mapping[str, Any]) -> bool | None:
    """Whether a model of two towers is with QuickGELU, by its config.json; None: that is of something else."""
    if config.get("model_type") not in tuple(_TWO_TOWERS):
        return None
    # What a CLIP's configuration leaves out is QuickGELU, a SigLIP's GELU.
    usual = "quick_gelu" if config["model_type"] == "clip" else "gelu"
    sides = [side if isinstance(side := config.get(key), dict) else {} for key in ("text_config", "vision_config")]
    return any(side.get("hidden_act", usual) == "quick_gelu" for side in sides)


def statistics_beside(path: Path) -> tuple[Statistic, Statistic]:
    """Mean and standard deviation of pixels in [0, 1] that stand beside a file of weights (None where nothing does).

    Raises:
        UserError: What stands there cannot be read.
    """
    file = path.with_name(_PREPROCESSOR)
    return pixel_statistics(_read_object(file), str(file), ("image_mean", "image_std"))


def kind_of(state: Mapping[str, Tensor]) -> str | None:
    """Which Hugging Face model a state dict is of, by its names; None: of none that is known here."""
    if any(name.startswith(("visual.", "text.transformer.")) for name in state):
        return None  # open_clip's, whose text tower may be a Hugging Face model, or the one tower that there is
    for sign, kind in _SIGNS:
        if any(name == sign or name.endswith(f".{sign}") for name in state):
            return kind
    return None


def open_clip_names(state: Mapping[str, Tensor], label: str) -> dict[str, Tensor]:
    """A state dict under open_clip's names: converted from a CLIPModel's or SiglipModel's, else as it is.

    Args:
        label: For the message.

    Raises:
        UserError: It is one of another Hugging Face model.
    """
    kind = kind_of(state)
    if kind == "CLIPModel":
        return hugging_face_clip.open_clip_names(state)
    if kind == "SiglipModel":
        return hugging_face_siglip.open_clip_names(state)
    if kind is not None:
        place = f"; {_PLACES[kind]}" if kind in _PLACES else ""
        raise UserError(
            f"weights {label} are a Hugging Face {kind}'s, one tower of the two that a backbone has; needed are those "
            f"of a CLIPModel, a SiglipModel or an open_clip network{place}"
        )
    return dict(state)
