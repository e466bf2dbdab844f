"""The memory of buckets, in the place of the parameters, and what copies there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..arrays.layout import Array, Layout, NDArray
from ..kernels.table import Copying
from ..steps.copies import DeviceCopies, HostCopies
from ..steps.on_numpy import allocate


class HostMemory:
    """NumPy's."""

    def arrays(self, layouts: Sequence[Layout]) -> list[NDArray]:
        """Zeroed arrays from one allocation, each on its own cache line."""
        return allocate(layouts)

    def copies(self, rows: Sequence[tuple[int, int, int, int]], itemsize: int, kind: Copying) -> HostCopies:
        """The copies for these rows."""
        return HostCopies(np.array(rows, np.int64).reshape(-1, 4), itemsize, kind)


class DeviceMemory:
    """CuPy's memory, on the device of the parameters."""

    def __init__(self, device: int, order: Any) -> None:
        self._device, self._order = device, order

    def arrays(self, layouts: Sequence[Layout]) -> list[Array]:
        """Zeroed arrays from one allocation, each on its own cache line."""
        from ..steps.on_cupy import allocate as allocate_on_device  # it imports CuPy

        return allocate_on_device(layouts, self._device, self._order)

    def copies(self, rows: Sequence[tuple[int, int, int, int]], itemsize: int, kind: Copying) -> DeviceCopies:
        """The copies for these rows, one kernel launch per set."""
        return DeviceCopies(np.array(rows, np.int64).reshape(-1, 4), itemsize, kind, self._device, self._order)
