"""Steps over arrays in host memory: the memory of their state, the check of a step's gradients, the launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from operator import methodcaller
from typing import Any

import numpy as np

from ..arrays.checks import (
    Problems,
    Tensor,
    check_grad,
    check_grads_disjoint,
    check_read_apart,
    check_unchanged,
    check_unmoved,
)
from ..arrays.layout import Layout, NDArray, address_of, is_aligned
from ..kernels import cpu, cpu_touch
from . import headers
from .batch import Batch, OtherDtypes, Written, allocated
from .library import Block
from .signals import Signals


def allocate(layouts: Sequence[Layout]) -> list[NDArray]:
    """Zeroed NumPy arrays of these layouts, views of one aligned allocation."""
    return allocated(layouts, lambda nbytes: np.zeros(nbytes, np.uint8))


def touch(sizes: Sequence[int], buffers: Sequence[NDArray | None]) -> None:
    """Have buffers that are zero, or about to be filled, first written to by the threads that will update them.

    Of each tensor, in the order of a step, its elements and its buffer, or None.
    """
    cpu_touch.touch(sizes, [(0, 0) if x is None or not x.size else (address_of(x), x.itemsize) for x in buffers])


_call = methodcaller("__call__")


def _and_zero(run: Callable[[], None], grads: list[NDArray]) -> Callable[[], None]:
    """The step, and zeros into these gradients, of which the kernels saw a copy."""

    def run_and_zero() -> None:
        # Without a return to Python between: Ctrl-C cannot leave some of it undone.
        list(map(_call, [run, *[partial(grad.fill, 0) for grad in grads], grads.clear]))

    return run_and_zero


def share_column(column: NDArray, batches: Sequence[Batch]) -> None:
    """Let each batch read the addresses of its gradients in its part of this column, which is of all of them."""
    start = 0
    for batch in batches:
        batch.grads = column[start : start + len(batch.sizes)]
        start += len(batch.sizes)


def settle_norms(batches: Sequence[Batch]) -> None:
    """Make the memory in which the norms of these batches are summed."""
    for batch in batches:
        batch.norms.find(batch, address_of(batch.scalars))
    for norms in {id(batch.norms): batch.norms for batch in batches if batch.variant.prepared}.values():
        partials, sums = (np.zeros(nbytes, np.uint8) for nbytes in norms.bytes_of_sums)
        norms.settle(*(Block(address_of(x), x) for x in (partials, norms.segments, sums)))


class HostSteps:
    """The steps of a plan over NumPy arrays: `bind` checks all of a step's arrays, `launch` runs it and cannot fail."""

    captured = False  # by no CUDA graph

    def __init__(
        self,
        tensors: Sequence[Tensor],
        layouts: Sequence[Layout],
        batches: Sequence[Batch],
        written: Written,
        steps: NDArray,
    ) -> None:
        self._tensors, self._layouts, self._batches, self._written = tensors, layouts, batches, written
        self._column = np.full(len(tensors), -1, np.int64)
        self._dense: dict[int, NDArray] = {}
        share_column(self._column, batches)
        self._zeros = any(batch.variant.zero_grads for batch in batches)
        self._nbytes = np.array([layout.nbytes for layout in layouts], np.int64)
        self._odd: list[NDArray] = []  # gradients that were copied, and are to be zeroed
        settle_norms(batches)
        self._make_block()
        # Those of other libraries whose memory may become another (torch's): looked at in every step.
        self._movable = [t for t in tensors if t.array is not t.header and hasattr(t.array, "data_ptr")]
        self._views: list[NDArray] = []  # of gradients of other libraries, held until the step is done
        run = cpu.make_launch(batches, steps)
        self._run = _and_zero(run, self._odd) if self._zeros else run
        self.launch = self._run

    def _make_block(self) -> None:
        """The block of addresses that the compiled check of all headers reads."""
        records = [headers.record(t.layout, t.address - t.layout.low) for t in self._tensors]
        offsets = np.cumsum([0, *map(len, records)], dtype=np.int64)
        ids = np.array([id(t.header) for t in self._tensors], np.int64)
        flat, flat_grads = (
            np.array([word for record in some for word in record], np.int64)
            for some in (records, map(headers.record, self._layouts))
        )
        self._grad_ids = np.zeros(len(ids), np.int64)
        self._verdicts = np.full(len(ids), headers.PARAM_CHANGED | headers.GRAD_ODD, np.int64)
        owners = (ids, flat, flat_grads, offsets, self._column, self._written.lowest, self._written.highest)
        addresses = [a.ctypes.data for a in owners]
        flags = headers.ALIGNED | headers.WRITEABLE * self._zeros
        counts = [len(self._written.lowest), self._verdicts.ctypes.data, len(ids), flags, id(np.ndarray), id(None)]
        self._block = np.array(addresses + counts, np.int64)
        self._owners = owners  # addresses do not own
        self._check = headers.checker()
        self._check_arguments = (self._block.ctypes.data, self._grad_ids.ctypes.data)

    def bind(self, grads: list[Any], signals: Signals) -> None:
        """Take the gradients of the next step, in the order of the tensors; every refusal comes from here."""
        self._odd.clear()
        if self._views:
            self._views.clear()
            self.launch = self._run
        self._grad_ids[:] = np.fromiter(map(id, grads), np.int64, len(grads))
        try:
            odd = not headers.TRUSTED or self._check(*self._check_arguments)
            if odd or self._movable:
                self._examine(grads, self._verdicts.nonzero()[0].tolist() if odd else [])
            if self._zeros and (self._odd or self._touch()):
                problems = Problems()
                self._check_apart(grads, problems)
                problems.raise_any()
        except BaseException:
            self._column.fill(-1)  # no address in it counts as checked
            raise
        if signals.asked.told:
            for batch in self._batches:
                batch.told[:] = signals.words

    def _run_and_release(self) -> None:
        """The step; what its gradients were read by is held no longer."""
        self._run()
        self._views.clear()
        self.launch = self._run

    def _touch(self) -> bool:
        """Might gradients that lie as their parameters do share memory?"""
        at = np.flatnonzero((self._column != 0) & (self._nbytes > 0))
        at = at[np.argsort(self._column[at], kind="stable")]
        starts = self._column[at]
        return bool((starts[1:] < (starts + self._nbytes[at])[:-1]).any())

    def _check_apart(self, grads: list[Any], problems: Problems) -> None:
        """What is written to must not be another's gradient."""
        pairs = zip(self._tensors, grads, strict=True)
        check_grads_disjoint([(t.grad_label, g) for t, g in pairs if g is not None], problems)

    def _examine(self, grads: list[Any], odd: list[int]) -> None:
        """Look at the odd ones in Python: refuse them, or take them the slow way."""
        problems, copies, views, others = Problems(), [], [], {}
        for tensor in self._movable:
            check_unmoved(tensor, problems)
        for i in odd:
            tensor, layout, grad, verdict = self._tensors[i], self._layouts[i], grads[i], self._verdicts[i]
            if verdict & headers.PARAM_CHANGED:
                check_unchanged(tensor, problems)
            if grad is None:
                self._column[i] = 0
            elif verdict & (headers.GRAD_ODD | headers.GRAD_OVERLAPS):
                array = check_grad(grad, tensor, problems, written=self._zeros)
                if array is None:
                    continue
                check_read_apart(array, tensor.grad_label, self._written.near(array), problems)
                if array.dtype != layout.dtype:
                    others[tensor] = array.dtype
                elif not isinstance(grad, np.generic) and layout.matches(array) and is_aligned(array):
                    self._column[i] = address_of(array)
                    if not isinstance(grad, np.ndarray):
                        views.append(array)
                else:
                    copies.append((i, array))
        if problems and self._zeros:
            self._check_apart(grads, problems)
        problems.raise_any()
        if others:
            raise OtherDtypes(others)
        if views:
            self._views, self.launch = views, self._run_and_release
        for i, array in copies:
            if i not in self._dense:
                (self._dense[i],) = allocate([self._layouts[i]])
            np.copyto(self._dense[i], array)
            self._column[i] = address_of(self._dense[i])
            if self._zeros:
                self._odd.append(array)

    def alone(self, i: int) -> Callable[[], object]:
        """The launch of one batch by itself, as it is bound; no step is counted."""
        return cpu.make_launch([self._batches[i]], np.zeros(1, np.int64))

    def send(self) -> None:
        """The kernels read the scalars where the plan writes them."""
