"""What counts as one real number: Python's and NumPy's, Decimal, and 0-d arrays from any library, in any place."""

from __future__ import annotations

import numbers
from decimal import Decimal
from typing import Any, TypeAlias

import numpy as np

from .interop import cupy_array
from .selector import is_cuda, is_masked

Real: TypeAlias = Any  # a numbers.Real, or a Decimal, which is not one in Python


def one_real(x: Any) -> Real | None:
    """The real number that `x` is, as Python's or NumPy's; None for anything else, including a bool.

    For an array on a device the host waits.
    """
    if isinstance(x, (bool, np.bool_, np.timedelta64)):  # the last is a subclass of NumPy's integers
        return None
    if isinstance(x, (numbers.Real, Decimal)):
        return x
    if isinstance(x, type) or is_masked(x) or getattr(getattr(x, "dtype", None), "kind", "") in ("m", "M"):
        return None
    try:
        if tuple(x.shape) != ():
            return None
        array = x if hasattr(x, "item") else cupy_array(x) if is_cuda(x) else np.asarray(x)
        found = array.item()
    except Exception:  # whatever another library raises, for a missing shape or value
        return None
    return found if isinstance(found, (numbers.Real, Decimal)) and not isinstance(found, (bool, np.bool_)) else None


def whole(x: Any) -> int | None:
    """The integer that `x` is, from any library; None for anything else, including a float."""
    found = one_real(x)
    return int(found) if isinstance(found, numbers.Integral) else None
