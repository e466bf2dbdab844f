"""What counts as an array: library, dtype, layout, place. All error messages about arrays are worded here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import dtypes
from .interop import FOR_TORCH, UnusableError, cupy_array, host_array
from .layout import (
    Array,
    Layout,
    address_of,
    device_of,
    interval_of,
    is_aligned,
    is_dense,
    layout_of,
    pointer_of,
    shadow,
)
from .selector import is_cuda, is_masked, is_on_host


def quoted(name: object) -> str:
    """A name as one would write it between brackets."""
    if not isinstance(name, str):
        return repr(name)
    return '"' + name.replace("\\", "\\\\").replace('"', '\\"') + '"'


def is_sequence(x: Any) -> bool:
    """Is this a sequence of things, rather than an array, a mapping or a string?"""
    return isinstance(x, (list, tuple)) or (
        isinstance(x, Iterable)
        and not isinstance(x, (np.ndarray, Mapping, str, bytes, set, frozenset))
        and not is_cuda(x)
        and not hasattr(x, "__array_interface__")
        and not hasattr(x, "__dlpack__")
    )


class Problems:
    """The problems of a call, collected so that one error names them all before anything is written."""

    def __init__(self) -> None:
        self._found: list[tuple[type[Exception], str]] = []

    def add(self, kind: type[Exception], text: str) -> None:
        self._found.append((kind, text))

    def __len__(self) -> int:
        return len(self._found)

    def take(self, error: Exception) -> None:
        """Add the problems that an error names, except those already known."""
        self._found += [one for one in problems_of(error) if one not in self._found]

    def taking(self) -> _Taking:
        """A context: add any errors raised inside, and continue after it."""
        return _Taking(self)

    def raise_any(self) -> None:
        """Raise their error; return if there is none."""
        if self._found:
            raise self.error()

    def error(self) -> Exception:
        """A TypeError if any of them is one, else a ValueError, naming every problem."""
        kinds, texts = zip(*self._found, strict=True)
        kind = TypeError if TypeError in kinds else ValueError
        said = texts[0] if len(texts) == 1 else f"{len(texts)} problems, nothing was changed:\n  " + "\n  ".join(texts)
        error = kind(said)
        vars(error)["problems"] = list(self._found)
        return error


class _Taking:
    """Not a generator: since Python 3.12 the frames of a generator that swallows an error keep it in a cycle.

    That keeps the frames it passed through, and the caller's gradients in them, until the garbage collector runs.
    """

    def __init__(self, problems: Problems) -> None:
        self._problems = problems

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, (TypeError, ValueError)):
            return False
        self._problems.take(error)
        return True


def problems_of(error: Exception) -> list[tuple[type[Exception], str]]:
    """The problems that an error names, from `Problems` or elsewhere."""
    return getattr(error, "problems", None) or [(type(error), str(error))]


@dataclass(eq=False)
class Tensor:
    """A parameter: the caller's array, its layout, and how errors name it and its gradient."""

    key: str
    label: str
    grad_label: str
    state_label: str  # precedes the name of a buffer
    array: Any
    view: Array  # the same memory, as NumPy's or CuPy's plain array
    layout: Layout
    address: int  # the lowest
    device: int | None  # CUDA's number; None means host memory
    of: str | None = None  # the key of the whole parameter, if this is a part of one
    start: int = 0  # and where in it this part begins, in elements

    @property
    def header(self) -> Array:
        """The array whose header a step checks: the caller's own, which may change, or our view of it."""
        return self.array if isinstance(self.array, np.ndarray) else self.view


def place(device: int | None) -> str:
    return "in host memory" if device is None else f"on cuda:{device}"


def plain_array(x: Any, label: str, problems: Problems) -> Array | None:
    """The memory of `x` as a plain NumPy array, or a CuPy array if it is on a device; anything else is a problem."""
    if is_masked(x):
        problems.add(TypeError, f"{label} is a masked array, whose mask would be ignored; wanted its .data")
        return None
    if isinstance(x, np.ndarray):
        return np.asarray(x)
    on_device = is_cuda(x)
    if not on_device and not is_on_host(x):
        problems.add(TypeError, f"{label} is {a(type(x))}; wanted a NumPy or CuPy array")
        return None
    try:
        return cupy_array(x) if on_device else host_array(x)
    except UnusableError as error:
        problems.add(TypeError, f"{label} is {a(type(x))}{' on a CUDA device' * on_device}: {error}")
        return None


