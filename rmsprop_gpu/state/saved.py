"""What a saved state has to be: its frame, and each array in it, validated before anything counts."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np

from ..arrays.checks import Problems, Tensor, plain_array
from ..arrays.interop import copied
from ..arrays.layout import Array, Layout, device_of
from ..arrays.selector import kind_of
from ..kernels.table import COUNTERS
from .kinds import layout_of

VERSION = 1  # of what state_dict returns


class LoadReport(NamedTuple):
    """What `load_state_dict` found: names that only the optimizer has, and names that only the dict has."""

    missing: list[str]
    unexpected: list[str]


def check_skipped(saved: Mapping[str, Any], problems: Problems) -> int:
    """The count of skipped steps in a state dict, which those of earlier versions lack."""
    x = saved.get("skipped_steps", 0)
    if kind_of(x) is not None and getattr(x, "shape", None) == () and x.dtype == np.int64:
        with where(x):
            x = int(x)
    if not isinstance(x, (int, np.integer)) or isinstance(x, bool) or not 0 <= x < 2**62:
        problems.add(TypeError, f'state_dict["skipped_steps"] is {_brief(x)}; wanted a count >= 0')
        return 0
    return int(x)


def check_state_dict(saved: Any, optimizer: str, problems: Problems) -> Mapping[str, Any]:
    """The frame of a state dict: which optimizer, which version, what stands where."""
    if not isinstance(saved, Mapping):
        problems.add(TypeError, f"state_dict is a {type(saved).__name__}; wanted a mapping, as state_dict() returns it")
        return {}
    kinds: dict[str, tuple[Any, str]] = {
        "state": (Mapping, "a mapping"),
        "param_groups": ((list, tuple), "a list"),
        "steps": ((int, np.integer), "a count >= 0"),
    }
    for name, (kind, wanted) in kinds.items():
        x: Any = saved.get(name)
        if not isinstance(x, kind) or isinstance(x, bool) or (name == "steps" and not 0 <= x < 2**62):
            problems.add(TypeError, f'state_dict["{name}"] is {_brief(x)}; wanted {wanted}')
    for name, want in (("optimizer", optimizer), ("version", VERSION)):
        x = saved.get(name)
        if type(x) is not type(want) or x != want:
            problems.add(ValueError, f'state_dict["{name}"] is {_brief(x)}; wanted {want!r}')
    return saved


def _brief(x: Any) -> str:
    return repr(x) if isinstance(x, (int, float, str, type(None))) else f"a {type(x).__name__}"


def _counter(x: object, dtype: np.dtype[Any]) -> object:
    """A plain number as an array of this dtype, where that has its value; else as it is."""
    whole = isinstance(x, (int, np.integer)) and not isinstance(x, bool) and abs(x) < 2**53
    if whole or (isinstance(x, (float, np.floating)) and dtype.kind == "f"):
        exact = np.float64(x)  # type: ignore[arg-type]  # a number, as was just asked
        with np.errstate(over="ignore"):
            rounded = exact.astype(dtype)
        if rounded.astype(np.float64) == exact:
            return np.asarray(rounded)
    return x


def check_entry(entry: object, label: str, name: str, tensor: Tensor, problems: Problems) -> Array | None:
    """One saved array, of the host or a device, of the shape and dtype that the state has; counters may be numbers.

    Returned as a copy where the parameter lies: it may be a view of the very state that is loaded.
    """
    layout = layout_of(tensor, name)
    if name in COUNTERS:
        entry = _counter(entry, layout.dtype)
    if kind_of(entry) is None:
        problems.add(TypeError, f"{label} is a {type(entry).__name__}; wanted a NumPy or CuPy array")
        return None
    x = plain_array(entry, label, problems)
    if x is None:
        return None
    with where(x):
        return _checked_entry(x, label, name, layout, tensor.device, problems)


def where(x: Array) -> AbstractContextManager[Any]:
    """The device of an array: what is asked of it there comes after what made it."""
    device = device_of(x)
    if device is None:
        return nullcontext()
    import cupy

    return cupy.cuda.Device(device)  # type: ignore[no-any-return]  # CuPy has no stubs


def _checked_entry(
    x: Array, label: str, name: str, layout: Layout, device: int | None, problems: Problems
) -> Array | None:
    if x.dtype != layout.dtype:
        problems.add(TypeError, f"{label} has dtype {x.dtype}; wanted {layout.dtype}, no value is rounded on loading")
    elif x.shape != layout.shape:
        problems.add(ValueError, f"{label} has shape {x.shape}; wanted {layout.shape}")
    elif name == "step" and not 0 <= x < 2**62:
        problems.add(ValueError, f"{label} is {x}; wanted a count >= 0")
    elif name not in ("step", "grad_avg", "momentum_buffer", "ema") and bool((x < 0).any()):
        problems.add(ValueError, f"{label} has elements below 0; wanted averages or sums of squares")
    else:
        return copied(x, device)
    return None
