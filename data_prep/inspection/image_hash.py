"""Hashes of images: a 64-bit difference hash, a coarse grid of colours, and all pairs that are close.

Two images are near duplicates when their hashes differ in at most MAX_BITS of 64 and no cell of their 4 x 4 colour
grids differs by more than MAX_COLOUR of 255: the hash alone takes the red heart for the blue one. A bit of the hash
tells whether the image brightens by more than MARGIN from one cell to the next, so that flat areas give zeros, not
the noise of the JPEG. Plain images (one colour, give or take) show nothing and are near duplicates of nothing.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dsmip.data.images import MAX_PIXELS

MAX_BITS = 4
MAX_COLOUR = 16
MARGIN = 8.0
PLAIN_DEVIATION = 4.0
GRID = 4
_SIDE = 32
_DRAFT_SIDE = 64
_COLUMNS = np.linspace(0, _SIDE, 10).astype(np.int64)
# Cut into 7 bands, hashes that differ in at most 4 bits agree in at least 3 bands. Three agreeing bands (27 bits) leave
# far fewer candidates than one band of five (13 bits), for 35 sorts instead of 5.
_NUM_BANDS = 7
_NUM_EQUAL_BANDS = _NUM_BANDS - MAX_BITS
# A band is every seventh bit: neighbouring bits are alike, so bands of them would fill a few large buckets.
_BANDS = tuple(np.uint64(sum(1 << bit for bit in range(band, 64, _NUM_BANDS))) for band in range(_NUM_BANDS))
_PAIRS_AT_ONCE = 1 << 18
_ONES = np.unpackbits(np.arange(1 << 16, dtype=np.uint16).view(np.uint8)).reshape(-1, 16).sum(1).astype(np.uint8)


@dataclass(frozen=True, slots=True)
class Signature:
    """What is kept of an image.

    Attributes:
        bits: The difference hash.
        colours: GRID x GRID x 3 bytes.
        plain: Whether its pixels hardly differ.
    """

    bits: int
    colours: bytes
    plain: bool


def read_signature(content: bytes) -> Signature | None:
    """The signature of an encoded image; None when it cannot be decoded."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            if image.width * image.height > MAX_PIXELS:
                return None
            image.draft("RGB", (_DRAFT_SIDE, _DRAFT_SIDE))  # a JPEG is decoded at an eighth where that is enough
            small = image.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.BOX)
    except Exception:  # decoders raise whatever broken bytes lead them to
        return None
    pixels_HWC = np.asarray(small, np.float64)
    grey_rows = pixels_HWC.mean(2).reshape(8, _SIDE // 8, _SIDE).mean(1)
    cells = np.add.reduceat(grey_rows, _COLUMNS[:-1], axis=1) / np.diff(_COLUMNS)
    bits = np.packbits(cells[:, 1:] > cells[:, :-1] + MARGIN)
    step = _SIDE // GRID
    colours = pixels_HWC.reshape(GRID, step, GRID, step, 3).mean((1, 3)).round().astype(np.uint8)
    plain = bool(pixels_HWC.std((0, 1)).max() < PLAIN_DEVIATION)
    return Signature(int.from_bytes(bits.tobytes(), "big"), colours.tobytes(), plain)


def near_pairs(bits_N: NDArray[np.uint64], colours_NC: NDArray[np.uint8]) -> NDArray[np.int32]:
    """All pairs i < j of near duplicates.

    Exact: no candidate is left out, see _NUM_BANDS. Memory: that of the pairs themselves; images that are all alike
    make a pair with each other, so time and memory grow with the square of the largest such group.

    Args:
        bits_N: Difference hashes, uint64 [N].
        colours_NC: Grids of colours, uint8 [N, 48].

    Returns:
        The pairs, int32 [P, 2], sorted.
    """
    found = [np.empty((0, 2), np.int32)]
    for bands in combinations(range(_NUM_BANDS), _NUM_EQUAL_BANDS):
        mask = np.uint64(sum(int(_BANDS[band]) for band in bands))
        order = np.argsort(bits_N & mask, kind="stable").astype(np.int32)
        keys, bits, colours = bits_N[order] & mask, bits_N[order], colours_NC[order]
        for left, right in _pairs_of_equals(keys):
            apart = bits[left] ^ bits[right]
            near = np.flatnonzero((_num_ones(apart) <= MAX_BITS) & _found_first(apart, bands))
            near = near[_alike(colours[left[near]], colours[right[near]])]
            found.append(np.stack([order[left[near]], order[right[near]]], 1))
    pairs = np.sort(np.concatenate(found), axis=1)
    return pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]


def _found_first(apart_N: NDArray[np.uint64], bands: tuple[int, ...]) -> NDArray[np.bool_]:
    """Whether no choice of bands that came earlier has found the pair: its first equal bands are these."""
    others = [band for band in range(bands[-1]) if band not in bands]
    first_N = np.ones(len(apart_N), np.bool_)
    for band in others:
        first_N &= (apart_N & _BANDS[band]) != 0
    return first_N


def are_near(
    bits_N: NDArray[np.uint64],
    colours_NC: NDArray[np.uint8],
    other_bits_N: NDArray[np.uint64],
    other_colours_NC: NDArray[np.uint8],
) -> NDArray[np.bool_]:
    """Whether image n of the one and of the other are near duplicates, bool [N]."""
    return (_num_ones(bits_N ^ other_bits_N) <= MAX_BITS) & _alike(colours_NC, other_colours_NC)


def _num_ones(bits_N: NDArray[np.uint64]) -> NDArray[np.uint32]:
    # four counts of 16 bits each, summed up in the top byte of a product
    counts_N = _ONES[bits_N.view(np.uint16)].view(np.uint32)
    return np.asarray((counts_N * np.uint32(0x01010101)) >> np.uint32(24))


def _alike(colours_NC: NDArray[np.uint8], other_colours_NC: NDArray[np.uint8]) -> NDArray[np.bool_]:
    apart_NC = np.maximum(colours_NC, other_colours_NC) - np.minimum(colours_NC, other_colours_NC)
    return np.asarray(apart_NC.max(1, initial=0) <= MAX_COLOUR)


def _pairs_of_equals(keys_N: NDArray[np.uint64]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """All pairs of positions with equal keys, some at a time; the keys are sorted."""
    # a position pairs with those behind it, up to its bucket's end
    partners = np.searchsorted(keys_N, keys_N, side="right") - np.arange(len(keys_N)) - 1
    totals = np.concatenate([[0], np.cumsum(partners)])
    start = 0
    while start < len(keys_N):
        # at least one position, and as many more as keep to the limit
        stop = max(start + 1, int(np.searchsorted(totals, totals[start] + _PAIRS_AT_ONCE, side="right")) - 1)
        first = np.repeat(np.arange(start, stop), partners[start:stop])
        yield first, first + 1 + np.arange(len(first)) - (totals[first] - totals[start])
        start = stop
