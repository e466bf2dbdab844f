"""THE update rule: scalars in, scalars out. Nothing else in the package contains the mathematics of a step.

The rule uses only operations that IEEE 754 defines to the last bit (``+ * / sqrt``), explicit ``fma``, and comparison
with selection. No compiler has anything left to contract or to choose, so CPU and GPU results are bit-identical.
``reference.py`` is the same mathematics in plain NumPy.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from numba import njit

from .intrinsics import fma

# The only decorator with which a function serves CPU loops and CUDA kernels and compiles to PTX without a driver.
inline: Any = njit(inline="always", error_model="numpy")


class Variant(NamedTuple):
    """The switches of a step, fixed when a kernel is compiled: a switch that is off leaves no instruction behind."""

    adagrad: bool = False
    scale: bool = False
    clipvalue: bool = False
    weight_decay: bool = False
    decoupled_weight_decay: bool = False
    centered: bool = False
    bias_correction: bool = False
    eps: bool = True
    eps_in_sqrt: bool = False
    momentum: bool = False
    nesterov: bool = False
    lr_in_momentum: bool = False
    # What is done around the rule.
    norm: bool = False  # compute the norm of the gradients, for clipping
    finite: bool = False  # skip a step whose gradients are not finite
    told: bool = False  # grad_scale or found_inf are given, and known on the device
    ema: bool = False
    zero_grads: bool = False
    # How the second moment and the parameter are stored (codes.py).
    uint16: bool = False
    uint8: bool = False
    remainder: bool = False
    stochastic_round: bool = False

    @property
    def measures(self) -> bool:
        """Does a pass over the gradients come before the update?"""
        return self.norm or self.finite

    @property
    def prepared(self) -> bool:
        """Does each tensor have factors, written by a kernel before the update?"""
        return self.bias_correction or self.ema or self.told or self.measures or self.dithers

    @property
    def dithers(self) -> bool:
        """Does each tensor have a key in each step?"""
        return self.uint16 or self.uint8 or self.stochastic_round

    @property
    def coded(self) -> bool:
        """Is the second moment or the parameter stored in fewer bytes than its own type?"""
        return self.dithers or self.remainder

    # The part that a kernel is compiled for: Variants share kernels where they can.

    @property
    def of_sums(self) -> Variant:
        return Variant(norm=self.norm, finite=self.finite)

    @property
    def of_prepare(self) -> Variant:
        return Variant(
            adagrad=self.adagrad, norm=self.norm, finite=self.finite, told=self.told, ema=self.ema, uint16=self.dithers
        )

    @property
    def of_update(self) -> Variant:
        if self.scale and not (self.told or self.norm):  # for its sign only
            return self._replace(finite=self.prepared)
        return self._replace(norm=False, finite=False, told=self.prepared)

    def __str__(self) -> str:
        """The switches that are on; eps is on by default."""
        on = [switch for switch, value in self._asdict().items() if value and switch != "eps"]
        return "+".join([*on, *["no eps"] * (not self.eps)]) or "plain"


class Scalars(NamedTuple):
    """The rule's numbers, in the compute type; read from memory, so that they may change between steps."""

    lr: Any
    alpha: Any
    one_minus_alpha: Any
    eps: Any
    weight_decay: Any
    lr_times_decay: Any
    momentum: Any
    clipvalue: Any
    scale: Any
    clipnorm: Any
    global_clipnorm: Any
    ema_momentum: Any
    one_minus_ema_momentum: Any


class Factors(NamedTuple):
    """A tensor's own numbers in a step, in the compute type."""

    scale: Any  # multiplies its gradient
    power: Any  # of two, taken out of a scale that would be too small for its type
    correction: Any  # multiplies its second moment
    ema_momentum: Any  # 0 in the first step


def make_rule(variant: Variant, T: Any) -> Any:
    """The rule of one Variant in the compute type T (``numpy.float32`` or ``numpy.float64``).

    ``rule(p, grad, v, m, b, e, s, f)``, with Scalars and Factors, returns the new ``(p, v, m, b, e)``; values that a
    Variant does not use pass through.
    """
    zero = T(0)  # constants take their neighbours' type: a bare 0 makes float32 code float64
    lifted = variant.told or variant.norm  # a sign alone makes nothing too small

    @inline
    def rule(p, grad, v, m, b, e, s, f):  # type: ignore[no-untyped-def]  # typed by Numba
        g = grad
        if variant.scale:
            if lifted:
                g = f.power * g
            g = f.scale * g
        if variant.clipvalue:
            # Select, never min, max, abs: on NaN the CPU and the GPU choose differently. Here a NaN stays a NaN.
            g = s.clipvalue if g > s.clipvalue else g
            g = -s.clipvalue if g < -s.clipvalue else g
        if variant.weight_decay:
            g = fma(s.weight_decay, p, g)

        # No bare + or - may act on a bare product: one compiler would contract it and the other would not.
        if variant.adagrad:
            v = fma(g, g, v)
        else:
            v = fma(s.alpha, v, (s.one_minus_alpha * g) * g)

        d = v
        if variant.centered:
            m = fma(s.alpha, m, s.one_minus_alpha * g)
            d = fma(-m, m, v)
            # With a constant gradient, rounding takes v - m^2 below 0; in other libraries that ends in a NaN.
            d = zero if d < zero else d

        if variant.eps_in_sqrt:
            r = math.sqrt(fma(d, f.correction, s.eps)) if variant.bias_correction else math.sqrt(d + s.eps)
        else:
            r = math.sqrt(d * f.correction) if variant.bias_correction else math.sqrt(d)
            if variant.eps:
                r = r + s.eps

        u = g / r
        if not variant.eps:
            u = zero if r == zero else u  # Hinton's form: nothing to scale by, so nothing moves
        if variant.lr_in_momentum:
            u = s.lr * u
        if variant.decoupled_weight_decay:
            p = fma(-s.lr_times_decay, p, p)
        step = u
        if variant.momentum:
            b = fma(s.momentum, b, u)
            step = fma(s.momentum, b, u) if variant.nesterov else b
        p = p - step if variant.lr_in_momentum else fma(-s.lr, step, p)
        if variant.ema:
            # Before the first step the memory may hold anything, and 0 times an infinity would be a NaN.
            e = p if f.ema_momentum == zero else fma(f.ema_momentum, e, s.one_minus_ema_momentum * p)
        return p, v, m, b, e

    return rule
