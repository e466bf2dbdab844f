"""What counts as an array: pointer, size, dtype, layout. Every refusal about arrays is worded here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from .backends import is_masked, refuse_cuda

NDArray: TypeAlias = np.ndarray[Any, Any]

DTYPES = (np.dtype(np.float32), np.dtype(np.float64))


def quoted(name: object) -> str:
    """A name as a person would write it between brackets."""
    if not isinstance(name, str):
        return repr(name)
    return '"' + name.replace("\\", "\\\\").replace('"', '\\"') + '"'


class Problems:
    """What is wrong with a call: collected, so that one error names it all, and nothing is written before."""

    def __init__(self) -> None:
        self._found: list[tuple[type[Exception], str]] = []

    def add(self, kind: type[Exception], text: str) -> None:
        self._found.append((kind, text))

    def __len__(self) -> int:
        return len(self._found)

    def raise_any(self) -> None:
        """Raise a TypeError if any of them is one, else a ValueError, naming every problem; return if there is none."""
        if not self._found:
            return
        kinds, texts = zip(*self._found, strict=True)
        kind = TypeError if TypeError in kinds else ValueError
        if len(texts) == 1:
            raise kind(texts[0])
        raise kind("\n  ".join([f"{len(texts)} problems, nothing was changed:", *texts]))


class Layout(NamedTuple):
    """How the elements of a dense array lie in its one block of memory."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype[Any]
    low: int  # bytes from the first element to the lowest address: below 0 with negative strides

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def matches(self, array: NDArray) -> bool:
        """Do the elements of this array lie in the same order?"""
        if array.shape != self.shape:
            return False
        pairs = zip(self.shape, self.strides, array.strides, strict=True)
        return self.size == 0 or all(n == 1 or want == got for n, want, got in pairs)

    def over(self, buffer: NDArray, offset: int) -> NDArray:
        """An array of this layout in `buffer` (bytes), its lowest address `offset` bytes from the start."""
        array: NDArray = np.ndarray(self.shape, self.dtype, buffer, offset - self.low, self.strides)
        return array


@dataclass(eq=False)
class Tensor:
    """A parameter: the caller's array, how it lies, and how to speak of it and of its gradient."""

    key: str
    label: str
    grad_label: str
    state_label: str  # before the name of a buffer
    array: NDArray
    layout: Layout
    address: int  # the lowest


def low_offset(array: NDArray) -> int:
    return sum(stride * (n - 1) for n, stride in zip(array.shape, array.strides, strict=True) if stride < 0 and n > 0)


def layout_of(array: NDArray) -> Layout:
    return Layout(array.shape, array.strides, array.dtype, low_offset(array))


def address_of(array: NDArray) -> int:
    """The lowest address of a dense array."""
    return int(array.__array_interface__["data"][0]) + low_offset(array)


def is_dense(array: NDArray) -> bool:
    """Is the memory of this array one block, each element once, in whatever order of dimensions and directions?"""
    if array.size == 0:
        return True
    expected = array.itemsize
    dims = [(abs(stride), n) for n, stride in zip(array.shape, array.strides, strict=True) if n > 1]
    for stride, n in sorted(dims):
        if stride != expected:
            return False
        expected *= n
    return True


def host_array(x: object, label: str, problems: Problems) -> NDArray | None:
    """A NumPy array as a plain ``ndarray`` (the same memory); anything else is a problem."""
    if is_masked(x):
        problems.add(TypeError, f"{label} is a masked array, whose mask would be ignored; wanted its .data")
        return None
    if isinstance(x, np.ndarray):
        plain: NDArray = np.asarray(x)
        return plain
    refusal = refuse_cuda(x)
    found = f"{label} is {_a(type(x))}"
    problems.add(TypeError, f"{found}: {refusal}" if refusal else f"{found}; wanted a NumPy array")
    return None


def _a(kind: type) -> str:
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return f"an {name}" if name[0] in "aeiouAEIOU" else f"a {name}"


def _dtype_name(dtype: np.dtype[Any]) -> str:
    return str(dtype) if dtype.isnative else f"{dtype.newbyteorder('=')} of foreign byte order ({dtype.str})"


