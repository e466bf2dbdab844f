"""CuPy as the library that owns the memory on devices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cupy
import numpy as np
from cupy.cuda import Device, get_current_stream, runtime

from ..arrays.layout import Array, Layout, NDArray
from .batch import allocated
from .library import Block, Streams
from .uploads import upload

_LEGACY = 0  # the pointer of CUDA's default stream
_UNREGISTERED = 0  # cudaMemoryTypeUnregistered: memory unknown to CUDA


def is_capturing(stream: Any) -> bool:
    """Is a CUDA graph being captured on this stream? The legacy default stream cannot be, and asking is an error."""
    return bool(stream.ptr != _LEGACY and stream.is_capturing())


class CuPy:
    """See `Library`."""

    errors: tuple[type[Exception], ...] = (runtime.CUDARuntimeError,)
    warm_up = "take the same step once before the capture, on the stream that is captured"
    device = staticmethod(Device)
    set_device = staticmethod(runtime.setDevice)
    get_device = staticmethod(runtime.getDevice)
    restore_device = staticmethod(runtime.setDevice)
    current_stream = staticmethod(get_current_stream)

    def is_capturing(self, device: int) -> bool:
        return is_capturing(get_current_stream(device))

    def empty(self, nbytes: int) -> Block:
        made = cupy.empty(nbytes, np.uint8)
        return Block(made.data.ptr, made)

    def zeros(self, nbytes: int) -> Block:
        made = cupy.zeros(nbytes, np.uint8)
        return Block(made.data.ptr, made)

    def upload(self, target: Block, source: NDArray, stream: Any) -> None:
        upload(target.owner, source, stream)

    def use(self, block: Block, device: int) -> None:
        """Do nothing: `Order.release` handles it."""

    def fails(self, device: int) -> bool:
        try:
            with Device(device):
                runtime.memGetInfo()
        except runtime.CUDARuntimeError:
            return True
        return False

    def knows(self, block: Block) -> bool:
        try:
            return bool(runtime.pointerGetAttributes(block.address).type != _UNREGISTERED)
        except runtime.CUDARuntimeError:
            return False


CUPY = CuPy()


def allocate(layouts: Sequence[Layout], device: int, order: Streams) -> list[Array]:
    """Zeroed CuPy arrays with these layouts, as views of one aligned allocation."""
    with order.allocating(device):
        return allocated(layouts, lambda nbytes: cupy.zeros(nbytes, np.uint8))
