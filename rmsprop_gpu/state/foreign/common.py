"""What the readers of foreign states share: to which parameter an array belongs, and how it is checked and read."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ...arrays import dtypes
from ...arrays.checks import Problems, Tensor, a, plain_array
from ...arrays.real import one_real
from ...arrays.selector import is_cuda, kind_of
from ...kernels.table import BUFFERS
from ..kinds import layout_of, needed
from ..saved import VERSION, check_entry, where


class Mine(NamedTuple):
    """The optimizer that will continue the run: its class, and the parameters and hyperparameters of each group."""

    optimizer: str
    adagrad: bool
    members: list[list[Tensor]]
    hyper: list[dict[str, Any]]
    by_order: bool = False  # match by order, whatever the names

    @property
    def tensors(self) -> list[Tensor]:
        return [tensor for tensors in self.members for tensor in tensors]


class Entry(NamedTuple):
    """One array of a foreign state: its parameter, its place in words, and the array itself."""

    param: str
    label: str
    value: Any
    lr: float | None = None  # of its parameter, if the state has it
    at: tuple[int, ...] = ()  # its position in a tree


def empty(mine: Mine) -> dict[str, Any]:
    """A state dict without state and with our own hyperparameters."""
    groups = [
        {"params": [t.key for t in tensors], **h, "lr": None if callable(h["lr"]) else h["lr"]}
        for tensors, h in zip(mine.members, mine.hyper, strict=True)
    ]
    return {"optimizer": mine.optimizer, "version": VERSION, "steps": 0, "state": {}, "param_groups": groups}


# Prefixes that a wrapper (torch.compile, DataParallel) puts before all names of a model.
_PREFIXES = ("_orig_mod.", "module.")


def unwrapped(names: Sequence[str], among: Sequence[Any]) -> list[str]:
    """The names without the known prefixes that are shared by all names in `among`."""
    names, among = list(names), [name for name in among if not is_index(name)]
    while prefix := next((p for p in _PREFIXES if among and all(n.startswith(p) and n != p for n in among)), None):
        names, among = ([name.removeprefix(prefix) for name in them] for them in (names, among))
    return names


def order_of(
    names: Sequence[Any],
    keys: Sequence[str],
    label: str,
    mine: Mine,
    problems: Problems,
    among: Sequence[Any] = (),
    exact: bool = False,
) -> list[int]:
    """The foreign name for each of our keys: matched by name if both sides have names, else by order.

    Indices, from whatever list, do not count as names. `among` has the names of all groups. With `exact` the keys are
    foreign names too.
    """
    if len(names) != len(keys):
        problems.add(ValueError, f"{label} has {len(names)} parameters; wanted {len(keys)}")
        return []
    named = not all(map(is_index, names)) and not all(map(is_index, keys))
    if not exact and (mine.by_order or (not named and set(names) != set(keys))):
        return list(range(len(keys)))
    theirs, ours = list(map(str, names)), list(keys)
    if set(theirs) != set(ours) and not exact:
        theirs = unwrapped(theirs, among or names)
        ours = unwrapped(ours, [tensor.key for tensor in mine.tensors])
    if set(theirs) == set(ours) and len(set(ours)) == len(ours):
        return [theirs.index(key) for key in ours]
    found, wanted = ", ".join(map(repr, names)), ", ".join(map(repr, keys))
    problems.add(ValueError, f'{label} is of the parameters {found}; wanted {wanted}, or match="order"')
    return []


def is_index(name: Any) -> bool:
    """Is this the position of a parameter in a list, or in lists of lists, rather than a name?"""
    return not isinstance(name, str) or re.fullmatch(r"(\d+([/.]\d+)*)?", name) is not None


def buffers_of(h: Mapping[str, Any], mine: Mine) -> list[str]:
    """The buffers needed by these hyperparameters, which may not be validated yet."""
    names = needed({**h, "centered": bool(h.get("centered"))}, mine.adagrad)
    return [name for name in names if name in BUFFERS]


def counters(step: int, tensor: Tensor, h: Mapping[str, Any], mine: Mine) -> dict[str, Any]:
    """``step``, and ``bias_weight``: after that many steps a moving average of ones is 1 - alpha**step."""
    if mine.adagrad:
        return {"step": step}
    alpha = one_real(h["alpha"])
    # An invalid alpha is reported as a problem of the hyperparameters.
    weight = 1.0 - float(alpha) ** step if alpha is not None and 0 <= alpha < 1 else 0.0
    return {"step": step, "bias_weight": np.asarray(weight, dtypes.compute_dtype(tensor.layout.dtype))}


def readable(x: Any, device: int | None) -> Any:
    """A foreign array as a NumPy array, or as an array on a device if the parameter is on one."""
    if isinstance(x, np.ndarray):
        return x
    if hasattr(x, "detach") and hasattr(x, "cpu"):  # a tensor of torch
        x = x.detach()
        x = x.float() if "bfloat16" in str(x.dtype) else x  # NumPy and the CUDA array interface have no such dtype
        return x if device is not None and is_cuda(x) else x.cpu().numpy()
    if hasattr(x, "__array__") and not (device is not None and is_cuda(x)):
        try:
            return np.asarray(x)
        except TypeError:  # CuPy refuses implicit conversion
            return x
    return x


def taken(value: Any, label: str, name: str, tensor: Tensor, problems: Problems) -> Any:
    """An array of a foreign state, checked like ours; a narrower dtype is widened, which is exact."""
    try:
        x = readable(value, tensor.device)
    except Exception as error:  # whatever another library raises, for a sparse tensor or one without memory
        problems.add(TypeError, f"{label} is {a(type(value))} that does not hand out its memory ({error})")
        return None
    if kind_of(x) is not None:
        x = plain_array(x, label, problems)
        if x is None:
            return None
        want = dtypes.compute_dtype(tensor.layout.dtype)
        if dtypes.is_supported(x.dtype) and x.dtype.itemsize < want.itemsize:
            with where(x):
                x = x.astype(want)
    return None if check_entry(x, label, name, layout_of(tensor, name, "float32"), tensor, problems) is None else x


def number(value: Any, label: str, problems: Problems) -> float:
    try:
        return float(value)
    except Exception:  # whatever another library raises
        problems.add(TypeError, f"{label} is {a(type(value))}; wanted a number")
        return 0.0


def count(value: Any, label: str, problems: Problems) -> int:
    """A count, which torch stores as float32 and others as int32."""
    before = len(problems)
    x = number(value, label, problems)
    if len(problems) == before and not (math.isfinite(x) and 0 <= x < 2**62 and x == int(x)):
        problems.add(ValueError, f"{label} is {x!r}; wanted a count >= 0")
    return int(x) if len(problems) == before else 0


def check_counted(steps: int | None, mine: Mine, problems: Problems) -> None:
    """Refuse a state without a count if a hyperparameter needs it."""
    for i, h in enumerate(mine.hyper):
        wants = "bias_correction=True" if h.get("bias_correction") else "a callable lr" if callable(h["lr"]) else ""
        if steps is None and wants:
            problems.add(ValueError, f"state has no count, which {wants} in param_groups[{i}] needs; wanted steps=")


def agreed(count: int, label: str, steps: int | None, problems: Problems) -> int:
    """The count in a state; `steps`, given or found elsewhere in it, has to be the same."""
    if steps is not None and steps != count:
        problems.add(ValueError, f"{label} is {count}, but steps is {steps}; wanted one count")
    return count
