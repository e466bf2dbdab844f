"""Learning rates that change because of a framework's argument."""

from __future__ import annotations

from dataclasses import dataclass

from .. import hyper
from ..hyper import Schedule


@dataclass(frozen=True)
class InverseTimeDecay:
    """``lr / (1 + decay * step)``: the `decay` of tf.keras up to 2.10, whose `iterations` are our `steps`.

    Parameters
    ----------
    lr : float or callable
        The learning rate, or a schedule of it, as for `RMSProp`.
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
