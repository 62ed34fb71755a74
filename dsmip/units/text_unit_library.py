"""The shared library of the text unit's C++ kernel: compiled at first use, kept, loaded only as it was built.

It lies in the user's cache folder, by a hash of the source, the flags and what the compiler says of itself and of this
processor. Beside it lies the digest of its content: a library that differs, or that another user may have written, is
not loaded but built again.
"""

import ctypes
import hashlib
import os
import shlex
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from dsmip.errors import UserError
from dsmip.ops.kernels import cpu
from dsmip.private import is_private_file, private_folder, user_cache_folder

_SECONDS = 300  # for the compiler


class NoCompiler(Exception):
    """The compiler's command, which is not to be found."""


def why_unavailable() -> str | None:
    """Why there is no compiled kernel, in one line; None when there is one. The first call builds it."""
    found = library_or_reason()
    return found if isinstance(found, str) else None


def library() -> ctypes.CDLL:
    """The loaded library, for `dsmip.ops.kernels.cpu`.

    Raises:
        RuntimeError: There is none; it says why.
    """
    found = library_or_reason()
    if isinstance(found, str):
        raise RuntimeError(f"the C++ kernel is not available: {found}")
    return found


@cache
def library_or_reason() -> ctypes.CDLL | str:
    """The loaded library, or why there is none; asked for once in a process."""
    compiler = _compiler()
    try:
        return cpu.load(_built(compiler))
    except NoCompiler as error:
        return f"no C++ compiler named {error} (set CXX to one)"
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if line.strip()] or ["it said nothing"]
        return f"{compiler[0]} failed: {next((line for line in lines if 'error' in line), lines[-1])}"
    except subprocess.TimeoutExpired:
        return f"{compiler[0]} took more than {_SECONDS} seconds"
    except (OSError, UserError) as error:  # a cache folder that cannot be written, is not ours, no home folder
        return str(error)


def _compiler() -> list[str]:
    """The command in CXX; `c++` when that is empty. Text that no shell would take is one name, and not found."""
    given = os.environ.get("CXX", "")
    try:
        return shlex.split(given) or ["c++"]
    except ValueError:
        return [given]


def _built(compiler: list[str]) -> Path:
    """The library's file, compiled if it is not there or not as it was built."""
    # the macros that a compiler defines name its version and the processor's instructions
    macros = _run([*compiler, *cpu.FLAGS, "-dM", "-E", "-x", "c++", os.devnull])
    key = hashlib.sha256(repr((cpu.SOURCE.read_bytes(), cpu.FLAGS, macros)).encode()).hexdigest()[:16]
    folder = private_folder(user_cache_folder(), "set XDG_CACHE_HOME to another folder")
    target = folder / f"text_unit-{key}.so"
    digest = target.with_suffix(".sha256")
    if not _is_whole(target, digest):
        with tempfile.TemporaryDirectory(dir=folder) as name:
            unfinished, its_digest = Path(name) / target.name, Path(name) / digest.name
            _run([*compiler, *cpu.FLAGS, str(cpu.SOURCE), "-o", str(unfinished)])
            its_digest.write_text(_sha256(unfinished), encoding="ascii")
            for each in (unfinished, its_digest):
                each.chmod(0o600)
            os.replace(unfinished, target)  # at once: another process sees all of it or nothing
            os.replace(its_digest, digest)
    return target


def _is_whole(library: Path, digest: Path) -> bool:
    """Whether a library is there with the content that it was built with, and only this user can have written it."""
    if not (is_private_file(library) and is_private_file(digest)):
        return False
    return digest.read_bytes() == _sha256(library).encode()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, errors="replace", timeout=_SECONDS)
    except FileNotFoundError as error:
        raise NoCompiler(command[0]) from error
    return done.stdout
