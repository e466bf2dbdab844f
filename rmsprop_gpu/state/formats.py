"""The formats of a second moment, on arrays: codes to float32 exactly, float32 to codes by rounding to nearest.

The arrays are NumPy's or CuPy's. For the codes see kernels/codes.py; in a step the kernels make them, with dither.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..arrays.checks import Problems, Tensor
from ..arrays.layout import Array
from ..kernels.codes import BLOCK, INFINITE, QUIET_NAN, SHIFT8, SHIFT16
from .kinds import MOMENTS, layout_of
from .pieces import Stored
from .saved import check_entry


def decoded(codes: Array, bases: Array | None = None) -> Array:
    """The float32 values that codes of any shape stand for; 8-bit codes have bases and are in C order."""
    bits = codes.reshape(-1).astype(np.uint32)  # of a 0-d array NumPy would return scalars
    if bases is None:
        return (bits << SHIFT16).view(np.float32).reshape(codes.shape)
    each = bases.astype(np.uint32).repeat(BLOCK)[: codes.size]
    return ((bits + each) << SHIFT8).view(np.float32).reshape(codes.shape)


def coded(v: Array, moment: str) -> tuple[Array, Array | None]:
    """The codes nearest to float32 values of any shape, and for 8-bit codes their bases."""
    bits = (v.reshape(-1).astype(np.float32) + np.float32(0)).view(np.uint32)  # -0.0 is 0.0
    if moment == "uint16":
        half = np.uint32(1 << (SHIFT16 - 1))
        return ((bits.clip(None, QUIET_NAN) + half) >> SHIFT16).astype(np.uint16).reshape(v.shape), None
    flat = bits.astype(np.int64)
    blocks = -(-flat.size // BLOCK)
    finite = np.zeros_like(flat, shape=(blocks * BLOCK,))  # NumPy's or CuPy's
    finite[: flat.size] = flat * (flat < INFINITE)
    most = finite.reshape(blocks, BLOCK).max(axis=1) if blocks else finite
    bases = (((most + ((1 << SHIFT8) - 1)) >> SHIFT8) - 255).clip(0, None)
    each = bases.repeat(BLOCK)[: flat.size]
    codes = ((flat.clip(None, INFINITE) + (1 << (SHIFT8 - 1)) - (each << SHIFT8)) >> SHIFT8).clip(0, 255)
    return codes.astype(np.uint8).reshape(v.shape), bases.astype(np.uint16)


def joined(p: Array, rest: Array) -> Array:
    """The float32 values of bfloat16 parameters and their remainders, as the kernels join them."""
    rest = rest.astype(np.uint32)
    bits = (p.view(np.uint16).astype(np.uint32) << 16) + rest
    nan = (bits & 0x7FFFFFFF) > INFINITE  # here the remainder is ignored
    return (bits - rest * nan).view(np.float32)


def in_format(
    entry: Mapping[str, Any], moment: str, tensor: Tensor, label: str, problems: Problems
) -> Mapping[str, Any]:
    """A saved entry of a parameter, with its second moment converted to this format from whichever it was saved in.

    Missing or surplus arrays are left as they are, for later checks.
    """
    kind = next((kind for kind in MOMENTS if kind in entry), None)
    if kind is None:
        return entry
    base, saved = MOMENTS[kind], entry[kind]
    theirs = str(getattr(saved, "dtype", ""))
    if theirs == moment or theirs not in ("float32", "uint16", "uint8"):
        return entry
    if "float32" not in (theirs, moment):
        problems.add(
            ValueError,
            f'{label}["{kind}"] has codes of {theirs}; wanted {moment}, as this optimizer has them, or float32',
        )
        return {name: x for name, x in entry.items() if name not in (kind, base)}
    if saved.shape != tensor.layout.shape:
        return entry
    rest = {name: x for name, x in entry.items() if name not in (kind, base)}
    values = _read(saved)
    if theirs == "float32" and bool((values < 0).any()):  # codes could no longer express that
        problems.add(ValueError, f'{label}["{kind}"] has elements below 0; wanted averages or sums of squares')
        return rest
    if moment != "float32":
        codes, bases = coded(values, moment)
        return {**rest, kind: codes, **({} if bases is None else {base: bases})}
    if theirs == "uint16":
        return {**entry, kind: decoded(values)}
    if base not in entry:
        problems.add(ValueError, f'{label}["{kind}"] has codes of uint8 without the bases that belong to them')
        return rest
    layout = layout_of(tensor, base, theirs)
    if check_entry(entry[base], f'{label}["{base}"]', base, layout, tensor, problems) is None:
        return rest
    return {**rest, kind: decoded(values, _read(entry[base]))}


def _read(x: Any) -> Array:
    if not isinstance(x, Stored):
        return x
    made = np.empty(x.shape, x.dtype)
    x.read_into(made)
    return made
