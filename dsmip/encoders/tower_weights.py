"""The weights of separate towers: a Hugging Face model's and a timm network's own, into one network.

What joins two towers stays random until `dsmip pretrain` trains it.
"""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsmip.encoders.weights import check_fit, read_weights
from dsmip.errors import UserError, first_line
from dsmip.separate_towers import SeparateTowers


def load_towers(clip: nn.Module, towers: SeparateTowers) -> None:
    """Loads the towers' own weights into a network that was built as `towers.separate.as_open_clip` says.

    Raises:
        UserError: Weights cannot be had or do not fit.
    """
    loaded: list[tuple[str, dict[str, Tensor], str]] = []
    if towers.text:
        loaded.append(("text.transformer", _text_weights(clip, towers.text), f"hf:{towers.text}"))
    if towers.vision:
        loaded.append(("visual.trunk", _vision_weights(towers.vision, towers.vision_file), f"timm:{towers.vision}"))
    for name, state, label in loaded:
        module = clip.get_submodule(name)
        check_fit(state, module.state_dict(), label)
        module.load_state_dict(state)


def _text_weights(clip: nn.Module, name: str) -> dict[str, Tensor]:
    from transformers import AutoModel

    config = getattr(clip.get_submodule("text"), "config", None)
    both = bool(getattr(config, "is_encoder_decoder", False))
    options = {} if both else {"add_pooling_layer": False}
    try:
        with _silent_transformers():
            model, said = AutoModel.from_pretrained(
                name, output_loading_info=True, dtype=torch.float32, trust_remote_code=False, **options
            )
    except Exception as error:  # a wrong file makes the library, safetensors and pickle raise what they like
        is_program = isinstance(error, pickle.UnpicklingError)  # it was not run
        why = "its file is not a plain file of tensors" if is_program else first_line(error)
        raise UserError(
            f"weights of backbone.text hf:{name} cannot be had ({why}); without internet give a folder "
            "with config.json, the tokenizer and model.safetensors or pytorch_model.bin"
        ) from None
    missing = sorted(key for key in said["missing_keys"] if not both or key.startswith(("encoder.", "shared.")))
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(f"weights of backbone.text hf:{name} have no {', '.join(missing[:3])}{more}")
    state: dict[str, Tensor] = (model.encoder if both else model).state_dict()
    return state


def _vision_weights(name: str, file: str | None) -> dict[str, Tensor]:
    """Those of the trunk without its classifier, whatever number of classes the file has."""
    import timm

    options: dict[str, Any] = {}
    stated = timm.get_pretrained_cfg(name)
    if file is None and not (stated is not None and stated.has_weights):
        raise UserError(f"timm has no weights of {name}: give a file, timm:{name}@<.safetensors or .pth>")
    if file is not None:
        if not Path(file).is_file():
            raise UserError(f"weights file {file} of backbone.vision does not exist")
        stored = read_weights(Path(file))
        classifier = stated.classifier if stated is not None else None
        names = (classifier,) if isinstance(classifier, str) else classifier or ()
        sizes = [stored[f"{name}.weight"].shape for name in names if f"{name}.weight" in stored]
        classes = int(sizes[0][0]) if sizes and sizes[0] else 0
        overlay = {"source": "", "state_dict": stored, "num_classes": classes, "label_offset": 0}
        options = {"num_classes": classes, "pretrained_cfg_overlay": overlay}
    try:
        trunk: Any = timm.create_model(name, pretrained=True, **options)
    except Exception as error:  # as above
        if file is not None:
            said = " ".join(str(error).split())[:300]
            raise UserError(f"weights {file} do not fit timm:{name}: {said}") from None
        raise UserError(
            f"weights of backbone.vision timm:{name} could not be downloaded ({first_line(error)}); without "
            f"internet give a file: timm:{name}@<.safetensors or .pth>"
        ) from None
    trunk.reset_classifier(0)
    state: dict[str, Tensor] = trunk.state_dict()
    return state


@contextmanager
def _silent_transformers() -> Iterator[None]:
    """Without its bars, and its tables of heads that are not loaded."""
    from transformers.utils import logging as library

    logging: Any = library

    before = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
