"""What is kept for a parameter: which buffers its hyperparameters need, and the memory layout of each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from .. import hyper
from ..arrays.checks import Tensor
from ..arrays.dtypes import compute_dtype
from ..arrays.layout import Layout
from ..kernels.codes import BLOCK
from ..kernels.table import BUFFERS, COUNTERS

MOMENTS = {"square_avg": "square_avg_base", "sum": "sum_base"}  # each with the bases of its 8-bit codes
BASES = tuple(MOMENTS.values())
REMAINDER = "param_remainder"


def needed(h: Mapping[str, Any], adagrad: bool, dtype: np.dtype[Any] | None = None) -> list[str]:
    """The names of the state that these hyperparameters need for a parameter of this dtype."""
    variant = hyper.variant(h, adagrad, dtype=dtype)
    names = ["step", "sum"] if adagrad else ["step", "bias_weight", "square_avg"]
    names += [MOMENTS[names[-1]]] * variant.uint8
    if not adagrad:
        names += ["grad_avg"] * h["centered"] + ["momentum_buffer"] * bool(h["momentum"])
    return names + ["ema"] * h["use_ema"] + [REMAINDER] * variant.remainder


def layout_of(tensor: Tensor, name: str, moment: str) -> Layout:
    """The layout of this buffer of a parameter if the second moment is stored in this format."""
    dtype = dtype_of(tensor.layout.dtype, name, moment)
    if name in BASES:
        blocks = -(-tensor.layout.size // BLOCK)
        return Layout((blocks,), (dtype.itemsize,), dtype, 0)
    return tensor.layout.of(dtype) if name in BUFFERS else Layout((), (), dtype, 0)


def is_counter(name: str) -> bool:
    """Is this state a single number, whatever the parameter's shape?"""
    return name in COUNTERS


def dtypes_of(dtype: np.dtype[Any], name: str) -> list[np.dtype[Any]]:
    """The dtypes that this state may have for a parameter of this dtype, depending on the second moment's format."""
    formats = hyper.FORMATS if name in MOMENTS and compute_dtype(dtype) == np.float32 else hyper.FORMATS[:1]
    return [dtype_of(dtype, name, moment) for moment in formats]


def elements_of(shape: tuple[int, ...], name: str) -> int:
    """How many elements this state has for a parameter of this shape; a counter has no elements of its own."""
    size = math.prod(shape)
    return -(-size // BLOCK) if name in BASES else size


def dtype_of(dtype: np.dtype[Any], name: str, moment: str) -> np.dtype[Any]:
    """The dtype of this state for a parameter of this dtype."""
    if name in MOMENTS and moment != "float32":
        return np.dtype(moment)
    if name in BASES:
        return np.dtype(np.uint16)
    if name == REMAINDER:
        return np.dtype(np.int16)
    return np.dtype(np.int64) if name == "step" else compute_dtype(dtype)
