"""Learning rates that change by themselves because an argument of a framework says so."""

from __future__ import annotations

from dataclasses import dataclass

from .. import hyper
from ..hyper import Schedule


@dataclass(frozen=True)
class InverseTimeDecay:
    """``lr / (1 + decay * step)``: what `decay` is in tf.keras up to 2.10, whose `iterations` are our `steps`.

    Parameters
    ----------
    lr : float or callable
        The learning rate, or a schedule of it, as `RMSProp` takes it.
    decay : float
        >= 0.

    Examples
    --------
    >>> lr = InverseTimeDecay(0.1, decay=0.25)
    >>> lr(0), lr(4)
    (0.1, 0.05)
    """

    lr: float | Schedule
    decay: float

    def __call__(self, step: int) -> float:
        return hyper.lr_at(self.lr, step) / (1.0 + self.decay * step)
