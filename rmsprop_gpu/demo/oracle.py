"""The demo's check: every update of a run is compared with the float64 oracle, given the same gradients."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .. import AdaGrad, RMSProp, reference

Arrays: TypeAlias = Mapping[str, NDArray[np.float32]]


@dataclass
class Deviation:
    """The largest distance of an update from the float64 oracle's."""

    largest: float = 0.0  # |(after - before) - the oracle's update|
    place: str = ""
    rounding: float = 0.0  # the part explained by rounding the float32 parameter: half an ulp of it
    relative: float = 0.0  # the largest deviation relative to the largest update of its tensor and step
    beyond: float = 0.0  # the most by which any deviation exceeds its rounding, likewise relative


class Oracle:
    """`reference` in float64, given the same gradients and parameters, but with its own state."""

    def __init__(self, opt: RMSProp | AdaGrad) -> None:
        self._function = reference.adagrad if isinstance(opt, AdaGrad) else reference.rmsprop
        names = inspect.signature(self._function).parameters
        group = opt.param_groups[0]
        given: dict[str, Any] = {name: group[name] for name in names if name in group}
        # The kernel's scalars are float32; that error is not the update's.
        self._hyper: dict[str, Any] = {n: float(np.float32(x)) if isinstance(x, float) else x for n, x in given.items()}
        if "alpha" in given:
            self._hyper["one_minus_alpha"] = float(np.float32(1 - given["alpha"]))
        self._roundings = 2 if given["weight_decay"] and given["decoupled_weight_decay"] else 1
        self._alpha, self._momentum = given.get("alpha", 1.0), given.get("momentum", 0.0)
        self._state: dict[str, reference.State] = {}
        self.deviation = Deviation()

    def compare(
        self,
        before: Arrays,
        after: Arrays,
        grads: Arrays,
        lr: float,
        step: int,
    ) -> None:
        """Check one step; all arrays are NumPy's."""
        worst, hyper = self.deviation, {**self._hyper, "lr": float(np.float32(lr))}
        for name, old in before.items():
            new, self._state[name] = self._function(old, grads[name], self._state.get(name), **hyper)
            want = new - old
            error = np.abs(after[name].astype(np.float64) - old - want)
            rounding = self._roundings * np.spacing(np.maximum(np.abs(old), np.abs(after[name]))).astype(np.float64) / 2
            scale = float(np.abs(want).max()) or 1.0
            at = int(error.argmax())
            if not (error.flat[at] <= worst.largest or math.isnan(worst.largest)):  # a NaN counts, and stays
                worst.largest, worst.rounding = float(error.flat[at]), float(rounding.flat[at])
                worst.relative, worst.place = worst.largest / scale, f"{name}, step {step + 1:,}"
            worst.beyond = float(np.maximum(worst.beyond, (error - rounding).max() / scale))

    def bound(self, steps: int) -> float:
        """The error that float32 may cause in an update beyond the rounding of its parameter, relative to the update.

        In units of 2**-24: the rule rounds g / (sqrt(v) + eps) three times, decoupled decay three times more, and the
        root halves the error of v. That error is one rounding per step and two for the square that entered, as long as
        a square counts: after 10 / (1 - alpha) steps its weight is exp(-10). Momentum sums 1 / (1 - momentum) updates.
        If v - m^2 cancels (centered), rounding may do more.
        """
        counting = min(steps, math.ceil(10 / (1 - self._alpha))) if self._alpha < 1 else steps
        roundings = (3 + (counting + 2) / 2 + 3 * (self._roundings - 1)) / (1 - self._momentum)
        return float(roundings * 2.0**-24)

    def summary(self, steps: int) -> dict[str, Any]:
        """The deviation after this many steps, and whether rounding alone explains it."""
        matches = self.deviation.beyond <= self.bound(steps)  # false for a NaN
        return {**asdict(self.deviation), "matches": matches}
