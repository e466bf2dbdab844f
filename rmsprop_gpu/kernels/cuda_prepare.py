"""What a CUDA device does before the updates of a step: the sums of the gradients, and the factors of each tensor."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..arrays.dtypes import compute_dtype
from . import table
from .cuda_target import target
from .intrinsics import GLOBAL, memory
from .norms import (
    BLOCK,
    LANES,
    SUM,
    ZERO,
    added,
    larger,
    make_gate,
    make_outcome,
    make_prepare,
    make_sum_terms,
    make_terms,
    make_verdict,
)
from .rule import Variant, inline

THREADS = 256  # a block of partial sums, or of rows where nothing is summed
SUMMING_THREADS = 1024  # the one block that adds up all partial sums: two warps a tensor
WARP = 32  # threads; each has four of the lanes, so that neighbours read neighbouring elements
ALL = 0xFFFFFFFF

_load_int, _ = memory(np.int64, GLOBAL)
_load, _store = memory(np.float64, GLOBAL)


def _make_sum(add: Any, join: Any, zero: Any = ZERO) -> Any:
    """``total(address, start, stop, thread)``: the terms of these elements in the order of norms.py, by a warp.

    ``add(address, i, so_far)`` adds the term of element i to what begins with `zero`, ``join(a, b)`` makes one of two
    lanes. The sum is the first thread's.
    """

    @inline
    def total(address, start, stop, thread):  # type: ignore[no-untyped-def]
        a, b, c, d = zero, zero, zero, zero
        whole = stop - (stop - start) % LANES
        i = start + thread
        while i < whole:  # libNVVM goes through it four times at once: sixteen loads are under way
            a, b = add(address, i, a), add(address, i + WARP, b)
            c, d = add(address, i + 2 * WARP, c), add(address, i + 3 * WARP, d)
            i += LANES
        if i < stop:
            a = add(address, i, a)
        if i + WARP < stop:
            b = add(address, i + WARP, b)
        if i + 2 * WARP < stop:
            c = add(address, i + 2 * WARP, c)
        if i + 3 * WARP < stop:
            d = add(address, i + 3 * WARP, d)
        a, b = join(a, c), join(b, d)  # lanes 64 apart
        a = join(a, b)  # 32 apart
        width = WARP // 2
        while width > 0:
            a = join(a, target.shfl_down_sync(ALL, a, width))
            width //= 2
        return a

    return total


def _make_largest(add: Any) -> Any:
    """The same of the largest magnitude, whose order is as good as any; it is sooner compiled than four lanes are."""

    @inline
    def largest(address, start, stop, thread):  # type: ignore[no-untyped-def]
        a, i, width = ZERO, start + thread, WARP // 2
        while i < stop:
            a = add(address, i, a)
            i += WARP
        while width > 0:
            a = larger(a, target.shfl_down_sync(ALL, a, width))
            width //= 2
        return a

    return largest


def make_partials_kernel(variant: Variant, D: Any) -> Any:
    """The kernel of the partial sums of a batch's gradients, a warp for each block of elements."""
    warps, (add_square, add_magnitude) = THREADS // WARP, make_terms(D, GLOBAL)
    zero: Any = compute_dtype(np.dtype(D)).type(0)
    squares, magnitude = _make_sum(add_square, added), _make_sum(add_magnitude, larger, zero)

    def partials_kernel(grads, blocks, count, numbers, norms):  # type: ignore[no-untyped-def]
        k = np.int64(target.blockIdx.x) * warps + np.int64(target.threadIdx.x) // WARP
        if k >= count:
            return
        thread = np.int64(target.threadIdx.x) % WARP
        block = blocks + k * (8 * table.CHUNK_COLUMNS)
        row, start = _load_int(block, table.ROW), _load_int(block, table.START)
        stop, grad = _load_int(block, table.STOP), _load_int(grads, row)
        if start == stop:
            return
        segment = table.SEGMENT_COLUMNS * _load_int(numbers, row)
        first = _load_int(_load_int(norms, table.SEGMENTS), segment + table.FIRST)
        partial = _load_int(norms, table.PARTIALS) + SUM * (first + start // BLOCK)
        sum_of_squares, largest = ZERO, zero
        if grad != 0 and variant.norm:
            sum_of_squares = squares(grad, start, stop, thread)
        if grad != 0 and variant.finite:
            largest = magnitude(grad, start, stop, thread)
        if thread == 0:
            _store(partial, table.SQUARES, sum_of_squares)
            _store(partial, table.LARGEST, np.float64(largest))

    return partials_kernel


def _make_totals() -> Any:
    """``totals(norms)``: the sums of all tensors and of their total, by one block of threads, which waits for them."""
    add_squares, add_magnitude = make_sum_terms(GLOBAL)
    squares, magnitude = _make_sum(add_squares, added), _make_largest(add_magnitude)

    @inline
    def add_up(source, sums, i, count, warp, thread):  # type: ignore[no-untyped-def]
        if warp % 2 == 0:
            s = squares(source, 0, count, thread)
            if thread == 0:
                _store(sums + SUM * i, table.SQUARES, s)
        else:
            x = magnitude(source, 0, count, thread)
            if thread == 0:
                _store(sums + SUM * i, table.LARGEST, x)

    @inline
    def totals(norms):  # type: ignore[no-untyped-def]
        partials, segments = _load_int(norms, table.PARTIALS), _load_int(norms, table.SEGMENTS)
        sums, tensors = _load_int(norms, table.SUMS), _load_int(norms, table.TENSORS)
        warp, thread = np.int64(target.threadIdx.x) // WARP, np.int64(target.threadIdx.x) % WARP
        i = warp // 2
        while i < tensors:
            segment = segments + 8 * table.SEGMENT_COLUMNS * i
            first, count = _load_int(segment, table.FIRST), _load_int(segment, table.COUNT)
            add_up(partials + SUM * first, sums, i, count, warp, thread)
            i += SUMMING_THREADS // (2 * WARP)
        target.syncthreads()
        if warp < 2:
            add_up(sums, sums, tensors, tensors, warp, thread)
        target.syncthreads()

    return totals


def make_prepare_kernel(variant: Variant, D: Any) -> Any:
    """The kernel before the updates of a batch that needs factors, a thread for each row; as a Python function.

    Where there are partial sums, one block of threads adds them up first, and goes through all rows.
    """
    T: Any = compute_dtype(np.dtype(D)).type
    gate, outcome, prepare = (
        make_gate(variant, GLOBAL),
        make_outcome(variant, GLOBAL),
        make_prepare(variant, T, GLOBAL),
    )
    mark, marked = make_verdict(GLOBAL)
    totals, measures, threads = _make_totals(), variant.measures, _prepare_threads(variant)

    def prepare_kernel(table_, grads, scalars, factors, rows, numbers, norms, counts):  # type: ignore[no-untyped-def]
        if measures:
            totals(norms)
        skip, inverse, norm = gate(norms, grads + 8 * rows)
        if variant.finite:
            mark(norms, inverse, norm, np.int64(target.threadIdx.x), threads)
            target.syncthreads()
            skip = skip or marked(norms)
        index = np.int64(target.blockIdx.x) * threads + np.int64(target.threadIdx.x)
        if index == 0:
            outcome(norms, skip, norm, counts)
        while index < rows:
            if _load_int(grads, index) != 0:
                own = _load_int(norms, table.SUMS) + SUM * _load_int(numbers, index)
                prepare(table_ + index * 8 * table.COLUMNS, scalars, factors, index, own, skip, inverse, norm)
            index += target.gridDim.x * threads

    # With 1,024 threads there are 64 registers for each: one more, and the launch would fail.
    prepare_kernel.launch_bounds = threads  # type: ignore[attr-defined]
    return prepare_kernel


def _prepare_threads(variant: Variant) -> int:
    return SUMMING_THREADS if variant.measures else THREADS


def grids(variant: Variant, rows: int, sums: int) -> dict[str, tuple[int, int]]:
    """Blocks and threads of each kernel here, for a batch of so many rows and partial sums."""
    return {
        "partials_kernel": (-(-sums // (THREADS // WARP)), THREADS),
        # Only one block can know that all sums are there.
        "prepare_kernel": (1 if variant.measures else -(-rows // THREADS), _prepare_threads(variant)),
    }
