"""What a saved state has to look like: its frame and each array in it, validated before anything changes."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np

from ..arrays.checks import Problems, Tensor, plain_array
from ..arrays.interop import copied
from ..arrays.layout import Array, Layout, device_of
from ..arrays.real import one_real, whole
from ..arrays.selector import kind_of
from ..kernels.codes import LARGEST_BASE
from ..kernels.table import COUNTERS
from .flat import is_flat, unflattened
from .kinds import BASES
from .pieces import Stored

VERSION = 1  # of the format that state_dict returns


class LoadReport(NamedTuple):
    """What `load` and `load_state_dict` return: the names of parameters that were not loaded.

    ``missing`` lists those that only the optimizer has, ``unexpected`` those that only the saved state has. Both are
    empty unless ``strict=False``.

    Examples
    --------
    >>> import numpy as np
    >>> from rmsprop_gpu import RMSProp
    >>> saved = RMSProp({"w": np.ones(2), "old": np.ones(2)}).state_dict()
    >>> report = RMSProp({"w": np.ones(2), "new": np.ones(2)}).load_state_dict(saved, strict=False)
    >>> report.missing, report.unexpected
    (['new'], ['old'])
    """

    missing: list[str]
    unexpected: list[str]


def check_skipped(saved: Mapping[str, Any], problems: Problems) -> int:
    """The count of skipped steps in a state dict; earlier versions do not have it."""
    return _count(saved.get("skipped_steps", 0), "skipped_steps", problems)


def _count(x: Any, name: str, problems: Problems) -> int:
    """A count in a state dict, given as any kind of number: npz makes 0-d arrays of them, others int32."""
    count = whole(x)
    if count is None or not 0 <= count < 2**62:
        problems.add(TypeError, f'state_dict["{name}"] is {_brief(x)}; wanted a count >= 0')
        return 0
    return count


def check_state_dict(saved: Any, optimizer: str, problems: Problems) -> Mapping[str, Any]:
    """Check the frame of a state dict: which optimizer, which version, which entries."""
    before = len(problems)
    if not isinstance(saved, Mapping):
        problems.add(TypeError, f"state_dict is a {type(saved).__name__}; wanted a mapping, as state_dict() returns it")
        return {}
    if is_flat(saved):
        saved = unflattened(saved, problems)
        if len(problems):
            return {}
    kinds: dict[str, tuple[Any, str]] = {
        "state": (Mapping, "a mapping"),
        "param_groups": ((list, tuple), "a list"),
    }
    for name, (kind, wanted) in kinds.items():
        x: Any = saved.get(name)
        if not isinstance(x, kind):
            problems.add(TypeError, f'state_dict["{name}"] is {_brief(x)}; wanted {wanted}')
    x = saved.get("optimizer")
    if not isinstance(x, str) or x != optimizer:
        problems.add(ValueError, f'state_dict["optimizer"] is {_brief(x)}; wanted {optimizer!r}')
    x = saved.get("version")
    if whole(x) != VERSION:
        problems.add(ValueError, f'state_dict["version"] is {_brief(x)}; wanted {VERSION!r}')
    sound = len(problems) == before  # otherwise its content would be misinterpreted
    steps = _count(saved.get("steps"), "steps", problems)
    return {**saved, "steps": steps} if sound else {}


def _brief(x: Any) -> str:
    return repr(x) if isinstance(x, (int, float, str, type(None))) else f"a {type(x).__name__}"


def _counter(x: object, dtype: np.dtype[Any]) -> object:
    """One real number as an array of this dtype if that can hold its value; otherwise returned unchanged.

    A count may be an array of any integer dtype; a weight given as an array must have the right dtype, like averages.
    """
    if kind_of(x) is not None and (dtype.kind == "f" or str(getattr(x, "dtype", "")) == str(dtype)):
        return x  # on a device, so that the host need not wait
    found = one_real(x)
    if found is not None and (dtype.kind == "f" or isinstance(found, numbers.Integral)):
        try:
            exact = np.float64(float(found))
        except (OverflowError, ValueError):
            return x
        with np.errstate(over="ignore", invalid="ignore"):
            rounded = exact.astype(dtype)
        if exact == found and rounded.astype(np.float64) == exact:
            return np.asarray(rounded)
    return x


def check_entry(
    entry: object, label: str, name: str, layout: Layout, tensor: Tensor, problems: Problems
) -> Array | Stored | None:
    """One saved array, on the host or a device, with the shape and dtype of the state; counters may be numbers.

    It is returned as a copy in the place of the parameter, since it may be a view of the very state being loaded.
    Arrays in a file stay there.
    """
    if isinstance(entry, Stored):
        right = _has_form(entry, label, layout, problems) and _has_range(entry.values(), label, name, problems)
        return entry if right else None
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
    """The device of an array: work on it there comes after the work that made it."""
    device = device_of(x)
    if device is None:
        return nullcontext()
    import cupy

    return cupy.cuda.Device(device)  # type: ignore[no-any-return]  # CuPy has no stubs


def _checked_entry(
    x: Array, label: str, name: str, layout: Layout, device: int | None, problems: Problems
) -> Array | None:
    right = _has_form(x, label, layout, problems) and _has_range([x], label, name, problems)
    return copied(x, device) if right else None


def _has_form(x: Array | Stored, label: str, layout: Layout, problems: Problems) -> bool:
    if x.dtype != layout.dtype:
        problems.add(TypeError, f"{label} has dtype {x.dtype}; wanted {layout.dtype}, since loading rounds no value")
    if x.shape != layout.shape:
        problems.add(ValueError, f"{label} has shape {x.shape}; wanted {layout.shape}")
    return bool(x.dtype == layout.dtype and x.shape == layout.shape)


def _has_range(parts: Iterable[Array], label: str, name: str, problems: Problems) -> bool:
    """Are all elements of these parts of an array in the valid range? For momentum, for example, any number is."""
    if name in ("grad_avg", "momentum_buffer", "ema", "param_remainder"):
        return True
    before = len(problems)
    for x in parts:
        if name == "step" and not 0 <= x.item() < 2**62:
            problems.add(ValueError, f"{label} is {x.item()}; wanted a count >= 0")
        elif name in BASES and bool((x > LARGEST_BASE).any()):
            problems.add(ValueError, f"{label} has elements above {LARGEST_BASE}; wanted bases of codes")
            break
        elif name != "step" and bool((x < 0).any()):
            problems.add(ValueError, f"{label} has elements below 0; wanted averages or sums of squares")
            break
    return len(problems) == before
