"""Arrays to files and back in pieces, whatever their layout and place; in a file they are in C order."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np

from ..arrays.layout import Array, NDArray

PIECE = 16 << 20  # bytes in transit at a time


def pieces(array: Array) -> Iterator[Array]:
    """Consecutive views of an array in C order, none larger than a piece."""
    if array.nbytes <= PIECE:
        yield array
    elif array.flags.c_contiguous:
        line, count = array.reshape(-1), PIECE // array.itemsize
        for start in range(0, line.size, count):
            yield line[start : start + count]
    elif rows := PIECE // (array.nbytes // len(array)):
        for start in range(0, len(array), rows):
            yield array[start : start + rows]
    else:
        for row in array:
            yield from pieces(row)


def write(file: BinaryIO, data: Any) -> None:
    """Write all of it to an unbuffered file."""
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]


class Source(Protocol):
    """What is read from: an unbuffered file, or several as one."""

    def seek(self, offset: int, /) -> Any: ...
    def readinto(self, into: memoryview, /) -> int | None: ...


def read(file: Source, into: memoryview) -> None:
    """Read as many bytes as there is room for."""
    while into:
        count = file.readinto(into)
        if not count:
            raise OSError("the file ends before its last array; it was shortened after it was opened")
        into = into[count:]


class Host:
    """How NumPy arrays are written and read."""

    def write(self, file: BinaryIO, piece: NDArray) -> None:
        write(file, _bytes(np.ascontiguousarray(piece)))

    def read(self, file: Source, piece: NDArray) -> None:
        if piece.flags.c_contiguous:
            read(file, _bytes(piece))
        else:
            dense = np.empty(piece.shape, piece.dtype)
            read(file, _bytes(dense))
            piece[...] = dense


def _bytes(array: NDArray) -> memoryview:
    """The memory of an array in C order."""
    line: Any = array.reshape(-1).view(np.uint8)
    return memoryview(line)


class Device:
    """How CuPy arrays are written and read: through pinned memory, on their device's current stream; the host waits."""

    def __init__(self) -> None:
        import cupy

        self._cupy, self._pinned = cupy, cupy.cuda.alloc_pinned_memory(PIECE)
        self._bytes: Any = np.frombuffer(self._pinned, np.uint8, PIECE)

    def write(self, file: BinaryIO, piece: Array) -> None:
        dense, stream = self._cupy.ascontiguousarray(piece), self._cupy.cuda.get_current_stream()
        dense.data.copy_to_host_async(self._pinned.ptr, piece.nbytes, stream)
        stream.synchronize()
        write(file, self._bytes[: piece.nbytes])

    def read(self, file: Source, piece: Array) -> None:
        read(file, memoryview(self._bytes[: piece.nbytes]))
        stream, whole = self._cupy.cuda.get_current_stream(), piece.flags.c_contiguous
        dense = piece if whole else self._cupy.empty(piece.shape, piece.dtype)
        dense.data.copy_from_host_async(self._pinned.ptr, piece.nbytes, stream)
        if not whole:
            piece[...] = dense
        stream.synchronize()


class Ways:
    """One of these per kind of array, made when first needed: one piece of pinned memory serves all arrays."""

    def __init__(self) -> None:
        self._made: dict[bool, Host | Device] = {}

    def of(self, array: Array) -> Host | Device:
        on_host = isinstance(array, np.ndarray)
        if on_host not in self._made:
            self._made[on_host] = Host() if on_host else Device()
        return self._made[on_host]


class Stored(NamedTuple):
    """An array in an open file, in C order."""

    file: Source
    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    ways: Ways

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)

    def part(self, start: int, stop: int) -> Stored:
        """Some of its elements, counted in C order, as an array with one axis."""
        return self._replace(offset=self.offset + start * self.dtype.itemsize, shape=(stop - start,))

    def values(self) -> Iterator[NDArray]:
        """Its elements, piece by piece, each in the same memory as the one before."""
        count = math.prod(self.shape)
        room = np.empty(min(count, PIECE // self.dtype.itemsize), self.dtype)
        self.file.seek(self.offset)
        for start in range(0, count, max(1, len(room))):
            piece = room[: count - start]
            read(self.file, _bytes(piece))
            yield piece

    def read_into(self, array: Array) -> None:
        """Read it into an array with its shape and dtype, which is in host memory or on the current device."""
        self.file.seek(self.offset)
        for piece in pieces(array):
            self.ways.of(array).read(self.file, piece)
