"""Which launches a step needs: batches, their tables and scalars, the memory of the state, the gradients of a step."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from . import headers, table
from .arrays import (
    Layout,
    NDArray,
    Problems,
    Tensor,
    address_of,
    check_grad,
    check_grad_apart,
    check_unchanged,
)
from .backends import cpu
from .rule import Scalars, Variant

LINE = 64  # bytes: large buffers start on a cache line of their own

# What a step of one group asks for, by the dtype of its tensors.
Settings: TypeAlias = Mapping[tuple[int, np.dtype[Any]], tuple[Variant, NDArray]]


def allocate(layouts: Sequence[Layout]) -> list[NDArray]:
    """Zeroed arrays of these layouts, views of one aligned allocation."""
    offsets, end = [], 0
    for layout in layouts:
        unit = LINE if layout.nbytes >= LINE else 16
        offsets.append(-(-end // unit) * unit)
        end = offsets[-1] + layout.nbytes
    memory = np.zeros(end + LINE, np.uint8)
    first = -address_of(memory) % LINE
    return [layout.over(memory, first + offset) for layout, offset in zip(layouts, offsets, strict=True)]


@dataclass(eq=False)
class Batch:
    """What one launch updates: the tensors that share dtype and Variant."""

    variant: Variant
    dtype: np.dtype[Any]
    sizes: list[int]
    groups: list[int]  # of its rows of scalars
    table: NDArray
    scalars: NDArray
    factors: NDArray
    block: NDArray


class Plan:
    """Everything a step needs that does not change from step to step, and the gradient column, which may.

    `bind` checks all of a step's arrays and raises before anything is written; `launch` cannot fail.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        groups: Sequence[int],
        buffers: Sequence[Mapping[str, NDArray]],
        settings: Settings,
        steps: NDArray,
    ) -> None:
        by_batch: dict[tuple[np.dtype[Any], Variant], list[int]] = {}
        for i, (tensor, group) in enumerate(zip(tensors, groups, strict=True)):
            dtype = tensor.layout.dtype
            by_batch.setdefault((dtype, settings[group, dtype][0]), []).append(i)
        self._order = [i for rows in by_batch.values() for i in rows]
        self._in_order = self._order == list(range(len(tensors)))
        self._tensors = [tensors[i] for i in self._order]
        self._column = np.full(len(tensors), -1, np.int64)
        self._dense: dict[int, NDArray] = {}

        self.batches, start = [], 0
        for (dtype, variant), rows in by_batch.items():
            column = self._column[start:]
            start += len(rows)
            members = [(tensors[i], groups[i], buffers[i]) for i in rows]
            self.batches.append(_make_batch(variant, dtype, members, column))
        self._written = sorted(_written(tensors, buffers), key=lambda interval: interval[0])
        self._highest = [interval[1] for interval in self._written]
        self._make_block()
        self._launch = cpu.make_launch(self.batches, steps)

    def _make_block(self) -> None:
        """The block of addresses that the compiled check of all headers reads."""
        records = [headers.record(tensor) for tensor in self._tensors]
        offsets = np.cumsum([0, *map(len, records)], dtype=np.int64)
        ids = np.array([id(t.array) for t in self._tensors], np.int64)
        flat = np.array([word for record in records for word in record], np.int64)
        lowest = np.array([interval[0] for interval in self._written], np.int64)
        highest = np.array(self._highest, np.int64)
        self._grad_ids = np.zeros(len(ids), np.int64)
        self._verdicts = np.full(len(ids), headers.PARAM_CHANGED | headers.GRAD_ODD, np.int64)
        owners = (ids, flat, offsets, self._column, lowest, highest)
        addresses = [a.ctypes.data for a in owners]
        counts = [len(lowest), self._verdicts.ctypes.data, len(ids)]
        self._block = np.array(addresses + counts, np.int64)
        self._owners = owners  # addresses do not own
        self._check = headers.checker()
        self._check_arguments = (self._block.ctypes.data, self._grad_ids.ctypes.data)

    def write_scalars(self, settings: Settings) -> None:
        """The numbers of the next steps."""
        for batch in self.batches:
            for row, group in enumerate(batch.groups):
                batch.scalars[row] = settings[group, batch.dtype][1]

    def bind(self, grads: list[Any]) -> None:
        """Take the gradients of the next step, in the order of the tensors; every refusal comes from here."""
        if not self._in_order:
            grads = [grads[i] for i in self._order]
        self._grad_ids[:] = np.fromiter(map(id, grads), np.int64, len(grads))
        try:
            if not headers.TRUSTED or self._check(*self._check_arguments):
                self._examine(grads)
        except BaseException:
            self._column.fill(-1)  # no address in it counts as checked
            raise

    def _examine(self, grads: list[Any]) -> None:
        """Look at the odd ones in Python: refuse them, or take them the slow way."""
        problems, copies = Problems(), []
        for i in self._verdicts.nonzero()[0].tolist():
            tensor, grad, verdict = self._tensors[i], grads[i], self._verdicts[i]
            if verdict & headers.PARAM_CHANGED:
                check_unchanged(tensor, problems)
            if grad is None:
                self._column[i] = 0
            elif verdict & (headers.GRAD_ODD | headers.GRAD_OVERLAPS):
                array = check_grad(grad, tensor, problems)
                if array is None:
                    continue
                check_grad_apart(array, tensor.grad_label, self._near(array), problems)
                if isinstance(grad, np.ndarray) and tensor.layout.matches(array) and array.flags.aligned:
                    self._column[i] = address_of(array)
                else:
                    copies.append((i, array))
        problems.raise_any()
        for i, array in copies:
            if i not in self._dense:
                (self._dense[i],) = allocate([self._tensors[i].layout])
            np.copyto(self._dense[i], array)
            self._column[i] = address_of(self._dense[i])

    def _near(self, array: NDArray) -> Iterator[tuple[str, NDArray]]:
        """What a step writes within the bounds of this array in memory."""
        low, high = np.lib.array_utils.byte_bounds(array)
        for lowest, _, label, other in self._written[bisect_right(self._highest, low) :]:
            if lowest >= high:
                return
            yield label, other

    def launch(self) -> None:
        """Run the step that was bound."""
        self._launch()


