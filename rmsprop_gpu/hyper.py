"""The user's hyperparameters, validated on entry, and what they mean to a kernel: a Variant and a row of scalars."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from .arrays.real import one_real, whole
from .kernels.rule import Scalars, Variant

Schedule: TypeAlias = Callable[[int], float]

_AT_LEAST_0 = ("a finite number >= 0", lambda x: 0 <= x < math.inf)
_CLIP = ("None or a number >= 0", lambda x: x >= 0)
_NUMBERS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "lr": _AT_LEAST_0,
    "alpha": ("a number with 0 <= alpha < 1", lambda x: 0 <= x < 1),
    "eps": _AT_LEAST_0,
    "weight_decay": _AT_LEAST_0,
    "momentum": ("a number with 0 <= momentum <= 1", lambda x: 0 <= x <= 1),
    "initial_scale": _AT_LEAST_0,
    "clipvalue": _CLIP,
    "clipnorm": _CLIP,
    "global_clipnorm": _CLIP,
    "ema_momentum": ("a number with 0 <= ema_momentum <= 1", lambda x: 0 <= x <= 1),
}
CLIPS = ("clipvalue", "clipnorm", "global_clipnorm")
# Decided for the step as a whole, so the same in all groups.
SHARED = ("global_clipnorm", "skip_nonfinite")
_FLAGS = (
    "centered",
    "nesterov",
    "eps_in_sqrt",
    "lr_in_momentum",
    "bias_correction",
    "decoupled_weight_decay",
    "maximize",
    "skip_nonfinite",
    "use_ema",
    "store_param_remainders",
    "bf16_stochastic_round",
)
# How the second moment may be stored.
FORMATS = ("float32", "uint16", "uint8")
_MOMENTS = ("square_avg_dtype", "sum_dtype")
# What the state is made for, which cannot change afterwards.
FIXED = (*_MOMENTS, "store_param_remainders")
_LARGEST_FLOAT32 = float(np.finfo(np.float32).max)
# The hyperparameters of each optimizer, in the order of its arguments.
RMSPROP = (
    "lr", "alpha", "eps", "weight_decay", "momentum", "centered", "nesterov", "eps_in_sqrt", "lr_in_momentum",
    "initial_scale", "bias_correction", "decoupled_weight_decay", "maximize", "clipvalue",
    "clipnorm", "global_clipnorm", "skip_nonfinite", "use_ema", "ema_momentum",
    "square_avg_dtype", "store_param_remainders", "bf16_stochastic_round", "seed",
)  # fmt: skip  # a table, read as one
ADAGRAD = tuple(
    "sum_dtype" if name == "square_avg_dtype" else name for name in RMSPROP
    if name not in ("alpha", "momentum", "centered", "nesterov", "lr_in_momentum", "bias_correction")
)  # fmt: skip
ALL = (*RMSPROP, "sum_dtype")
# What may be missing from older state dicts, written before it existed.
_STORED = {"store_param_remainders": False, "bf16_stochastic_round": False, "seed": 0}
SINCE = {
    "use_ema": False, "ema_momentum": 0.99,
    "square_avg_dtype": "float32", "sum_dtype": "float32", **_STORED,
}  # fmt: skip
# Off in the update of a single tensor, which does not have them.
NEUTRAL = {
    "initial_scale": 0.0, "bias_correction": False, "skip_nonfinite": False, "use_ema": False, "ema_momentum": 0.0,
    "square_avg_dtype": "float32", "sum_dtype": "float32", **_STORED,
}  # fmt: skip  # None if not listed


class Asked(NamedTuple):
    """What a step's own arguments require of its kernels."""

    told: bool = False
    scaled: bool = False
    zero_grads: bool = False


NOTHING_ASKED = Asked()


