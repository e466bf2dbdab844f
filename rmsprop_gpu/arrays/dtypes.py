"""Which dtypes parameters may have, and the dtypes of their arithmetic and state."""

from __future__ import annotations

from typing import Any

import numpy as np

NAMES = ("float32", "float64", "float16", "bfloat16")  # the last one is from ml_dtypes, which is never imported here


def is_supported(dtype: np.dtype[Any]) -> bool:
    """May a parameter have this dtype?"""
    return dtype.isnative and dtype.name in NAMES


def grad_dtypes(dtype: np.dtype[Any]) -> tuple[str, ...]:
    """The names of the dtypes that a parameter's gradient may have: the parameter's own, and halves for float32.

    Mixed precision produces these, and a half converts to float32 without rounding. A gradient wider than its parameter
    would cost more bytes than its precision is worth, and a narrower one would feed float64 with what float32 left of
    it: cast explicitly if you want that.
    """
    return ("float32", "float16", "bfloat16") if dtype == np.float32 else (dtype.name,)


class Bfloat16:
    """NumPy has bfloat16 only through ml_dtypes; this class is a type, and its instance a dtype, if that is absent."""

    name, itemsize, isnative = "bfloat16", 2, True

    @property
    def type(self) -> type:
        return Bfloat16

    def __str__(self) -> str:
        return self.name


_BFLOAT16: Any = Bfloat16()


def named(name: str) -> np.dtype[Any]:
    """The dtype with this name."""
    dtype: np.dtype[Any] = _BFLOAT16 if name == "bfloat16" else np.dtype(name)
    return dtype


def of(T: Any) -> np.dtype[Any]:
    """The dtype of a type from NumPy, from ml_dtypes, or ours."""
    dtype: np.dtype[Any] = _BFLOAT16 if T is Bfloat16 else np.dtype(T)
    return dtype


def type_of(dtype: np.dtype[Any]) -> Any:
    """The type that identifies kernels: a single one for bfloat16, wherever its dtype comes from."""
    return Bfloat16 if dtype.name == "bfloat16" else dtype.type


def compute_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype of arithmetic and state: the parameter's, but float32 for halves."""
    return np.dtype(np.float64) if dtype == np.float64 else np.dtype(np.float32)