def _make_batch(
    variant: Variant,
    dtype: np.dtype[Any],
    members: Sequence[tuple[Tensor, int, Mapping[str, NDArray]]],
    column: NDArray,
) -> Batch:
    groups = list(dict.fromkeys(group for _, group, _ in members))
    rows = np.zeros((len(members), table.COLUMNS), np.int64)
    places = {**table.BUFFERS, **table.COUNTERS}
    for row, (tensor, group, buffers) in zip(rows, members, strict=True):
        row[table.PARAM], row[table.SIZE] = tensor.address, tensor.layout.size
        row[table.SCALARS_ROW] = groups.index(group)
        for name, buffer in buffers.items():
            row[places[name]] = address_of(buffer)
    scalars = np.zeros((len(groups), len(Scalars._fields)), dtype)
    factors = np.ones(len(members), dtype)
    block = np.array([a.ctypes.data for a in (rows, column, scalars, factors)], np.int64)
    sizes = [tensor.layout.size for tensor, _, _ in members]
    return Batch(variant, dtype, sizes, groups, rows, scalars, factors, block)


def _written(
    tensors: Sequence[Tensor], buffers: Sequence[Mapping[str, NDArray]]
) -> Iterator[tuple[int, int, str, NDArray]]:
    """(lowest address, end, label, array) of everything a step writes; disjoint, as was checked when it was made."""
    for tensor, state in zip(tensors, buffers, strict=True):
        written = [(tensor.label, np.asarray(tensor.array), tensor.address, tensor.layout.nbytes)]
        written += [(tensor.state_label + name, x, address_of(x), x.nbytes) for name, x in state.items()]
        for label, array, start, nbytes in written:
            if nbytes:
                yield start, start + nbytes, label, array
