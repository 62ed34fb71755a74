"""Leftovers of a run that nothing needs any more: checkpoints of trainings and trials that have finished."""

from dsmip.errors import UserError
from dsmip.runs.loaded_model import PART
from dsmip.runs.run import TRAININGS
from dsmip.storage.parsing import read_json
from dsmip.storage.run_storage import RunStorage

SWEEP = "tune/sweep.json"  # what the sweep is whose trials are there


def removable(storage: RunStorage, system: str) -> dict[str, int]:
    """Bytes by folder of what can be deleted without any loss: what is finished is loaded from its weights.

    A training that is not finished keeps its checkpoints, from which it goes on.

    Args:
        storage: The run's.
        system: Name of its system; its trials' checkpoints are needed until their sweep has made it.
    """
    found: list[str] = []
    for home in ("", *(f"{name}/" for name in storage.glob("variants/*"))):
        for report in storage.glob(f"{home}*/{PART}"):
            part, variant = report.split("/")[-2], home.removeprefix("variants/").rstrip("/")
            found += storage.glob(f"{home}{TRAININGS}/{part}-{variant}" if variant else f"{TRAININGS}/{part}")
    if _sweep_has_ended(storage, system):
        found += storage.glob("tune/trials/*/checkpoints")
    sizes = {name: sum((storage / name).sizes().values()) for name in found}
    return {name: size for name, size in sizes.items() if size}


def _sweep_has_ended(storage: RunStorage, system: str) -> bool:
    """Whether the trials that are there made the whole system: it may be of an earlier sweep, whose trials are gone."""
    made, claimed = storage.folder / system / PART, storage.folder / SWEEP
    try:
        return bool(read_json(made, lambda it: it["sweep"]) == read_json(claimed, lambda it: it["sha256"]))
    except (UserError, OSError):  # not there, or damaged: what is not known to have ended keeps its checkpoints
        return False
