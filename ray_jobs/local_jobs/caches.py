"""The jobs `dsmip cache list` and `dsmip cache prune`: shared feature tables, and picture features beside data."""

import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from rich.table import Table

from dsmip.data.dataset import Dataset
from dsmip.encoders.image_features import ImageFeatures, is_outdated, stored_features
from dsmip.encoders.shared_tables.places import place_at
from dsmip.encoders.shared_tables.tables import Listed, SharedTables
from dsmip.errors import UserError
from dsmip.storage.atomic import write_masked_json
from ray_jobs.terminal.lines import result_console, say

_DAY = 86_400.0


def show_tables(location: str | None, json_file: Path | None) -> None:
    """Prints the tables of a place, and the picture features of a data set.

    Args:
        location: As `place_at` takes it.
        json_file: Where to write all of it as well.

    Raises:
        UserError: There is no such place.
    """
    place = place_at(location)
    found = place.listed()
    in_use = {each.key: place.in_use(each.key) for each in found}
    console = result_console()
    if found:
        table = Table("table", "data", "of", "first for", "rows", "MiB", "last used", "", header_style="bold")
        for each in found:
            about, used = _about(each), "in use" if in_use[each.key] else ""
            table.add_row(each.key[:16], *about, f"{each.num_bytes / 2**20:.1f}", _when(each.used), used)
        console.print(table)
    held = sum(each.num_bytes for each in found)
    limit = place.limit(held)
    allowed = "" if limit is None else f" of {limit / 1e9:.1f} GB that they may take"
    say(f"{place}: {_counted(found)}, {held / 1e9:.1f} GB{allowed}")
    pictures = _picture_features(location)
    for features, outdated in pictures:
        note = "; of another version of the data, 'dsmip cache prune' removes them" if outdated else ""
        say(f"{features.files.address(features.name)}: picture features, {_size(features) / 2**20:.1f} MiB{note}")
    if json_file is not None:
        write_masked_json(json_file, _described(place, found, in_use, pictures))


def prune_tables(location: str | None, keep: float | None, unused: float | None) -> None:
    """Removes tables, and picture features of other versions of a data set.

    Args:
        location: As `place_at` takes it.
        keep: Gigabytes of the tables last used that may stay; None: as many as the place allows.
        unused: Days; what was used since may stay.

    Raises:
        UserError: There is no such place.
    """
    place = place_at(location)
    leftovers = place.remove_leftovers()
    found, removed = place.listed(), list[Listed]()
    if unused is not None:
        old = [each for each in found if each.used < time.time() - unused * _DAY]
        removed += place.shrink(old, 0)
    found = [each for each in found if each not in removed]
    held = sum(each.num_bytes for each in found)
    limit = place.limit(held) if keep is None else keep * 1e9
    if limit is not None:
        removed += place.shrink(found, limit)
    for each in removed:
        say(f"  removed {' '.join(_about(each)[:2])}, {each.num_bytes / 2**20:.1f} MiB, last used {_when(each.used)}")
    if leftovers:
        say(f"  removed what killed writers have left, {leftovers / 2**20:.1f} MiB")
    for features, outdated in _picture_features(location):
        if outdated:
            features.files.remove(features.name)
            say(f"  removed picture features of another version of the data, {_size(features) / 2**20:.1f} MiB")
    left = [each for each in found if each not in removed]
    held = sum(each.num_bytes for each in left)
    busy = sum(place.in_use(each.key) for each in left) if limit is not None and held > limit else 0
    kept = f", {busy} of them in use, which are kept" if busy else ""
    say(f"{place}: removed {_counted(removed)}; {_counted(left)} left, {held / 1e9:.1f} GB{kept}")


def _picture_features(location: str | None) -> list[tuple[ImageFeatures, bool]]:
    """Of a data set; and whether they are of another version of it. Of another place, none."""
    if location is not None:
        with suppress(UserError):
            dataset = Dataset.open(location)
            return [(features, is_outdated(features)) for features in stored_features(dataset)]
    return []


def _about(listed: Listed) -> tuple[str, str, str, str]:
    """Data set, split, part and rows."""
    if listed.entry is None:
        return "?", "unfinished", "", ""
    origin = listed.entry.origin
    return origin.data, origin.split, origin.part, str(listed.entry.rows)


def _counted(found: Sequence[Listed]) -> str:
    return f"{len(found)} table{'' if len(found) == 1 else 's'}"


def _size(features: ImageFeatures) -> int:
    return sum(file.bytes for file in features.manifest.files.values())


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M") if seconds else "?"


def _described(
    place: SharedTables, found: Sequence[Listed], in_use: dict[str, bool], pictures: list[tuple[ImageFeatures, bool]]
) -> dict[str, object]:
    return {
        "place": str(place),
        "tables": [
            {
                "key": each.key,
                "bytes": each.num_bytes,
                "in_use": in_use[each.key],
                **(each.entry.model_dump(mode="json") if each.entry else {}),
            }
            for each in found
        ],
        "picture_features": [
            {"name": features.name, "bytes": _size(features), "outdated": outdated} for features, outdated in pictures
        ],
    }
