"""Files and folders of a backbone that a run's configuration names: found again where they were moved with the run."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsmip.config import ExperimentConfig
from dsmip.encoders.formats import hugging_face
from dsmip.errors import UserError
from dsmip.runs.load_config import parse_config, with_files
from dsmip.storage.atomic import sha256_file
from dsmip.storage.parsing import read_json
from dsmip.storage.run_storage import STAMP, LocalRun, RunStorage

FILES = "files"
"""What a run's stamp has of them: by name in the configuration, `sha256`, and `beside`, the way there from the run."""

Noted = Mapping[str, Mapping[str, str]]


def noted_files(config: ExperimentConfig, storage: RunStorage, before: Noted) -> dict[str, dict[str, str]]:
    """What is written down of files: what was, and those of this configuration that are here.

    A run in an object store has no way to a node's files, and notes their hashes alone.
    """
    noted = {name: dict(about) for name, about in before.items()}
    for name in filter(os.path.exists, _names(config)):
        noted[name] = {"sha256": _sha256(Path(name))}
        if isinstance(storage, LocalRun):
            noted[name]["beside"] = os.path.relpath(Path(name).resolve(), storage.path.resolve())
    return noted


def found_again(config: ExperimentConfig, storage: RunStorage, noted: Noted) -> ExperimentConfig:
    """The configuration with the present names of files that lie where they lay as seen from the run, unchanged."""
    moved = {}
    for name, about in noted.items():
        if "beside" not in about or not isinstance(storage, LocalRun) or Path(name).exists():
            continue
        here = Path(os.path.normpath(storage.path.resolve() / about["beside"]))
        if here.exists() and _sha256(here) == about["sha256"]:
            moved[name] = str(here)
    if not moved:
        return config
    return parse_config(with_files(config.model_dump(mode="json"), lambda name: moved.get(name, name)))


def found_beside(config: ExperimentConfig, path: str) -> ExperimentConfig:
    """As `found_again`, of a configuration that was read from a run's own file `path`; itself where it was not."""
    folder = Path(path).parent
    if not (folder / STAMP).is_file():
        return config
    try:
        noted = read_json(folder / STAMP, noted_in)
    except UserError:  # said where the run is opened
        return config
    return found_again(config, LocalRun(folder), noted)


def by_content(noted: Noted) -> dict[str, str]:
    """What stands for the names of files in keys that a move does not change (`key_text`)."""
    return {name: f"sha256:{about['sha256']}" for name, about in noted.items()}


def noted_in(stamp: Any) -> dict[str, dict[str, str]]:
    """What a stamp has of files: nothing in those of older versions."""
    files = stamp.get(FILES, {})
    return {str(name): {str(key): str(value) for key, value in about.items()} for name, about in files.items()}


def _sha256(path: Path) -> str:
    """Of a file, or of what a text tower reads in a folder: descriptions, its tokenizer, one file of weights."""
    if path.is_file():
        return sha256_file(path)
    weights = [path / name for name in hugging_face.FILES if (path / name).is_file()][:1]
    described = (each for form in ("*.json", "*.txt", "*.model", "1_Pooling/*.json") for each in path.glob(form))
    lines = [f"{sha256_file(each)} {each.relative_to(path).as_posix()}" for each in sorted((*described, *weights))]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _names(config: ExperimentConfig) -> list[str]:
    names: list[str] = []

    def note(name: str) -> str:
        names.append(name)
        return name

    with_files(config.model_dump(mode="json"), note)
    return sorted(set(names))
