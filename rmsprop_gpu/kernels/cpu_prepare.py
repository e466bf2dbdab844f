"""What the CPU does before the updates of a step: sum up the gradients, and compute the factors of each tensor."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types

from . import table
from .cpu_code import unique
from .intrinsics import HOST, make_scratch, memory
from .norms import (
    BLOCK,
    LANES,
    SUM,
    ZERO,
    Terms,
    largest_of,
    make_gate,
    make_outcome,
    make_prepare,
    make_sum_terms,
    make_terms,
    make_verdict,
)
from .rule import Variant, inline

KERNEL = types.void(*[types.int64] * 4)  # batch, row, start, stop


def kernel(function: Any) -> Any:
    """Compile a kernel."""
    # Kernels are called by address, never from Python. Without error_model="numpy" a division may raise, and the loop
    # does not vectorise.
    options: Any = {"error_model": "numpy", "no_cpython_wrapper": True}
    return njit(KERNEL, **options)(unique(function))


_scratch = make_scratch(LANES)
_load_int, _ = memory(np.int64, HOST)
_load, _store = memory(np.float64, HOST)


def _make_sum(terms: Terms, in_order: bool) -> Any:
    """``total(address, start, stop)``: the sum of squares, in the order of norms.py, and the largest magnitude.

    When no order is asked for, squares are not summed.
    """
    load, square, magnitude, nothing = terms

    @inline
    def total(address, start, stop):  # type: ignore[no-untyped-def]
        lanes, largest = _scratch(), nothing
        for j in range(LANES):
            _store(lanes, j, ZERO)
        whole = stop - (stop - start) % LANES
        for i in range(start, whole, LANES):
            for j in range(LANES):
                x = load(address, i + j)
                _store(lanes, j, square(x, _load(lanes, j)))
                largest = magnitude(x, largest)
        for i in range(whole, stop):
            x = load(address, i)
            _store(lanes, i - whole, square(x, _load(lanes, i - whole)))
            largest = magnitude(x, largest)
        width = LANES // 2
        while width > 0:
            for j in range(width):
                _store(lanes, j, _load(lanes, j) + _load(lanes, j + width))
            width //= 2
        return _load(lanes, 0), largest

    @inline
    def largest_alone(address, start, stop):  # type: ignore[no-untyped-def]
        largest = nothing
        for i in range(start, stop):
            largest = magnitude(load(address, i), largest)
        return ZERO, largest

    return total if in_order else largest_alone


def make_partials_kernel(variant: Variant, D: Any) -> Any:
    """The kernel for partial sums of one tensor's gradient, elements start to stop: whole blocks."""
    terms = make_terms(variant, D, HOST)
    total, nothing = _make_sum(terms, variant.norm), terms.nothing

    @kernel
    def partials_kernel(batch, index, start, stop):  # type: ignore[no-untyped-def]
        grad = _load_int(_load_int(batch, table.GRADS), index)
        norms, first = _load_int(batch, table.NORMS), _load_int(_load_int(batch, table.FIRSTS), index)
        for begin in range(start, stop, BLOCK):
            end = begin + BLOCK if begin + BLOCK < stop else stop
            squares, largest = ZERO, nothing
            if grad != 0:
                squares, largest = total(grad, begin, end)
            partial = _load_int(norms, table.PARTIALS) + SUM * (first + begin // BLOCK)
            _store(partial, table.SQUARES, squares)
            _store(partial, table.LARGEST, largest_of(largest))

    return partials_kernel


def make_totals_kernel() -> Any:
    """The kernel for the sums of all tensors and their total; in place of a batch it gets the table of norms."""
    squares = _make_sum(make_sum_terms(table.SQUARES, HOST), True)
    magnitude = _make_sum(make_sum_terms(table.LARGEST, HOST), False)

    @kernel
    def totals_kernel(norms, index, start, stop):  # type: ignore[no-untyped-def]
        partials, segments = _load_int(norms, table.PARTIALS), _load_int(norms, table.SEGMENTS)
        sums, tensors = _load_int(norms, table.SUMS), _load_int(norms, table.TENSORS)
        for i in range(tensors + 1):
            source, first, last = partials, 0, 0
            if i < tensors:
                segment = segments + 8 * table.SEGMENT_COLUMNS * i
                first = _load_int(segment, table.FIRST)
                last = first + _load_int(segment, table.COUNT)
            else:
                source, last = sums, tensors
            _store(sums + SUM * i, table.SQUARES, squares(source + SUM * first, 0, last - first)[0])
            _store(sums + SUM * i, table.LARGEST, magnitude(source + SUM * first, 0, last - first)[1])

    return totals_kernel


def make_prepare_kernel(variant: Variant, T: Any) -> Any:
    """The kernel before the updates of a batch that needs factors: rows start to stop of its table.

    In place of a row it gets whether this batch counts the skipped steps.
    """
    gate, outcome, prepare = make_gate(variant, HOST), make_outcome(variant, HOST), make_prepare(variant, T, HOST)
    too_large = make_verdict(HOST)

    @kernel
    def prepare_kernel(batch, counts, start, stop):  # type: ignore[no-untyped-def]
        norms = _load_int(batch, table.NORMS)
        skip, inverse, norm = gate(norms, _load_int(batch, table.TOLD))
        if variant.finite:
            skip = skip or too_large(norms, inverse, norm, 0, 1)
        outcome(norms, skip, norm * inverse, counts)
        scalars, factors = _load_int(batch, table.SCALARS), _load_int(batch, table.FACTORS)
        for i in range(start, stop):
            if _load_int(_load_int(batch, table.GRADS), i) != 0:
                row = _load_int(batch, table.TABLE) + i * 8 * table.COLUMNS
                own = _load_int(norms, table.SUMS) + SUM * _load_int(_load_int(batch, table.NUMBERS), i)
                prepare(row, scalars, factors, i, own, skip, inverse, norm)

    return prepare_kernel
