"""What is kept for a parameter: which buffers its hyperparameters need, and how each lies in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..arrays.checks import Tensor
from ..arrays.dtypes import compute_dtype
from ..arrays.layout import Layout
from ..kernels.table import BUFFERS


def needed(h: Mapping[str, Any], adagrad: bool) -> list[str]:
    """The names of the state that these hyperparameters need."""
    names = ["step", "sum"] if adagrad else ["step", "bias_weight", "square_avg"]
    if not adagrad:
        names += ["grad_avg"] * h["centered"] + ["momentum_buffer"] * bool(h["momentum"])
    return names + ["ema"] * h["use_ema"]


def layout_of(tensor: Tensor, name: str) -> Layout:
    """How this buffer of a parameter lies."""
    compute = compute_dtype(tensor.layout.dtype)
    if name in BUFFERS:
        return tensor.layout.of(compute)
    return Layout((), (), np.dtype(np.int64) if name == "step" else compute, 0)
