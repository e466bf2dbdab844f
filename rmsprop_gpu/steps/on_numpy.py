"""NumPy as the library that owns the memory: of whole buffers, and who writes to it first."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..arrays.layout import Layout, NDArray, address_of
from ..kernels import cpu_touch
from .batch import allocated


def allocate(layouts: Sequence[Layout]) -> list[NDArray]:
    """Zeroed NumPy arrays of these layouts, views of one aligned allocation."""
    return allocated(layouts, lambda nbytes: np.zeros(nbytes, np.uint8))


def touch(sizes: Sequence[int], buffers: Sequence[NDArray | None]) -> None:
    """Have buffers that are zero, or about to be filled, first written to by the threads that will update them.

    Of each tensor, in the order of a step, its elements and its buffer, or None.
    """
    cpu_touch.touch(sizes, [(0, 0) if x is None or not x.size else (address_of(x), x.itemsize) for x in buffers])
