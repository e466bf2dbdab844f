"""The hyperparameters of a torch parameter group: torch's own and, behind them, those that torch does not have."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

import torch

from .. import hyper
from .rows import place

# torch's, as its function `rmsprop` takes them; what is beside them in a group is no number of the rule.
TORCHS = ("lr", "alpha", "eps", "weight_decay", "momentum", "centered", "maximize")
# Ours, with the values at which the rule is torch's.
OURS: dict[str, Any] = {
    "nesterov": False,
    "eps_in_sqrt": False,
    "lr_in_momentum": False,
    "initial_scale": 0.0,
    "bias_correction": False,
    "decoupled_weight_decay": False,
    "clipvalue": None,
    "clipnorm": None,
    "global_clipnorm": None,
    "skip_nonfinite": False,
    "square_avg_dtype": "float32",
    "store_param_remainders": False,
    "bf16_stochastic_round": False,
    "seed": 0,
}
# What the state is made for: a state that is loaded is converted.
FIXED = tuple(name for name in OURS if name in hyper.FIXED)
NEUTRAL = {"fused": None, **OURS}
# What RMSProp over arrays has beside them.
_ARRAYS = {name: hyper.SINCE[name] for name in ("use_ema", "ema_momentum")}

_NAN = float("nan")

# What of a group decides about a step, to be compared with that of the step before; the learning rate comes first.
SWITCHES = ("fused", "capturable", "differentiable")
values_of = itemgetter(*TORCHS, *OURS, *SWITCHES)


def checked(given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ours that are given, validated; more than one clip is refused."""
    fused = given.get("fused")
    if fused is not None and not isinstance(fused, bool):
        raise TypeError(f"fused is {fused!r} (a {type(fused).__name__}); wanted True, False or None")
    found = {name: hyper.checked(name, plain(given.get(name, neutral))) for name, neutral in OURS.items()}
    hyper.check_clips(found)
    return {"fused": fused, **found}


def switched_on(group: Mapping[str, Any]) -> list[str]:
    """The names of ours in this group that torch's rule does not have."""
    return [name for name, neutral in OURS.items() if group[name] != neutral and name != "seed"]


def number(x: Any) -> Any:
    """A number that may stand in a tensor, as a Python number."""
    return x.item() if isinstance(x, torch.Tensor) else x


def stored_otherwise(h: Mapping[str, Any]) -> bool:
    """Is anything of these parameters or of their second moment in another format than torch's?"""
    return any(h[name] != OURS[name] for name in (*FIXED, "bf16_stochastic_round"))


def plain(x: Any) -> Any:
    """A hyperparameter without torch: a dtype by its name, a number that may stand in a tensor."""
    return str(x).removeprefix("torch.") if isinstance(x, torch.dtype) else number(x)


class DeviceRate:
    """A learning rate that is a tensor on a device and is read there, in each step; it equals itself where it lies."""

    def __init__(self, lr: torch.Tensor) -> None:
        self.tensor, self._at = lr, (lr.data_ptr(), lr.dtype)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DeviceRate) and self.tensor is other.tensor and self._at == other._at

    __hash__ = None  # type: ignore[assignment]


def rate(group: Mapping[str, Any]) -> Any:
    """The learning rate of a group: a number, or where a graph may be captured a tensor that stays on its device."""
    lr = group["lr"]
    if group["capturable"] and isinstance(lr, torch.Tensor) and place(lr) is not None:
        return DeviceRate(lr)
    found = number(lr)
    is_nan = isinstance(found, float) and math.isnan(found)
    return _NAN if is_nan else found  # which equals itself where tuples are compared


def values(group: Mapping[str, Any]) -> tuple[Any, ...]:
    """What of a group decides about a step, its `rate` first."""
    return rate(group), *values_of(group)[1:]


def names_of(groups: Sequence[Mapping[str, Any]]) -> dict[int, str]:
    """What the parameters are called, by their ids: by name where the groups have names, else by place, the first."""
    names: dict[int, str] = {}
    for i, group in enumerate(groups):
        for j, p in enumerate(group["params"]):
            name = group["param_names"][j] if "param_names" in group else f"param_groups[{i}]['params'][{j}]"
            names.setdefault(id(p), name)
    return names


def keys_of(groups: Sequence[Mapping[str, Any]]) -> dict[int, str]:
    """By the ids of the parameters what `RMSProp` over arrays calls them: their names, else their numbers as text."""
    keys: dict[int, str] = {}
    number = 0
    for group in groups:
        for j, p in enumerate(group["params"]):
            keys.setdefault(id(p), group["param_names"][j] if "param_names" in group else str(number))
            number += 1
    return keys


def hypers(values: tuple[Any, ...]) -> dict[str, Any] | str:
    """The hyperparameters of a group as `hyper` has them, from its `values`; or why our kernels do not have them."""
    h = dict(zip((*TORCHS, *OURS, *SWITCHES), values, strict=True))
    if h.pop("fused") is False:
        return "fused=False"
    if h.pop("differentiable"):
        return "differentiable=True"
    del h["capturable"]  # it is of the place where a parameter is
    if isinstance(h["lr"], DeviceRate):
        h["lr"] = 0.0  # it is on the device
    try:
        for name, value in h.items():
            # torch asks of its switches only whether they are true.
            h[name] = bool(value) if name in ("centered", "maximize") else hyper.checked(name, plain(value))
        hyper.check_clips(h)
    except (TypeError, ValueError) as error:
        return str(error)
    return {**h, **_ARRAYS}