def check_param(x: object, label: str, problems: Problems) -> NDArray | None:
    """A parameter or state array: float32 or float64, native, aligned, writeable, dense."""
    array = host_array(x, label, problems)
    if array is None:
        return None
    before = len(problems)
    if array.dtype not in DTYPES:
        problems.add(TypeError, f"{label} has dtype {_dtype_name(array.dtype)}; wanted float32 or float64")
        return None
    if not array.flags.writeable:
        problems.add(ValueError, f"{label} is read-only; wanted an array that can be updated in place")
    if not array.flags.aligned:
        problems.add(
            ValueError, f"{label} is not aligned to its {array.itemsize}-byte elements; wanted an aligned array"
        )
    if not is_dense(array):
        problems.add(
            ValueError,
            f"{label} is not dense (shape {array.shape}, strides {array.strides}); "
            "wanted one block of memory, as of a contiguous array or a transpose of one",
        )
    return array if len(problems) == before else None


def make_tensor(
    x: object, problems: Problems, *, key: str, label: str, grad_label: str, state_label: str
) -> Tensor | None:
    """The Tensor of a parameter, or None and a problem."""
    array = check_param(x, label, problems)
    if array is None:
        return None
    assert isinstance(x, np.ndarray)  # kept itself, not its plain view: what changes in place is the caller's object
    return Tensor(key, label, grad_label, state_label, x, layout_of(array), address_of(array))


def check_disjoint(labelled: Iterable[tuple[str, int, int]], problems: Problems) -> None:
    """Name every array (label, lowest address, bytes) that shares memory with one before it."""
    highest, owner = -1, ""
    for label, start, nbytes in sorted((x for x in labelled if x[2]), key=lambda x: x[1]):
        if start < highest:
            problems.add(ValueError, f"{label} overlaps {owner} in memory; wanted arrays apart from each other")
        if start + nbytes > highest:
            highest, owner = start + nbytes, label


def check_unchanged(tensor: Tensor, problems: Problems) -> None:
    """Is the parameter what it was when the optimizer was built?"""
    array, layout = np.asarray(tensor.array), tensor.layout
    same = array.dtype == layout.dtype and array.dtype.isnative and layout.matches(array)
    if not same or address_of(array) != tensor.address:
        found = f"shape {array.shape}, strides {array.strides}, dtype {_dtype_name(array.dtype)}"
        want = f"shape {layout.shape}, strides {layout.strides}, dtype {layout.dtype}"
        moved = "" if address_of(array) == tensor.address else ", at another address"
        problems.add(
            ValueError,
            f"{tensor.label} was changed in place: it has {found}{moved}; the optimizer was built for {want}",
        )
    elif not array.flags.writeable:
        problems.add(ValueError, f"{tensor.label} has become read-only; wanted an array that can be updated in place")


def check_grad(x: object, tensor: Tensor, problems: Problems) -> NDArray | None:
    """A gradient of the parameter's shape and dtype, in any layout."""
    if isinstance(x, np.generic) and tensor.layout.shape == ():
        x = np.asarray(x)  # what NumPy's arithmetic makes of 0-d arrays
    array = host_array(x, tensor.grad_label, problems)
    if array is None:
        return None
    before = len(problems)
    if array.dtype != tensor.layout.dtype or not array.dtype.isnative:
        problems.add(
            TypeError,
            f"{tensor.grad_label} has dtype {_dtype_name(array.dtype)}, but the parameter has {tensor.layout.dtype}",
        )
    if array.shape != tensor.layout.shape:
        problems.add(
            ValueError,
            f"{tensor.grad_label} has shape {array.shape}, but the parameter has shape {tensor.layout.shape}",
        )
    return array if len(problems) == before else None


def check_grad_apart(array: NDArray, label: str, others: Iterable[tuple[str, NDArray]], problems: Problems) -> None:
    """Refuse a gradient that shares memory with what the step writes."""
    for name, other in others:
        if np.may_share_memory(array, other) and np.shares_memory(array, other):
            problems.add(
                ValueError, f"{label} overlaps {name} in memory; wanted a gradient apart from what a step writes"
            )
