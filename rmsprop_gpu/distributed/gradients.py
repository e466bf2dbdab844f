"""A rank's gradients of whole parameters: checked as in a single process, before anything is sent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..arrays.checks import Problems, Tensor, check_grad, check_grads_disjoint
from ..arrays.layout import Array, NDArray
from ..steps.batch import OtherDtypes, Written
from ..steps.host_gradients import HostGradients


class WholeGradients:
    """The gradients of successive steps, and the addresses from which they are packed.

    Refusals are the same as in a step of a single process. A half gradient of a float32 parameter is widened into a
    buffer, and one with a different memory layout is copied: buckets have one dtype and one order.
    """

    def __init__(self, tensors: Sequence[Tensor], written: Written, order: Any = None, *, zeros: bool) -> None:
        self._tensors, self._order, self._zeros = tensors, order, zeros
        layouts = [tensor.layout for tensor in tensors]
        self._wide: dict[int, Array] = {}
        self._narrow: list[Array] = []  # widened copies
        self._checks: Any
        if order is None:
            self._checks = HostGradients(tensors, layouts, written, zeros=zeros)
        else:
            from ..steps.gradients import Gradients  # it imports CuPy

            self._checks = Gradients(tensors, layouts, written, zeros=zeros)

    @property
    def column(self) -> NDArray:
        """For each tensor the address from which its gradient is packed; 0 if it has none."""
        column: NDArray = self._checks.column
        return column

    def take(self, grads: Sequence[Any]) -> None:
        """Accept the gradients of the next step, in parameter order; all refusals come from here.

        Those with another layout than their parameters are copied; the column names the copies.
        """
        self._narrow = []
        try:
            self._checks.bind(list(grads))
        except OtherDtypes as found:
            self._checks.bind(self._widened(grads, [i for i, x in enumerate(self._tensors) if x in found.of]))
        if self._order is not None:  # before ranks agree, since it may run out of memory
            self._checks.make_copies(self._order)

    def _widened(self, grads: Sequence[Any], others: Sequence[int]) -> list[Any]:
        problems, made = Problems(), list(grads)
        if self._zeros:  # the check saw only the wide ones
            check_grads_disjoint([(t.grad_label, g) for t, g in zip(self._tensors, grads, strict=True)], problems)
        problems.raise_any()
        for i in others:
            array = check_grad(grads[i], self._tensors[i], problems, written=self._zeros)
            assert array is not None  # only its dtype was wrong
            if i not in self._wide:
                self._wide[i] = self._empty(array, self._tensors[i])
            self._wide[i][...] = array
            self._narrow.append(array)
            made[i] = self._wide[i]
        return made

    def _empty(self, array: Array, tensor: Tensor) -> Array:
        if self._order is None:
            return np.empty(array.shape, tensor.layout.dtype)
        import cupy

        return cupy.empty(array.shape, tensor.layout.dtype)

    def release(self) -> None:
        """After packing: zero what was copied, if requested, and release everything."""
        if self._zeros:
            for array in self._narrow:
                array.fill(0)
        self._narrow = []
        if self._order is None:
            if self._zeros:
                for array in self._checks.odd:
                    array.fill(0)
            self._checks.odd.clear()
            self._checks.views.clear()
        else:
            for call in self._checks.after():
                call()
            self._checks.hand_over()
