"""Who owns what: tensors as one range of elements, cut into buckets, and each bucket into one slice per rank."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from ..kernels.norms import BLOCK


class Piece(NamedTuple):
    """Elements start to stop of a tensor, in C order, stored `at` elements after the start of their slice."""

    tensor: int
    start: int
    stop: int
    at: int


class Bucket(NamedTuple):
    """A part of the range that is in transit at one time: the pieces of each rank, and the elements per slice.

    All slices have the length of the longest.
    """

    pieces: list[list[Piece]]
    length: int


def cut(sizes: Sequence[int], ranks: int, buckets: int) -> list[Bucket]:
    """Cut tensors of these sizes, laid end to end in one range, into this many buckets.

    Each of the ``ranks * buckets`` nearly equal slices is moved back to begin at the start of a tensor, or at a
    multiple of a block of norms from it, so that each partial sum belongs to one rank.
    """
    ends = np.cumsum(sizes, dtype=np.int64)
    starts, total, count = ends - sizes, int(ends[-1]) if len(ends) else 0, ranks * buckets
    wanted = np.arange(1, count, dtype=np.int64) * total // count
    tensor = np.searchsorted(ends, wanted, side="right")
    inner = starts[tensor] + (wanted - starts[tensor]) // BLOCK * BLOCK if total else wanted
    cuts = [0, *inner.tolist(), total]
    made = []
    for first in range(0, count, ranks):
        borders = cuts[first : first + ranks + 1]
        pieces = [_pieces(starts, ends, low, high) for low, high in pairwise(borders)]
        made.append(Bucket(pieces, int(np.diff(borders).max())))
    return made


def _pieces(starts: np.ndarray, ends: np.ndarray, low: int, high: int) -> list[Piece]:
    """The pieces in these elements of the range."""
    found = []
    for i in range(int(np.searchsorted(ends, low, side="right")), len(ends)):
        first = int(starts[i])
        if first >= high:
            break
        begin, end = max(low, first), min(high, int(ends[i]))
        if begin < end:
            found.append(Piece(i, begin - first, end - first, begin - low))
    return found
