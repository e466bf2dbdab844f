"""Check the headers of many NumPy arrays in one call.

NumPy arrays change in place (``resize``, ``shape``, ``dtype``, ``flags``), and an object's identity proves nothing, so
every array is checked again in every step. In Python that is the most expensive part of a step over many small
tensors; here a compiled function reads the fields of ``PyArrayObject`` (NumPy's stable C interface) behind each ``id``.
Their offsets are verified at import. If they differ (another object header), `TRUSTED` is False, every array counts as
odd, and the checks in ``arrays/checks.py`` do all the work.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numba import njit, types

from ..arrays.layout import Layout
from ..kernels.cpu_code import entry, unique
from ..kernels.intrinsics import HOST, memory

_TYPE, _DATA, _ND, _SHAPE, _STRIDES, _DESCR, _FLAGS = 8, 16, 24, 32, 40, 56, 64  # offsets in bytes
ALIGNED, WRITEABLE = 0x100, 0x400

# The block of addresses and counts that the function gets.
(
    PARAM_IDS, RECORDS, GRAD_RECORDS, OFFSETS, COLUMN, LOWEST, HIGHEST, INTERVALS, VERDICTS, COUNT, GRAD_FLAGS,
    NDARRAY, NONE,
) = range(13)  # fmt: skip

# A record, one per parameter and one per gradient: what its header has to contain.
_R_DATA, _R_DESCR, _R_LOW, _R_SIZE, _R_ND, _R_DIMS = range(6)

PARAM_CHANGED, GRAD_ODD, GRAD_OVERLAPS = 1, 2, 4  # verdicts

load, store = memory(np.int64, HOST)
load_int32, _ = memory(np.int32, HOST)


def _layout_is_known() -> bool:
    """Is an array's C struct on this interpreter laid out as in NumPy's headers?"""

    def word(address: int, T: Any = ctypes.c_int64) -> int:
        return int(T.from_address(address).value)

    frozen = np.ones((2, 3), np.float64).T
    frozen.flags.writeable = False
    for a in (
        np.zeros(()),
        np.zeros((4, 0), np.float32),
        frozen,
        np.arange(24, dtype=np.float32).reshape(2, 3, 4)[::-1],
    ):
        head, nd = id(a), a.ndim
        try:
            found = (word(head + _TYPE), word(head + _DATA), word(head + _ND, ctypes.c_int32), word(head + _DESCR))
            if found != (id(np.ndarray), a.__array_interface__["data"][0], nd, id(a.dtype)):
                return False
            shape, strides = word(head + _SHAPE), word(head + _STRIDES)
            if tuple(word(shape + 8 * j) for j in range(nd)) != a.shape:
                return False
            if tuple(word(strides + 8 * j) for j in range(nd)) != a.strides:
                return False
            flags = word(head + _FLAGS, ctypes.c_int32)
        except ValueError:
            return False
        if bool(flags & ALIGNED) != a.flags.aligned or bool(flags & WRITEABLE) != a.flags.writeable:
            return False
    return True


def _struct_is_plausible() -> bool:
    """Do the reads stay inside the object? True for a CPython with 8-byte words and the ordinary object header."""
    return ctypes.sizeof(ctypes.c_void_p) == 8 and object.__basicsize__ == 16 and np.ndarray.__basicsize__ >= 72


TRUSTED = _struct_is_plausible() and _layout_is_known()


def record(layout: Layout, address: int = 0) -> list[int]:
    """The contents of the header of an array with this layout; a parameter's has its first element at this address."""
    dims = [x for pair in zip(layout.shape, layout.strides, strict=True) for x in pair]
    return [address, id(layout.dtype), layout.low, layout.nbytes, len(layout.shape), *dims]


@njit(inline="always")
def lies_so(shape, strides, nd, size, dims):  # type: ignore[no-untyped-def]
    """Do these `nd` dimensions, `size` elements or bytes in total, match the shapes and strides recorded at `dims`?"""
    for j in range(nd):
        n = load(shape, j)
        if n != load(dims, 2 * j):
            return False
        # The stride means nothing in a dimension of one element, or in an array without elements.
        if n != 1 and size != 0 and load(strides, j) != load(dims, 2 * j + 1):
            return False
    return True


@njit(inline="always")
def overlaps(lowest, highest, intervals, start, size):  # type: ignore[no-untyped-def]
    """Is any byte of [start, start + size) in one of these sorted, disjoint intervals?"""
    a, b = 0, intervals
    while a < b:  # the first interval that ends after start
        middle = (a + b) // 2
        if load(highest, middle) > start:
            b = middle
        else:
            a = middle + 1
    return size > 0 and a < intervals and load(lowest, a) < start + size


def checker() -> Any:
    """The compiled function that checks a step's arrays; see `_make_check`."""
    return entry(_make_check)


def _make_check() -> Any:
    """``check(block, grad_ids)``: verdicts on every parameter and gradient; 0 if nothing needs a closer look.

    It writes the address of every gradient into the column (0 for ``None``), and looks for overlaps of changed ones.
    """

    @njit(inline="always")
    def same(head, record, flags, ndarray):  # type: ignore[no-untyped-def]
        if load(head + _TYPE, 0) != ndarray or load(head + _DESCR, 0) != load(record, _R_DESCR):
            return False
        nd = load(record, _R_ND)
        if load_int32(head + _FLAGS, 0) & flags != flags or load_int32(head + _ND, 0) != nd:
            return False
        shape, strides = load(head + _SHAPE, 0), load(head + _STRIDES, 0)
        return lies_so(shape, strides, nd, load(record, _R_SIZE), record + 8 * _R_DIMS)

    @njit(types.int64(types.int64, types.int64))
    @unique
    def check(block, grad_ids):  # type: ignore[no-untyped-def]
        ids, offsets = load(block, PARAM_IDS), load(block, OFFSETS)
        records, grad_records = load(block, RECORDS), load(block, GRAD_RECORDS)
        column, verdicts, any_verdict = load(block, COLUMN), load(block, VERDICTS), 0
        # Addresses in this process are not constants, since the code is kept for other processes.
        ndarray, none = load(block, NDARRAY), load(block, NONE)
        for i in range(load(block, COUNT)):
            record = records + 8 * load(offsets, i)
            head = load(ids, i)
            verdict = 0
            if not same(head, record, ALIGNED | WRITEABLE, ndarray) or load(head + _DATA, 0) != load(record, _R_DATA):
                verdict = PARAM_CHANGED
            head, record = load(grad_ids, i), grad_records + 8 * load(offsets, i)
            if head == none:
                store(column, i, 0)
            elif not same(head, record, load(block, GRAD_FLAGS), ndarray):
                verdict |= GRAD_ODD
            else:
                start = load(head + _DATA, 0) + load(record, _R_LOW)
                if start != load(column, i):
                    store(column, i, start)
                    size = load(record, _R_SIZE)
                    if overlaps(load(block, LOWEST), load(block, HIGHEST), load(block, INTERVALS), start, size):
                        verdict |= GRAD_OVERLAPS
            store(verdicts, i, verdict)
            any_verdict |= verdict
        return any_verdict

    return check
