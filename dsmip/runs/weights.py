"""Weights of a part as a run stores them: all of its own, without frozen tensors of pretrained towers."""

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from dsmip.errors import UserError
from dsmip.storage.atomic import atomic_path
from dsmip.units.matcher import Part


def save_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Writes named tensors as safetensors, atomically."""
    with atomic_path(path) as temporary:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, temporary)


def own_weights(part: Part) -> dict[str, Tensor]:
    """Everything but frozen tensors of pretrained towers, which the configuration's `backbone` brings back."""
    towers = part.tower_tensors()
    trained = {name for name, parameter in part.named_parameters() if parameter.requires_grad}
    state = part.state_dict()
    return {name: tensor for name, tensor in state.items() if name in trained or name not in towers}


def load_own_weights(part: Part, path: Path) -> None:
    """Loads what `own_weights` saved; tensors of an encoder that a matcher was built without are passed over.

    Raises:
        UserError: A tensor of the part is missing or has another shape.
    """
    stored = load_file(path)
    state = part.state_dict()
    wanted = own_weights(part)
    if missing := [name for name in wanted if name not in stored]:
        raise UserError(f"{path} lacks {missing[0]} and {len(missing) - 1} more: it is of another configuration")
    for name in stored.keys() & state.keys():
        if stored[name].shape != state[name].shape:
            raise UserError(
                f"{path}: {name} has shape {list(stored[name].shape)}, "
                f"the configuration makes {list(state[name].shape)}"
            )
    part.load_state_dict({name: stored[name] for name in stored.keys() & state.keys()}, strict=False)
