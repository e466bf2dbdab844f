"""The hyperparameters of a torch parameter group: torch's own, followed by those that torch does not have."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

import torch

from .. import hyper
from .rows import place

# torch's, as in its function `rmsprop`; anything else in a group is not a number of the rule.
TORCHS = ("lr", "alpha", "eps", "weight_decay", "momentum", "centered", "maximize")
# Ours, with the values for which the rule is torch's.
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
# What the state is made for: loaded state is converted.
FIXED = tuple(name for name in OURS if name in hyper.FIXED)
NEUTRAL = {"fused": None, **OURS}
# What RMSProp over arrays has in addition.
_ARRAYS = {name: hyper.SINCE[name] for name in ("use_ema", "ema_momentum")}

_NAN = float("nan")

# The values of a group that determine a step, compared with those of the previous step; the learning rate comes first.
SWITCHES = ("fused", "capturable", "differentiable")
values_of = itemgetter(*TORCHS, *OURS, *SWITCHES)


def checked(given: Mapping[str, Any]) -> dict[str, Any]:
    """Our hyperparameters as given, validated; more than one kind of clipping is refused."""
    fused = given.get("fused")
    if fused is not None and not isinstance(fused, bool):
        raise TypeError(f"fused is {fused!r} (a {type(fused).__name__}); wanted True, False or None")
    found = {name: hyper.checked(name, plain(given.get(name, neutral))) for name, neutral in OURS.items()}
    hyper.check_clips(found)
    return {"fused": fused, **found}


def switched_on(group: Mapping[str, Any]) -> list[str]:
    """The names of our hyperparameters in use in this group that torch's rule does not have."""
    return [name for name, neutral in OURS.items() if group[name] != neutral and name != "seed"]


def number(x: Any) -> Any:
    """A number, which may be in a tensor, as a Python number."""
    return x.item() if isinstance(x, torch.Tensor) else x


def stored_otherwise(h: Mapping[str, Any]) -> bool:
    """Does any of these parameters or their second moments have a format other than torch's?"""
    return any(h[name] != OURS[name] for name in (*FIXED, "bf16_stochastic_round"))


def plain(x: Any) -> Any:
    """A hyperparameter without torch types: a dtype as its name, a number out of its tensor."""
    return str(x).removeprefix("torch.") if isinstance(x, torch.dtype) else number(x)


class DeviceRate:
    """A learning rate tensor on a device, read there in each step; it equals another one with the same memory."""

    def __init__(self, lr: torch.Tensor) -> None:
        self.tensor, self._at = lr, (lr.data_ptr(), lr.dtype)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DeviceRate) and self.tensor is other.tensor and self._at == other._at

    __hash__ = None  # type: ignore[assignment]


def rate(group: Mapping[str, Any]) -> Any:
    """The learning rate of a group: a number, or, if a graph may be captured, a tensor that stays on its device."""
    lr = group["lr"]
    if group["capturable"] and isinstance(lr, torch.Tensor) and place(lr) is not None:
        return DeviceRate(lr)
    found = number(lr)
    is_nan = isinstance(found, float) and math.isnan(found)
    return _NAN if is_nan else found  # one object, which equals itself when tuples are compared


def values(group: Mapping[str, Any]) -> tuple[Any, ...]:
    """The values of a group that determine a step, its `rate` first."""
    return rate(group), *values_of(group)[1:]


def names_of(groups: Sequence[Mapping[str, Any]]) -> dict[int, str]:
    """The names of the parameters, by id: their own if the groups have names, else their first position."""
    names: dict[int, str] = {}
    for i, group in enumerate(groups):
        own = _names_in(group)
        for j, p in enumerate(group["params"]):
            names.setdefault(id(p), own[j] if own else f"param_groups[{i}]['params'][{j}]")
    return names


def keys_of(groups: Sequence[Mapping[str, Any]]) -> dict[int, str]:
    """The keys of the parameters in `RMSProp` over arrays, by id: their names, or else their numbers as text."""
    keys: dict[int, str] = {}
    number = 0
    for group in groups:
        own = _names_in(group)
        for j, p in enumerate(group["params"]):
            keys.setdefault(id(p), own[j] if own else str(number))
            number += 1
    return keys


def _names_in(group: Mapping[str, Any]) -> Sequence[str]:
    """The names of a group's parameters, or none if other code changed its parameters without their names."""
    names = group.get("param_names")
    return names if isinstance(names, (list, tuple)) and len(names) == len(group["params"]) else ()


def hypers(values: tuple[Any, ...]) -> dict[str, Any] | str:
    """The hyperparameters of a group in the form of `hyper`, from its `values`; or why our kernels do not have them."""
    h = dict(zip((*TORCHS, *OURS, *SWITCHES), values, strict=True))
    if h.pop("fused") is False:
        return "fused=False"
    if h.pop("differentiable"):
        return "differentiable=True"
    del h["capturable"]  # it matters only for the place of a parameter
    if isinstance(h["lr"], DeviceRate):
        h["lr"] = 0.0  # it is on the device
    try:
        for name, value in h.items():
            # torch only tests its switches for truth.
            h[name] = bool(value) if name in ("centered", "maximize") else hyper.checked(name, plain(value))
        hyper.check_clips(h)
    except (TypeError, ValueError) as error:
        return str(error)
    return {**h, **_ARRAYS}
