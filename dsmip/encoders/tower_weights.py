"""The weights of two separate towers: a Hugging Face model's and a timm network's own, into one network.

What joins the towers stays random until `dsmip pretrain` trains it.
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
from dsmip.tower_pair import TowerPair


def load_towers(clip: nn.Module, pair: TowerPair) -> None:
    """Loads the two towers' own weights into a network that was built as `towers.pair.as_open_clip` says.

    Raises:
        UserError: Weights cannot be had or do not fit.
    """
    for module, state, label in (
        (clip.get_submodule("text.transformer"), _text_weights(clip, pair.text), f"hf:{pair.text}"),
        (clip.get_submodule("visual.trunk"), _vision_weights(pair), f"timm:{pair.vision}"),
    ):
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


def _vision_weights(pair: TowerPair) -> dict[str, Tensor]:
    """Those of the trunk without its classifier, whatever number of classes the file has."""
    import timm

    options: dict[str, Any] = {}
    stated = timm.get_pretrained_cfg(pair.vision)
    if pair.vision_file is None and not (stated is not None and stated.has_weights):
        raise UserError(f"timm has no weights of {pair.vision}: give a file, timm:{pair.vision}@<.safetensors or .pth>")
    if pair.vision_file is not None:
        if not Path(pair.vision_file).is_file():
            raise UserError(f"weights file {pair.vision_file} of backbone.vision does not exist")
        stored = read_weights(Path(pair.vision_file))
        classifier = stated.classifier if stated is not None else None
        names = (classifier,) if isinstance(classifier, str) else classifier or ()
        sizes = [stored[f"{name}.weight"].shape for name in names if f"{name}.weight" in stored]
        classes = int(sizes[0][0]) if sizes and sizes[0] else 0
        overlay = {"source": "", "state_dict": stored, "num_classes": classes, "label_offset": 0}
        options = {"num_classes": classes, "pretrained_cfg_overlay": overlay}
    try:
        trunk: Any = timm.create_model(pair.vision, pretrained=True, **options)
    except Exception as error:  # as above
        if pair.vision_file is not None:
            said = " ".join(str(error).split())[:300]
            raise UserError(f"weights {pair.vision_file} do not fit timm:{pair.vision}: {said}") from None
        raise UserError(
            f"weights of backbone.vision timm:{pair.vision} could not be downloaded ({first_line(error)}); without "
            f"internet give a file: timm:{pair.vision}@<.safetensors or .pth>"
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
