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


class Bfloat16:
    """NumPy knows bfloat16 by ml_dtypes alone; this is its type, and an object of it its dtype, for who has neither."""

    name, itemsize, isnative = "bfloat16", 2, True

    @property
    def type(self) -> type:
        return Bfloat16

    def __str__(self) -> str:
        return self.name


_BFLOAT16: Any = Bfloat16()


def named(name: str) -> np.dtype[Any]:
    """The dtype of this name."""
    dtype: np.dtype[Any] = _BFLOAT16 if name == "bfloat16" else np.dtype(name)
    return dtype


def of(T: Any) -> np.dtype[Any]:
    """The dtype of a type: NumPy's, ml_dtypes', or ours."""
    dtype: np.dtype[Any] = _BFLOAT16 if T is Bfloat16 else np.dtype(T)
    return dtype


def type_of(dtype: np.dtype[Any]) -> Any:
    """The type by which kernels are known: one for bfloat16, whosever its dtype is."""
    return Bfloat16 if dtype.name == "bfloat16" else dtype.type


def compute_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype of arithmetic and state: that of the parameter, but float32 for halves."""
    return np.dtype(np.float64) if dtype == np.float64 else np.dtype(np.float32)
