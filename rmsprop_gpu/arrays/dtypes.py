"""Which dtypes parameters may have, and in which their arithmetic and their state are."""

from __future__ import annotations

from typing import Any

import numpy as np

NAMES = ("float32", "float64", "float16", "bfloat16")  # the last is that of ml_dtypes, which is never imported here


def is_supported(dtype: np.dtype[Any]) -> bool:
    """May a parameter have this dtype?"""
    return dtype.isnative and dtype.name in NAMES


def grad_dtypes(dtype: np.dtype[Any]) -> tuple[str, ...]:
    """The names of the dtypes that the gradient of a parameter may have: its own, and halves for float32.

    Those are what mixed precision yields, and a half is a float32 without rounding. A wider gradient than the parameter
    would be read at more bytes than its precision is worth, and float64 be fed what float32 left of a gradient: who
    wants that says so by a cast.
    """
    return ("float32", "float16", "bfloat16") if dtype == np.float32 else (dtype.name,)


def compute_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype of arithmetic and state: that of the parameter, but float32 for halves."""
    return np.dtype(np.float64) if dtype == np.float64 else np.dtype(np.float32)
