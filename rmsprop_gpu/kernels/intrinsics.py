"""Load, store, fma and call on raw addresses, for the CPU and for CUDA: with codes.py, the only use of LLVM."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import extending, types

from ..arrays.dtypes import of

# Numba annotates an intrinsic with the signature of the function below it; callers pass fewer arguments.
intrinsic: Any = extending.intrinsic

HOST, GLOBAL = 0, 1  # LLVM's address spaces: the host's memory, and a CUDA device's

_I8, _I16, _I32, _F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.FloatType()

# For the name of a dtype: the type in memory, and the type that kernels see.
_TYPES: dict[str, tuple[Any, Any]] = {
    "int8": (_I8, types.int8),
    "int16": (_I16, types.int16),
    "int32": (_I32, types.int32),
    "int64": (ir.IntType(64), types.int64),
    "float32": (_F32, types.float32),
    "float64": (ir.DoubleType(), types.float64),
    "float16": (_I16, types.float32),
    "bfloat16": (_I16, types.float32),
}


@intrinsic
def fma(typingctx, a, b, c):  # type: ignore[no-untyped-def]
    """``a * b + c`` with one rounding, on every target."""
    return a(a, a, a), lambda context, builder, sig, args: builder.fma(*args)


def _bits_of(x: Any) -> Any:
    return types.int64 if x == types.float64 else types.int32


@intrinsic
def magnitude(typingctx, x):  # type: ignore[no-untyped-def]
    """The bits of a number without its sign, as an integer: ordered like magnitudes, with every NaN above infinity."""
    bits = _bits_of(x)

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        kind = ir.IntType(bits.bitwidth)
        return builder.and_(builder.bitcast(args[0], kind), kind((1 << (bits.bitwidth - 1)) - 1))

    return bits(x), codegen


@intrinsic
def of_magnitude(typingctx, bits):  # type: ignore[no-untyped-def]
    """The number with these bits."""
    x = types.float64 if bits == types.int64 else types.float32

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        return builder.bitcast(args[0], ir.DoubleType() if x == types.float64 else _F32)

    return x(bits), codegen


def _widen(builder: Any, name: str, space: int, x: Any) -> Any:
    """The float32 for the 16 bits of a half; anything else is returned unchanged."""
    if name == "float16":
        if space == GLOBAL:
            return builder.fpext(builder.bitcast(x, ir.HalfType()), _F32)
        return _widen_by_hand(builder, builder.zext(x, _I32))
    if name == "bfloat16":  # the upper half of a float32
        return builder.bitcast(builder.shl(builder.zext(x, _I32), _I32(16)), _F32)
    return x


def _narrow(builder: Any, name: str, space: int, x: Any) -> Any:
    """The 16 bits of the half nearest to a float32, ties to even; anything else is returned unchanged."""
    if name == "float16":
        if space == GLOBAL:
            return builder.bitcast(builder.fptrunc(x, ir.HalfType()), _I16)
        return builder.trunc(_narrow_by_hand(builder, builder.bitcast(x, _I32)), _I16)
    if name == "bfloat16":  # in integers: the instruction for it exists only on some architectures
        bits = builder.bitcast(x, _I32)
        odd = builder.and_(builder.lshr(bits, _I32(16)), _I32(1))
        rounded = builder.add(bits, builder.add(odd, _I32(0x7FFF)))
        # A NaN stays one: rounding could carry it into an infinity.
        chosen = builder.select(builder.fcmp_unordered("uno", x, x), _I32(0x7FC00000), rounded)
        return builder.trunc(builder.lshr(chosen, _I32(16)), _I16)
    return x


# On a processor without F16C, LLVM calls a function of the compiler's runtime for float16, which may be missing, and
# the process would abort. By hand it is a handful of vector instructions everywhere.


def _widen_by_hand(builder: Any, h: Any) -> Any:
    """The float32 of a float16 whose 16 bits come in an int32; multiplying by a power of two is exact."""
    rest = builder.and_(h, _I32(0x7FFF))
    shifted = builder.bitcast(builder.shl(rest, _I32(13)), _F32)
    scaled = builder.bitcast(builder.fmul(shifted, _F32(2.0**112)), _I32)
    finite = builder.icmp_unsigned("<", rest, _I32(0x7C00))
    endless = builder.or_(builder.shl(rest, _I32(13)), _I32(0x7F800000))
    sign = builder.shl(builder.and_(h, _I32(0x8000)), _I32(16))
    return builder.bitcast(builder.or_(builder.select(finite, scaled, endless), sign), _F32)


def _narrow_by_hand(builder: Any, bits: Any) -> Any:
    """The 16 bits, in an int32, of the float16 nearest to the float32 with these bits."""
    rest = builder.and_(bits, _I32(0x7FFFFFFF))
    sign = builder.and_(builder.lshr(bits, _I32(16)), _I32(0x8000))
    odd = builder.and_(builder.lshr(rest, _I32(13)), _I32(1))
    rebased = builder.sub(builder.add(rest, builder.add(odd, _I32(0xFFF))), _I32(112 << 23))
    normal = builder.lshr(rebased, _I32(13))
    # Adding 0.5 rounds to a multiple of 2^-24, the unit of subnormals.
    rounded = builder.fadd(builder.bitcast(rest, _F32), _F32(0.5))
    subnormal = builder.sub(builder.bitcast(rounded, _I32), _I32(0x3F000000))
    chosen = builder.select(builder.icmp_unsigned("<", rest, _I32(113 << 23)), subnormal, normal)
    is_nan = builder.icmp_unsigned(">", rest, _I32(0x7F800000))
    endless = builder.select(is_nan, _I32(0x7E00), _I32(0x7C00))
    chosen = builder.select(builder.icmp_unsigned("<", rest, _I32(143 << 23)), chosen, endless)
    return builder.or_(chosen, sign)


@cache
def memory(T: Any, space: int, width: int = 1) -> tuple[Any, Any]:
    """``load(address, index)`` and ``store(address, index, value)`` at an integer address, in elements of type T.

    Callers load and store halves as float32. With a `width`, they use tuples of this many consecutive elements, aligned
    as a whole, in one access of at most 16 bytes.
    """
    return (_one if width == 1 else _many)(of(T), space, width)


def _one(dtype: np.dtype[Any], space: int, _: int) -> tuple[Any, Any]:
    llvm, value = _TYPES[dtype.name]

    def pointer(builder: Any, address: Any, index: Any) -> Any:
        return builder.gep(builder.inttoptr(address, llvm.as_pointer(space)), [index], inbounds=True)

    @intrinsic
    def load(typingctx, address, index):  # type: ignore[no-untyped-def]
        def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
            return _widen(builder, dtype.name, space, builder.load(pointer(builder, *args), align=dtype.itemsize))

        return value(types.int64, types.int64), codegen

    @intrinsic
    def store(typingctx, address, index, x):  # type: ignore[no-untyped-def]
        def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
            address, index, x = args
            stored = _narrow(builder, dtype.name, space, x)
            builder.store(stored, pointer(builder, address, index), align=dtype.itemsize)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, value), codegen

    return load, store


def _many(dtype: np.dtype[Any], space: int, width: int) -> tuple[Any, Any]:
    llvm, element = _TYPES[dtype.name]
    value = types.UniTuple(element, width)
    # Halves travel in pairs: some compilers take a vector of 16-bit integers apart.
    halves = dtype.itemsize == 2
    vector, align = ir.VectorType(_I32 if halves else llvm, width // 2 if halves else width), width * dtype.itemsize

    def pointer(builder: Any, address: Any, index: Any) -> Any:
        first = builder.gep(builder.inttoptr(address, llvm.as_pointer(space)), [index], inbounds=True)
        return builder.bitcast(first, vector.as_pointer(space))

    def unpacked(builder: Any, loaded: Any) -> list[Any]:
        words = [builder.extract_element(loaded, _I32(j)) for j in range(vector.count)]
        if halves:
            words = [builder.trunc(x, _I16) for w in words for x in (w, builder.lshr(w, _I32(16)))]
        return [_widen(builder, dtype.name, space, x) for x in words]

    def packed(builder: Any, values: Sequence[Any]) -> Any:
        words = [_narrow(builder, dtype.name, space, x) for x in values]
        if halves:
            wide = [builder.zext(x, _I32) for x in words]
            pairs = zip(wide[::2], wide[1::2], strict=True)
            words = [builder.or_(low, builder.shl(high, _I32(16))) for low, high in pairs]
        stored = ir.Constant(vector, ir.Undefined)
        for j, x in enumerate(words):
            stored = builder.insert_element(stored, x, _I32(j))
        return stored

    @intrinsic
    def load(typingctx, address, index):  # type: ignore[no-untyped-def]
        def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
            return context.make_tuple(
                builder, value, unpacked(builder, builder.load(pointer(builder, *args), align=align))
            )

        return value(types.int64, types.int64), codegen

    @intrinsic
    def store(typingctx, address, index, x):  # type: ignore[no-untyped-def]
        def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
            address, index, x = args
            values = [builder.extract_value(x, j) for j in range(width)]
            builder.store(packed(builder, values), pointer(builder, address, index), align=align)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, value), codegen

    return load, store


def make_lanes(function: Any, T: Any, width: int) -> Any:
    """``lanes(p, g, v, m, b, e, s, f)``: apply a function of six elements, `s` and `f` to tuples of `width` elements.

    The function is compiled once and called for each element, and the calls vanish in the machine code. Inlined by
    Numba itself, the copies would take longer to compile the more there are.
    """
    element = _TYPES[of(T).name][1]
    many = element if width == 1 else types.UniTuple(element, width)

    @intrinsic
    def lanes(typingctx, p, g, v, m, b, e, s, f):  # type: ignore[no-untyped-def]
        result = types.UniTuple(many, 5)

        def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
            one = types.UniTuple(element, 5)(*[element] * 6, *sig.args[6:])
            if width == 1:
                return context.compile_internal(builder, function.py_func, one, args)
            rows = []
            for j in range(width):
                lane = [builder.extract_value(x, j) for x in args[:6]]
                five = context.compile_internal(builder, function.py_func, one, [*lane, *args[6:]])
                rows.append([builder.extract_value(five, k) for k in range(5)])
            columns = zip(*rows, strict=True)
            return context.make_tuple(builder, result, [context.make_tuple(builder, many, x) for x in columns])

        return result(many, many, many, many, many, many, s, f), codegen

    return lanes


@intrinsic
def opaque(typingctx, x):  # type: ignore[no-untyped-def]
    """Hide the value of `x` from the compiler, so that it cannot unroll a loop up to it.

    For CUDA only. Unrolled at the compiler's guess, our loops would take more registers than unrolling is worth.
    """

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        kind, bits = args[0].type, args[0].type.width
        register = "r" if bits == 32 else "l"
        text, constraint = f"mov.b{bits} $0, $1;", f"={register},{register}"
        return builder.asm(ir.FunctionType(kind, [kind]), text, constraint, [args[0]], side_effect=True)

    return x(x), codegen


@intrinsic
def late(typingctx, x, known):  # type: ignore[no-untyped-def]
    """Delay `x`, an int32, until the float32 `known` is computed, and with it everything computed from `x`.

    For CUDA only. Computed earlier, it would hold registers through divisions and roots.
    """

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        kind = ir.FunctionType(_I32, [_I32, _F32])
        return builder.asm(kind, "mov.b32 $0, $1;", "=r,r,f", args, side_effect=False)

    return types.int32(types.int32, types.float32), codegen


def make_largest_of_warp(by_shuffles: Any) -> Any:
    """``largest(x)``: each thread of a warp gets the largest int32 of all 32 threads.

    For CUDA only: one instruction from compute capability 8.0 on, and `by_shuffles`, a function, on older devices.
    """

    @intrinsic
    def largest(typingctx, x):  # type: ignore[no-untyped-def]
        def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
            from numba.cuda.core.targetconfig import ConfigStack

            if ConfigStack().top().compute_capability < (8, 0):
                return context.compile_internal(builder, by_shuffles.py_func, sig, args)
            text = "redux.sync.max.s32 $0, $1, 0xffffffff;"
            # With a side effect, LLVM does not move it into a branch that only some threads take.
            return builder.asm(ir.FunctionType(_I32, [_I32]), text, "=r,r", args, side_effect=True)

        return types.int32(types.int32), codegen

    return largest


def make_scratch(count: int) -> Any:
    """``scratch()``: the address of `count` float64 on the stack of the calling function. For the CPU only."""

    @intrinsic
    def scratch(typingctx):  # type: ignore[no-untyped-def]
        def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
            with builder.goto_entry_block():
                memory = builder.alloca(ir.ArrayType(ir.DoubleType(), count))
                memory.align = 64
            return builder.ptrtoint(memory, ir.IntType(64))

        return types.int64(), codegen

    return scratch


@intrinsic
def call(typingctx, function, batch, row, start, stop):  # type: ignore[no-untyped-def]
    """Call the C function of four int64 at this address; a first-class function would be unboxed on every call."""

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        signature = ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * 4)
        builder.call(builder.inttoptr(args[0], signature.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), codegen


@intrinsic
def ask(typingctx, function, a, b):  # type: ignore[no-untyped-def]
    """What the C function ``int (void *, void *)`` at this address returns.

    If it calls Python, its caller has to hold the GIL, as an ``njit`` function without ``nogil`` does.
    """

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        signature = ir.FunctionType(_I32, [ir.IntType(64)] * 2)
        answer = builder.call(builder.inttoptr(args[0], signature.as_pointer()), args[1:])
        return builder.sext(answer, ir.IntType(64))

    return types.int64(types.int64, types.int64, types.int64), codegen


@intrinsic
def tell(typingctx, function):  # type: ignore[no-untyped-def]
    """Call the C function ``void (void)`` at this address; as to the GIL, see `ask`."""

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        signature = ir.FunctionType(ir.VoidType(), [])
        builder.call(builder.inttoptr(args[0], signature.as_pointer()), [])
        return context.get_dummy_value()

    return types.void(types.int64), codegen
