"""Puts a finished dataset directory into an object store, its manifest last; interrupted, it goes on where it was.

What was uploaded is noted beside the dataset, with the version that the store gave to it: a file that is still there
in that version is not sent again.
"""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from dsmip.data.manifest import ENTITIES_FILE, REJECTS_FILE, Manifest, is_shard_path, parse_manifest, read_manifest
from dsmip.errors import UserError
from dsmip.progress import Progress, counting, no_progress
from dsmip.storage.atomic import sha256_file, write_json
from dsmip.storage.dataset_storage import MANIFEST_FILE, FileInfo, StoredFile
from dsmip.storage.object_store import ObjectStore, StoredObject

_AT_ONCE = 4

Journal = dict[str, list[str]]  # by name: the content's SHA-256 and the store's version


def published_manifest(uri: str) -> Manifest | None:
    """The manifest of the dataset at a URI; None where a new one may be put.

    Raises:
        UserError: No such bucket, or something else is there.
    """
    store = ObjectStore(uri)
    names = _present(store).keys()
    content = store.read(MANIFEST_FILE) if MANIFEST_FILE in names else None
    if content is not None:
        return parse_manifest(content, store.address(MANIFEST_FILE))[0]
    foreign = sorted(name for name in names if not (name in (ENTITIES_FILE, REJECTS_FILE) or is_shard_path(name)))
    if foreign:
        raise UserError(f"{uri}: is not empty and no dataset (it holds {foreign[0]}); choose another place")
    return None


def upload_dataset(folder: Path, uri: str, journal: Path, progress: Progress = no_progress) -> int:
    """Uploads a dataset.

    Args:
        folder: Where it lies here.
        uri: Where it goes.
        journal: File to note in what was sent; it is read first.
        progress: Told of the files that are there.

    Returns:
        How many files were sent.

    Raises:
        UserError: The store cannot be written; what was sent stays noted.
    """
    manifest, _ = read_manifest(folder)
    files: list[StoredFile] = [*manifest.shards, manifest.entities_file, _described(folder, REJECTS_FILE)]
    store = ObjectStore(uri)
    noted, present = _read_journal(journal), _present(store)
    missing = [
        file
        for file in files
        if (stored := present.get(file.path)) is None or noted.get(file.path) != [file.sha256, stored.version]
    ]
    add = counting(progress, "uploaded", len(files))
    add(len(files) - len(missing))
    for file, version in _sent(folder, store, missing):
        noted[file.path] = [file.sha256, version]
        write_json(journal, noted)
        add(1)
    store.put(folder / MANIFEST_FILE, MANIFEST_FILE)
    return len(missing) + 1


def _sent(folder: Path, store: ObjectStore, files: list[StoredFile]) -> Iterator[tuple[StoredFile, str]]:
    """The files with the store's versions, as they get there. The first error ends it."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        calls = {pool.submit(store.put, folder / file.path, file.path): file for file in files}
        try:
            for call in as_completed(calls):
                yield calls[call], call.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _present(store: ObjectStore) -> dict[str, StoredObject]:
    """What is there, by name."""
    try:
        return store.objects()
    except FileNotFoundError as error:
        raise UserError(f"{store.uri}: no such bucket ({error})") from error


def _described(folder: Path, name: str) -> FileInfo:
    path = folder / name
    return FileInfo(name, sha256_file(path), path.stat().st_size)


def _read_journal(path: Path) -> Journal:
    try:
        noted = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return noted if isinstance(noted, dict) else {}
