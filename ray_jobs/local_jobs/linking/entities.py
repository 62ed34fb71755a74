"""The job `dsmip entities`: the entities of a bundle, changed by those of a file. Knows no Ray."""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from data_prep.formats.json_records import BrokenLine, numbered_records
from dsmip.errors import UserError
from dsmip.linking.growing.entities import EntitiesChange
from dsmip.linking.growing.records import GivenEntity
from dsmip.linking.load import load_entities
from dsmip.linking.mentions import Unreadable
from dsmip.rank_options import device_here
from dsmip.storage.locations import Location
from ray_jobs.terminal.display import Display


class EntityFile:
    """A file of entities, one JSON object a line; each says in which line it stands."""

    def __init__(self, path: Path) -> None:
        """
        Args:
            path: A .jsonl.

        Raises:
            UserError: It is no such file.
        """
        if path.suffix != ".jsonl":
            raise UserError(f"{path}: entities are read from .jsonl, one object a line")
        self.path = path

    def __iter__(self) -> Iterator[GivenEntity]:
        for number, record in numbered_records(self.path):
            if isinstance(record, BrokenLine):
                yield GivenEntity(str(self.path), Unreadable(f"wrong JSON: {record.problem}"))
            else:
                yield GivenEntity(f"{self.path}: line {number}", record)


def change_entities(bundle: Location, how: Literal["add", "remove", "update"], path: Path, device: str = "cpu") -> None:
    """Adds, removes or updates the entities of a file, and says how many there are now.

    Raises:
        UserError: For a bundle that cannot be changed, or a file that does not fit it; then nothing is changed.
    """
    display, file = Display(), EntityFile(path)
    entities = load_entities(bundle, device_here(device))
    display.interrupted = lambda: f"interrupted; {bundle} is as it was"
    with display:
        if how == "remove":
            change = entities.remove(file)
        else:
            put = entities.add if how == "add" else entities.update
            change = put(file, images=path.absolute().parent, progress=display)
    done = {"add": f"{change.added} added", "remove": f"{change.removed} removed", "update": f"{change.added} updated"}
    display.say(f"{bundle}: {done[how]}; {_state(change)}")
    if change.segments > 1 or change.dead:
        display.say(f"  once there are many: {shlex.join(['dsmip', 'entities', 'compact', str(bundle)])}")


def compact_entities(bundle: Location) -> None:
    """Writes all segments of a bundle as one.

    Raises:
        UserError: For a bundle that cannot be changed.
    """
    display = Display()
    entities = load_entities(bundle, device_here("cpu"))
    display.interrupted = lambda: f"interrupted; {bundle} is as it was"
    with display:
        change = entities.compact(display)
    display.say(f"{bundle}: {_state(change)}")


def _state(change: EntitiesChange) -> str:
    dead = f", {_counted(change.dead, 'row')} of removed ones" if change.dead else ""
    return f"{change.entities} entities in {_counted(change.segments, 'segment')}{dead}"


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
