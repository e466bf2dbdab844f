"""Copies between tensors and a bucket, on the host and on a device: see the rows and the kinds in `kernels.table`."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..arrays.layout import NDArray
from ..kernels import cpu_copies
from ..kernels.table import COPY_COLUMNS, TENSOR, Copying
from .library import Streams


class HostCopies:
    """The copies for these rows, with elements of `itemsize` bytes; call it with a column of addresses.

    A tensor that is absent, a 0 in the column, is packed as zeros and not unpacked.
    """

    def __init__(self, rows: NDArray, itemsize: int, kind: Copying) -> None:
        self._copy = cpu_copies.make_copies(rows, itemsize, kind)

    def __call__(self, column: NDArray) -> None:
        """Make the copies for the tensors at these addresses."""
        self._copy(column)


class DeviceCopies:
    """The same on a CUDA device, in one kernel launch on its current stream. An unchanged column is sent only once.

    The copies are not part of a CUDA graph: the caller ensures that none is being captured.
    """

    def __init__(self, rows: NDArray, itemsize: int, kind: Copying, device: int, order: Streams) -> None:
        from ..kernels import cuda_copies

        rows = np.asarray(rows, np.int64).reshape(-1, COPY_COLUMNS)
        chunks = cuda_copies.chunks(rows, itemsize)
        self._device, self._order, self._n_chunks = device, order, len(chunks)
        self._tensors = int(rows[:, TENSOR].max(initial=-1)) + 1
        self._title = f"copies_kernel[{kind}] over {len(rows)} arrays"
        self._sent, self._stream = b"", None
        with order.allocating(device) as stream:
            self._kernel = cuda_copies.kernel(itemsize, kind)
            self._chunks = order.uploaded(chunks, stream)
            self._column = order.library.empty(8 * self._tensors)
        self._make_launch = cuda_copies.launch

    def __call__(self, column: NDArray) -> None:
        """Enqueue the copies for the tensors at these addresses; the column may change afterwards."""
        if not self._n_chunks:
            return
        column = column[: self._tensors]
        content = column.tobytes()
        with self._order.on(self._device) as stream:
            if content != self._sent:
                self._sent = b""  # until the new one is sent
                self._order.library.upload(self._column, column, stream)
                self._sent = content
            if stream != self._stream:
                self._take(stream)
            self._launch()

    def _take(self, stream: Any) -> None:
        """Use this stream for launches from now on."""
        for block in (self._chunks, self._column):
            self._order.library.use(block, self._device)
        addresses = self._chunks.address, self._column.address
        self._launch = self._make_launch(self._kernel, stream, *addresses, self._n_chunks, self._title)
        self._stream = stream
