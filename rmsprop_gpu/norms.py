"""What happens once a tensor and step: its numbers, its step counter, its bias weight, its correction."""

from __future__ import annotations

from typing import Any

import numpy as np

from .intrinsics import fma, memory
from .rule import Scalars, Variant, inline
from .table import BIAS_WEIGHT, SCALARS_ROW, STEP


def make_scalars(T: Any, space: int) -> Any:
    """``scalars(first, row)``: the numbers of the tensor whose table row is at this address, as the rule takes them.

    `first` is the address of the first row of scalars.
    """
    (load, _), (load_int, _) = memory(T, space), memory(np.int64, space)
    stride = len(Scalars._fields) * np.dtype(T).itemsize

    @inline
    def scalars(first, row):  # type: ignore[no-untyped-def]
        s = first + load_int(row, SCALARS_ROW) * stride
        return Scalars(
            load(s, 0), load(s, 1), load(s, 2), load(s, 3), load(s, 4), load(s, 5), load(s, 6), load(s, 7), load(s, 8)
        )

    return scalars


def make_advance(variant: Variant, T: Any, space: int) -> Any:
    """``advance(row, s)``: count the step of the tensor whose table row is at this address; return its correction.

    The bias weight is the moving average of ones, ``w = alpha w + (1 - alpha)``, and the correction ``1 / w``: exact
    operations only, right after skips and late starts, and the drift of a rounded alpha cancels. It is kept whether
    `bias_correction` is on or not, so that it may be turned on at any step.
    """
    load, store = memory(T, space)
    load_int, store_int = memory(np.int64, space)
    one = T(1)

    @inline
    def advance(row, s):  # type: ignore[no-untyped-def]
        step = load_int(row, STEP)
        if step != 0:
            store_int(step, 0, load_int(step, 0) + 1)
        correction = one
        if not variant.adagrad:
            weight = load_int(row, BIAS_WEIGHT)
            if weight != 0:
                w = fma(s.alpha, load(weight, 0), s.one_minus_alpha)
                store(weight, 0, w)
                correction = one / w
        return correction

    return advance
