"""The layout of an array in memory, on the host or on a device: addresses, strides, density."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

NDArray: TypeAlias = np.ndarray[Any, Any]
Array: TypeAlias = Any  # NumPy's, or CuPy's for a device


class Layout(NamedTuple):
    """The layout of a dense array in its one block of memory."""

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

    def of(self, dtype: np.dtype[Any]) -> Layout:
        """The same order of elements with another dtype."""
        have, want = self.dtype.itemsize, dtype.itemsize
        strides = tuple(stride // have * want for stride in self.strides)
        return Layout(self.shape, strides, dtype, self.low // have * want)

    def matches(self, array: Array) -> bool:
        """Are the elements of this array in the same order?"""
        if array.shape != self.shape:
            return False
        pairs = zip(self.shape, self.strides, array.strides, strict=True)
        return self.size == 0 or all(n == 1 or want == got for n, want, got in pairs)

    def over(self, buffer: Array, offset: int) -> Array:
        """An array with this layout in `buffer` (bytes), with its lowest address `offset` bytes from the start."""
        if isinstance(buffer, np.ndarray):
            return np.ndarray(self.shape, self.dtype, buffer, offset - self.low, self.strides)
        return type(buffer)(self.shape, self.dtype, buffer.data + (offset - self.low), self.strides)


def reach(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> tuple[int, int]:
    """The range of the elements, in bytes from the first one: the lowest address, and the end."""
    if 0 in shape:
        return 0, 0
    steps = [stride * (n - 1) for n, stride in zip(shape, strides, strict=True)]
    return sum(x for x in steps if x < 0), sum(x for x in steps if x > 0) + itemsize


def low_offset(array: Array) -> int:
    return reach(array.shape, array.strides, array.itemsize)[0]


def interval_of(array: Array) -> tuple[int, int]:
    """The lowest address of an array, and its end."""
    low, end = reach(array.shape, array.strides, array.itemsize)
    return pointer_of(array) + low, pointer_of(array) + end


def layout_of(array: Array) -> Layout:
    return Layout(array.shape, array.strides, array.dtype, low_offset(array))


def pointer_of(array: Array) -> int:
    """The address of the first element."""
    return int(array.__array_interface__["data"][0] if isinstance(array, np.ndarray) else array.data.ptr)


def address_of(array: Array) -> int:
    """The lowest address."""
    return pointer_of(array) + low_offset(array)


def device_of(array: Array) -> int | None:
    """CUDA's number of the device of this array; None for the host."""
    return None if isinstance(array, np.ndarray) else array.data.device_id


def is_dense(array: Array) -> bool:
    """Is the memory of this array one block, with each element once, in any order and direction of dimensions?"""
    if array.size == 0:
        return True
    expected = array.itemsize
    dims = [(abs(stride), n) for n, stride in zip(array.shape, array.strides, strict=True) if n > 1]
    for stride, n in sorted(dims):
        if stride != expected:
            return False
        expected *= n
    return True


def is_aligned(array: Array) -> bool:
    return array.flags.aligned if isinstance(array, np.ndarray) else pointer_of(array) % array.itemsize == 0


def shadow(array: Array) -> NDArray:
    """A NumPy array at the addresses of any array, used only to examine these; its elements are not touched."""
    if isinstance(array, np.ndarray) or array.size == 0:
        return np.asarray(array) if isinstance(array, np.ndarray) else np.empty(0)
    low, end = interval_of(array)
    memory: Any = (ctypes.c_uint8 * (end - low)).from_address(low)
    bytes_: NDArray = np.ndarray(
        (*array.shape, array.itemsize), np.uint8, memory, pointer_of(array) - low, (*array.strides, 1)
    )
    return bytes_
