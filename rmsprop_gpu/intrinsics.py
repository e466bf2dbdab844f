"""Load, store, fma and call on raw addresses, for the CPU and for CUDA: the only file that knows LLVM."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import extending, types

# Numba annotates an intrinsic with the signature of the function below it; callers write fewer arguments.
intrinsic: Any = extending.intrinsic

HOST = 0  # LLVM's address space of the host's memory; CUDA's global memory is 1

_LLVM: dict[Any, Any] = {
    np.int32: ir.IntType(32),
    np.int64: ir.IntType(64),
    np.float32: ir.FloatType(),
    np.float64: ir.DoubleType(),
}
_NUMBA: dict[Any, Any] = {
    np.int32: types.int32,
    np.int64: types.int64,
    np.float32: types.float32,
    np.float64: types.float64,
}


@intrinsic
def fma(typingctx, a, b, c):  # type: ignore[no-untyped-def]
    """``a * b + c`` with one rounding, on every target."""
    return a(a, a, a), lambda context, builder, sig, args: builder.fma(*args)


@cache
def memory(T: Any, space: int) -> tuple[Any, Any]:
    """``load(address, index)`` and ``store(address, index, value)`` of elements of type T at an integer address."""
    llvm, numba = _LLVM[T], _NUMBA[T]
    align = np.dtype(T).itemsize

    def pointer(builder: Any, address: Any, index: Any) -> Any:
        return builder.gep(builder.inttoptr(address, llvm.as_pointer(space)), [index], inbounds=True)

    @intrinsic
    def load(typingctx, address, index):  # type: ignore[no-untyped-def]
        def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
            return builder.load(pointer(builder, *args), align=align)

        return numba(types.int64, types.int64), codegen

    @intrinsic
    def store(typingctx, address, index, value):  # type: ignore[no-untyped-def]
        def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
            builder.store(args[2], pointer(builder, args[0], args[1]), align=align)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, numba), codegen

    return load, store


@intrinsic
def call(typingctx, function, batch, row, start, stop):  # type: ignore[no-untyped-def]
    """Call the C function of four int64 at this address; a first-class function would be unboxed at every call."""

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        signature = ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * 4)
        builder.call(builder.inttoptr(args[0], signature.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), codegen
