"""Leftovers of a run that nothing needs any more: checkpoints of trainings and trials that have finished."""

from dsmip.runs.run import PART, TRAININGS
from dsmip.storage.run_storage import RunStorage


def removable(storage: RunStorage, system: str) -> dict[str, int]:
    """Bytes by folder of what can be deleted without any loss: what is finished is loaded from its weights.

    A training that is not finished keeps its checkpoints, from which it goes on.

    Args:
        storage: The run's.
        system: Name of its system; its trials' checkpoints are needed until it is finished.
    """
    found = []
    for home in ("", *(f"{name}/" for name in storage.glob("variants/*"))):
        for report in storage.glob(f"{home}*/{PART}"):
            part, variant = (
                report.removeprefix(home).removesuffix(f"/{PART}"),
                home.removeprefix("variants/").rstrip("/"),
            )
            found += storage.glob(f"{home}{TRAININGS}/{part}-{variant}" if variant else f"{TRAININGS}/{part}")
    if storage.glob(f"{system}/{PART}"):
        found += storage.glob("tune/trials/*/checkpoints")
    sizes = {name: sum((storage / name).sizes().values()) for name in found}
    return {name: size for name, size in sizes.items() if size}
