"""Steps over torch's tensors on CUDA devices: what torch's own operations do in them, beside the launches."""

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
from ..steps.library import Streams
from .gradients import Gradients, Row
from .rows import place

_LR, _LR_TIMES_DECAY = (Scalars._fields.index(name) for name in Rates._fields)


def _rate_copies(lr: torch.Tensor, decay: float, row: torch.Tensor) -> list[Callable[[], Any]]:
    """What writes a learning rate into a row of scalars, both on the device."""
    source, target = lr.detach().reshape(1), row[_LR : _LR + 1]
    calls: list[Callable[[], Any]] = [partial(target.copy_, source)]
    if decay:
        product = row[_LR_TIMES_DECAY : _LR_TIMES_DECAY + 1]
        calls += [partial(product.copy_, source), partial(product.mul_, decay)]
    return calls


class CudaGradients(Gradients):
    """Gradients on CUDA devices, as `steps.device.DeviceSteps` asks for them.

    Copies of odd ones are enqueued when they are bound. Counters on a device are counted there, by what the step says
    of itself in `outcome`.
    """

    def __init__(
        self, rows: Sequence[Row], batches: Sequence[Batch], written: Written, outcome: Mapping[int, torch.Tensor]
    ) -> None:
        super().__init__(rows, written)
        self._read = np.empty(0, np.int64)
        self._grads: list[Any] = []
        self._before: list[Callable[[], Any]] = []
        self._counters = [(i, row.state["step"]) for i, row in enumerate(rows) if place(row.state["step"]) is not None]
        self._taken: torch.Tensor | None = None  # 1, or 0 after a step that was skipped
        if self._counters and any(batch.variant.finite or batch.variant.told for batch in batches):
            (words,) = outcome.values()  # what is decided for a step as a whole is decided on one device
            self._taken = torch.zeros((), dtype=torch.float32, device=words.device)
            one, skipped = torch.ones_like(words[SKIPPED]), words[SKIPPED]
            self._before.append(skipped.zero_)
            self._take = partial(torch.sub, one, skipped, out=self._taken)

    def read_rates(self, steps: DeviceSteps, rates: Mapping[int, tuple[torch.Tensor, float]]) -> None:
        """Have these learning rates, by group and with their decoupled decay, written before each launch."""
        for batch, block in steps.scalars:
            rows = block.owner.view(getattr(torch, batch.scalars.dtype.name)).view(batch.scalars.shape)
            for row, group in zip(rows, batch.groups, strict=True):
                if group in rates:
                    self._before += _rate_copies(*rates[group], row)

    def bind(self, grads: list[Any]) -> bool:  # type: ignore[override]  # it says: is any address another?
        super().bind(grads)
        self._grads = grads
        moved = not np.array_equal(self.column, self._read)
        self._read = self.column.copy()
        return moved

    def make_copies(self, order: Streams) -> None:
        """They are made."""

    def capture_copies(self) -> None:
        """They are made, a graph's too."""

    def lack_memory(self, rows: slice) -> bool:
        return False

    def before(self) -> list[Callable[[], Any]]:
        return self._before

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
    """The steps of a plan over these rows."""
    grads = CudaGradients(rows, batches, written, outcome)
    steps = DeviceSteps(tensors, batches, grads, grads.count, streams)
    grads.read_rates(steps, rates)
    return steps
