"""NumPy's gradients of a step: check their headers in one compiled call, and note where each is read from."""

from __future__ import annotations

from collections.abc import Sequence
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
from . import headers
from .batch import OtherDtypes, Written
from .on_numpy import allocate


class HostGradients:
    """The gradients of successive steps, in the order of the tensors."""

    def __init__(self, tensors: Sequence[Tensor], layouts: Sequence[Layout], written: Written, *, zeros: bool) -> None:
        self._tensors, self._layouts, self._written, self._zeros = tensors, layouts, written, zeros
        self.column = np.full(len(tensors), -1, np.int64)  # the addresses that kernels read
        self.odd: list[NDArray] = []  # those that were copied and have to be zeroed
        self.views: list[NDArray] = []  # on other libraries' gradients, held until the step is done
        self._dense: dict[int, NDArray] = {}
        self._nbytes = np.array([layout.nbytes for layout in layouts], np.int64)
        self._make_block()
        # Gradients of other libraries (torch) that may get new memory: checked in every step.
        self._movable = [t for t in tensors if t.array is not t.header and hasattr(t.array, "data_ptr")]

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
        owners = (ids, flat, flat_grads, offsets, self.column, self._written.lowest, self._written.highest)
        addresses = [a.ctypes.data for a in owners]
        flags = headers.ALIGNED | headers.WRITEABLE * self._zeros
        counts = [len(self._written.lowest), self._verdicts.ctypes.data, len(ids), flags, id(np.ndarray), id(None)]
        self._block = np.array(addresses + counts, np.int64)
        self._owners = owners  # raw addresses keep nothing alive
        self._check = headers.checker()
        self._check_arguments = (self._block.ctypes.data, self._grad_ids.ctypes.data)

    def bind(self, grads: list[Any]) -> None:
        """Accept the gradients of the next step, in the order of the tensors; all refusals come from here."""
        self.odd.clear()
        self.views.clear()
        self._grad_ids[:] = np.fromiter(map(id, grads), np.int64, len(grads))
        try:
            odd = not headers.TRUSTED or self._check(*self._check_arguments)
            if odd or self._movable:
                self._examine(grads, self._verdicts.nonzero()[0].tolist() if odd else [])
            if self._zeros and (self.odd or self._touch()):
                problems = Problems()
                self._check_apart(grads, problems)
                problems.raise_any()
        except BaseException:
            self.column.fill(-1)  # no address in it counts as checked
            raise

    def _touch(self) -> bool:
        """Might gradients with the layout of their parameters share memory?"""
        at = np.flatnonzero((self.column != 0) & (self._nbytes > 0))
        at = at[np.argsort(self.column[at], kind="stable")]
        starts = self.column[at]
        return bool((starts[1:] < (starts + self._nbytes[at])[:-1]).any())

    def _check_apart(self, grads: list[Any], problems: Problems) -> None:
        """Check that nothing written to is another tensor's gradient."""
        pairs = zip(self._tensors, grads, strict=True)
        check_grads_disjoint([(t.grad_label, g) for t, g in pairs if g is not None], problems)

    def _examine(self, grads: list[Any], odd: list[int]) -> None:
        """Check the odd ones in Python: refuse them, or handle them the slow way."""
        problems, copies, views, others = Problems(), [], [], {}
        for tensor in self._movable:
            check_unmoved(tensor, problems)
        for i in odd:
            tensor, layout, grad, verdict = self._tensors[i], self._layouts[i], grads[i], self._verdicts[i]
            if verdict & headers.PARAM_CHANGED:
                check_unchanged(tensor, problems)
            if grad is None:
                self.column[i] = 0
            elif verdict & (headers.GRAD_ODD | headers.GRAD_OVERLAPS):
                array = check_grad(grad, tensor, problems, written=self._zeros)
                if array is None:
                    continue
                check_read_apart(array, tensor.grad_label, self._written.near(array), problems)
                if array.dtype != layout.dtype:
                    others[tensor] = array.dtype
                elif not isinstance(grad, np.generic) and layout.matches(array) and is_aligned(array):
                    self.column[i] = address_of(array)
                    if not isinstance(grad, np.ndarray):
                        views.append(array)
                else:
                    copies.append((i, array))
        if problems and self._zeros:
            self._check_apart(grads, problems)
        problems.raise_any()
        if others:
            raise OtherDtypes(others)
        self.views = views
        for i, array in copies:
            if i not in self._dense:
                (self._dense[i],) = allocate([self._layouts[i]])
            np.copyto(self._dense[i], array)
            self.column[i] = address_of(self._dense[i])
            if self._zeros:
                self.odd.append(array)