def number(name: str, value: object, like: str | None = None) -> float | None:
    """A hyperparameter that is one real number, from any library, as a float; None where that means "off".

    A name that is not ours is checked like the one that it is `like`.
    """
    wanted, allowed = _NUMBERS[like or name]
    if value is None and (name in CLIPS or name == "weight_decay"):
        return None if name in CLIPS else 0.0
    found = value if type(value) is float else one_real(value)
    if found is None:
        raise TypeError(f"{name} is {value!r} (a {type(value).__name__}); wanted {wanted}")
    try:
        x = float(found)
    except OverflowError:  # an integer or fraction too large for a float
        x = math.inf if found > 0 else -math.inf
    except ValueError:  # a signaling Decimal NaN
        x = math.nan
    if not allowed(x):
        raise ValueError(f"{name} is {written(value)}; wanted {wanted}")
    if x == 0 and found != 0 and name == "eps":
        raise ValueError(f"eps is {written(value)}, which is 0 in float64; wanted 0 itself or a larger number")
    return x


def written(value: object) -> str:
    """The repr of a value; Python refuses the repr of an integer with thousands of digits."""
    try:
        return repr(value)
    except ValueError:
        return f"a number too long to be written ({type(value).__name__})"


def shown(value: Any) -> str:
    """A hyperparameter as shown to people: a schedule by its name."""
    return getattr(value, "__qualname__", None) or type(value).__qualname__ if callable(value) else repr(value)


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} is {written(value)} (a {type(value).__name__}); wanted True or False")
    return bool(value)


def checked(name: str, value: object) -> Any:
    """One hyperparameter, validated; a callable is a schedule if `name` is ``lr``."""
    if name == "lr" and callable(value):
        return value
    if name in _MOMENTS:
        return _format(name, value)
    if name == "seed":
        return _seed(value)
    return _flag(name, value) if name in _FLAGS else number(name, value)


def _format(name: str, value: object) -> str:
    """The name of a format, given by name or as a dtype."""
    found: object = value
    if not isinstance(value, str) and value is not None:
        with suppress(TypeError, ValueError):
            found = np.dtype(value).name  # type: ignore[call-overload]  # whatever it is
    if not isinstance(found, str) or found not in FORMATS:
        raise ValueError(f"{name} is {written(value)}; wanted one of {', '.join(map(repr, FORMATS))}")
    return str(found)


def _seed(value: object) -> int:
    found = None if isinstance(value, (bool, np.bool_)) else whole(value)
    if found is None or not 0 <= found < 2**64:
        raise (TypeError if found is None else ValueError)(
            f"seed is {written(value)} (a {type(value).__name__}); wanted an integer with 0 <= seed < 2**64"
        )
    return found


def moment_dtype(h: Mapping[str, Any]) -> str:
    """How the second moment is stored with these hyperparameters, for either optimizer."""
    return str(h.get("square_avg_dtype") or h.get("sum_dtype") or "float32")


def rate_alone(x: object) -> float | None:
    """A learning rate of the common kind, without the checks in `number`; None if it needs those."""
    return float(x) if isinstance(x, float) and 0 <= x < math.inf else None


def lr_at(lr: float | Schedule, step: int) -> float:
    """The learning rate of a step; a schedule is called and its answer validated."""
    if not callable(lr):
        return lr
    x = lr(step)
    if (rate := rate_alone(x)) is not None:
        return rate
    try:
        return number("lr", x)  # type: ignore[return-value]  # only weight_decay and clipvalue may be None
    except (TypeError, ValueError) as error:
        raise type(error)(f"lr({step}): {error}") from None


class Rates(NamedTuple):
    """The two scalars of a step that depend on the learning rate, in float64."""

    lr: float
    lr_times_decay: float


def rates(h: Mapping[str, Any], lr: float) -> Rates:
    """Both scalars for a step at this learning rate, with the other hyperparameters unchanged."""
    return Rates(lr, lr * h["weight_decay"] if h["decoupled_weight_decay"] else 0.0)


def finite(rates: Rates) -> bool:
    """Are both finite in every compute type?"""
    lr, lr_times_decay = rates
    return lr <= _LARGEST_FLOAT32 and lr_times_decay <= _LARGEST_FLOAT32


