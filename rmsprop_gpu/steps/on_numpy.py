"""NumPy as the library that owns the memory: allocating whole buffers, and who writes to them first."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..arrays.layout import Layout, NDArray, address_of
from ..kernels import cpu_touch
from .batch import allocated


def allocate(layouts: Sequence[Layout]) -> list[NDArray]:
    """Zeroed NumPy arrays with these layouts, as views of one aligned allocation."""
    return allocated(layouts, lambda nbytes: np.zeros(nbytes, np.uint8))


def touch(sizes: Sequence[int], buffers: Sequence[NDArray | None]) -> None:
    """Have each buffer, zero or about to be filled, first written to by the threads that will update it.

    For each tensor, in the order of a step: its number of elements, and its buffer or None.
    """
    cpu_touch.touch(sizes, [(0, 0) if x is None or not x.size else (address_of(x), x.itemsize) for x in buffers])
