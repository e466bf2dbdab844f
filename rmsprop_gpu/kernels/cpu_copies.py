"""Copies between tensors and a bucket, in one pass on the CPU, whatever the number of tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..arrays.layout import NDArray, address_of
from .cpu_code import address
from .cpu_drive import driven, items_of
from .cpu_prepare import kernel
from .intrinsics import HOST, memory
from .table import BUCKET, COPY_COLUMNS, ELEMENTS, OFFSET, TENSOR, Copying

# The kernel's input, as addresses.
ROWS, COLUMN = range(2)

_load, _ = memory(np.int64, HOST)


def _make_copies_kernel(word: Any, kind: Copying) -> Any:
    """The kernel for elements start to stop of one row; `word` is the integer type of an element's bits."""
    load, store = memory(word, HOST)
    zero, unpacks, zeroes = word(0), kind == "unpack", kind == "pack and zero"

    @kernel
    def copies_kernel(given, index, start, stop):  # type: ignore[no-untyped-def]
        row = _load(given, ROWS) + index * 8 * COPY_COLUMNS
        tensor, bucket = _load(_load(given, COLUMN), _load(row, TENSOR)), _load(row, BUCKET)
        there = tensor + _load(row, OFFSET)
        if unpacks:
            if tensor != 0:
                for i in range(start, stop):
                    store(there, i, load(bucket, i))
        elif tensor == 0:
            for i in range(start, stop):
                store(bucket, i, zero)
        else:
            for i in range(start, stop):
                store(bucket, i, load(there, i))
                if zeroes:
                    store(there, i, zero)

    return copies_kernel


def make_copies(rows: NDArray, itemsize: int, kind: Copying) -> Callable[[NDArray], None]:
    """Compile the copies for these rows (table.py), whose elements have `itemsize` bytes: 2, 4 or 8.

    The returned function makes the copies for an int64 column of addresses. A tensor that is absent, a 0 in the
    column, is packed as zeros and not unpacked. Each copy is aligned to its elements, and copies do not overlap.
    """
    rows = np.array(rows, np.int64, order="C").reshape(-1, COPY_COLUMNS)
    given = np.array([address_of(rows), 0], np.int64)
    code = address(_make_copies_kernel, np.dtype(f"i{itemsize}").type, kind)
    run = driven([], [items_of(code, address_of(given), rows[:, ELEMENTS].tolist())], np.zeros(1, np.int64))
    run.kept = rows  # type: ignore[attr-defined]  # raw addresses keep nothing alive

    def copy(column: NDArray) -> None:
        given[COLUMN] = address_of(column)
        run()

    return copy
