"""The gradients of whole parameters, as a rank has them: checked as in one process, before anything moves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..arrays.checks import Problems, Tensor, check_grad, check_grads_disjoint
from ..arrays.layout import Array, NDArray
from ..steps.batch import OtherDtypes, Written
from ..steps.host_gradients import HostGradients


class WholeGradients:
    """Those of one step after the other, and the addresses at which they are packed.

    Every refusal is the one of a step in one process. A half gradient beside float32 is widened into a buffer, and so
    is one that lies otherwise than its parameter: buckets have one dtype and one order.
    """

    def __init__(self, tensors: Sequence[Tensor], written: Written, order: Any = None, *, zeros: bool) -> None:
        self._tensors, self._order, self._zeros = tensors, order, zeros
        layouts = [tensor.layout for tensor in tensors]
        self._wide: dict[int, Array] = {}
        self._narrow: list[Array] = []  # those that were widened
        self._checks: Any
        if order is None:
            self._checks = HostGradients(tensors, layouts, written, zeros=zeros)
        else:
            from ..steps.gradients import Gradients  # it imports CuPy

            self._checks = Gradients(tensors, layouts, written, zeros=zeros)

    @property
    def column(self) -> NDArray:
        """By tensor where its gradient is packed from; 0 where there is none."""
        column: NDArray = self._checks.column
        return column

    def take(self, grads: Sequence[Any]) -> None:
        """Take the gradients of the next step, in the order of the parameters; every refusal comes from here.

        Those that lie otherwise than their parameters are copied; the column names the copies.
        """
        self._narrow = []
        try:
            self._checks.bind(list(grads))
        except OtherDtypes as found:
            self._checks.bind(self._widened(grads, [i for i, x in enumerate(self._tensors) if x in found.of]))
        if self._order is not None:  # before ranks agree, since there may be no memory for it
            self._checks.make_copies(self._order)

    def _widened(self, grads: Sequence[Any], others: Sequence[int]) -> list[Any]:
        problems, made = Problems(), list(grads)
        if self._zeros:  # of which the check sees the wide ones alone
            check_grads_disjoint([(t.grad_label, g) for t, g in zip(self._tensors, grads, strict=True)], problems)
        problems.raise_any()
        for i in others:
            array = check_grad(grads[i], self._tensors[i], problems, written=self._zeros)
            assert array is not None  # it was found right but for its dtype
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
        """Behind the packing: zeros into what was copied, where they are asked for; and nothing is held any longer."""
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
