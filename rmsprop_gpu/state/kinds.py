"""What is kept for a parameter: which buffers its hyperparameters need, and how each lies in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..arrays.checks import Tensor
from ..arrays.dtypes import compute_dtype
from ..arrays.layout import Layout
from ..kernels.table import BUFFERS, COUNTERS


def needed(h: Mapping[str, Any], adagrad: bool) -> list[str]:
    """The names of the state that these hyperparameters need."""
    names = ["step", "sum"] if adagrad else ["step", "bias_weight", "square_avg"]
    if not adagrad:
        names += ["grad_avg"] * h["centered"] + ["momentum_buffer"] * bool(h["momentum"])
    return names + ["ema"] * h["use_ema"]


def layout_of(tensor: Tensor, name: str) -> Layout:
    """How this buffer of a parameter lies."""
    dtype = dtype_of(tensor.layout.dtype, name)
    return tensor.layout.of(dtype) if name in BUFFERS else Layout((), (), dtype, 0)


def is_counter(name: str) -> bool:
    """Is this one number of a parameter, rather than one of each element?"""
    return name in COUNTERS


def dtype_of(dtype: np.dtype[Any], name: str) -> np.dtype[Any]:
    """What this buffer has for a parameter of this dtype."""
    return np.dtype(np.int64) if name == "step" else compute_dtype(dtype)
