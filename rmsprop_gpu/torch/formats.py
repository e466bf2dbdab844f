"""A second moment in codes, as torch tensors: converted from and to float32, and checked in state dicts.

Bit-identical to `state.formats`, with torch's operations.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch

from ..kernels.codes import BLOCK, INFINITE, LARGEST_BASE, QUIET_NAN, SHIFT8, SHIFT16
from ..state.kinds import MOMENTS, REMAINDER

CODES = {"uint16": torch.uint16, "uint8": torch.uint8}
BASE = MOMENTS["square_avg"]
# Besides the second moment: integer state that exists only for some formats and parameters.
INTEGERS = {BASE: torch.uint16, REMAINDER: torch.int16}


def format_of(x: torch.Tensor) -> str:
    """The format of this second moment."""
    return next((name for name, dtype in CODES.items() if x.dtype == dtype), "float32")


def blocks_of(numel: int) -> int:
    """How many bases there are for this many codes."""
    return -(-numel // BLOCK)


def decoded(codes: torch.Tensor, bases: torch.Tensor | None = None) -> torch.Tensor:
    """The float32 values that codes stand for; 8-bit codes have bases and are in C order."""
    if bases is None:
        return (codes.to(torch.int32) << SHIFT16).view(torch.float32)
    each = bases.to(torch.int32).repeat_interleave(BLOCK)[: codes.numel()].view(codes.shape)
    return ((codes.to(torch.int32) + each) << SHIFT8).view(torch.float32)


def coded(v: torch.Tensor, moment: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The codes nearest to values that are or become float32, and for 8-bit codes their bases."""
    floats = v.detach().to(torch.float32) + 0  # -0.0 is 0.0
    bits = floats.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    if moment == "uint16":
        return ((bits.clamp(max=QUIET_NAN) + (1 << (SHIFT16 - 1))) >> SHIFT16).to(torch.uint16), None
    flat = bits.reshape(-1)
    most = flat.new_zeros((blocks_of(flat.numel()) * BLOCK,), dtype=torch.int64)
    most[: flat.numel()] = torch.where(flat < INFINITE, flat, 0)
    bases = (((most.view(-1, BLOCK).amax(1) + ((1 << SHIFT8) - 1)) >> SHIFT8) - 255).clamp(min=0)
    each = bases.repeat_interleave(BLOCK)[: flat.numel()]
    codes = ((flat.clamp(max=INFINITE) + (1 << (SHIFT8 - 1)) - (each << SHIFT8)) >> SHIFT8).clamp(0, 255)
    return codes.to(torch.uint8).view(v.shape), bases.to(torch.uint16)


def problem(p: torch.Tensor, entry: Mapping[str, Any], moment: str) -> str | None:
    """Why a saved entry of a parameter cannot become its state if the second moment has this format."""
    x = entry.get("square_avg")
    if not isinstance(x, torch.Tensor):
        return None
    found = format_of(x)
    if found == "float32" and not (x.is_floating_point() or x.is_complex()):
        return f"square_avg has dtype {x.dtype}; wanted a float, or codes of {' or '.join(CODES)}"
    if found != "float32" and moment not in ("float32", found):
        return f"square_avg has codes of {found}; wanted {moment}, as this optimizer has them, or float32"
    if found == "uint8":
        bases = entry.get(BASE)
        if not isinstance(bases, torch.Tensor) or bases.dtype != torch.uint16:
            return "square_avg has codes of uint8 without the bases that belong to them"
        if bases.shape != (blocks_of(x.numel()),):
            return f"{BASE} has shape {tuple(bases.shape)}; wanted {(blocks_of(x.numel()),)}, a base per {BLOCK} codes"
        if bool((bases.to(torch.int32) > LARGEST_BASE).any()):
            return f"{BASE} has elements above {LARGEST_BASE}; wanted bases of codes"
    if (found != "float32" or moment != "float32") and x.shape != p.shape:
        return f"square_avg has shape {tuple(x.shape)}; wanted {tuple(p.shape)}"
    if found == "float32" != moment and bool((x < 0).any()):  # codes could no longer express that
        return "square_avg has elements below 0; wanted averages of squares"
    rest = entry.get(REMAINDER)
    if isinstance(rest, torch.Tensor) and (rest.dtype != torch.int16 or rest.shape != p.shape):
        return f"{REMAINDER} has {rest.dtype} with shape {tuple(rest.shape)}; wanted int16, {tuple(p.shape)}"
    return None


def converted(p: torch.Tensor, entry: Mapping[str, Any], moment: str, *, rests: bool) -> dict[str, torch.Tensor | None]:
    """The arrays of a saved entry that are, or will be, integers: copies on the parameter's device; None if dropped.

    The entry must have no `problem`.
    """
    made: dict[str, torch.Tensor | None] = {}
    x, rest = entry.get("square_avg"), entry.get(REMAINDER)
    if isinstance(x, torch.Tensor):
        bases = entry.get(BASE)
        found = format_of(x)
        if found == moment != "float32":
            made |= {"square_avg": _copy(x, p), BASE: None if bases is None else _copy(bases, p)}
        elif moment != "float32":
            made["square_avg"], made[BASE] = coded(_copy(x, p), moment)
        elif found != "float32":
            made["square_avg"] = decoded(_copy(x, p), _copy(bases, p) if found == "uint8" else None)
    if moment != "uint8" or not isinstance(x, torch.Tensor):
        made[BASE] = None
    if rest is not None:  # if the parameter now has another dtype, or is rounded, it means nothing
        made[REMAINDER] = _copy(rest, p) if rests else None
    return made


def pickled(state: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """A state for pickle, with uint16 as int16, since pickle cannot read torch's uint16 tensors."""
    return _viewed(state, torch.uint16, torch.int16)


def unpickled(state: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """The state that was `pickled`."""
    return _viewed(state, torch.int16, torch.uint16)


def _viewed(state: Mapping[Any, Any], dtype: torch.dtype, other: torch.dtype) -> Mapping[Any, Any]:
    found: dict[Any, dict[str, Any]] = {}
    for p, entry in state.items():
        views = {name: entry[name].view(other) for name in ("square_avg", BASE) if _has(entry, name, dtype)}
        if views:
            found[p] = {**entry, **views}
    return defaultdict(dict, {p: found.get(p, entry) for p, entry in state.items()}) if found else state


def _has(entry: Any, name: str, dtype: torch.dtype) -> bool:
    x = entry.get(name) if isinstance(entry, dict) else None
    return isinstance(x, torch.Tensor) and x.dtype == dtype


def _copy(x: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    return x.detach().to(p.device, copy=True)
