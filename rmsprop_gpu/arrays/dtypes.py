"""Which dtypes parameters may have, and in which their arithmetic and their state are."""

from __future__ import annotations

from typing import Any

import numpy as np

NAMES = ("float32", "float64", "float16", "bfloat16")  # the last is that of ml_dtypes, which is never imported here


def is_supported(dtype: np.dtype[Any]) -> bool:
    """May a parameter have this dtype?"""
    return dtype.isnative and dtype.name in NAMES


def compute_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype of arithmetic and state: that of the parameter, but float32 for halves."""
    return np.dtype(np.float64) if dtype == np.float64 else np.dtype(np.float32)
