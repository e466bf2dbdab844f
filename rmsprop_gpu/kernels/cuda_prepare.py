"""What a CUDA device does before the updates of a step: sum up the gradients, compute the factors of each tensor."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..arrays.dtypes import compute_dtype, of
from . import table
from .cuda_target import target
from .intrinsics import GLOBAL, memory
from .norms import (
    BLOCK,
    LANES,
    SUM,
    ZERO,
    Terms,
    larger,
    largest_of,
    make_gate,
    make_outcome,
    make_prepare,
    make_sum_terms,
    make_terms,
    make_verdict,
)
from .rule import Variant, inline

THREADS = 256  # per block of partial sums, or of rows if nothing is summed
SUMMING_THREADS = 1024  # the one block that adds up all partial sums: two warps per tensor
WARP = 32  # threads; each has four lanes, so that neighbours read neighbouring elements
ALL = 0xFFFFFFFF

_load_int, _ = memory(np.int64, GLOBAL)
_load, _store = memory(np.float64, GLOBAL)


def _make_sum(terms: Terms) -> Any:
    """``total(address, start, stop, thread)``: the sum of squares and the largest of these elements, by a warp.

    The squares are added in the order of norms.py. The first thread holds both results.
    """
    load, square, magnitude, nothing = terms

    @inline
    def total(address, start, stop, thread):  # type: ignore[no-untyped-def]
        a, b, c, d, largest = ZERO, ZERO, ZERO, ZERO, nothing
        whole = stop - (stop - start) % LANES
        i = start + thread
        while i < whole:  # libNVVM unrolls it four times: sixteen loads are in flight
            w, x = load(address, i), load(address, i + WARP)
            y, z = load(address, i + 2 * WARP), load(address, i + 3 * WARP)
            a, b, c, d = square(w, a), square(x, b), square(y, c), square(z, d)
            largest = magnitude(z, magnitude(y, magnitude(x, magnitude(w, largest))))
            i += LANES
        if i < stop:
            w = load(address, i)
            a, largest = square(w, a), magnitude(w, largest)
        if i + WARP < stop:
            x = load(address, i + WARP)
            b, largest = square(x, b), magnitude(x, largest)
        if i + 2 * WARP < stop:
            y = load(address, i + 2 * WARP)
            c, largest = square(y, c), magnitude(y, largest)
        if i + 3 * WARP < stop:
            z = load(address, i + 3 * WARP)
            d, largest = square(z, d), magnitude(z, largest)
        a, b = a + c, b + d  # lanes 64 apart
        a = a + b  # 32 apart
        width = WARP // 2
        while width > 0:
            a = a + target.shfl_down_sync(ALL, a, width)
            largest = larger(target.shfl_down_sync(ALL, largest, width), largest)
            width //= 2
        return a, largest

    return total


def _make_largest() -> Any:
    """``largest(sums, count, thread)``: the largest magnitude of these sums, by a warp; the first thread holds it.

    Any order gives the same result, and this one compiles faster than four lanes.
    """
    load = make_sum_terms(table.LARGEST, GLOBAL).load

    @inline
    def largest(sums, count, thread):  # type: ignore[no-untyped-def]
        x, i, width = ZERO, thread, WARP // 2
        while i < count:
            x = larger(load(sums, i), x)
            i += WARP
        while width > 0:
            x = larger(target.shfl_down_sync(ALL, x, width), x)
            width //= 2
        return x

    return largest


def make_partials_kernel(variant: Variant, D: Any) -> Any:
    """The kernel for the partial sums of a batch's gradients, one warp per block of elements."""
    terms, warps = make_terms(variant, D, GLOBAL), THREADS // WARP
    total, nothing = _make_sum(terms), terms.nothing

    def partials_kernel(grads, blocks, count, firsts, norms):  # type: ignore[no-untyped-def]
        k = np.int64(target.blockIdx.x) * warps + np.int64(target.threadIdx.x) // WARP
        if k >= count:
            return
        thread = np.int64(target.threadIdx.x) % WARP
        block = blocks + k * (8 * table.CHUNK_COLUMNS)
        row, start = _load_int(block, table.ROW), _load_int(block, table.START)
        stop, grad = _load_int(block, table.STOP), _load_int(grads, row)
        if start == stop:
            return
        partial = _load_int(norms, table.PARTIALS) + SUM * (_load_int(firsts, row) + start // BLOCK)
        squares, largest = ZERO, nothing
        if grad != 0:
            squares, largest = total(grad, start, stop, thread)
        if thread == 0:
            _store(partial, table.SQUARES, squares)
            _store(partial, table.LARGEST, largest_of(largest))

    return partials_kernel


def _make_totals() -> Any:
    """``totals(norms)``: the sums of all tensors and the overall sum of squares, by one block of threads, which waits.

    Each tensor has two warps, one for its squares and one for its largest magnitude, so more loads are in flight.
    """
    squares, largest = _make_sum(make_sum_terms(table.SQUARES, GLOBAL)), _make_largest()

    @inline
    def add_up(source, sums, i, count, thread):  # type: ignore[no-untyped-def]
        total, _ = squares(source, 0, count, thread)
        if thread == 0:
            _store(sums + SUM * i, table.SQUARES, total)

    @inline
    def totals(norms):  # type: ignore[no-untyped-def]
        partials, segments = _load_int(norms, table.PARTIALS), _load_int(norms, table.SEGMENTS)
        sums, tensors = _load_int(norms, table.SUMS), _load_int(norms, table.TENSORS)
        warp, thread = np.int64(target.threadIdx.x) // WARP, np.int64(target.threadIdx.x) % WARP
        i = warp // 2
        while i < tensors:
            segment = segments + 8 * table.SEGMENT_COLUMNS * i
            first, count = _load_int(segment, table.FIRST), _load_int(segment, table.COUNT)
            source = partials + SUM * first
            if warp % 2 == 0:
                add_up(source, sums, i, count, thread)
            else:
                x = largest(source, count, thread)
                if thread == 0:
                    _store(sums + SUM * i, table.LARGEST, x)
            i += SUMMING_THREADS // (2 * WARP)
        target.syncthreads()
        if warp == 0:
            add_up(sums, sums, tensors, tensors, thread)
        target.syncthreads()

    return totals


def make_prepare_kernel(variant: Variant, D: Any) -> Any:
    """The kernel before the updates of a batch that needs factors, one thread per row; as a Python function.

    If there are partial sums, one block of threads adds them up first and then goes through all rows.
    """
    T: Any = compute_dtype(of(D)).type
    gate, outcome, prepare = (
        make_gate(variant, GLOBAL),
        make_outcome(variant, GLOBAL),
        make_prepare(variant, T, GLOBAL),
    )
    too_large = make_verdict(GLOBAL)
    totals, measures, threads = _make_totals(), variant.measures, _prepare_threads(variant)

    def prepare_kernel(table_, grads, scalars, factors, rows, numbers, norms, counts):  # type: ignore[no-untyped-def]
        if measures:
            totals(norms)
        skip, inverse, norm = gate(norms, grads + 8 * rows)
        if variant.finite:
            found = too_large(norms, inverse, norm, np.int64(target.threadIdx.x), threads)
            skip = target.syncthreads_or(np.int32(skip or found)) != 0
        index = np.int64(target.blockIdx.x) * threads + np.int64(target.threadIdx.x)
        if index == 0:
            outcome(norms, skip, norm * inverse, counts)
        while index < rows:
            if _load_int(grads, index) != 0:
                own = _load_int(norms, table.SUMS) + SUM * _load_int(numbers, index)
                prepare(table_ + index * 8 * table.COLUMNS, scalars, factors, index, own, skip, inverse, norm)
            index += target.gridDim.x * threads

    # With 1,024 threads, each may use 64 registers: with one more, the launch would fail.
    prepare_kernel.launch_bounds = threads  # type: ignore[attr-defined]
    return prepare_kernel


def _prepare_threads(variant: Variant) -> int:
    return SUMMING_THREADS if variant.measures else THREADS


def grids(variant: Variant, rows: int, sums: int) -> dict[str, tuple[int, int]]:
    """Blocks and threads of each kernel here, for a batch with this many rows and partial sums."""
    return {
        "partials_kernel": (-(-sums // (THREADS // WARP)), THREADS),
        # Only a single block can know that all sums are complete.
        "prepare_kernel": (1 if variant.measures else -(-rows // THREADS), _prepare_threads(variant)),
    }