def check_clips(h: Mapping[str, Any]) -> None:
    """Refuse more than one kind of clipping for the same gradient."""
    on = [f"{name}={h[name]!r}" for name in CLIPS if h[name]]
    if len(on) > 1:
        raise ValueError(f"{' and '.join(on)} are given; wanted at most one of {', '.join(CLIPS)}")


def check_shared(hypers: Sequence[Mapping[str, Any]], devices: Sequence[Any]) -> None:
    """Refuse options of the step as a whole if groups differ in them or devices would have to wait."""
    for name in SHARED:
        found = [h[name] or None for h in hypers]
        if any(x != found[0] for x in found):
            raise ValueError(
                f"the groups differ in {name}: {found}; wanted the same in all, since it applies to the whole step"
            )
        if found[0] and len(devices) > 1:
            raise ValueError(f"{name} is {found[0]!r} and the parameters are on devices {devices}; wanted one device")


def variant(
    h: Mapping[str, Any], adagrad: bool, asked: Asked = NOTHING_ASKED, dtype: np.dtype[Any] | None = None
) -> Variant:
    """The compile-time switches, normalised: what has no effect is off, so that kernels are shared.

    They are for parameters of one dtype: what exists only for bfloat16 does not affect others.
    """
    moment, bf16 = moment_dtype(h), dtype is not None and dtype.name == "bfloat16"
    eps, decay, momentum = h["eps"] != 0, bool(h["weight_decay"]), bool(h.get("momentum"))
    norm = bool(h["clipnorm"] or h["global_clipnorm"])
    return Variant(
        adagrad=adagrad,
        scale=h["maximize"] or norm or asked.scaled,
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
        norm=norm,
        finite=h["skip_nonfinite"],
        told=asked.told,
        ema=h["use_ema"],
        zero_grads=asked.zero_grads,
        uint16=moment == "uint16",
        uint8=moment == "uint8",
        remainder=bf16 and h.get("store_param_remainders", False),
        stochastic_round=bf16 and h.get("bf16_stochastic_round", False),
    )


def scalars(h: Mapping[str, Any], lr: float, dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """The row of scalars of a step: computed in float64, rounded once to the compute type.

    Raises
    ------
    ValueError
        If rounding changes the meaning of a number: an `eps` that becomes 0, an `alpha` that becomes 1, anything finite
        that becomes infinite.
    """
    alpha, moving = h.get("alpha", 0.0), rates(h, lr)
    exact = Scalars(
        lr=moving.lr,
        alpha=alpha,
        one_minus_alpha=1.0 - alpha,
        eps=h["eps"],
        weight_decay=h["weight_decay"],
        lr_times_decay=moving.lr_times_decay,
        momentum=h.get("momentum", 0.0),
        clipvalue=h["clipvalue"] or math.inf,
        scale=-1.0 if h["maximize"] else 1.0,
        clipnorm=h["clipnorm"] or math.inf,
        global_clipnorm=h["global_clipnorm"] or math.inf,
        ema_momentum=h["ema_momentum"],
        one_minus_ema_momentum=1.0 - h["ema_momentum"],
    )
    with np.errstate(over="ignore", under="ignore"):
        row = np.array(exact, np.float64).astype(dtype)
    rounded = Scalars(*row.tolist())
    if h["eps"] != 0 and rounded.eps == 0:
        raise ValueError(f"eps is {h['eps']!r}, which is 0 in {dtype}; wanted 0 itself or a larger number")
    for name in CLIPS:
        if h[name] and getattr(rounded, name) == 0:
            raise ValueError(f"{name} is {h[name]!r}, which is 0 in {dtype}; wanted None or a larger number")
    if rounded.alpha == 1:
        raise ValueError(f"alpha is {alpha!r}, which is 1 in {dtype}; wanted alpha < 1 after rounding")
    largest = float(np.finfo(dtype).max)
    for name, value in {**exact._asdict(), "initial_scale": h["initial_scale"]}.items():
        if value > largest and name not in CLIPS:  # an infinite clip means no clipping
            said = "lr * weight_decay" if name == "lr_times_decay" else name
            raise ValueError(f"{said} is {value!r}, which is infinite in {dtype}; wanted a smaller number")
    return row
