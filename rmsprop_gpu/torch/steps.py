"""Steps over torch's tensors in host memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from ..arrays.layout import NDArray
from ..kernels import cpu
from ..kernels.table import SKIPPED
from ..steps.batch import Batch, Written
from ..steps.host import settle_norms, share_column
from ..steps.signals import Signals
from .gradients import Gradients, Row


class TensorSteps:
    """The steps of a plan over torch's tensors in host memory: `bind` checks all of them, `launch` runs the step."""

    captured = False  # CUDA graphs capture nothing here

    def __init__(
        self, rows: Sequence[Row], batches: Sequence[Batch], written: Written, steps: NDArray, outcome: NDArray
    ) -> None:
        self._batches, self._outcome = batches, outcome
        self._grads = Gradients(rows, written)
        share_column(self._grads.column, batches)
        settle_norms(batches)
        self._run = cpu.make_launch(batches, steps, threads=torch.get_num_threads)

    def bind(self, grads: list[Any], signals: Signals) -> None:
        """Accept the gradients of the next step; raise `Changed` if anything else has changed."""
        self._grads.take(grads)
        if signals.asked.told:
            for batch in self._batches:
                batch.told[:] = signals.words

    def launch(self) -> None:
        """Run the bound step; a skipped step is counted only in the outcome."""
        skipped = self._outcome[SKIPPED]
        self._run()
        if self._outcome[SKIPPED] == skipped:
            self._grads.count()

    def alone(self, i: int) -> Callable[[], object]:
        """The launch of one batch alone, as bound; no step is counted."""
        return cpu.make_launch([self._batches[i]], np.zeros(1, np.int64))

    def send(self) -> None:
        """Do nothing: the kernels read the scalars where the plan writes them."""

    def send_tables(self) -> None:
        """Do nothing: the same is true of the tables."""
