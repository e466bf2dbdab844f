"""Copies between tensors and a bucket, in one kernel launch on a CUDA device: a block of threads per chunk of a row."""

from __future__ import annotations

from typing import Any

import cuda.core
import numpy as np

from ..arrays.dtypes import of
from ..arrays.layout import NDArray
from .cuda import THREADS, VECTOR, Launch
from .cuda_code import handle
from .cuda_target import target
from .intrinsics import GLOBAL, memory, opaque
from .table import BUCKET, COPY_COLUMNS, ELEMENTS, OFFSET, TENSOR, Copying, chunk_list

CHUNK = THREADS * VECTOR  # bytes, as in an update: one vector per thread of a block

_load_int, _ = memory(np.int64, GLOBAL)
_load_vector, _store_vector = memory(np.int64, GLOBAL, 2)
_ZEROS = (np.int64(0), np.int64(0))


def make_copies_kernel(word: Any, kind: Copying) -> Any:
    """The kernel for all chunks, as a Python function; `word` is the integer type of an element's bits."""
    load, store = memory(word, GLOBAL)
    zero, unpacks, zeroes = word(0), kind == "unpack", kind == "pack and zero"
    width = VECTOR // of(word).itemsize

    def copies_kernel(chunks, column):  # type: ignore[no-untyped-def]
        row = chunks + np.int64(target.blockIdx.x) * (8 * COPY_COLUMNS)
        tensor, offset = _load_int(column, _load_int(row, TENSOR)), _load_int(row, OFFSET)
        bucket, size = _load_int(row, BUCKET), _load_int(row, ELEMENTS)
        is_there = tensor != 0
        n = np.int32(size) if is_there or not unpacks else np.int32(0)
        there = tensor + offset if is_there else bucket  # so that it is aligned like what is written
        source, goal = (bucket, there) if unpacks else (there, bucket)
        vectors = n // width if (there | bucket) % VECTOR == 0 else np.int32(0)
        i = np.int32(target.threadIdx.x)
        while i < vectors:
            _store_vector(goal, 2 * i, _load_vector(source, 2 * i) if is_there else _ZEROS)
            if zeroes:
                _store_vector(there, 2 * i, _ZEROS)
            i = opaque(np.int32(i + THREADS))
        i = np.int32(vectors * width + np.int32(target.threadIdx.x))
        while i < n:  # the ragged end of a row, or all of an unaligned chunk
            store(goal, i, load(source, i) if is_there else zero)
            if zeroes:
                store(there, i, zero)
            i = opaque(np.int32(i + THREADS))

    return copies_kernel


def kernel(itemsize: int, kind: Copying) -> Any:
    """The handle of the kernel for elements of `itemsize` bytes, on the current device."""
    return handle(make_copies_kernel, np.dtype(f"i{itemsize}").type, kind)


def chunks(rows: NDArray, itemsize: int) -> NDArray:
    """These rows (table.py) cut into chunks; rows without elements are left out."""
    rows = np.asarray(rows, np.int64).reshape(-1, COPY_COLUMNS)
    rows = rows[rows[:, ELEMENTS] > 0]
    of_row, start, stop = chunk_list(rows[:, ELEMENTS].tolist(), CHUNK // itemsize).T
    made: NDArray = rows[of_row]
    made[:, [OFFSET, BUCKET]] += itemsize * start[:, np.newaxis]
    made[:, ELEMENTS] = stop - start
    return made


def launch(kernel: Any, stream: Any, chunks: int, column: int, n_chunks: int, title: str) -> Launch:
    """The call that launches a kernel on a stream, over the chunks and the column at these addresses."""
    config = cuda.core.LaunchConfig(grid=n_chunks, block=THREADS)
    made = Launch(cuda.core.launch, cuda.core.Stream.from_handle(stream.ptr), config, kernel, chunks, column)
    made.kernel = title
    return made
