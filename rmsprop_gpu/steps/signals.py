"""The arguments of a step beside its gradients: their scale, whether to skip the step, whether to zero them."""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np

from ..arrays.checks import Problems, a, dtype_name, place, plain_array
from ..arrays.layout import device_of, is_aligned, pointer_of
from ..arrays.selector import kind_of
from ..hyper import NOTHING_ASKED, Asked, written
from ..kernels import table

_KINDS = {
    "float32": table.AT_FLOAT32,
    "float64": table.AT_FLOAT64,
    "bool": table.AT_INT8,
    "uint8": table.AT_INT8,
    "int8": table.AT_INT8,
    "int32": table.AT_INT32,
    "int64": table.AT_INT64,
}
_SCALES = ("float32", "float64")


class Signals(NamedTuple):
    """What a kernel reads of them, and what the plan has to provide for that."""

    asked: Asked = NOTHING_ASKED
    words: tuple[int, ...] = (0,) * table.TOLD_WORDS
    # (name, array as given, array in CuPy or NumPy), held until the step is enqueued: the words hold their addresses.
    arrays: tuple[tuple[str, Any, Any], ...] = ()
    numbers: tuple[str, ...] = ()  # those given as numbers, which a CUDA graph would keep forever
    problems: Problems | None = None  # what is wrong with them


SILENCE = Signals()


def signals(
    grad_scale: Any, found_inf: Any, zero_grads: Any, devices: list[int], computes: Collection[np.dtype[Any]]
) -> Signals:
    """The arguments of a step, for parameters in host memory or on these devices, of these compute types.

    Nothing is raised: problems are noted, and reported together with all others of the step.
    """
    if grad_scale is None and found_inf is None and zero_grads is False:
        return SILENCE
    problems = Problems()
    if not isinstance(zero_grads, (bool, np.bool_)):
        problems.add(TypeError, f"zero_grads is {zero_grads!r} ({a(type(zero_grads))}); wanted True or False")
    before = len(problems)
    scale = _signal(grad_scale, "grad_scale", devices, problems)
    if scale[0][0] == table.NUMBER and len(problems) == before:
        _check_reciprocal(grad_scale, computes, problems)
    found = _signal(found_inf, "found_inf", devices, problems)
    given = grad_scale is not None, found_inf is not None
    zeros = isinstance(zero_grads, (bool, np.bool_)) and bool(zero_grads)
    asked = Asked(told=any(given), scaled=given[0], zero_grads=zeros)
    both = ("grad_scale", scale), ("found_inf", found)
    arrays = tuple((name, *x) for name, (words, x) in both if words[0] > table.NUMBER)
    named = tuple(name for name, (words, _) in both if words[0] == table.NUMBER)
    return Signals(asked, (*scale[0], *found[0]), arrays, named, problems)


def _signal(x: Any, name: str, devices: list[int], problems: Problems) -> tuple[tuple[int, int], Any]:
    """The two words of one argument, and the array that holds it."""
    nothing = (table.NOTHING, 0), None
    if x is None:
        return nothing
    where = place(devices[0]) if devices else place(None)
    wanted = f"a number, or an array of one element {where}"
    if isinstance(x, (numbers.Real, np.bool_)):
        return (table.NUMBER, _bits(x, name, problems)), None
    if not isinstance(x, np.ndarray) and kind_of(x) is None:
        problems.add(TypeError, f"{name} is {a(type(x))}; wanted {wanted}")
        return nothing
    array = plain_array(x, name, problems)
    if array is None:
        return nothing
    before = len(problems)
    if array.size != 1:
        problems.add(ValueError, f"{name} has shape {array.shape}; wanted {wanted}")
    if len(devices) > 1:
        problems.add(ValueError, f"{name} is an array, and the parameters are on devices {devices}; wanted a number")
    elif device_of(array) != (devices[0] if devices else None):
        problems.add(TypeError, f"{name} is {place(device_of(array))}; wanted {wanted}")
    known = _SCALES if name == "grad_scale" else tuple(_KINDS)
    if array.dtype.name not in known or not array.dtype.isnative or not is_aligned(array):
        problems.add(
            TypeError, f"{name} has dtype {dtype_name(array.dtype)}; wanted one of {', '.join(known)}, native, aligned"
        )
    if len(problems) > before:
        return nothing
    return (_KINDS[array.dtype.name], pointer_of(array)), (x, array)


def _check_reciprocal(x: Any, computes: Collection[np.dtype[Any]], problems: Problems) -> None:
    """Can every dtype hold the factor of the gradients?"""
    for dtype in computes:
        with np.errstate(over="ignore", under="ignore"):
            factor = np.float64(1.0 / float(x)).astype(dtype)
        if not 0 < factor < math.inf:
            said = f"grad_scale is {x!r}, whose reciprocal is {factor} in {dtype}"
            problems.add(ValueError, f"{said}; wanted one whose reciprocal is neither 0 nor infinite there")


def _bits(x: Any, name: str, problems: Problems) -> int:
    """The bits of a number as a float64."""
    try:
        value = float(x)
    except OverflowError:
        value = math.inf
    if name == "grad_scale" and (isinstance(x, (bool, np.bool_)) or not 0 < value < math.inf):
        problems.add(ValueError, f"grad_scale is {written(x)}; wanted a finite number > 0")
    return int(np.float64(value).view(np.int64))
