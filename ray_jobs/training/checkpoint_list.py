"""Ray's own list of a training's checkpoints, which it neither writes atomically nor mends.

A kill or a full disk while Ray writes the list leaves a part of it, and with such a list, or one that names a lost
folder, Ray refuses to go on. Of the checkpoints one may be half there: Ray copies a folder's files in any order.
"""

import json
from pathlib import Path
from typing import Any

import ray

from dsmip.errors import UserError
from dsmip.runs.checkpoints import verify_checkpoint
from dsmip.storage.atomic import write_json
from dsmip.storage.parsing import NOT_AS_WRITTEN

SNAPSHOT = "checkpoint_manager_snapshot.json"


def mend_snapshot(folder: Path) -> str:
    """Makes the list of a training's folder anew when it cannot be used; returns what was wrong with it, or ''.

    Only complete checkpoints are in it; what else there is of checkpoints is left as it is.
    """
    path = folder / SNAPSHOT
    if not path.is_file() or not (problem := _problem(path)):
        return ""
    sound = [(position, each.name) for each in folder.glob("checkpoint_*") if (position := _position(each))]
    names = [name for _, name in sorted(sound)]
    if names:
        write_json(path, _snapshot(names))
    else:
        path.unlink()
    return f"{path} {problem}; it was made anew with {len(names)} checkpoints"


def _problem(path: Path) -> str:
    try:
        named = [each["checkpoint_dir_name"] for each in json.loads(path.read_text())["checkpoint_results"]]
    except NOT_AS_WRITTEN:
        return "is damaged"
    lost = [name for name in named if not (path.parent / name).is_dir()]
    return f"names {lost[0]}, which is lost" if lost else ""


def _position(checkpoint: Path) -> tuple[int, int] | None:
    """Epoch and step of a complete checkpoint, None of another one."""
    try:
        manifest = verify_checkpoint(checkpoint)  # reads all of it: there are few, and lists are seldom broken
    except UserError:
        return None
    return manifest["epoch"], manifest["step"]


def _snapshot(names: list[str]) -> dict[str, Any]:
    """The list as Ray writes it, of these checkpoint folders, oldest first."""
    results = [{"version": 0, "checkpoint_dir_name": name, "metrics": {}} for name in names]
    empty = ("pending_training_results", "pending_validation_specs", "validated_checkpoint_dir_names")
    failed = ("timed_out_validation_checkpoint_dir_names", "failed_validation_checkpoint_dir_names")
    return {
        "ray_version": ray.__version__,
        "checkpoint_results": results,
        "checkpoint_report_indices": list(range(len(names))),
        "latest_checkpoint_result": results[-1],
        "current_report_index": len(names),
        **{key: [] for key in (*empty, *failed)},
    }
