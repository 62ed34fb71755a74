"""Provenance of figures: source revision, package versions and machine; and a record of each command on a run.

<run>/records/<start>-<command>.json   one per command, written when it starts and again when it ends
<data>/records/<start>-prepare.json    of the command that made a dataset directory, written when it was complete
"""

import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from dsmip.config import ExperimentConfig
from dsmip.errors import ReportedError
from dsmip.messages import masked
from dsmip.storage.atomic import sha256_file, write_json
from dsmip.storage.run_storage import RunStorage
from dsmip.version import VERSION

RECORDS = "records"
RUNNING = "running"  # the outcome of a command that has not ended, or was killed
ROOT = Path(__file__).resolve().parents[2]  # of the packages, and of the checkout if it is one
SOURCES = ("data_prep", "dsmip", "ray_jobs")
# What figures depend on; of the others the pins tell.
_PACKAGES = (
    *("numpy", "open_clip_torch", "pillow", "pyarrow", "pydantic", "ray", "safetensors"),
    *("timm", "torch", "torchvision", "transformers", "triton"),
)
_TOOL_SECONDS = 20  # git and nvidia-smi may hang on a broken disk or driver


def environment() -> dict[str, Any]:
    """The source revision (None outside a checkout), versions and hardware of this process, as plain values."""
    return {
        "dsmip": VERSION,
        "git": _git(ROOT),
        "source_sha256": source_sha256(ROOT),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cuda": torch.version.cuda,
        "cpu": {"model": _cpu_model(), "count": os.cpu_count()},
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": _gpus(),
    }


def source_sha256(root: Path) -> str:
    """Digest of the packages' files below `root`: the same for a checkout, its upload by Ray and an installation.

    It is that of what `sha256sum` prints of them, sorted by name (docs/watching.md has the command).
    """
    files = [path.relative_to(root) for package in SOURCES for path in (root / package).rglob("*")]
    names = sorted(
        file.as_posix()
        for file in files
        if (root / file).is_file() and "__pycache__" not in file.parts and not file.name.startswith(".")
    )
    return hashlib.sha256("".join(f"{sha256_file(root / name)}  {name}\n" for name in names).encode()).hexdigest()


def write_record(folder: Path, command: str, started: datetime, **about: Any) -> None:
    """Records a command that has just made `folder`: what it was, when, where, and `about`."""
    record = {**_command(command, started), "ended": _now(), "outcome": "finished", **about}
    write_json(folder / _record_name(command, started), record)


@contextmanager
def recorded(
    storage: RunStorage, command: str, config: ExperimentConfig, *, seed: int, data_sha256: str
) -> Iterator[None]:
    """Records a command that works on the run in `storage`: what it was, on what, from when to when and how it ended.

    A record that stays at "running" is of a command that still runs or was killed.
    """
    started = datetime.now(UTC)
    name = _record_name(command, started)
    record = {
        **_command(command, started),
        "ended": None,
        "outcome": RUNNING,
        "seed": seed,
        "data_sha256": data_sha256,
        "config": config.model_dump(mode="json"),
    }
    storage.write_json(name, record)
    outcome = "interrupted"
    try:
        yield
        outcome = "finished"
    except Exception as error:
        outcome = masked(f"failed: {type(error).__name__}: {error}")
        raise
    finally:
        # A full disk or a store that is away must not hide behind this line why a command has failed.
        with nullcontext() if outcome == "finished" else suppress(OSError, ReportedError):
            storage.write_json(name, {**record, "ended": _now(), "outcome": outcome})


def _record_name(command: str, started: datetime) -> str:
    return f"{RECORDS}/{started:%Y%m%dT%H%M%S.%fZ}-{command}.json"


def _command(command: str, started: datetime) -> dict[str, Any]:
    return {
        "command": command,
        "arguments": [Path(sys.argv[0]).name, *map(masked, sys.argv[1:])],
        "started": started.isoformat(timespec="seconds"),
        "environment": environment(),
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _git(folder: Path) -> dict[str, Any] | None:
    """Revision of the checkout whose root is `folder`, and whether tracked files were changed since."""
    root = _output(["git", "-C", str(folder), "rev-parse", "--show-toplevel"])
    if root is None or Path(root.strip()).resolve() != folder:
        return None  # not a checkout, or installed into somebody else's
    revision = _output(["git", "-C", str(folder), "rev-parse", "HEAD"])
    changed = _output(["git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no"])
    if revision is None or changed is None:
        return None
    return {"revision": revision.strip(), "dirty": bool(changed.strip())}


def _gpus() -> list[str]:
    """Name, memory and driver of each GPU; asked of the driver's tool, because torch would take GPU memory for it."""
    said = _output(["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"])
    return said.splitlines() if said else []


def _output(command: Sequence[str]) -> str | None:
    """What a program prints, None when it is not there or fails."""
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=_TOOL_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout


@cache
def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
