"""What comes before the update, once per tensor and step: numbers, factors and counters, and whether to skip the step.

Norms are summed in the same order on every backend, however the work is divided. A tensor is cut into blocks of `BLOCK`
elements from its start. In a block each of `LANES` lanes adds every `LANES`-th square, in order; then lane j adds lane
j + 64, then j + 32, down to 1. The same lanes and the same tree add up a tensor's blocks, then the tensors in parameter
order. All of it is float64, in which the square of a float32 is exact and cannot overflow.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from ..arrays.dtypes import compute_dtype, of
from . import table
from .codes import key_of
from .intrinsics import fma, magnitude, memory, of_magnitude
from .rule import Factors, Scalars, Variant, inline
from .table import BIAS_WEIGHT, COUNT_FLOAT32, COUNT_FLOAT64, SCALARS_ROW, STEP

BLOCK = 4096  # elements per partial sum
LANES = 128
SUM = 16  # bytes per sum

ZERO, ONE, INFINITY = np.float64(0), np.float64(1), np.float64(math.inf)


class Terms(NamedTuple):
    """The building blocks of sums. An element is loaded once for all of them; what is not needed stays unchanged."""

    load: Any  # load(address, i): the element
    square: Any  # square(x, so_far): the sum of squares including it, a float64
    magnitude: Any  # magnitude(x, so_far): the largest magnitude including it
    nothing: Any  # the largest magnitude of no elements


def make_terms(variant: Variant, D: Any, space: int) -> Terms:
    """The terms for a gradient of type D. Magnitudes are bits, which `largest_of` turns into a number."""
    load, _ = memory(D, space)
    bits = np.dtype(f"int{8 * compute_dtype(of(D)).itemsize}")

    @inline
    def square(x, so_far):  # type: ignore[no-untyped-def]
        wide = np.float64(x)
        return fma(wide, wide, so_far)

    @inline
    def larger_bits(x, so_far):  # type: ignore[no-untyped-def]
        return larger(magnitude(x), so_far)

    return Terms(load, square if variant.norm else _same, larger_bits if variant.finite else _same, bits.type(0))


@inline
def largest_of(bits):  # type: ignore[no-untyped-def]
    """The magnitude with these bits, as a float64; infinity for a NaN."""
    x = np.float64(of_magnitude(bits))
    return x if x <= INFINITY else INFINITY


def make_sum_terms(column: int, space: int) -> Terms:
    """The terms for adding up partial sums: of the squares, or of the largest magnitudes."""
    load_float, _ = memory(np.float64, space)
    of_squares = column == table.SQUARES

    @inline
    def load(sums, i):  # type: ignore[no-untyped-def]
        return load_float(sums + SUM * i, column)

    return Terms(load, _added if of_squares else _same, _same if of_squares else larger, ZERO)


@inline
def _added(x, so_far):  # type: ignore[no-untyped-def]
    return so_far + x


@inline
def larger(x, so_far):  # type: ignore[no-untyped-def]
    """The larger of two magnitudes; neither is NaN."""
    return x if so_far < x else so_far


@inline
def _same(x, so_far):  # type: ignore[no-untyped-def]
    return so_far


def make_scalars(T: Any, space: int) -> Any:
    """``scalars(first, row)``: the numbers of the tensor whose table row is at this address, as the rule wants them.

    `first` is the address of the first row of scalars.
    """
    (load, _), (load_int, _) = memory(T, space), memory(np.int64, space)
    stride = len(Scalars._fields) * np.dtype(T).itemsize

    @inline
    def scalars(first, row):  # type: ignore[no-untyped-def]
        s = first + load_int(row, SCALARS_ROW) * stride
        return Scalars(
            load(s, 0), load(s, 1), load(s, 2), load(s, 3), load(s, 4), load(s, 5), load(s, 6), load(s, 7), load(s, 8),
            load(s, 9), load(s, 10), load(s, 11), load(s, 12),
        )  # fmt: skip

    return scalars


def make_advance(variant: Variant, T: Any, space: int) -> Any:
    """``advance(row, s)``: count the step of the tensor whose table row is at this address; return its correction.

    The bias weight is the moving average of ones, ``w = alpha w + (1 - alpha)``, and the correction is ``1 / w``. It
    uses exact operations only, stays right after skips and late starts, and the drift from a rounded alpha cancels. It
    is kept whether `bias_correction` is on or not, so that it may be turned on at any step.
    """
    load, store = memory(T, space)
    load_int, store_int = memory(np.int64, space)
    one = T(1)

    @inline
    def advance(row, s):  # type: ignore[no-untyped-def]
        step = load_int(row, STEP)
        if step != 0:
            store_int(step, 0, load_int(step, 0) + 1)
        correction = one
        if not variant.adagrad:
            weight = load_int(row, BIAS_WEIGHT)
            if weight != 0:
                w = fma(s.alpha, load(weight, 0), s.one_minus_alpha)
                store(weight, 0, w)
                correction = one / w
        return correction

    return advance


def _make_count(space: int) -> Any:
    """``count(row)``: the number of the current step of the tensor with the table row at this address, once advanced.

    A float counter is advanced by its owner after the step, so the current step is the next one.
    """
    (load_int, _), (load32, _), (load64, _) = (memory(T, space) for T in (np.int64, np.float32, np.float64))

    @inline
    def count(row):  # type: ignore[no-untyped-def]
        own, narrow, wide = load_int(row, STEP), load_int(row, COUNT_FLOAT32), load_int(row, COUNT_FLOAT64)
        found = 0
        if own != 0:
            found = load_int(own, 0)
        elif narrow != 0:
            found = np.int64(load32(narrow, 0)) + 1
        elif wide != 0:
            found = np.int64(load64(wide, 0)) + 1
        return found

    return count


def make_factors(variant: Variant, T: Any, space: int) -> Any:
    """``factors(address, index, s)``: the tensor's factors for an update, as the prepare kernel wrote them."""
    load, _ = memory(T, space)
    zero, one, stride = T(0), T(1), table.FACTOR_COLUMNS * np.dtype(T).itemsize

    @inline
    def prepared(address, index, s):  # type: ignore[no-untyped-def]
        f = address + index * stride
        return Factors(
            load(f, table.SCALE), load(f, table.POWER), load(f, table.CORRECTION), load(f, table.EMA_MOMENTUM)
        )

    @inline
    def neutral(address, index, s):  # type: ignore[no-untyped-def]
        return Factors(s.scale, one, one, zero)

    return prepared if variant.prepared else neutral


