"""Steps over arrays in host memory: `bind` accepts the arguments of a step, `launch` runs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from operator import methodcaller
from typing import Any

import numpy as np

from ..arrays.checks import Tensor
from ..arrays.layout import Layout, NDArray, address_of
from ..kernels import cpu
from .batch import Batch, Written
from .host_gradients import HostGradients
from .library import Block
from .signals import Signals

_call = methodcaller("__call__")


def _and_zero(run: Callable[[], None], grads: list[NDArray]) -> Callable[[], None]:
    """The step, followed by zeroing these gradients, which the kernels read as copies."""

    def run_and_zero() -> None:
        # Without returning to Python in between: Ctrl-C cannot leave some of it undone.
        list(map(_call, [run, *[partial(grad.fill, 0) for grad in grads], grads.clear]))

    return run_and_zero


def share_column(column: NDArray, batches: Sequence[Batch]) -> None:
    """Let each batch read the addresses of its gradients from its part of this column, which covers all batches."""
    start = 0
    for batch in batches:
        batch.grads = column[start : start + len(batch.sizes)]
        start += len(batch.sizes)


def settle_norms(batches: Sequence[Batch]) -> None:
    """Allocate the memory in which the norms of these batches are summed."""
    for batch in batches:
        batch.norms.find(batch, address_of(batch.scalars))
    for norms in {id(batch.norms): batch.norms for batch in batches if batch.variant.prepared}.values():
        partials, sums = (np.zeros(nbytes, np.uint8) for nbytes in norms.bytes_of_sums)
        norms.settle(*(Block(address_of(x), x) for x in (partials, norms.segments, sums)))


class HostSteps:
    """The steps of a plan over NumPy arrays: `bind` checks all of a step's arrays, `launch` runs it and cannot fail."""

    captured = False  # CUDA graphs capture nothing here

    def __init__(
        self,
        tensors: Sequence[Tensor],
        layouts: Sequence[Layout],
        batches: Sequence[Batch],
        written: Written,
        steps: NDArray,
    ) -> None:
        zeros = any(batch.variant.zero_grads for batch in batches)
        self._batches, self._grads = batches, HostGradients(tensors, layouts, written, zeros=zeros)
        share_column(self._grads.column, batches)
        settle_norms(batches)
        run = cpu.make_launch(batches, steps)
        self._run = _and_zero(run, self._grads.odd) if zeros else run
        self.launch = self._run

    def bind(self, grads: list[Any], signals: Signals) -> None:
        """Accept the gradients of the next step, in the order of the tensors; all refusals come from here."""
        self._grads.bind(grads)
        self.launch = self._run_and_release if self._grads.views else self._run
        if signals.asked.told:
            for batch in self._batches:
                batch.told[:] = signals.words

    def _run_and_release(self) -> None:
        """Run the step, then release the views through which its gradients were read."""
        self._run()
        self._grads.views.clear()
        self.launch = self._run

    def alone(self, i: int) -> Callable[[], object]:
        """The launch of one batch alone, as bound; no step is counted."""
        return cpu.make_launch([self._batches[i]], np.zeros(1, np.int64))

    def send(self) -> None:
        """Do nothing: the kernels read the scalars where the plan writes them."""

    def send_tables(self) -> None:
        """Do nothing: the same is true of the tables."""
