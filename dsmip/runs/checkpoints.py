"""A training's checkpoint folder: safetensors for weights, a weights-only file for the optimizer, the manifest last.

The manifest `checkpoint.json` holds the hash of each file and of itself. Nothing is read from a folder that differs.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from dsmip import distributed
from dsmip.errors import UserError
from dsmip.runs.weights import save_weights
from dsmip.storage.atomic import atomic_path, sha256_file, write_json
from dsmip.storage.parsing import NOT_AS_WRITTEN

MANIFEST = "checkpoint.json"
KEPT = 2  # checkpoints of a training: the newest, and one to fall back on when that is damaged
_FILES = ("weights.safetensors", "best.safetensors", "optimizer.pt")
_NEGATIVES = "hard_negatives.safetensors"
_POSITION = ("epoch", "step", "sums", "count", "history")


class NoSoundCheckpoint(UserError):
    """A training has checkpoints, and all of them are damaged."""

    may_pass = True


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Everything a training needs to go on at `step` of `epoch`.

    No generator's state is among it: every random number of a training is a function of (seed, epoch, step, worker).
    Nor is the place in the shards: it follows from (seed, epoch, step).

    Attributes:
        sums, count: Of figures of the epoch so far, and of its samples, over all workers.
        hard_row_NK: Hard negatives of the training mentions, found by earlier weights.
    """

    epoch: int
    history: list[dict[str, float]]
    weights: dict[str, Tensor]
    best: dict[str, Tensor]
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    scaler: dict[str, Any]
    step: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    count: int = 0
    hard_row_NK: Tensor | None = None


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Writes all parts into `folder`; `checkpoint.json` is written last: present means complete."""
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(folder / "weights.safetensors", checkpoint.weights)
    save_weights(folder / "best.safetensors", checkpoint.best)
    with atomic_path(folder / "optimizer.pt") as temporary, temporary.open("wb") as stream:
        state = {"optimizer": checkpoint.optimizer, "schedule": checkpoint.schedule, "scaler": checkpoint.scaler}
        torch.save(state, stream)  # given a path, torch does not say that the disk is full
    files = list(_FILES)
    if checkpoint.hard_row_NK is not None:
        save_weights(folder / _NEGATIVES, {"rows": checkpoint.hard_row_NK})
        files.append(_NEGATIVES)
    position = {name: getattr(checkpoint, name) for name in _POSITION}
    manifest = {**position, "files": {name: sha256_file(folder / name) for name in files}}
    write_json(folder / MANIFEST, {**manifest, "sha256": _hash(manifest)})


def read_manifest(folder: Path) -> dict[str, Any]:
    """Position, history and the files' hashes of a checkpoint.

    Raises:
        UserError: It is incomplete or damaged.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(f"checkpoint {folder} is not complete (no {MANIFEST})")
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        stored = manifest.pop("sha256")
    except NOT_AS_WRITTEN as error:
        raise UserError(f"checkpoint file {path} is damaged: {error!r}") from error
    if stored != _hash(manifest):
        raise UserError(f"checkpoint file {path} is damaged: its content differs from its hash")
    return manifest


def verify_checkpoint(folder: Path) -> dict[str, Any]:
    """Reads every byte of a checkpoint and returns its manifest.

    Raises:
        UserError: A file is missing, or differs from the hash in the manifest; the first one is named.
    """
    manifest = read_manifest(folder)
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"checkpoint file {path} is missing")
        if sha256_file(path) != expected:
            raise UserError(f"checkpoint file {path} is damaged: its content differs from the hash in {MANIFEST}")
    return manifest


def newest_sound(
    folders: Iterable[Path], device: torch.device, warn: Callable[[str], None], location: str
) -> Path | None:
    """The first of `folders` (newest first) that every worker finds undamaged, None when there is none at all.

    Warns of each damaged one that it passes over.

    Raises:
        NoSoundCheckpoint: All are damaged: whether the training begins anew is for the user to say, who then deletes
            `location`.
    """
    damaged = []
    for folder in folders:
        problem = _problem(folder)
        # All workers must go on from the same epoch, and one may have received a broken copy.
        if not distributed.any_worker(bool(problem), device):
            return folder
        damaged.append(problem or f"checkpoint {folder} is damaged on another worker")
        warn(f"warning: {damaged[-1]}; trying the checkpoint before it")
    if damaged:
        raise NoSoundCheckpoint(
            f"no checkpoint can be read: {'; '.join(damaged)}. Delete {location} to train this anew"
        )
    return None


def load_checkpoint(folder: Path, device: torch.device) -> Checkpoint:
    """Reads a folder that `save_checkpoint` finished.

    Raises:
        UserError: It is not complete, or damaged.
    """
    manifest = verify_checkpoint(folder)
    # The optimizer moves its moments itself; its step counts must stay on the CPU, or each step waits for the device.
    state = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
    found = load_file(folder / _NEGATIVES)["rows"] if _NEGATIVES in manifest["files"] else None
    return Checkpoint(
        **{name: manifest[name] for name in _POSITION},
        weights=load_file(folder / "weights.safetensors", device=str(device)),
        best=load_file(folder / "best.safetensors", device=str(device)),
        optimizer=state["optimizer"],
        schedule=state["schedule"],
        scaler=state["scaler"],
        hard_row_NK=found,
    )


def _problem(folder: Path) -> str:
    """What is wrong with a checkpoint, empty when nothing is."""
    try:
        verify_checkpoint(folder)
    except UserError as error:
        return str(error)
    return ""


def _hash(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
