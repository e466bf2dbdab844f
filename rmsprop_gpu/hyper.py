"""The user's hyperparameters, validated at the edge, and what they mean to a kernel: a Variant and a row of scalars."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np

from .rule import Scalars, Variant

Schedule: TypeAlias = Callable[[int], float]

_AT_LEAST_0 = ("a finite number >= 0", lambda x: 0 <= x < math.inf)
_NUMBERS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "lr": _AT_LEAST_0,
    "alpha": ("a number with 0 <= alpha < 1", lambda x: 0 <= x < 1),
    "eps": _AT_LEAST_0,
    "weight_decay": _AT_LEAST_0,
    "momentum": ("a number with 0 <= momentum <= 1", lambda x: 0 <= x <= 1),
    "initial_scale": _AT_LEAST_0,
    "clipvalue": ("None or a number >= 0", lambda x: x >= 0),
}
_MAY_BE_NONE = ("weight_decay", "clipvalue")
_FLAGS = (
    "centered",
    "nesterov",
    "eps_in_sqrt",
    "lr_in_momentum",
    "bias_correction",
    "decoupled_weight_decay",
    "maximize",
)
# The hyperparameters of each optimizer, in the order of its arguments.
RMSPROP = (
    "lr", "alpha", "eps", "weight_decay", "momentum", "centered", "nesterov", "eps_in_sqrt", "lr_in_momentum",
    "initial_scale", "bias_correction", "decoupled_weight_decay", "maximize", "clipvalue",
    "clipnorm", "global_clipnorm", "skip_nonfinite",
)  # fmt: skip  # a table, read as one
ADAGRAD = tuple(
    name for name in RMSPROP
    if name not in ("alpha", "momentum", "centered", "nesterov", "lr_in_momentum", "bias_correction")
)  # fmt: skip
NEUTRAL = {"initial_scale": 0.0, "bias_correction": False, "skip_nonfinite": False}  # None where not named
_LATER = {"clipnorm": None, "global_clipnorm": None, "skip_nonfinite": False, "grad_scale": None, "found_inf": None}


def refuse_later(**arguments: object) -> None:
    """Refuse what the interface names and this version cannot do yet, unless it is at its neutral value."""
    for name, value in arguments.items():
        if value is not _LATER[name]:
            raise NotImplementedError(f"{name} is not implemented yet; wanted {name}={_LATER[name]}")


def number(name: str, value: object) -> float | None:
    """A hyperparameter that is a number, as a float; None where that means "off"."""
    wanted, allowed = _NUMBERS[name]
    if value is None and name in _MAY_BE_NONE:
        return None if name == "clipvalue" else 0.0
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} is {value!r} (a {type(value).__name__}); wanted {wanted}")
    try:
        x = float(value)
    except OverflowError:  # a whole number or fraction beyond all floats
        x = math.inf if value > 0 else -math.inf  # type: ignore[operator]  # all real numbers compare
    if not allowed(x):
        raise ValueError(f"{name} is {_written(value)}; wanted {wanted}")
    if x == 0 and value != 0 and name == "eps":
        raise ValueError(f"eps is {_written(value)}, which is 0 in float64; wanted 0 itself or a larger number")
    return x


def _written(value: object) -> str:
    """The repr of a value; Python refuses that of an integer of thousands of digits."""
    try:
        return repr(value)
    except ValueError:
        return f"a number too long to be written ({type(value).__name__})"


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} is {value!r} (a {type(value).__name__}); wanted True or False")
    return bool(value)


def checked(name: str, value: object) -> Any:
    """One hyperparameter, validated; a callable is a schedule where `name` is ``lr``."""
    if name in _LATER:
        refuse_later(**{name: value})
        return value
    if name == "lr" and callable(value):
        return value
    return _flag(name, value) if name in _FLAGS else number(name, value)


def lr_at(lr: float | Schedule, step: int) -> float:
    """The learning rate of a step, asked of a schedule and validated where it is one."""
    if not callable(lr):
        return lr
    x = lr(step)
    try:
        return number("lr", x)  # type: ignore[return-value]  # only weight_decay and clipvalue may be None
    except (TypeError, ValueError) as error:
        raise type(error)(f"lr({step}): {error}") from None


def variant(h: Mapping[str, Any], adagrad: bool) -> Variant:
    """The compile-time switches, normalised: what has no effect is off, so that it shares its kernel."""
    eps, decay, momentum = h["eps"] != 0, bool(h["weight_decay"]), bool(h.get("momentum"))
    return Variant(
        adagrad=adagrad,
        scale=h["maximize"],
        clipvalue=bool(h["clipvalue"]),
        weight_decay=decay and not h["decoupled_weight_decay"],
        decoupled_weight_decay=decay and h["decoupled_weight_decay"],
        centered=h.get("centered", False),
        bias_correction=h.get("bias_correction", False),
        eps=eps,
        eps_in_sqrt=eps and h["eps_in_sqrt"],
        momentum=momentum,
        nesterov=momentum and h["nesterov"],
        lr_in_momentum=momentum and h["lr_in_momentum"],
    )


def scalars(h: Mapping[str, Any], lr: float, dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """The row of scalars of a step: computed in float64, rounded once to the compute type.

    Raises
    ------
    ValueError
        A number that means something else once it is rounded: an `eps` that becomes 0, an `alpha` that becomes 1,
        anything finite that becomes infinite.
    """
    alpha, decay = h.get("alpha", 0.0), h["weight_decay"]
    exact = Scalars(
        lr=lr,
        alpha=alpha,
        one_minus_alpha=1.0 - alpha,
        eps=h["eps"],
        weight_decay=decay,
        lr_times_decay=lr * decay if h["decoupled_weight_decay"] else 0.0,
        momentum=h.get("momentum", 0.0),
        clipvalue=h["clipvalue"] or math.inf,
        scale=-1.0 if h["maximize"] else 1.0,
    )
    with np.errstate(over="ignore", under="ignore"):
        row = np.array(exact, np.float64).astype(dtype)
    rounded = Scalars(*row.tolist())
    if h["eps"] != 0 and rounded.eps == 0:
        raise ValueError(f"eps is {h['eps']!r}, which is 0 in {dtype}; wanted 0 itself or a larger number")
    if h["clipvalue"] and rounded.clipvalue == 0:
        raise ValueError(f"clipvalue is {h['clipvalue']!r}, which is 0 in {dtype}; wanted None or a larger number")
    if rounded.alpha == 1:
        raise ValueError(f"alpha is {alpha!r}, which is 1 in {dtype}; wanted alpha < 1 after rounding")
    largest = float(np.finfo(dtype).max)
    for name, value in {**exact._asdict(), "initial_scale": h["initial_scale"]}.items():
        if value > largest and name != "clipvalue":  # an infinite clip is none
            said = "lr * weight_decay" if name == "lr_times_decay" else name
            raise ValueError(f"{said} is {value!r}, which is infinite in {dtype}; wanted a smaller number")
    return row