def _make_told(space: int) -> Any:
    """``told(words, k, nothing)``: a number that was given to the step, wherever it is stored."""
    load_int, _ = memory(np.int64, space)
    load32, load64, load_int8, load_int32 = (memory(T, space)[0] for T in (np.float32, np.float64, np.int8, np.int32))

    @inline
    def told(words, k, nothing):  # type: ignore[no-untyped-def]
        kind, address = load_int(words, k), load_int(words, k + 1)
        x = nothing
        if kind == table.NUMBER:
            x = load64(words, k + 1)
        elif kind == table.AT_FLOAT32:
            x = np.float64(load32(address, 0))
        elif kind == table.AT_FLOAT64:
            x = load64(address, 0)
        elif kind == table.AT_INT8:
            x = np.float64(load_int8(address, 0))
        elif kind == table.AT_INT32:
            x = np.float64(load_int32(address, 0))
        elif kind == table.AT_INT64:
            x = np.float64(load_int(address, 0))
        return x

    return told


def make_gate(variant: Variant, space: int) -> Any:
    """``gate(norms, words)``: skip the step?, ``1 / grad_scale``, and the norm of all gradients before scaling."""
    (load, _), (load_int, _) = memory(np.float64, space), memory(np.int64, space)
    told = _make_told(space)

    @inline
    def gate(norms, words):  # type: ignore[no-untyped-def]
        inverse, skip, norm = ONE, False, ZERO
        if variant.told:
            inverse = ONE / told(words, table.GRAD_SCALE, ONE)
            skip = told(words, table.FOUND_INF, ZERO) != ZERO
        total = load_int(norms, table.SUMS) + SUM * load_int(norms, table.TENSORS)
        if variant.norm:
            norm = math.sqrt(load(total, table.SQUARES))
        if variant.finite:
            # A factor that is 0, infinite or NaN would destroy all gradients. This is tested in the narrowest type of
            # the step, whatever the type of this batch is: a step is skipped as a whole.
            factor = np.float64(np.float32(inverse)) if load_int(norms, table.NARROW) != 0 else inverse
            usable = factor > ZERO and factor - factor == ZERO
            skip = skip or not usable
        return skip, inverse, norm

    return gate


@inline
def _multiplied(inverse, norm, all_norm, clipnorm, global_clipnorm):  # type: ignore[no-untyped-def]
    """What a gradient of this norm is multiplied by, as a numerator and a denominator: 1 / grad_scale, or the clip."""
    most, length = (clipnorm, norm) if global_clipnorm == INFINITY else (global_clipnorm, all_norm)
    if length * inverse <= most or most == INFINITY:
        return inverse, ONE
    # A clipped gradient is as long as the clip, whatever the scale was, unless the scale leaves only NaN.
    return most if inverse < INFINITY else inverse - inverse, length


# A scale below the smallest normal number of its type would keep few bits there, or none. It is lifted by a power of
# two, and the gradient is multiplied by the reciprocal first, which is exact unless the scaled gradient is 0 anyway. A
# float32 that the first power leaves too small uses the second; no float64 is that small.
_LIFTS = {np.float32: (2.0**100, 2.0**149), np.float64: (2.0**900, 2.0**900)}


