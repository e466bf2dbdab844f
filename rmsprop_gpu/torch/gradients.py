"""Check all tensors of a step, and note where each gradient is read from."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

import numpy as np
import torch

from ..arrays.layout import NDArray
from ..steps.batch import Written
from .exchange import NO_ELEMENTS, PARAM_CHANGED, STATE_CHANGED, UNCHECKED, Reader, counter
from .rows import has_memory, place, unusable_grad

SPARSE = "RMSprop does not support sparse gradients"  # torch's message


class Row(NamedTuple):
    """A parameter that our kernels update, its state, and the dtype of its gradients."""

    name: str
    param: torch.Tensor
    group: int
    state: dict[str, Any]
    kept: tuple[str, ...]  # the names of its state besides the step
    grad_dtype: torch.dtype
    seed: int | None = None  # what its dither is made from, if there is any


class Changed(Exception):  # noqa: N818  # no error: the tensors are bound again
    """A tensor has changed since it was bound; nothing was written."""


class _Part:
    """Rows whose states have the same names, so that they form complete columns for the compiled check."""

    def __init__(self, rows: Sequence[Row], here: slice, column: NDArray, written: Written) -> None:
        self.here, self._params = here, [row.param for row in rows]
        self._entries = [row.state for row in rows]
        self._names = list(map(itemgetter, ("step", *rows[0].kept)))
        dtypes = [row.grad_dtype for row in rows]
        self.reader = Reader(self._params, self._states(), dtypes, column, written.lowest, written.highest)
        steps = [entry["step"] for entry in self._entries]
        self.count = counter([x if place(x) is None else None for x in steps], column)

    def _states(self) -> list[list[Any]]:
        return [list(map(name, self._entries)) for name in self._names]

    def read(self, grads: list[Any]) -> int:
        return self.reader.bind(self._params, grads, self._states())


class Gradients:
    """The gradients of successive steps, in the order of the rows; the rows' other tensors are checked as well."""

    def __init__(self, rows: Sequence[Row], written: Written) -> None:
        self._rows, self._params = rows, [row.param for row in rows]
        self.column = np.full(len(rows), UNCHECKED, np.int64)
        self._dense: dict[int, torch.Tensor] = {}
        self._parts: list[_Part] = []
        start = 0
        for _, run in groupby(rows, key=attrgetter("kept")):
            members = list(run)
            here = slice(start, start + len(members))
            self._parts.append(_Part(members, here, self.column[here], written))
            start = here.stop

    def take(self, grads: list[Any]) -> None:
        """Accept the gradients of the next step; raise `Changed` if anything else has changed."""
        try:
            for part in self._parts:
                if part.read(grads[part.here]):
                    self._examine(grads, part.here.start, part.reader.verdicts)
        except BaseException:
            self.column.fill(UNCHECKED)
            raise

    def _examine(self, grads: list[Any], first: int, verdicts: NDArray) -> None:
        """Check the odd ones in Python."""
        odd = [(first + k, verdicts[k]) for k in verdicts.nonzero()[0].tolist()]
        for i, _ in odd:
            if grads[i] is not None and grads[i].is_sparse:
                raise RuntimeError(SPARSE)
        for i, verdict in odd:
            row, grad = self._rows[i], grads[i]
            if verdict & (PARAM_CHANGED | STATE_CHANGED):
                raise Changed
            if unusable_grad(row.param, grad) or grad.dtype != row.grad_dtype:
                raise Changed
        for i, _ in odd:
            self._copy(i, grads[i])

    def _copy(self, i: int, grad: torch.Tensor) -> None:
        """Replace a gradient by a dense copy with the layout of the parameter."""
        row = self._rows[i]
        if not has_memory(grad):
            raise RuntimeError(f"the gradient of {row.name} has no memory: its storage was resized to nothing")
        if i not in self._dense:
            self._dense[i] = torch.empty_like(row.param, dtype=grad.dtype, requires_grad=False)
        self._dense[i].copy_(grad.detach())
        self.column[i] = self._dense[i].data_ptr() or NO_ELEMENTS

    def count(self) -> None:
        """Tell torch about a step that was not skipped."""
        counted = sum([part.count() for part in self._parts])
        # So that autograd refuses a saved tensor that has been changed.
        updated = self._params
        if counted < len(updated):
            updated = [p for p, x in zip(updated, self.column, strict=True) if x]
        torch.autograd.graph.increment_version(updated)
