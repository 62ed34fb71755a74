"""A training's checkpoint folder: safetensors for weights, a weights-only file for the optimizer, the manifest last."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsmip.errors import UserError
from dsmip.files import atomic_path, write_json


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Everything a training needs to go on at the start of `epoch`."""

    epoch: int
    history: list[dict[str, float]]
    weights: dict[str, Tensor]
    best: dict[str, Tensor]
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    scaler: dict[str, Any]


def save_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Writes named tensors as safetensors, atomically."""
    with atomic_path(path) as temporary:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, temporary)


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Writes all parts into `folder`; `checkpoint.json` is written last: present means complete."""
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(folder / "weights.safetensors", checkpoint.weights)
    save_weights(folder / "best.safetensors", checkpoint.best)
    with atomic_path(folder / "optimizer.pt") as temporary:
        state = {"optimizer": checkpoint.optimizer, "schedule": checkpoint.schedule, "scaler": checkpoint.scaler}
        torch.save(state, temporary)
    write_json(folder / "checkpoint.json", {"epoch": checkpoint.epoch, "history": checkpoint.history})


def load_checkpoint(folder: Path, device: torch.device) -> Checkpoint:
    """Reads a folder that `save_checkpoint` finished; UserError when it is not complete."""
    manifest = folder / "checkpoint.json"
    if not manifest.is_file():
        raise UserError(f"checkpoint {folder} is not complete (no checkpoint.json)")
    position = json.loads(manifest.read_text(encoding="utf-8"))
    state = torch.load(folder / "optimizer.pt", map_location=device, weights_only=True)
    return Checkpoint(
        epoch=position["epoch"],
        history=position["history"],
        weights=load_file(folder / "weights.safetensors", device=str(device)),
        best=load_file(folder / "best.safetensors", device=str(device)),
        optimizer=state["optimizer"],
        schedule=state["schedule"],
        scaler=state["scaler"],
    )
