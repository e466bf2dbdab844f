"""CUDA's loop around the rule where the second moment or the parameter is stored in fewer bytes (codes.py).

A thread handles four neighbours at a time, and a warp one block of codes. Its largest element is found in registers,
by one instruction or, before compute capability 8.0, by shuffles: one pass is enough, without shared memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..arrays.dtypes import of
from .codes import (
    BLOCK,
    base_of,
    block_key,
    decode8,
    decode16,
    dithered,
    encode8,
    encode16,
    finite_bits,
    halves,
    in_halves,
    in_quarters,
    joined,
    larger,
    quarters,
    remainder,
    small,
    upper,
    word,
)
from .cuda_target import target
from .intrinsics import GLOBAL, late, make_lanes, make_largest_of_warp, memory, opaque
from .norms import make_advance, make_factors, make_scalars
from .rule import Variant, inline, make_rule
from .table import (
    BASES,
    BLOCKS_BEFORE,
    CHUNK_COLUMNS,
    COLUMNS,
    EMA,
    FACTOR_COLUMNS,
    GRAD_AVG,
    KEY,
    MOMENTUM_BUFFER,
    PARAM,
    REMAINDER,
    ROW,
    SKIP,
    SQUARE_AVG,
    START,
    STOP,
)

T = np.float32  # the compute type: float64 has no codes
THREADS = 256  # per block, as in cuda.py
WARP = 32
LOG_WARP, LOG_BLOCK = 5, 7  # shifts, since dividing signed integers takes more than one instruction
WIDTH = BLOCK // WARP  # elements per thread at a time
ALL = 0xFFFFFFFF

_load_int, _ = memory(np.int64, GLOBAL)
_load_word, _store_word = memory(np.int32, GLOBAL)
_load_pair, _store_pair = memory(np.int32, GLOBAL, 2)
_load8, _store8 = small(np.uint8, GLOBAL)
_load16, _store16 = small(np.uint16, GLOBAL)
_zero = np.int64(0)


@inline
def _largest_of_four(a, b, c, d):  # type: ignore[no-untyped-def]
    return larger(larger(finite_bits(a), finite_bits(b)), larger(finite_bits(c), finite_bits(d)))


@inline
def _largest_by_shuffles(x):  # type: ignore[no-untyped-def]
    x = larger(x, target.shfl_xor_sync(ALL, x, 16))
    x = larger(x, target.shfl_xor_sync(ALL, x, 8))
    x = larger(x, target.shfl_xor_sync(ALL, x, 4))
    x = larger(x, target.shfl_xor_sync(ALL, x, 2))
    return larger(x, target.shfl_xor_sync(ALL, x, 1))


_largest_of_warp = make_largest_of_warp(_largest_by_shuffles)


@inline
def _word(key, before, i):  # type: ignore[no-untyped-def]
    """The dither word of element i of a chunk that has `before` blocks before it."""
    return word(block_key(key, before + (i >> LOG_BLOCK)), i & (BLOCK - 1))


@inline
def _words(key, before, i):  # type: ignore[no-untyped-def]
    """The dither words of four neighbours, which lie in one block."""
    k, j = block_key(key, before + (i >> LOG_BLOCK)), i & (BLOCK - 1)
    return word(k, j), word(k, j + 1), word(k, j + 2), word(k, j + 3)


def _make_param(variant: Variant, D: Any, width: int) -> tuple[Any, Any]:
    """``load(param, rest, i)``, ``store(param, rest, i, p, w)``; on tuples if there is a width."""
    load_nearest, store_nearest = memory(D, GLOBAL, width)

    if width == 1:

        @inline
        def load(param, rest, i):  # type: ignore[no-untyped-def]
            return joined(_load16(param, i), _load16(rest, i)) if variant.remainder else load_nearest(param, i)

        @inline
        def store(param, rest, i, p, w):  # type: ignore[no-untyped-def]
            if variant.remainder:
                _store16(param, i, upper(p))
                _store16(rest, i, remainder(p))
            elif variant.stochastic_round:
                _store16(param, i, dithered(p, w))
            else:
                store_nearest(param, i, p)

        return load, store

    @inline
    def load_many(param, rest, i):  # type: ignore[no-untyped-def]
        if variant.remainder:
            x, y = halves(_load_pair(param + 2 * i, _zero)), halves(_load_pair(rest + 2 * i, _zero))
            return joined(x[0], y[0]), joined(x[1], y[1]), joined(x[2], y[2]), joined(x[3], y[3])
        return load_nearest(param, i)

    @inline
    def store_many(param, rest, i, p, w):  # type: ignore[no-untyped-def]
        if variant.remainder:
            x = upper(p[0]), upper(p[1]), upper(p[2]), upper(p[3])
            y = remainder(p[0]), remainder(p[1]), remainder(p[2]), remainder(p[3])
            _store_pair(param + 2 * i, _zero, in_halves(x))
            _store_pair(rest + 2 * i, _zero, in_halves(y))
        elif variant.stochastic_round:
            x = dithered(p[0], w[0]), dithered(p[1], w[1]), dithered(p[2], w[2]), dithered(p[3], w[3])
            _store_pair(param + 2 * i, _zero, in_halves(x))
        else:
            store_nearest(param, i, p)

    return load_many, store_many


def _make_moment(variant: Variant, width: int) -> tuple[Any, Any]:
    """``load(square_avg, base, i)``, ``store(square_avg, base, i, v, w)``; on tuples if there is a width."""
    load_float, store_float = memory(T, GLOBAL, width)

    if width == 1:

        @inline
        def load(square_avg, base, i):  # type: ignore[no-untyped-def]
            if variant.uint8:
                return decode8(_load8(square_avg, i), base)
            if variant.uint16:
                return decode16(_load16(square_avg, i))
            return load_float(square_avg, i)

        @inline
        def store(square_avg, base, i, v, w):  # type: ignore[no-untyped-def]
            if variant.uint8:
                _store8(square_avg, i, encode8(v, w, base))
            elif variant.uint16:
                _store16(square_avg, i, encode16(v, w))
            else:
                store_float(square_avg, i, v)

        return load, store

    @inline
    def load_many(square_avg, base, i):  # type: ignore[no-untyped-def]
        if variant.uint8:
            x = quarters(_load_word(square_avg + i, _zero))
            return decode8(x[0], base), decode8(x[1], base), decode8(x[2], base), decode8(x[3], base)
        if variant.uint16:
            x = halves(_load_pair(square_avg + 2 * i, _zero))
            return decode16(x[0]), decode16(x[1]), decode16(x[2]), decode16(x[3])
        return load_float(square_avg, i)

    @inline
    def store_many(square_avg, base, i, v, w):  # type: ignore[no-untyped-def]
        if variant.uint8:
            x = (
                encode8(v[0], w[0], base),
                encode8(v[1], w[1], base),
                encode8(v[2], w[2], base),
                encode8(v[3], w[3], base),
            )
            _store_word(square_avg + i, _zero, in_quarters(x))
        elif variant.uint16:
            x = encode16(v[0], w[0]), encode16(v[1], w[1]), encode16(v[2], w[2]), encode16(v[3], w[3])
            _store_pair(square_avg + 2 * i, _zero, in_halves(x))
        else:
            store_float(square_avg, i, v)

    return load_many, store_many


def _make_update(variant: Variant, D: Any, G: Any, width: int) -> Any:
    """``update(param, rest, grad, v, ..., i, key, before, s, f)``: update the elements from i on, except storing v.

    It returns the new v, and the words of dither.
    """
    lanes, words = make_lanes(make_rule(variant, T), T, width), _word if width == 1 else _words
    (load_param, store_param), (load_state, store_state) = _make_param(variant, D, width), memory(T, GLOBAL, width)
    load_grad, store_grad = memory(G, GLOBAL, width)
    zeros = T(0) if width == 1 else (T(0),) * width

    @inline
    def update(param, rest, grad, v, grad_avg, momentum_buffer, ema, i, key, before, s, f):  # type: ignore[no-untyped-def]
        p, g = load_param(param, rest, i), load_grad(grad, i)
        m = load_state(grad_avg, i) if variant.centered else v
        b = load_state(momentum_buffer, i) if variant.momentum else v
        e = load_state(ema, i) if variant.ema else v
        p, v, m, b, e = lanes(p, g, v, m, b, e, s, f)
        w = words(key, before, np.int32(late(i, p if width == 1 else p[width - 1])))
        store_param(param, rest, i, p, w)
        if variant.centered:
            store_state(grad_avg, i, m)
        if variant.momentum:
            store_state(momentum_buffer, i, b)
        if variant.ema:
            store_state(ema, i, e)
        if variant.zero_grads:
            store_grad(grad, i, zeros)
        return v, w

    return update


def make_update_kernel(variant: Variant, D: Any, G: Any = None) -> Any:
    """The kernel for all chunks of a batch, as in cuda.py; a chunk begins with a block of codes."""
    G = G or D
    size, grad_size, moment_size = of(D).itemsize, of(G).itemsize, 1 if variant.uint8 else 2 if variant.uint16 else 4
    update_one, update_many = _make_update(variant, D, G, 1), _make_update(variant, D, G, WIDTH)
    (load_v, store_v), (load_vs, store_vs) = _make_moment(variant, 1), _make_moment(variant, WIDTH)
    advance, scalars_of = make_advance(variant, T, GLOBAL), make_scalars(T, GLOBAL)
    factors_of = make_factors(variant, T, GLOBAL)
    (load_factor, _), (_, store_grad) = memory(T, GLOBAL), memory(G, GLOBAL)
    zero, no_base, prepared, uint8, dithers = T(0), np.int32(0), variant.prepared, variant.uint8, variant.dithers
    together = BLOCK if uint8 else WIDTH  # elements handled as a whole, or left to the loop over single ones

    def update_kernel(table, grads, chunks, scalars, factors):  # type: ignore[no-untyped-def]
        chunk = chunks + np.int64(target.blockIdx.x) * (8 * CHUNK_COLUMNS)
        index, start, stop = _load_int(chunk, ROW), _load_int(chunk, START), _load_int(chunk, STOP)
        row = table + index * 8 * COLUMNS
        # As in cuda.py, all is read at once, with no branch in between.
        grad, param, square_avg = _load_int(grads, index), _load_int(row, PARAM), _load_int(row, SQUARE_AVG)
        grad_avg = _load_int(row, GRAD_AVG) if variant.centered else square_avg
        momentum_buffer = _load_int(row, MOMENTUM_BUFFER) if variant.momentum else square_avg
        ema = _load_int(row, EMA) if variant.ema else square_avg
        rest = _load_int(row, REMAINDER) if variant.remainder else param
        bases = _load_int(row, BASES) + (start >> LOG_BLOCK) * 2 if uint8 else square_avg
        key = _load_int(row, KEY) if dithers else start
        before = _load_int(row, BLOCKS_BEFORE) + (start >> LOG_BLOCK) if dithers else start
        skipped = prepared and load_factor(factors, index * FACTOR_COLUMNS + SKIP) != zero
        has_grad = grad != 0
        grad += start * grad_size
        param += start * size
        square_avg += start * moment_size
        grad_avg += start * 4
        momentum_buffer += start * 4
        ema += start * 4
        rest += start * 2
        n = np.int32(stop - start) if has_grad else np.int32(0)
        if variant.zero_grads and skipped:
            i = np.int32(target.threadIdx.x)
            while i < n:
                store_grad(grad, i, zero)
                i = opaque(np.int32(i + THREADS))
        n = np.int32(0) if skipped else n
        s = scalars_of(scalars, row)
        f = factors_of(factors, index, s)
        # Each stream's address, times the factor that would make its vector 16 bytes wide. With bit masks, or with all
        # streams at once, kernels with all buffers would use up to 70 registers, as in cuda.py.
        even = param * (4 // size) | grad * (4 // grad_size)
        moments = square_avg * (4 // moment_size)
        if variant.centered:
            moments |= grad_avg
        if variant.momentum:
            moments |= momentum_buffer
        if variant.ema:
            moments |= ema
        if variant.remainder:
            even |= rest * 2
        whole = np.int32(n & -together)
        if even % 16 != 0 or moments % 16 != 0:
            whole = np.int32(0)
        if not prepared and has_grad and start == 0 and target.threadIdx.x == 0:
            advance(row, s)
        i = np.int32(target.threadIdx.x * WIDTH)
        while i < whole:
            base = _load16(bases, i >> LOG_BLOCK) if uint8 else no_base
            v = load_vs(square_avg, base, i)
            v, w = update_many(param, rest, grad, v, grad_avg, momentum_buffer, ema, i, key, before, s, f)
            if uint8:  # one block of codes per warp
                base = base_of(_largest_of_warp(_largest_of_four(v[0], v[1], v[2], v[3])))
                if i & (BLOCK - 1) == 0:  # the address is computed again: kept, it would cost two registers
                    _store16(bases, late(i, v[3]) >> LOG_BLOCK, base)
            store_vs(square_avg, base, i, v, w)
            i = opaque(np.int32(i + THREADS * WIDTH))
        if uint8:  # the ragged end of a tensor, or all of an unaligned one: each lane has four elements, 32 apart
            lane = np.int32(target.threadIdx.x & (WARP - 1))
            begin = np.int32(whole + np.int32(target.threadIdx.x >> LOG_WARP) * BLOCK)
            while begin < n:
                i, end, base = np.int32(begin + lane), np.int32(begin + BLOCK), _load16(bases, begin >> LOG_BLOCK)
                a, b, c, d = zero, zero, zero, zero
                while i < end:  # a loop, so that the rule is not compiled in four times; its results move up
                    a, b, c, d = b, c, d, zero
                    if i < n:
                        d = load_v(square_avg, base, i)
                        d, w = update_one(param, rest, grad, d, grad_avg, momentum_buffer, ema, i, key, before, s, f)
                    i = opaque(np.int32(i + WARP))
                base = base_of(_largest_of_warp(_largest_of_four(a, b, c, d)))
                if lane == 0:
                    _store16(bases, begin >> LOG_BLOCK, base)
                i = np.int32(begin + lane)
                while i < end:
                    if i < n:
                        store_v(square_avg, base, i, a, _word(key, before, i))
                    a, b, c = b, c, d
                    i = opaque(np.int32(i + WARP))
                begin = opaque(np.int32(begin + THREADS // WARP * BLOCK))
        else:
            i = np.int32(whole + np.int32(target.threadIdx.x))
            while i < n:  # the ragged end of a chunk, or all of a chunk that is not aligned
                v = load_v(square_avg, no_base, i)
                v, w = update_one(param, rest, grad, v, grad_avg, momentum_buffer, ema, i, key, before, s, f)
                store_v(square_avg, no_base, i, v, w)
                i = opaque(np.int32(i + THREADS))

    return update_kernel
