"""Write first to each page from the thread that will use it: with several NUMA nodes the page lands on its node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .compiling import why_not
from .cpu_code import address
from .cpu_drive import driven, items_of, parts_of
from .cpu_prepare import kernel
from .intrinsics import HOST, memory

PAGE = 4096  # bytes; larger pages are written to more than once
SPAN = 2  # int64 per tensor: its address and the bytes per element

_load, _ = memory(np.int64, HOST)
_, _store_byte = memory(np.int8, HOST)


def _make_touch_kernel() -> Any:
    """The kernel that writes a zero to each page of elements start to stop; an address of 0 means no buffer."""
    zero = np.int8(0)

    @kernel
    def touch_kernel(spans, index, start, stop):  # type: ignore[no-untyped-def]
        first, size = _load(spans, SPAN * index), _load(spans, SPAN * index + 1)
        if first == 0:
            return
        byte, end = first + start * size, first + stop * size
        while byte < end:
            _store_byte(byte, 0, zero)
            byte = byte - byte % PAGE + PAGE

    return touch_kernel


def touch(sizes: Sequence[int], spans: Sequence[tuple[int, int]]) -> None:
    """Write to each page of these buffers from the thread that will update it; they hold zeros or will be filled.

    For each tensor, in the order of a step: its number of elements; the address of its buffer, or 0; and the bytes per
    element of that buffer.
    """
    if parts_of(sum(sizes)) == 1 or why_not():
        return
    block = np.array(spans, np.int64)
    work = items_of(address(_make_touch_kernel), block.ctypes.data, sizes)
    driven([], [work], np.zeros(1, np.int64))()
