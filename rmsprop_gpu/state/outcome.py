"""What steps leave behind besides the state: how many were skipped, and the norm of the last gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..arrays.layout import Array, Layout, address_of
from ..kernels.table import NORM, SKIPPED
from ..steps.on_numpy import allocate

if TYPE_CHECKING:
    from ..steps.order import Order

_LAYOUT = Layout((2,), (8,), np.dtype(np.int64), 0)


class Outcome:
    """Two words on each device, written there by the steps and read only on request."""

    def __init__(self, devices: Sequence[int], order: Order | None) -> None:
        self._order = order
        self._words: dict[int | None, Array] = {}
        if order is None:
            self._words[None] = allocate([_LAYOUT])[0]
            return
        from ..steps.on_cupy import allocate as allocate_on_device  # it imports CuPy

        for device in devices:
            self._words[device] = allocate_on_device([_LAYOUT], device, order)[0]

    @property
    def addresses(self) -> dict[int | None, int]:
        """Their addresses, by device."""
        return {device: address_of(words) for device, words in self._words.items()}

    def _read(self) -> Iterator[Any]:
        """The words of each device; the host waits for earlier steps."""
        for device, words in self._words.items():
            if device is None or self._order is None:
                yield words
            else:
                with self._order.on(device):
                    yield words.get()

    @property
    def skipped(self) -> int:
        return sum(int(words[SKIPPED]) for words in self._read())

    @property
    def norm(self) -> float:
        return math.hypot(*(float(words.view(np.float64)[NORM]) for words in self._read()))

    def snapshot(self) -> int | Array:
        """The count of skipped steps; with one device an array there, so that the host need not wait for it."""
        if self._order is None or len(self._words) > 1:
            return self.skipped
        ((device, words),) = self._words.items()
        assert device is not None
        with self._order.on(device):
            return words[SKIPPED].copy()

    def load(self, skipped: int) -> None:
        """Continue counting from this number."""
        for i, (device, words) in enumerate(self._words.items()):
            if device is None or self._order is None:
                words[SKIPPED] = skipped
            else:
                with self._order.on(device):
                    words[SKIPPED] = skipped * (i == 0)
