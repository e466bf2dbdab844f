"""CuPy's gradients of a step: check those that differ from the last step, and note where each is read from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter
from typing import Any

import cupy
import numpy as np
from cupy.cuda import Device, runtime

from ..arrays.checks import Problems, Tensor, check_grad, check_grads_disjoint, check_read_apart
from ..arrays.layout import Array, Layout, address_of
from .batch import OtherDtypes, Written
from .library import Block, Streams
from .on_cupy import allocate

EMPTY = 16  # the address of a gradient without elements: not 0, which means that there is none

_layout_of = attrgetter("__class__", "dtype", "shape", "strides", "data.device_id")
_address_of = attrgetter("data.ptr")


class Gradients:
    """The gradients of successive steps, in the order of the tensors."""

    def __init__(self, tensors: Sequence[Tensor], layouts: Sequence[Layout], written: Written, *, zeros: bool) -> None:
        self._tensors, self._wanted, self._written, self._zeros = tensors, layouts, written, zeros
        self._layouts = [
            (cupy.ndarray, x.dtype, x.shape, x.strides, t.device) for x, t in zip(layouts, tensors, strict=True)
        ]
        self._low = np.array([x.low for x in layouts], np.int64)
        self._nbytes = np.array([x.nbytes for x in layouts], np.int64)
        self._itemsize = np.array([x.dtype.itemsize for x in layouts], np.int64)
        self._addresses: list[Any] = []  # of the gradients that last passed the checks
        self.column = np.zeros(len(tensors), np.int64)  # the addresses that kernels read
        self._copies: list[tuple[int, Array]] = []  # those whose layout differs from their parameter's, by number
        self._dense: dict[int, Array] = {}
        self._grads: list[Any] = []
        self._views: list[Array] = []

    def bind(self, grads: list[Any]) -> bool:
        """Accept the gradients of the next step and return whether any address changed. All refusals come from here."""
        try:
            layouts: list[Any] = list(map(_layout_of, grads))
            addresses = list(map(_address_of, grads))
        except Exception:  # a None, another library's array, or one whose attributes raise
            known = [grad if type(grad) is cupy.ndarray else None for grad in grads]
            layouts = [None if grad is None else _layout_of(grad) for grad in known]
            addresses = [0 if grad is None else grad.data.ptr for grad in known]
        moved = addresses != self._addresses or layouts != self._layouts
        if moved:
            self._addresses = []  # checks that did not finish do not count the next time
            self._examine(grads, layouts, addresses)
            if layouts == self._layouts:
                self._addresses = addresses
        self._grads = grads
        return moved

    def hand_over(self) -> tuple[list[Any], list[Array]]:
        """Hand over what was held only until the step is enqueued."""
        held = self._grads, self._views
        self._grads, self._views = [], []
        return held

    def make_copies(self, order: Streams) -> None:
        """Enqueue copies of those whose memory layout differs from their parameter's; the column names the copies."""
        for i, _ in self._copies:
            if i not in self._dense:
                (self._dense[i],) = allocate([self._wanted[i]], self._tensors[i].device or 0, order)
        for device in self._copied_on():
            with order.on(device):
                self._copy(device)

    def capture_copies(self) -> None:
        """The same as part of a graph, in which no memory is allocated."""
        for device in self._copied_on():
            with Device(device):
                self._copy(device)

    def _copied_on(self) -> list[int]:
        return list(dict.fromkeys(self._tensors[i].device or 0 for i, _ in self._copies))

    def _copy(self, device: int) -> None:
        for i, array in self._copies:
            if (self._tensors[i].device or 0) == device:
                cupy.copyto(self._dense[i], array)
                self.column[i] = address_of(self._dense[i])

    def lack_memory(self, rows: slice) -> bool:
        """Would a copy of any of these need new memory? If not, the column names the copies."""
        copied = [i for i, _ in self._copies if rows.start <= i < rows.stop]
        if not all(i in self._dense for i in copied):
            return True
        for i in copied:
            self.column[i] = address_of(self._dense[i])
        return False

    def before(self) -> list[Callable[[], Any]]:
        """What a step does on the device before its kernel launches."""
        return []

    behind = "write zeros into gradients"

    def memory(self) -> list[Block]:
        """Nothing beyond what `Order.release` handles."""
        return []

    def after(self) -> list[Callable[[], Any]]:
        """What it does after them: zero the gradients that the kernels read as copies."""
        calls: list[Callable[[], Any]] = []
        for i, array in self._copies if self._zeros else []:
            calls += [partial(runtime.setDevice, self._tensors[i].device or 0), partial(array.fill, 0)]
        return calls

    def _examine(self, grads: list[Any], layouts: list[Any], addresses: list[int]) -> None:
        """Check what differs from the last step."""
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
        self.column, self._copies = column, copies
        self._views = views  # a view holds another library's memory just as its array does
