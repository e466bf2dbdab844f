"""The selector: which backend an array belongs to, which backends work here, and why one does not."""

from __future__ import annotations

import os
import sys
from types import ModuleType

import numpy as np

CUDA_MISSING = (
    'CuPy arrays need the extra cuda12 or cuda13 (pip install "rmsprop-gpu[cuda13]") and the CUDA backend, '
    "which this version of rmsprop_gpu does not have yet; on the CPU use NumPy arrays"
)


def refuse_cuda(x: object) -> str | None:
    """Why this CUDA array cannot be used; None for whatever is not one. The array is asked, no library is imported."""
    try:
        interface = getattr(x, "__cuda_array_interface__", None)
    except Exception:  # torch's for a CUDA tensor that requires grad: it has one, and does not hand it out
        return CUDA_MISSING
    return None if interface is None else CUDA_MISSING


def is_masked(x: object) -> bool:
    """Is this a masked array? Asked of sys.modules: there is none where numpy.ma, which NumPy loads late, is not."""
    return "numpy.ma" in sys.modules and isinstance(x, np.ma.MaskedArray)


def backend_of(array: object) -> str:
    """The backend that updates this array: ``"cpu"`` for NumPy arrays.

    Parameters
    ----------
    array : array
        It is only looked at; nothing is copied or moved.

    Raises
    ------
    TypeError
        For a CUDA array, with what is missing, and for anything that is not an array.

    Examples
    --------
    >>> import numpy as np
    >>> backend_of(np.zeros(3))
    'cpu'
    """
    if isinstance(array, np.ndarray) and not is_masked(array):
        return "cpu"
    kind = f"{type(array).__module__}.{type(array).__qualname__}"
    refusal = refuse_cuda(array)
    raise TypeError(f"{kind}: {refusal}" if refusal else f"{kind} is not an array that can be updated; wanted NumPy's")


def available_backends() -> dict[str, str]:
    """What works here: ``{"cpu": "...", "cuda": "..."}``, where one does not, why not and what to install.

    Examples
    --------
    >>> available_backends()["cpu"]  # doctest: +ELLIPSIS
    'NumPy arrays, ... cores'
    """
    return {"cpu": f"NumPy arrays, {_cores()} cores", "cuda": f"not available: {CUDA_MISSING}"}


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def array_module(device: str = "auto") -> ModuleType:
    """The module to make arrays with: CuPy where a CUDA device works, else NumPy.

    Parameters
    ----------
    device : {"auto", "cpu", "cuda"}
        ``"cpu"`` and ``"cuda"`` insist.

    Raises
    ------
    RuntimeError
        ``"cuda"`` where it does not work, with the reason and what to install.

    Examples
    --------
    >>> array_module("cpu").__name__
    'numpy'
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f'device is {device!r}; wanted "auto", "cpu" or "cuda"')
    if device == "cuda":
        raise RuntimeError(CUDA_MISSING)
    return np
