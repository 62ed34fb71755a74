"""The text unit's token-level score in C++ (text_unit.cpp), compiled at first use; float32 on a CPU, no gradients.

The source is one C function in a shared library of its own, loaded with ctypes: building it takes a C++ compiler and
seconds, where an extension of torch takes ninja, torch's headers and a minute. It starts threads itself, so that no
second OpenMP runtime comes into the process. The library is kept in the user's cache folder, by a hash of the source,
the flags and what the compiler says of itself and of this processor. Beside it lies the digest of its content: a
library that differs, or that another user may have written, is not loaded but built again.
"""

import ctypes
import hashlib
import os
import shlex
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from dsmip.errors import UserError
from dsmip.ops.kernels.rows import Pairs, TokenRows, checked
from dsmip.private import is_private_file, private_folder, user_cache_folder

_SOURCE = Path(__file__).with_name("text_unit.cpp")
# tuned for a certain processor, GCC reads the keys of a register tile from memory for every row: a third slower
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-mtune=generic", "-ffp-contract=fast", "-fPIC", "-shared", "-pthread")
_SECONDS = 300  # for the compiler


def why_unavailable() -> str | None:
    """Why there is no compiled kernel, in one line; None when there is one. The first call builds it."""
    library = _library()
    return library if isinstance(library, str) else None


def local_scores(
    key: TokenRows,
    value: TokenRows,
    query: TokenRows,
    direction_Ed: Tensor,
    eps: float,
    wanted_ME: Tensor | None = None,
    num_threads: int | None = None,
) -> Tensor:
    """`dsmip.ops.text_unit.local_scores` of M mentions, E entities: float32 [M, E], 0 where not wanted (bool [M, E]).

    A pair's score depends on the pair alone, to the last bit: not on the other pairs, their order or the number of
    threads (default: torch's). NaN in, NaN out; an item without tokens scores NaN.

    Raises:
        RuntimeError: the kernel is not available, or memory does not suffice.
        ValueError: another dtype, device or shape, or rows outside their tensor.
    """
    library = _library()
    if isinstance(library, str):
        raise RuntimeError(f"the C++ kernel is not available: {library}")
    pairs = checked(Pairs(key, value, query, direction_Ed, wanted_ME), "cpu", (torch.float32,))
    key, value, query, direction_Ed, wanted_ME = pairs
    scores_ME = torch.empty(pairs.num_mentions, pairs.num_entities)
    mentions = (key.values_Rd, value.values_Rd, key.start_N, value.start_N, key.length_N)
    failed = library.dsmip_text_unit(
        *map(_address, mentions),
        pairs.num_mentions,
        *map(_address, query),
        _address(direction_Ed),
        pairs.num_entities,
        pairs.width,
        eps,
        None if wanted_ME is None else _address(wanted_ME),
        num_threads or torch.get_num_threads(),
        _address(scores_ME),
    )
    if failed:
        raise RuntimeError(f"no memory left to score {pairs.num_mentions} x {pairs.num_entities} pairs")
    return scores_ME


def _address(tensor: Tensor) -> int:
    return tensor.data_ptr()


@cache
def _library() -> ctypes.CDLL | str:
    """The loaded library, or why there is none."""
    compiler = _compiler()
    try:
        library = ctypes.CDLL(str(_built(compiler)))
    except FileNotFoundError:
        return f"no C++ compiler named {compiler[0]} (set CXX to one)"
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if line.strip()] or ["it said nothing"]
        return f"{compiler[0]} failed: {next((line for line in lines if 'error' in line), lines[-1])}"
    except subprocess.TimeoutExpired:
        return f"{compiler[0]} took more than {_SECONDS} seconds"
    except (OSError, UserError) as error:  # a cache folder that cannot be written, is not ours, no home folder
        return str(error)
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.dsmip_text_unit.argtypes = (
        *(pointer,) * 5,  # keys, values, their starts, lengths
        number,
        *(pointer,) * 4,  # queries, starts, lengths, directions
        number,
        number,
        ctypes.c_float,
        pointer,  # wanted
        ctypes.c_int,
        pointer,  # scores
    )
    library.dsmip_text_unit.restype = ctypes.c_int
    return library


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
    macros = _run([*compiler, *_FLAGS, "-dM", "-E", "-x", "c++", os.devnull])
    key = hashlib.sha256(repr((_SOURCE.read_bytes(), _FLAGS, macros)).encode()).hexdigest()[:16]
    folder = private_folder(user_cache_folder(), "set XDG_CACHE_HOME to another folder")
    target = folder / f"text_unit-{key}.so"
    digest = target.with_suffix(".sha256")
    if not _is_whole(target, digest):
        with tempfile.TemporaryDirectory(dir=folder) as name:
            unfinished, its_digest = Path(name) / target.name, Path(name) / digest.name
            _run([*compiler, *_FLAGS, str(_SOURCE), "-o", str(unfinished)])
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
    return subprocess.run(
        command, check=True, capture_output=True, text=True, errors="replace", timeout=_SECONDS
    ).stdout