def a(kind: type) -> str:
    """The name of a type with its article."""
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return f"an {name}" if name[0] in "aeiouAEIOU" else f"a {name}"


def dtype_name(dtype: np.dtype[Any]) -> str:
    return str(dtype) if dtype.isnative else f"{dtype.newbyteorder('=')} of foreign byte order ({dtype.str})"


def is_writeable(x: Any, array: Array) -> bool:
    """May the memory of `x`, given as this plain array, be written to?"""
    if isinstance(array, np.ndarray):
        return array.flags.writeable
    interface = None if x is array else getattr(x, "__cuda_array_interface__", None)
    return interface is None or not interface["data"][1]


def check_param(x: object, label: str, problems: Problems) -> Array | None:
    """A parameter or state array: it has to have a supported, native dtype, and be aligned, writeable and dense."""
    array = plain_array(x, label, problems)
    if array is None:
        return None
    before = len(problems)
    if not dtypes.is_supported(array.dtype):
        wanted = "float32, float64, float16 or bfloat16"
        problems.add(TypeError, f"{label} has dtype {dtype_name(array.dtype)}; wanted {wanted}")
        return None
    if not is_writeable(x, array):
        found = "immutable, as JAX's arrays are" if hasattr(x, "block_until_ready") else "read-only"
        problems.add(ValueError, f"{label} is {found}; wanted an array that can be updated in place")
    if not is_aligned(array):
        problems.add(
            ValueError, f"{label} is not aligned to its {array.itemsize}-byte elements; wanted an aligned array"
        )
    if not is_dense(array):
        found = f"{label} is not dense (shape {array.shape}, strides {array.strides})"
        wanted = "one block of memory, such as a contiguous array or its transpose"
        if hasattr(x, "retain_grad"):  # a tensor of torch
            wanted += f", or {FOR_TORCH}"
        problems.add(ValueError, f"{found}; wanted {wanted}")
    return array if len(problems) == before else None


def make_tensor(
    x: object, problems: Problems, *, key: str, label: str, grad_label: str, state_label: str
) -> Tensor | None:
    """The Tensor of a parameter, or None and a problem."""
    array = check_param(x, label, problems)
    if array is None:
        return None
    # The caller's own object is kept: NumPy arrays can change in place, and it owns the memory.
    layout, address = layout_of(array), address_of(array)
    return Tensor(key, label, grad_label, state_label, x, array, layout, address, device_of(array))


def check_one_place(tensors: Iterable[Tensor], problems: Problems) -> None:
    """Refuse host and device arrays side by side, naming each."""
    host: list[Tensor] = []
    device: list[Tensor] = []
    for tensor in tensors:
        (host if tensor.device is None else device).append(tensor)
    if host and device:
        names = ", ".join(f"{t.label} ({place(t.device)})" for t in device)
        rest = ", ".join(f"{t.label} ({place(None)})" for t in host)
        problems.add(TypeError, f"arrays on a device and arrays of the host cannot be mixed: {names}; {rest}")


def check_disjoint(labelled: Iterable[tuple[str, int, int]], problems: Problems) -> None:
    """Report every array (label, lowest address, bytes) that shares memory with an earlier one."""
    highest, owner = -1, ""
    for label, start, nbytes in sorted((x for x in labelled if x[2]), key=lambda x: x[1]):
        if start < highest:
            problems.add(ValueError, f"{label} overlaps {owner} in memory; wanted arrays that share no memory")
        if start + nbytes > highest:
            highest, owner = start + nbytes, label


