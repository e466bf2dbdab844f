"""Fewer bytes: codes for the second moment, bfloat16 parameters plus a remainder, and stochastic rounding.

Only this file and `intrinsics.py` use LLVM: here for 32-bit integers, which Numba would widen. Everything is done with
exact operations on the bits of a float32 (add, shift, compare, select), so both targets give the same codes.

A 16-bit code is a non-negative float32 without its sign and its last 15 bits: 8 bits of exponent, 8 of mantissa. An
8-bit code is the same prefix with 3 bits of mantissa, as a window of 256 codes below the largest of `BLOCK`
neighbours; their base is where the window begins. All codes lie on one absolute grid: another base only shifts the
window, and nothing is rounded again.

Dither is a random word per element and step, made without a generator from a key per tensor and step. For each element
the words of its steps are independent and uniform, so rounding is unbiased, whatever has been rounded before.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from .intrinsics import intrinsic, memory

BLOCK = 128  # elements that share a base and a key
SHIFT16, SHIFT8 = 15, 20  # how many of the last bits of a float32 a code drops
INFINITE, QUIET_NAN = 0x7F800000, 0x7FC00000  # as float32 bits
LARGEST_BASE = (INFINITE >> SHIFT8) - 255

_I8, _I16, _I32, _I64, _F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
i32, i64, f32 = types.int32, types.int64, types.float32
_UniTuple: Any = types.UniTuple


def _intrinsic(result: Any, *arguments: Any) -> Callable[[Any], Any]:
    """An intrinsic with these types whose code is ``build(builder, *values)``."""

    def wrap(build: Any) -> Any:
        def codegen(context, builder, sig, values):  # type: ignore[no-untyped-def]
            return build(builder, *values)

        def typed(typingctx, *given):  # type: ignore[no-untyped-def]
            return result(*arguments), codegen

        names = ", ".join(f"x{i}" for i in range(len(arguments)))
        # Numba counts the arguments by looking at their names.
        made: dict[str, Any] = {"typed": typed}
        exec(f"def {build.__name__}(typingctx, {names}):\n    return typed(typingctx, {names})", made)
        function = made[build.__name__]
        function.__doc__, function.__module__ = build.__doc__, __name__
        return intrinsic(function)

    return wrap


def _smaller(b: Any, x: Any, limit: int) -> Any:
    """The smaller of two unsigned integers."""
    return b.select(b.icmp_unsigned("<", x, _I32(limit)), x, _I32(limit))


# Keys and words of dither


def splitmix(x: int) -> int:
    """Mix 64 bits into 64 bits (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators")."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def seed_of(name: str, seed: int) -> int:
    """What a tensor's keys are made from: its name and the user's seed, mixed."""
    return splitmix(zlib.crc32(name.encode("utf-8", "surrogatepass")) ^ seed)


@_intrinsic(i64, i64, i64)
def key_of(b: Any, mixed: Any, step: Any) -> Any:
    """The 32-bit key of a tensor's step: ``splitmix(splitmix(seed) ^ step) >> 32``; `mixed` is the inner splitmix."""
    x = b.add(b.xor(mixed, step), _I64(0x9E3779B97F4A7C15))
    x = b.mul(b.xor(x, b.lshr(x, _I64(30))), _I64(0xBF58476D1CE4E5B9))
    x = b.mul(b.xor(x, b.lshr(x, _I64(27))), _I64(0x94D049BB133111EB))
    return b.lshr(b.xor(x, b.lshr(x, _I64(31))), _I64(32))


@_intrinsic(i32, i64, i64)
def block_key(b: Any, key: Any, block: Any) -> Any:
    """The key of a block of elements; without it, columns of some widths would round alike."""
    x = b.xor(b.trunc(key, _I32), b.mul(b.trunc(block, _I32), _I32(0x85EBCA6B)))
    x = b.mul(b.xor(x, b.lshr(x, _I32(15))), _I32(0x2C1B3C6D))
    return b.xor(x, b.lshr(x, _I32(13)))


@_intrinsic(i32, i32, i64)
def word(b: Any, key: Any, j: Any) -> Any:
    """The word of element j of a block; the second moment uses the top bits, the parameter the low 16."""
    return b.add(b.mul(b.trunc(j, _I32), _I32(0x9E3779B9)), key)


# The second moment in 16 bits


@_intrinsic(f32, i32)
def decode16(b: Any, code: Any) -> Any:
    return b.bitcast(b.shl(code, _I32(SHIFT16)), _F32)


@_intrinsic(i32, f32, i32)
def encode16(b: Any, v: Any, w: Any) -> Any:
    bits = _smaller(b, b.bitcast(v, _I32), QUIET_NAN)  # any NaN, whatever its sign and payload, becomes this one
    return b.lshr(b.add(bits, b.lshr(w, _I32(32 - SHIFT16))), _I32(SHIFT16))


# The second moment in 8 bits


@_intrinsic(f32, i32, i32)
def decode8(b: Any, code: Any, base: Any) -> Any:
    return b.bitcast(b.shl(b.add(code, base), _I32(SHIFT8)), _F32)


@_intrinsic(i32, f32)
def finite_bits(b: Any, v: Any) -> Any:
    """The bits of v >= 0, among which the largest is searched; 0 if v is not finite."""
    bits = b.bitcast(v, _I32)
    return b.select(b.icmp_unsigned("<", bits, _I32(INFINITE)), bits, _I32(0))


@_intrinsic(i32, i32, i32)
def larger(b: Any, x: Any, y: Any) -> Any:
    return b.select(b.icmp_signed(">", x, y), x, y)


@_intrinsic(i32, i32)
def base_of(b: Any, most: Any) -> Any:
    """The base at which the largest value of a block fits, however it is rounded."""
    base = b.sub(b.lshr(b.add(most, _I32((1 << SHIFT8) - 1)), _I32(SHIFT8)), _I32(255))
    return b.select(b.icmp_signed("<", base, _I32(0)), _I32(0), base)


@_intrinsic(i32, f32, i32, i32)
def encode8(b: Any, v: Any, w: Any, base: Any) -> Any:
    """Values below the window get its lowest code, never 0; non-finite values get its highest."""
    bits = _smaller(b, b.bitcast(v, _I32), INFINITE)
    moved = b.sub(b.add(bits, b.lshr(w, _I32(32 - SHIFT8))), b.shl(base, _I32(SHIFT8)))
    code = b.ashr(moved, _I32(SHIFT8))
    code = b.select(b.icmp_signed("<", code, _I32(255)), code, _I32(255))
    return b.select(b.icmp_signed(">", code, _I32(0)), code, _I32(0))


# bfloat16 parameters, in the low bits of an int32


@_intrinsic(f32, i32, i32)
def joined(b: Any, p: Any, rest: Any) -> Any:
    """The float32 made from a bfloat16 and its 16-bit remainder, which is signed: rounding was to nearest.

    If that is a NaN the result is the bfloat16: also a NaN, or a zero or infinity that a user has written beside the
    remainder of another number.
    """
    alone = b.shl(p, _I32(16))
    bits = b.add(alone, b.sext(b.trunc(rest, _I16), _I32))
    both = b.bitcast(bits, _F32)
    return b.select(b.fcmp_unordered("uno", both, both), b.bitcast(alone, _F32), both)


def _without_payload(b: Any, x: Any) -> Any:
    return b.select(b.fcmp_unordered("uno", x, x), _I32(QUIET_NAN), b.bitcast(x, _I32))


@_intrinsic(i32, f32)
def upper(b: Any, x: Any) -> Any:
    """The bfloat16 nearest to a float32 whose remainder is kept."""
    return b.lshr(b.add(_without_payload(b, x), _I32(0x8000)), _I32(16))


@_intrinsic(i32, f32)
def remainder(b: Any, x: Any) -> Any:
    """What `upper` drops."""
    return b.and_(_without_payload(b, x), _I32(0xFFFF))


@_intrinsic(i32, f32, i32)
def dithered(b: Any, x: Any, w: Any) -> Any:
    """Round a float32 stochastically to bfloat16, by the low bits of a word; non-finite values stay."""
    return b.lshr(b.add(_without_payload(b, x), b.and_(w, _I32(0xFFFF))), _I32(16))


# Small integers in memory, which kernels see as int32


def small(dtype: Any, space: int) -> tuple[Any, Any]:
    """``load(address, i)`` and ``store(address, i, x)`` for unsigned integers of 8 or 16 bits."""
    size = np.dtype(dtype).itemsize
    llvm = {1: _I8, 2: _I16}[size]

    def pointer(b: Any, address: Any, i: Any) -> Any:
        return b.gep(b.inttoptr(address, llvm.as_pointer(space)), [i], inbounds=True)

    @_intrinsic(i32, i64, i64)
    def load(b: Any, address: Any, i: Any) -> Any:
        return b.zext(b.load(pointer(b, address, i), align=size), _I32)

    @intrinsic
    def store(typingctx, address, i, x):  # type: ignore[no-untyped-def]
        def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
            address, i, x = args
            builder.store(builder.trunc(x, llvm), pointer(builder, address, i), align=size)
            return context.get_dummy_value()

        return types.void(i64, i64, i32), codegen

    return load, store


# Four consecutive ones, in one access


@_intrinsic(_UniTuple(i32, 4), _UniTuple(i32, 2))
def halves(b: Any, pair: Any) -> Any:
    """The four 16-bit integers in two words."""
    words = [b.extract_value(pair, k) for k in range(2)]
    found = [x for w in words for x in (b.and_(w, _I32(0xFFFF)), b.lshr(w, _I32(16)))]
    return _array(b, found)


@_intrinsic(_UniTuple(i32, 2), _UniTuple(i32, 4))
def in_halves(b: Any, four: Any) -> Any:
    """Two words made from four 16-bit integers."""
    x = [b.and_(b.extract_value(four, k), _I32(0xFFFF)) for k in range(4)]
    return _array(b, [b.or_(x[k], b.shl(x[k + 1], _I32(16))) for k in (0, 2)])


@_intrinsic(_UniTuple(i32, 4), i32)
def quarters(b: Any, one: Any) -> Any:
    """The four 8-bit integers in a word."""
    return _array(b, [b.and_(b.lshr(one, _I32(8 * k)), _I32(255)) for k in range(4)])


@_intrinsic(i32, _UniTuple(i32, 4))
def in_quarters(b: Any, four: Any) -> Any:
    """A word made from four 8-bit integers."""
    x = [b.shl(b.extract_value(four, k), _I32(8 * k)) for k in range(4)]
    return b.or_(b.or_(x[0], x[1]), b.or_(x[2], x[3]))


def _array(b: Any, values: list[Any]) -> Any:
    made = ir.Constant(ir.ArrayType(_I32, len(values)), ir.Undefined)
    for k, x in enumerate(values):
        made = b.insert_value(made, x, k)
    return made


def four_halves(space: int) -> tuple[Any, Any]:
    """``load(address, 0)`` and ``store(address, 0, pair)`` for two words."""
    return memory(np.int32, space, 2)
