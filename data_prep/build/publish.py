"""Puts a finished dataset directory into an object store, its manifest last; interrupted, it goes on where it was.

What was uploaded is noted beside the dataset, with the mark that the store gave to it: a file that still has its mark
is not sent again.
"""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from dsmip.atomic import sha256_file, write_json
from dsmip.dataset_storage import MANIFEST_FILE, FileInfo, StoredFile
from dsmip.errors import UserError
from dsmip.manifest import ENTITIES_FILE, REJECTS_FILE, Manifest, is_shard_path, parse_manifest, read_manifest
from dsmip.object_store import attempt, filesystem, join
from dsmip.progress import Progress, counting, no_progress

_AT_ONCE = 4

Marks = dict[str, list[str]]  # by name: the content's SHA-256 and the store's mark


def published_manifest(uri: str) -> Manifest | None:
    """The manifest of the dataset at a URI; None where a new one may be put.

    Raises:
        UserError: no such bucket, or something else is there.
    """
    names = {name.removeprefix(f"{_root(uri)}/") for name in _listing(uri)}
    if MANIFEST_FILE in names:
        place = join(uri, MANIFEST_FILE)
        system, path = filesystem(place)
        return parse_manifest(attempt(place, lambda: system.cat_file(path)), place)[0]
    foreign = sorted(name for name in names if not (name in (ENTITIES_FILE, REJECTS_FILE) or is_shard_path(name)))
    if foreign:
        raise UserError(f"{uri}: is not empty and no dataset (it holds {foreign[0]}); choose another place")
    return None


def upload_dataset(folder: Path, uri: str, journal: Path, progress: Progress = no_progress) -> int:
    """Uploads the dataset in `folder`; returns how many files were sent. `journal`: where to note what was sent.

    Raises:
        UserError: the store cannot be written; what was sent stays noted.
    """
    manifest, _ = read_manifest(folder)
    files: list[StoredFile] = [*manifest.shards, manifest.entities_file, _described(folder, REJECTS_FILE)]
    noted, present = _read_journal(journal), _listing(uri)
    root = _root(uri)
    missing = [
        file
        for file in files
        if (info := present.get(f"{root}/{file.path}")) is None or noted.get(file.path) != [file.sha256, _mark(info)]
    ]
    add = counting(progress, "uploaded", len(files))
    add(len(files) - len(missing))
    for file, mark in _sent(folder, uri, missing):
        noted[file.path] = [file.sha256, mark]
        write_json(journal, noted)
        add(1)
    _send(folder, uri, MANIFEST_FILE)
    return len(missing) + 1


def _sent(folder: Path, uri: str, files: list[StoredFile]) -> Iterator[tuple[StoredFile, str]]:
    """The files with the store's marks, as they get there. The first error ends it."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        calls = {pool.submit(_send, folder, uri, file.path): file for file in files}
        try:
            for call in as_completed(calls):
                yield calls[call], call.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _send(folder: Path, uri: str, name: str) -> str:
    place = join(uri, name)
    system, path = filesystem(place)
    try:
        attempt(place, lambda: system.put_file(str(folder / name), path))
        return _mark(attempt(place, lambda: system.info(path)))
    except FileNotFoundError as error:
        raise UserError(f"{place}: cannot be written ({error})") from error


def _listing(uri: str) -> dict[str, dict[str, Any]]:
    """What is below a URI, by path in the store."""
    system, path = filesystem(uri)
    try:
        found: dict[str, dict[str, Any]] = attempt(uri, lambda: system.find(path, detail=True))
    except FileNotFoundError as error:
        raise UserError(f"{uri}: no such bucket ({error})") from error
    return found


def _root(uri: str) -> str:
    return filesystem(uri)[1]


def _mark(info: dict[str, Any]) -> str:
    """What changes whenever an object is written: its entity tag, where the store has such."""
    return str([info["size"], info.get("ETag") or info.get("etag") or info.get("mtime")])


def _described(folder: Path, name: str) -> FileInfo:
    path = folder / name
    return FileInfo(name, sha256_file(path), path.stat().st_size)


def _read_journal(path: Path) -> Marks:
    try:
        noted = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return noted if isinstance(noted, dict) else {}