def make_scale(variant: Variant, T: Any) -> Any:
    """``scale(s, inverse, norm, all_norm)``: the factor of a gradient, and the power of two to multiply by before."""
    one, tiny = T(1), np.float64(np.finfo(T).smallest_normal)
    first, second = (np.float64(x) for x in _LIFTS[T])

    @inline
    def scale(s, inverse, norm, all_norm):  # type: ignore[no-untyped-def]
        above, below = _multiplied(inverse, norm, all_norm, np.float64(s.clipnorm), np.float64(s.global_clipnorm))
        x, lift = above / below, ONE
        if -tiny < x < tiny:
            lift = first if x * first >= tiny or x * first <= -tiny else second
            x = above * lift / below
        return s.scale * T(x), T(ONE / lift)

    @inline
    def as_it_is(s, inverse, norm, all_norm):  # type: ignore[no-untyped-def]
        return s.scale, one

    return scale if variant.told or variant.norm else as_it_is


def make_verdict(space: int) -> Any:
    """``too_large(norms, inverse, all_norm, first, step)``: is the square of any gradient element not finite?

    Or is an element itself not finite? It looks at every step-th tensor from the first on. Every batch looks at the
    same float64 numbers, whatever its own Variant and type are, so there is one verdict.
    """
    (load, _), (load_int, _), (load32, _) = (memory(T, space) for T in (np.float64, np.int64, np.float32))
    clipvalue, clipnorm, global_clipnorm = map(Scalars._fields.index, ("clipvalue", "clipnorm", "global_clipnorm"))
    # Below the root of the largest number by more than the error of the scaled gradient, which is rounded a few times.
    narrow, wide = np.finfo(np.float32), np.finfo(np.float64)
    limit32 = np.float64((1 - 8 * float(narrow.eps)) * 2.0**64)
    limit64 = np.float64((1 - 8 * float(wide.eps)) * 2.0**512)

    @inline
    def too_large(norms, inverse, all_norm, first, step):  # type: ignore[no-untyped-def]
        found, i, tensors = False, first, load_int(norms, table.TENSORS)
        while i < tensors:
            segment = load_int(norms, table.SEGMENTS) + 8 * table.SEGMENT_COLUMNS * i
            s, limit = load_int(segment, table.SCALARS_AT), limit64
            if load_int(segment, table.IS_FLOAT32) != 0:
                limit, value = limit32, np.float64(load32(s, clipvalue))
                own, together = np.float64(load32(s, clipnorm)), np.float64(load32(s, global_clipnorm))
            else:
                value, own, together = load(s, clipvalue), load(s, clipnorm), load(s, global_clipnorm)
            sums = load_int(norms, table.SUMS) + SUM * i
            above, below = _multiplied(inverse, math.sqrt(load(sums, table.SQUARES)), all_norm, own, together)
            largest = load(sums, table.LARGEST)
            x = largest * (above / below)
            x = value if x > value else x
            found = found or largest == INFINITY or not x <= limit
            i += step
        return found

    return too_large


def make_prepare(variant: Variant, T: Any, space: int) -> Any:
    """``prepare(row, scalars, factors, index, sum_address, skip, inverse, all_norm)``: a tensor's factors and counters.

    `row` is the address of its row in the table, `sum_address` the address of its own sum.
    """
    (load64, _), (load_int, store_int), (_, store) = (
        memory(np.float64, space),
        memory(np.int64, space),
        memory(T, space),
    )
    advance, scalars_of, scale_of = make_advance(variant, T, space), make_scalars(T, space), make_scale(variant, T)
    zero, one, stride = T(0), T(1), table.FACTOR_COLUMNS * np.dtype(T).itemsize
    dithers, count = variant.dithers, _make_count(space)

    @inline
    def prepare(row, scalars, factors, index, sum_address, skip, inverse, all_norm):  # type: ignore[no-untyped-def]
        f = factors + index * stride
        store(f, table.SKIP, one if skip else zero)
        if not skip:
            s = scalars_of(scalars, row)
            norm = math.sqrt(load64(sum_address, table.SQUARES)) if variant.norm else ZERO
            scale, power = scale_of(s, inverse, norm, all_norm)
            store(f, table.SCALE, scale)
            store(f, table.POWER, power)
            if variant.ema:  # the first step sets the average, as Keras does
                first = load_int(load_int(row, STEP), 0) == 0
                store(f, table.EMA_MOMENTUM, zero if first else s.ema_momentum)
            store(f, table.CORRECTION, advance(row, s))
            if dithers:  # after counting: each replay of a graph then has another key
                store_int(row, table.KEY, key_of(load_int(row, table.SEED), count(row)))

    return prepare


def make_outcome(variant: Variant, space: int) -> Any:
    """``outcome(norms, skip, norm, counts)``: record what became of the step; `counts` is set in one batch only."""
    (_, store), (load_int, store_int) = memory(np.float64, space), memory(np.int64, space)

    @inline
    def outcome(norms, skip, norm, counts):  # type: ignore[no-untyped-def]
        address = load_int(norms, table.OUTCOME)
        if counts != 0 and skip:
            store_int(address, table.SKIPPED, load_int(address, table.SKIPPED) + 1)
        if variant.norm:
            store(address, table.NORM, norm)

    return outcome
