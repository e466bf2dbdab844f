"""The CPU's loops around the rule where the second moment or the parameter is stored in fewer bytes (codes.py)."""

from __future__ import annotations

from typing import Any

import numpy as np

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
    joined,
    larger,
    remainder,
    small,
    upper,
    word,
)
from .cpu_prepare import kernel
from .intrinsics import HOST, make_scratch, memory
from .norms import make_advance, make_factors, make_scalars
from .rule import Variant, inline
from .table import (
    BASES,
    BLOCKS_BEFORE,
    COLUMNS,
    EMA,
    FACTOR_COLUMNS,
    FACTORS,
    GRAD_AVG,
    GRADS,
    KEY,
    MOMENTUM_BUFFER,
    PARAM,
    REMAINDER,
    SCALARS,
    SKIP,
    SQUARE_AVG,
    TABLE,
)

T = np.float32  # the compute type: float64 has no codes
_load_int, _ = memory(np.int64, HOST)
_load_float, _store_float = memory(T, HOST)
_load8, _store8 = small(np.uint8, HOST)
_load16, _store16 = small(np.uint16, HOST)
_scratch = make_scratch(BLOCK // 2)  # room for BLOCK float32


def _make_param(variant: Variant, D: Any) -> tuple[Any, Any]:
    """``load(param, rest, i)``, ``store(param, rest, i, p, w)``."""
    load_nearest, store_nearest = memory(D, HOST)

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


def make_update_kernel(variant: Variant, D: Any, G: Any, make_rule: Any) -> Any:
    """The kernel for a piece of a tensor, as in cpu.py; `start` is a multiple of `BLOCK`."""
    rule, advance, scalars = make_rule(variant, T), make_advance(variant, T, HOST), make_scalars(T, HOST)
    factors_of, (load_grad, store_grad) = make_factors(variant, T, HOST), memory(G, HOST)
    load_param, store_param = _make_param(variant, D)
    zero, prepared = T(0), variant.prepared

    @inline
    def update(param, rest, grad, v, grad_avg, momentum_buffer, ema, i, w, s, f):  # type: ignore[no-untyped-def]
        """Update element i except for storing the new v, which is returned."""
        p = load_param(param, rest, i)
        m = _load_float(grad_avg, i) if variant.centered else p
        b = _load_float(momentum_buffer, i) if variant.momentum else p
        e = _load_float(ema, i) if variant.ema else p
        p, v, m, b, e = rule(p, load_grad(grad, i), v, m, b, e, s, f)
        store_param(param, rest, i, p, w)
        if variant.centered:
            _store_float(grad_avg, i, m)
        if variant.momentum:
            _store_float(momentum_buffer, i, b)
        if variant.ema:
            _store_float(ema, i, e)
        if variant.zero_grads:
            store_grad(grad, i, zero)
        return v

    @kernel
    def update_kernel(batch, index, start, stop):  # type: ignore[no-untyped-def]
        grad = _load_int(_load_int(batch, GRADS), index)
        if grad == 0:
            return
        row = _load_int(batch, TABLE) + index * 8 * COLUMNS
        s = scalars(_load_int(batch, SCALARS), row)
        factors = _load_int(batch, FACTORS)
        if prepared:
            if _load_float(factors, index * FACTOR_COLUMNS + SKIP) != zero:
                if variant.zero_grads:
                    for i in range(start, stop):
                        store_grad(grad, i, zero)
                return
        elif start == 0:
            advance(row, s)
        f = factors_of(factors, index, s)
        param, square_avg, rest = _load_int(row, PARAM), _load_int(row, SQUARE_AVG), _load_int(row, REMAINDER)
        grad_avg, momentum_buffer, ema = _load_int(row, GRAD_AVG), _load_int(row, MOMENTUM_BUFFER), _load_int(row, EMA)
        key, before, bases, scratch = (
            _load_int(row, KEY),
            _load_int(row, BLOCKS_BEFORE),
            _load_int(row, BASES),
            _scratch(),
        )
        for begin in range(start, stop, BLOCK):
            count = min(BLOCK, stop - begin)
            block = begin // BLOCK
            k = block_key(key, before + block)
            if variant.uint8:
                base, most = _load16(bases, block), np.int32(0)
                for j in range(count):
                    i = begin + j
                    v = decode8(_load8(square_avg, i), base)
                    v = update(param, rest, grad, v, grad_avg, momentum_buffer, ema, i, word(k, j), s, f)
                    _store_float(scratch, j, v)
                    most = larger(most, finite_bits(v))
                base = base_of(most)
                for j in range(count):
                    _store8(square_avg, begin + j, encode8(_load_float(scratch, j), word(k, j), base))
                _store16(bases, block, base)
            elif variant.uint16:
                for j in range(count):
                    i, w = begin + j, word(k, j)
                    v = decode16(_load16(square_avg, i))
                    v = update(param, rest, grad, v, grad_avg, momentum_buffer, ema, i, w, s, f)
                    _store16(square_avg, i, encode16(v, w))
            else:
                for j in range(count):
                    i = begin + j
                    v = _load_float(square_avg, i)
                    v = update(param, rest, grad, v, grad_avg, momentum_buffer, ema, i, word(k, j), s, f)
                    _store_float(square_avg, i, v)

    return update_kernel
