"""What each batch keeps on a device: table, chunks, numbers and gradient columns."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..arrays.layout import NDArray
from ..kernels import cuda
from .batch import Batch, Norms
from .library import Block, Streams


class ResidentNorms:
    """A device's data on the norms of its tensors' gradients."""

    block: Block
    blocks: list[Block]

    def settle(self, norms: Norms, device: int, order: Streams) -> None:
        """Send the data, once the places of all scalars are known."""
        with order.allocating(device) as stream:
            partials, sums = map(order.library.zeros, norms.bytes_of_sums)
            segments = order.uploaded(norms.segments, stream)
            norms.settle(partials, segments, sums)
            self.block = order.uploaded(norms.block, stream)
            self.blocks = [partials, segments, sums, self.block]


class _Column:
    """A gradient column on the device, and its contents."""

    def __init__(self, rows: int, order: Streams) -> None:
        self.buffer = order.library.empty(8 * rows)
        self.content = b""


class Resident:
    """A batch on its device: the table, the chunks, the scalars, the factors, the gradient columns.

    After the addresses of the gradients, a column holds the other arguments of the step.
    """

    def __init__(self, batch: Batch, device: int, norms: ResidentNorms | None, counts: bool, order: Streams) -> None:
        self.batch, self.device, self._norms, self._counts = batch, device, norms, counts
        self._sent = batch.scalars.tobytes()
        with order.allocating(device) as stream:
            self.kernels = cuda.kernels(batch.variant, batch.dtype, batch.grad_dtype)
            chunks = cuda.chunks(batch.sizes, batch.dtype)
            nothing = np.empty((0, 3), np.int64)
            prepared, measures = batch.variant.prepared, batch.variant.measures
            sums = cuda.sum_blocks(batch.sizes) if measures else nothing
            factors, numbers = (batch.factors, batch.numbers) if prepared else (nothing, nothing)
            firsts = batch.firsts if measures else nothing
            sources = (batch.table, chunks, batch.scalars, factors, sums, numbers, firsts)
            self.table, self.chunks, self.scalars, self.factors, self.sums, self.numbers, self.firsts = (
                order.uploaded(a, stream) for a in sources
            )
            self._counts_of = len(chunks), len(sums)
            self.column = _Column(len(batch.sizes) + batch.variant.told * len(batch.told), order)
        self._own: _Column | None = self.column  # the column that no graph has captured
        self._captured: list[_Column] = []

    def send(self, order: Streams) -> None:
        """Send the scalars if they differ from those last sent."""
        wanted = self.batch.scalars.tobytes()
        if wanted != self._sent:
            with order.on(self.device) as stream:
                order.library.upload(self.scalars, self.batch.scalars, stream)
            self._sent = wanted

    def known(self, column: NDArray) -> _Column | None:
        """A column with these addresses that is already on the device."""
        content = column.tobytes()
        return next((c for c in (self._own, *self._captured) if c and c.content == content), None)

    def known_grads(self, addresses: NDArray) -> bool:
        """Is a column with these gradients on the device, whatever else it holds?"""
        content = addresses.tobytes()
        return any(c.content.startswith(content) for c in (self._own, *self._captured) if c)

    def take(self, column: NDArray, stream: Any, order: Streams) -> bool:
        """Have the next launch read this column; return whether its buffer changed. Captured ones are never written."""
        found, before = self.known(column), self.column
        if found is None:
            if self._own is None:
                with order.allocating(self.device):
                    self._own = _Column(len(column), order)
            found = self._own
            found.content = b""  # until the new one is sent
            order.library.upload(found.buffer, column, stream)
            found.content = column.tobytes()
        self.column = found
        return found is not before

    def capture(self) -> None:
        """Keep the current column unchanged from now on."""
        if self.column is self._own:
            self._captured.append(self.column)
            self._own = None

    @property
    def _own_blocks(self) -> list[Block]:
        tables = [self.table, self.column.buffer, self.chunks, self.scalars, self.factors]
        return [*tables, self.sums, self.numbers, self.firsts]

    @property
    def blocks(self) -> list[Block]:
        """The memory here that the launches read and write."""
        return self._own_blocks + (self._norms.blocks if self._norms else [])

    def launches(self, stream: Any) -> dict[str, cuda.Launch]:
        """The calls that launch a step, by kernel name."""
        norms = self._norms.block.address if self._norms else 0
        at = cuda.Addresses(*[*(block.address for block in self._own_blocks), norms])
        return cuda.launches(self.kernels, stream, self.batch, at, *self._counts_of, self._counts)
