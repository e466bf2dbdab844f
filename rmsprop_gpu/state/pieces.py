"""Arrays to files and back in pieces, whatever their layout and wherever they lie; in a file they are in C order."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np

from ..arrays.layout import Array, NDArray

PIECE = 16 << 20  # bytes that are under way at a time


def pieces(array: Array) -> Iterator[Array]:
    """Views of an array that follow each other in C order, none of more bytes than a piece has."""
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
    """All of it, to a file without a buffer."""
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]


class Source(Protocol):
    """What is read from: a file without a buffer, or several as one."""

    def seek(self, offset: int, /) -> Any: ...
    def readinto(self, into: memoryview, /) -> int | None: ...


def read(file: Source, into: memoryview) -> None:
    """As many bytes as there is room for."""
    while into:
        count = file.readinto(into)
        if not count:
            raise OSError("the file ends before its last array; it became shorter after it was opened")
        into = into[count:]


class Host:
    """The way of NumPy arrays."""

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
    """The way of CuPy arrays: by pinned memory, on the current stream of their device, which the host waits for."""

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
    """Of each kind of array one, made when it is first needed: a piece of pinned memory serves all."""

    def __init__(self) -> None:
        self._made: dict[bool, Host | Device] = {}

    def of(self, array: Array) -> Host | Device:
        on_host = isinstance(array, np.ndarray)
        if on_host not in self._made:
            self._made[on_host] = Host() if on_host else Device()
        return self._made[on_host]


class Stored(NamedTuple):
    """An array in a file that is open, in C order."""

    file: Source
    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    ways: Ways

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)

    def part(self, start: int, stop: int) -> Stored:
        """Some of its elements, counted in C order, as an array of one axis."""
        return self._replace(offset=self.offset + start * self.dtype.itemsize, shape=(stop - start,))

    def values(self) -> Iterator[NDArray]:
        """Its elements, a piece after the other, each in the place of the one before."""
        count = math.prod(self.shape)
        room = np.empty(min(count, PIECE // self.dtype.itemsize), self.dtype)
        self.file.seek(self.offset)
        for start in range(0, count, max(1, len(room))):
            piece = room[: count - start]
            read(self.file, _bytes(piece))
            yield piece

    def read_into(self, array: Array) -> None:
        """Read it into an array of its shape and dtype, on the current device where it lies on one."""
        self.file.seek(self.offset)
        for piece in pieces(array):
            self.ways.of(array).read(self.file, piece)
