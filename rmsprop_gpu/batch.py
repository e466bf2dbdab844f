"""What plan, host and device share: a batch, what a step writes, how buffers are allocated."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import table
from .arrays import Tensor
from .dtypes import compute_dtype
from .layout import Array, Layout, NDArray, address_of, interval_of
from .rule import Scalars, Variant

LINE = 64  # bytes: large buffers start on a cache line of their own


def allocated(layouts: Sequence[Layout], zeros: Callable[[int], Array]) -> list[Array]:
    """Zeroed arrays of these layouts, views of one aligned allocation: that of ``zeros(bytes)``."""
    offsets, end = [], 0
    for layout in layouts:
        unit = LINE if layout.nbytes >= LINE else 16
        offsets.append(-(-end // unit) * unit)
        end = offsets[-1] + layout.nbytes
    memory = zeros(end + LINE)
    first = -address_of(memory) % LINE
    return [layout.over(memory, first + offset) for layout, offset in zip(layouts, offsets, strict=True)]


def kernel_name(kernel: str, dtype: np.dtype[Any], variant: Variant) -> str:
    """How a kernel is called where people read of it."""
    return f"{kernel}[{dtype}, {variant}]"


@dataclass(eq=False)
class Batch:
    """What one launch updates: the tensors that share device, dtype and Variant."""

    variant: Variant
    dtype: np.dtype[Any]  # of parameters and gradients
    device: int | None
    labels: list[str]
    sizes: list[int]
    groups: list[int]  # of its rows of scalars
    table: NDArray
    scalars: NDArray
    factors: NDArray
    grads: NDArray = field(default_factory=lambda: np.empty(0, np.int64))  # the gradient column, on the host

    def title(self, kernel: str) -> str:
        """How a kernel over this batch is called where people read of it."""
        return kernel_name(kernel, self.dtype, self.variant)


def make_batch(
    variant: Variant,
    dtype: np.dtype[Any],
    device: int | None,
    members: Sequence[tuple[Tensor, int, Mapping[str, Array]]],
) -> Batch:
    """The batch of these tensors, each with its group and its state."""
    groups = list(dict.fromkeys(group for _, group, _ in members))
    rows = np.zeros((len(members), table.COLUMNS), np.int64)
    columns = {**table.BUFFERS, **table.COUNTERS}
    for row, (tensor, group, buffers) in zip(rows, members, strict=True):
        row[table.PARAM], row[table.SIZE] = tensor.address, tensor.layout.size
        row[table.SCALARS_ROW] = groups.index(group)
        for name, buffer in buffers.items():
            row[columns[name]] = address_of(buffer)
    compute = compute_dtype(dtype)
    scalars = np.zeros((len(groups), len(Scalars._fields)), compute)
    tensors = [tensor for tensor, _, _ in members]
    labels, sizes = [t.label for t in tensors], [t.layout.size for t in tensors]
    return Batch(variant, dtype, device, labels, sizes, groups, rows, scalars, np.ones(len(members), compute))


class Written:
    """Everything a step writes, by its place in memory: disjoint intervals, as was checked when they were made."""

    def __init__(self, tensors: Sequence[Tensor], buffers: Sequence[Mapping[str, Array]]) -> None:
        intervals = sorted(_intervals(tensors, buffers), key=lambda interval: interval[0])
        self._named = [(label, array) for _, _, label, array in intervals]
        self._starts, self._ends = [i[0] for i in intervals], [i[1] for i in intervals]
        self.lowest, self.highest = np.array(self._starts, np.int64), np.array(self._ends, np.int64)
        self._lowest_or_none = np.append(self.lowest, np.iinfo(np.int64).max)

    def near(self, array: Array) -> Iterator[tuple[str, Array]]:
        """(label, array) of what a step writes within the bounds of this array in memory."""
        if array.size == 0:
            return
        low, end = interval_of(array)
        for k in range(bisect_right(self._ends, low), len(self._ends)):
            if self._starts[k] >= end:
                return
            yield self._named[k]

    def hit(self, starts: NDArray, sizes: NDArray) -> NDArray:
        """The indices of the intervals, by their first addresses and sizes in bytes, that hold a byte of these."""
        lowest = self._lowest_or_none[np.searchsorted(self.highest, starts, side="right")]
        return ((lowest < starts + sizes) & (sizes > 0)).nonzero()[0]


def _intervals(
    tensors: Sequence[Tensor], buffers: Sequence[Mapping[str, Array]]
) -> Iterator[tuple[int, int, str, Array]]:
    """(lowest address, end, label, array)."""
    for tensor, state in zip(tensors, buffers, strict=True):
        written = [(tensor.label, tensor.view, tensor.address, tensor.layout.nbytes)]
        written += [(tensor.state_label + name, x, address_of(x), x.nbytes) for name, x in state.items()]
        for label, array, start, nbytes in written:
            if nbytes:
                yield start, start + nbytes, label, array