def check_unchanged(tensor: Tensor, problems: Problems, *, written: bool = True) -> None:
    """Check that a NumPy parameter is as it was when the optimizer was built, and can be `written` to."""
    array, layout = np.asarray(tensor.header), tensor.layout
    same = array.dtype == layout.dtype and array.dtype.isnative and layout.matches(array)
    if not same or address_of(array) != tensor.address:
        found = f"shape {array.shape}, strides {array.strides}, dtype {dtype_name(array.dtype)}"
        want = f"shape {layout.shape}, strides {layout.strides}, dtype {layout.dtype}"
        moved = "" if address_of(array) == tensor.address else ", at another address"
        problems.add(
            ValueError,
            f"{tensor.label} was changed in place: it has {found}{moved}; the optimizer was built for {want}",
        )
    elif written and not array.flags.writeable:
        problems.add(ValueError, f"{tensor.label} has become read-only; wanted an array that can be updated in place")


def check_unmoved(tensor: Tensor, problems: Problems) -> None:
    """Check that another library's parameter has the same memory as when the optimizer was built."""
    if tensor.layout.size and tensor.array.data_ptr() != pointer_of(tensor.view):
        found = f"{tensor.label} was changed in place: it has different memory"
        problems.add(ValueError, f"{found}; wanted that for which the optimizer was built")


def check_grad(x: object, tensor: Tensor, problems: Problems, *, written: bool = False) -> Array | None:
    """Check a gradient: the parameter's shape, place and one of its dtypes, any layout; may it be `written` to?"""
    if written and isinstance(x, np.generic):
        problems.add(
            TypeError, f"{tensor.grad_label} is {a(type(x))}; wanted an array, into which zeros can be written"
        )
        return None
    if isinstance(x, np.generic) and tensor.layout.shape == () and tensor.device is None:
        x = np.asarray(x)  # NumPy's arithmetic turns 0-d arrays into scalars
    array = plain_array(x, tensor.grad_label, problems)
    if array is None:
        return None
    before, label = len(problems), tensor.grad_label
    here, there = device_of(array), tensor.device
    if here != there and (array.size or here is None or there is None):  # an empty array may be on any device
        found = f"{label} is {a(type(x))} {place(device_of(array))}, but the parameter is {place(tensor.device)}"
        problems.add(TypeError, f"{found}; wanted a gradient there, since nothing is copied implicitly")
    wanted = dtypes.grad_dtypes(tensor.layout.dtype)
    if array.dtype.name not in wanted or not array.dtype.isnative:
        found = f"{label} has dtype {dtype_name(array.dtype)}, but the parameter has {tensor.layout.dtype}"
        problems.add(TypeError, f"{found}; wanted {' or '.join(wanted)}")
    if array.shape != tensor.layout.shape:
        problems.add(ValueError, f"{label} has shape {array.shape}, but the parameter has shape {tensor.layout.shape}")
    if tensor.device is not None and len(problems) == before and not is_aligned(array):
        problems.add(ValueError, f"{label} is not aligned to its {array.itemsize}-byte elements, as CUDA requires")
    if written and not is_writeable(x, array):
        problems.add(ValueError, f"{label} is read-only; wanted an array into which zeros can be written")
    return array if len(problems) == before else None


def check_read_apart(array: Array, label: str, others: Iterable[tuple[str, Array]], problems: Problems) -> None:
    """Refuse an array that a step reads if it shares memory with one that the step writes."""
    mine = shadow(array)
    for name, other in others:
        if np.shares_memory(mine, shadow(other)):
            problems.add(
                ValueError, f"{label} overlaps {name} in memory; wanted an array apart from what a step writes"
            )


def check_grads_disjoint(labelled: Iterable[tuple[str, Any]], problems: Problems) -> None:
    """Refuse gradients that share memory if they will be written to; anything that is not an array has no memory."""
    arrays = [(label, plain_array(x, label, Problems())) for label, x in labelled]
    apart: list[tuple[int, str, Array]] = []  # (end, label, array) of earlier ones that reach this far
    for (start, end), label, x in sorted(
        ((interval_of(x), label, x) for label, x in arrays if x is not None and x.size), key=lambda entry: entry[0]
    ):
        apart = [entry for entry in apart if entry[0] > start]
        for _, other, y in apart:
            if np.shares_memory(shadow(x), shadow(y)):
                problems.add(ValueError, f"{label} overlaps {other} in memory; wanted gradients that share no memory")
        apart.append((end, label, x))
