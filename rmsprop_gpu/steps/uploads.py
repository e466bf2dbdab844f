"""Small copies from the host to a device: nothing waits for them, and the source may change at once.

For a copy from pageable memory CUDA promises neither: it may wait for the stream, and on some systems the device reads
that memory later. So each copy is made from its own pinned memory, which is reused once the copy is done.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from contextlib import suppress
from typing import Any

import numpy as np
from cupy.cuda import Event, alloc_pinned_memory

from ..arrays.layout import Array, NDArray

SMALLEST = 1 << 12  # bytes per slot
LOOKS = 4  # slots that are tried before another is made


class _Slot:
    """Pinned memory, and the event after the last copy from it."""

    def __init__(self, size: int) -> None:
        self._memory: Any = alloc_pinned_memory(size)
        self.bytes = np.frombuffer(self._memory, np.uint8, size)
        self.address: int = self._memory.ptr
        self.event = Event(disable_timing=True)


# By device and size, in the order of their last use. They stay pinned as long as the process lives: an optimizer may be
# gone before its last copy is made.
_slots: dict[tuple[int, int], deque[_Slot]] = {}
_lock = threading.RLock()  # a signal handler, or a finalizer, may step another optimizer in the middle of a copy
if hasattr(os, "register_at_fork"):  # a child that steps should hear that CUDA is lost, not wait forever
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


def _free(slots: deque[_Slot]) -> _Slot | None:
    """One of the first few whose copy is done; a stream makes its copies in order, but one stream may be busy."""
    with suppress(IndexError):  # there is none, or a signal handler has taken it
        for _ in range(LOOKS):
            slot = slots.popleft()  # from here on no handler can take it
            if slot.event.done:
                return slot
            slots.append(slot)
    return None


def upload(target: Array, source: NDArray, stream: Any) -> None:
    """Enqueue a copy to an array on the current device; `source` may change afterwards."""
    nbytes = source.nbytes
    size = max(SMALLEST, 1 << (nbytes - 1).bit_length())
    with _lock:
        slots = _slots.setdefault((target.data.device_id, size), deque())
        slot = _free(slots) or _Slot(size)
        slot.bytes[:nbytes] = np.frombuffer(np.ascontiguousarray(source), np.uint8)
        target.data.copy_from_host_async(slot.address, nbytes, stream)
        slot.event.record(stream)
        slots.append(slot)
