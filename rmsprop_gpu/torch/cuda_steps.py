"""Steps over torch's tensors on CUDA devices: what torch's own operations do in them, besides the kernel launches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from ..arrays.checks import Tensor
from ..hyper import Rates
from ..kernels.rule import Scalars
from ..kernels.table import SKIPPED
from ..steps.batch import Batch, Written
from ..steps.device import DeviceSteps
from ..steps.library import Block, Streams
from .gradients import Gradients, Row
from .rows import place

_LR, _LR_TIMES_DECAY = (Scalars._fields.index(name) for name in Rates._fields)


def _rate_copies(lr: torch.Tensor, decay: float, row: torch.Tensor) -> list[Callable[[], Any]]:
    """The calls that write a learning rate into a row of scalars, on the device; the product is rounded once, too."""
    source, target = lr.detach().reshape(1), row[_LR : _LR + 1]
    calls: list[Callable[[], Any]] = [partial(target.copy_, source)]
    if decay:
        product, target = torch.zeros_like(source, dtype=torch.float64), row[_LR_TIMES_DECAY : _LR_TIMES_DECAY + 1]
        calls += [partial(product.copy_, source), partial(product.mul_, decay), partial(target.copy_, product)]
    return calls


class CudaGradients(Gradients):
    """Gradients on CUDA devices, as needed by `steps.device.DeviceSteps`.

    Copies of odd ones are enqueued when they are bound. Counters on a device are advanced there, according to what the
    step writes into `outcome`.
    """

    def __init__(
        self, rows: Sequence[Row], batches: Sequence[Batch], written: Written, outcome: Mapping[int, torch.Tensor]
    ) -> None:
        super().__init__(rows, written)
        self._read = np.empty(0, np.int64)
        self._outcome = outcome
        self._grads: list[Any] = []
        self._before: list[Callable[[], Any]] = []
        self._counters = [(i, row.state["step"]) for i, row in enumerate(rows) if place(row.state["step"]) is not None]
        self._taken: torch.Tensor | None = None  # 1, or 0 after a skipped step
        if self._counters and any(batch.variant.finite or batch.variant.told for batch in batches):
            (words,) = outcome.values()  # decisions about a step as a whole are made on one device
            self._taken = torch.zeros((), dtype=self._counters[0][1].dtype, device=words.device)
            one, skipped = torch.ones_like(words[SKIPPED]), words[SKIPPED]
            self._before.append(skipped.zero_)
            self._take = partial(torch.sub, one, skipped, out=self._taken)

    def read_rates(self, steps: DeviceSteps, rates: Mapping[int, tuple[torch.Tensor, float]]) -> None:
        """Write these learning rates, by group and with their decoupled decay, before each launch."""
        for batch, block in steps.scalars:
            rows = block.owner.view(getattr(torch, batch.scalars.dtype.name)).view(batch.scalars.shape)
            for row, group in zip(rows, batch.groups, strict=True):
                if group in rates:
                    self._before += _rate_copies(*rates[group], row)

    def bind(self, grads: list[Any]) -> bool:
        """Accept the gradients of the next step and return whether any address changed."""
        self.take(grads)
        self._grads = grads
        moved = not np.array_equal(self.column, self._read)
        self._read = self.column.copy()
        return moved

    def make_copies(self, order: Streams) -> None:
        """Do nothing: they were made when bound."""

    def capture_copies(self) -> None:
        """Do nothing: they were made when bound, and are in the graph."""

    def lack_memory(self, rows: slice) -> bool:
        return False

    def before(self) -> list[Callable[[], Any]]:
        return self._before

    behind = "count the step"

    def memory(self) -> list[Block]:
        own = [*self._dense.values(), *self._outcome.values(), *([] if self._taken is None else [self._taken])]
        return [Block(x.data_ptr(), x) for x in own]

    def after(self) -> list[Callable[[], Any]]:
        counted = [step for i, step in self._counters if self.column[i]]
        if not counted:
            return []
        if self._taken is None:
            return [partial(torch._foreach_add_, counted, 1)]
        return [self._take, partial(torch._foreach_add_, counted, [self._taken] * len(counted))]

    def hand_over(self) -> tuple[list[Any], list[torch.Tensor]]:
        held, self._grads = self._grads, []
        return held, list(self._dense.values())


def cuda_steps(
    rows: Sequence[Row],
    tensors: Sequence[Tensor],
    batches: Sequence[Batch],
    written: Written,
    outcome: Mapping[int, torch.Tensor],
    rates: Mapping[int, tuple[torch.Tensor, float]],
    streams: Streams,
) -> DeviceSteps:
    """The function that makes the steps of a plan over these rows."""
    grads = CudaGradients(rows, batches, written, outcome)
    steps = DeviceSteps(tensors, batches, grads, grads.count, streams)
    grads.read_rates(steps, rates)
    return steps
