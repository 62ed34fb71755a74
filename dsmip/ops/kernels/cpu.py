"""The text unit's token-level score in C++ (text_unit.cpp); float32 or float64 on a CPU, no gradients.

The source is one C function in a shared library of its own, called with ctypes: building it takes a C++ compiler and
seconds, where an extension of torch takes ninja, torch's headers and a minute. It starts threads itself, so that no
second OpenMP runtime comes into the process. `dsmip.units.text_unit_library` builds the library.
"""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from dsmip.ops.kernels.rows import Pairs, TokenRows, checked

SOURCE = Path(__file__).with_name("text_unit.cpp")
# tuned for a certain processor, GCC reads the keys of a register tile from memory for every row: a third slower
FLAGS = ("-std=c++17", "-O3", "-march=native", "-mtune=generic", "-ffp-contract=fast", "-fPIC", "-shared", "-pthread")


def load(path: Path) -> ctypes.CDLL:
    """The library that a compiler made of SOURCE with FLAGS.

    Raises:
        OSError: It cannot be loaded.
        AttributeError: It is another library.
    """
    library = ctypes.CDLL(str(path))
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.dsmip_text_unit.argtypes = (
        ctypes.c_int,  # whether numbers are doubles
        *(pointer,) * 5,  # keys, values, their starts, lengths
        number,
        *(pointer,) * 4,  # queries, starts, lengths, directions
        number,
        number,
        ctypes.c_double,
        pointer,  # wanted
        ctypes.c_int,
        pointer,  # scores
    )
    library.dsmip_text_unit.restype = ctypes.c_int
    return library


def local_scores(
    library: ctypes.CDLL,
    key: TokenRows,
    value: TokenRows,
    query: TokenRows,
    direction_Ed: Tensor,
    eps: float,
    wanted_ME: Tensor | None = None,
    num_threads: int | None = None,
) -> Tensor:
    """`dsmip.ops.text_unit.local_scores` of M mentions, E entities: [M, E], 0 where not wanted (bool [M, E]).

    A pair's score depends on the pair alone, to the last bit: not on the other pairs, their order or the number of
    threads (default: torch's). NaN in, NaN out; an item without tokens scores NaN.

    Args:
        library: Of `load`.
        key: Rows of the mentions' tokens, as `value`; all numbers are float32, or all are float64.
        value: See `key`.
        query: Rows of the entities' tokens.
        direction_Ed: [E, d].
        eps: Of the LayerNorm.
        wanted_ME: Which pairs are wanted; None: all.
        num_threads: See above.

    Raises:
        RuntimeError: Memory does not suffice.
        ValueError: Another dtype, device or shape, or rows outside their tensor.
    """
    pairs = checked(Pairs(key, value, query, direction_Ed, wanted_ME), "cpu", (torch.float32, torch.float64))
    key, value, query, direction_Ed, wanted_ME = pairs
    scores_ME = torch.empty(pairs.num_mentions, pairs.num_entities, dtype=direction_Ed.dtype)
    mentions = (key.values_Rd, value.values_Rd, key.start_N, value.start_N, key.length_N)
    failed = library.dsmip_text_unit(
        direction_Ed.dtype == torch.float64,
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
