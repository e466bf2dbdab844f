"""The gradients of a step on CUDA devices: checked where they differ from the last step, and where each is read."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import cupy
import numpy as np

from ..arrays.checks import Problems, Tensor, check_grad, check_grads_disjoint, check_read_apart
from ..arrays.layout import Array, Layout, address_of
from .batch import OtherDtypes, Written

EMPTY = 16  # the address of a gradient without elements: not 0, which says that there is none

_layout_of = attrgetter("__class__", "dtype", "shape", "strides", "data.device_id")
_address_of = attrgetter("data.ptr")


class Gradients:
    """Those of one step after the other, in the order of the tensors."""

    def __init__(self, tensors: Sequence[Tensor], layouts: Sequence[Layout], written: Written, *, zeros: bool) -> None:
        self._tensors, self._wanted, self._written, self._zeros = tensors, layouts, written, zeros
        self._layouts = [
            (cupy.ndarray, x.dtype, x.shape, x.strides, t.device) for x, t in zip(layouts, tensors, strict=True)
        ]
        self._low = np.array([x.low for x in layouts], np.int64)
        self._nbytes = np.array([x.nbytes for x in layouts], np.int64)
        self._itemsize = np.array([x.dtype.itemsize for x in layouts], np.int64)
        self._addresses: list[Any] = []  # of the gradients that were found right last
        self.column = np.zeros(len(tensors), np.int64)  # the addresses that kernels read
        self.copies: list[tuple[int, Array]] = []  # those that lie otherwise than their parameters, by number
        self._grads: list[Any] = []
        self._views: list[Array] = []

    def bind(self, grads: list[Any]) -> bool:
        """Take the gradients of the next step: is any address another? Every refusal comes from here."""
        try:
            layouts: list[Any] = list(map(_layout_of, grads))
            addresses = list(map(_address_of, grads))
        except Exception:  # a None, another library's array, or one whose attributes raise
            known = [grad if type(grad) is cupy.ndarray else None for grad in grads]
            layouts = [None if grad is None else _layout_of(grad) for grad in known]
            addresses = [0 if grad is None else grad.data.ptr for grad in known]
        moved = addresses != self._addresses or layouts != self._layouts
        if moved:
            self._addresses = []  # what is not right to the end is not right the next time
            self._examine(grads, layouts, addresses)
            if layouts == self._layouts:
                self._addresses = addresses
        self._grads = grads
        return moved

    def hand_over(self) -> tuple[list[Any], list[Array]]:
        """What was held until the step is enqueued, held no longer."""
        held = self._grads, self._views
        self._grads, self._views = [], []
        return held

    def _examine(self, grads: list[Any], layouts: list[Any], addresses: list[int]) -> None:
        """Check what is not as in the last step."""
        problems, copies, views, others = Problems(), [], [], {}
        column = np.array(addresses, np.int64) + self._low
        column[self._nbytes == 0] = EMPTY
        odd = set()
        if layouts != self._layouts:
            odd = {i for i, (got, want) in enumerate(zip(layouts, self._layouts, strict=True)) if got != want}
        odd |= set((column % self._itemsize).nonzero()[0].tolist())
        odd |= set(self._written.hit(column, self._nbytes).tolist())
        for i in sorted(odd):
            tensor, wanted, grad = self._tensors[i], self._wanted[i], grads[i]
            if grad is None:
                column[i] = 0
                continue
            array = check_grad(grad, tensor, problems, written=self._zeros)
            if array is None:
                continue
            check_read_apart(array, tensor.grad_label, self._written.near(array), problems)
            if array.dtype != wanted.dtype:
                others[tensor] = array.dtype
                continue
            views.append(array)
            if wanted.matches(array):
                column[i] = address_of(array) if array.size else EMPTY
            else:
                copies.append((i, array))
        if self._zeros:
            pairs = zip(self._tensors, grads, strict=True)
            check_grads_disjoint([(t.grad_label, g) for t, g in pairs if g is not None], problems)
        problems.raise_any()
        if others:
            raise OtherDtypes(others)
        self.column, self.copies = column, copies
        self._views = views  # another library's memory is held by the view as well as by its array
