"""The CUDA backend: a loop over chunks around the rule, one block of threads per chunk.

Kernels get addresses, not arrays: unpacking array arguments costs more than a small update.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import cuda.core
import numpy as np

from ..arrays.dtypes import compute_dtype, of, type_of
from .cuda_code import compiled, handle
from .cuda_coded import make_update_kernel as make_coded_update_kernel
from .cuda_prepare import grids, make_partials_kernel, make_prepare_kernel
from .cuda_target import target
from .intrinsics import GLOBAL, make_lanes, memory, opaque
from .norms import BLOCK, make_advance, make_factors, make_scalars
from .rule import Variant, inline, make_rule
from .table import (
    CHUNK_COLUMNS,
    COLUMNS,
    EMA,
    FACTOR_COLUMNS,
    GRAD_AVG,
    MOMENTUM_BUFFER,
    PARAM,
    ROW,
    SKIP,
    SQUARE_AVG,
    START,
    STOP,
    chunk_list,
)

THREADS = 256  # per block
ORDER = ("partials_kernel", "prepare_kernel", "update_kernel")  # of the kernel launches of a step
VECTOR = 16  # bytes in the widest access

_load_int, _ = memory(np.int64, GLOBAL)


class Batch(Protocol):
    """What this backend needs to know about a batch (steps/batch.py)."""

    variant: Variant
    dtype: np.dtype[Any]
    labels: list[str]
    sizes: list[int]

    def title(self, kernel: str) -> str: ...


def _make_update(variant: Variant, D: Any, G: Any, T: Any, width: int) -> Any:
    """``update(param, grad, ..., i, s, f)``: load what the elements from i on need, update them, and store."""
    lanes = make_lanes(make_rule(variant, T), T, width)
    (load, store), (load_state, store_state) = memory(D, GLOBAL, width), memory(T, GLOBAL, width)
    load_grad, store_grad = memory(G, GLOBAL, width)
    zeros = T(0) if width == 1 else (T(0),) * width

    @inline
    def update(param, grad, square_avg, grad_avg, momentum_buffer, ema, i, s, f):  # type: ignore[no-untyped-def]
        p, g, v = load(param, i), load_grad(grad, i), load_state(square_avg, i)
        m = load_state(grad_avg, i) if variant.centered else v
        b = load_state(momentum_buffer, i) if variant.momentum else v
        e = load_state(ema, i) if variant.ema else v
        p, v, m, b, e = lanes(p, g, v, m, b, e, s, f)
        store(param, i, p)
        store_state(square_avg, i, v)
        if variant.centered:
            store_state(grad_avg, i, m)
        if variant.momentum:
            store_state(momentum_buffer, i, b)
        if variant.ema:
            store_state(ema, i, e)
        if variant.zero_grads:
            store_grad(grad, i, zeros)

    return update


def make_update_kernel(variant: Variant, D: Any, G: Any = None) -> Any:
    """The kernel for all chunks of a batch, as a Python function; parameters have type D, gradients G, or D if None."""
    G = G or D
    T: Any = compute_dtype(of(D)).type
    size, grad_size, state_size = (of(x).itemsize for x in (D, G, T))
    # Elements per thread at a time: 128 bits of state. With 128 bits of halves a thread would have two such vectors
    # side by side, and each access of a warp would touch every second half of a sector.
    width = VECTOR // state_size
    update_one, update_many = _make_update(variant, D, G, T, 1), _make_update(variant, D, G, T, width)
    advance, scalars_of = make_advance(variant, T, GLOBAL), make_scalars(T, GLOBAL)
    factors_of = make_factors(variant, T, GLOBAL)
    (load_factor, _), (_, store_grad) = memory(T, GLOBAL), memory(G, GLOBAL)
    zero, prepared = T(0), variant.prepared
    # 64 bits cost a kernel on halves up to one instruction per element, and bfloat16 on 10.0 would exceed its 64
    # registers; 32 bits cost registers on Turing, where plain float32 may use 40.
    Index = np.int64 if size == state_size else np.int32

    def update_kernel(table, grads, chunks, scalars, factors):  # type: ignore[no-untyped-def]
        chunk = chunks + np.int64(target.blockIdx.x) * (8 * CHUNK_COLUMNS)
        index, start, stop = _load_int(chunk, ROW), _load_int(chunk, START), _load_int(chunk, STOP)
        row = table + index * 8 * COLUMNS
        # All of this is read at once, with no branch in between: the only wait is for the parts of an address.
        grad, param, square_avg = _load_int(grads, index), _load_int(row, PARAM), _load_int(row, SQUARE_AVG)
        grad_avg = _load_int(row, GRAD_AVG) if variant.centered else square_avg
        momentum_buffer = _load_int(row, MOMENTUM_BUFFER) if variant.momentum else square_avg
        ema = _load_int(row, EMA) if variant.ema else square_avg
        has_grad = grad != 0
        # From here on only the chunk matters: its addresses are moved once, in 64 bits.
        grad += start * grad_size
        param += start * size
        square_avg += start * state_size
        grad_avg += start * state_size
        momentum_buffer += start * state_size
        ema += start * state_size
        n = Index(stop - start) if has_grad else Index(0)
        if prepared and load_factor(factors, index * FACTOR_COLUMNS + SKIP) != zero:
            if variant.zero_grads:
                i = Index(target.threadIdx.x)
                while i < n:
                    store_grad(grad, i, zero)
                    i = opaque(Index(i + THREADS))
            return
        s = scalars_of(scalars, row)
        f = factors_of(factors, index, s)
        whole = Index(n - n % width)
        # With bit masks, this would take kernels with all buffers from 50 registers to 66.
        # A vector of half gradients beside float32 is half as wide: twice its address is aligned like the others.
        scaled = grad * (size // grad_size)
        if (param | scaled) % (width * size) != 0 or (square_avg | grad_avg | momentum_buffer | ema) % VECTOR != 0:
            whole = Index(0)

        if not prepared and has_grad and start == 0 and target.threadIdx.x == 0:
            advance(row, s)  # here, where all addresses are known; after the loops it would cost registers
        i = Index(target.threadIdx.x * width)
        while i < whole:
            update_many(param, grad, square_avg, grad_avg, momentum_buffer, ema, i, s, f)
            i = opaque(Index(i + THREADS * width))
        i = Index(whole + Index(target.threadIdx.x))
        while i < n:  # the ragged end of a chunk, or all of a chunk that is not aligned
            update_one(param, grad, square_avg, grad_avg, momentum_buffer, ema, i, s, f)
            i = opaque(Index(i + THREADS))

    return update_kernel


def _makers(variant: Variant, dtype: np.dtype[Any], grad_dtype: np.dtype[Any]) -> dict[str, tuple[Any, ...]]:
    """The makers of the kernels that a step of a Variant launches, in this order, with their arguments."""
    D, G = type_of(dtype), type_of(grad_dtype)
    partials = {"partials_kernel": (make_partials_kernel, variant.of_sums, G)} if variant.measures else {}
    prepare = {"prepare_kernel": (make_prepare_kernel, variant.of_prepare, D)} if variant.prepared else {}
    update = make_coded_update_kernel if variant.coded else make_update_kernel
    return {**partials, **prepare, "update_kernel": (update, variant.of_update, D, G)}


def update_function(variant: Variant, dtype: np.dtype[Any], grad_dtype: np.dtype[Any] | None = None) -> Any:
    """The Python function of the update that a step of a Variant launches, for whoever compiles it elsewhere."""
    make, *made_for = _makers(variant, dtype, grad_dtype or dtype)["update_kernel"]
    return make(*made_for)


def functions(variant: Variant, dtype: np.dtype[Any], grad_dtype: np.dtype[Any]) -> dict[str, Any]:
    """The ``@cuda.jit`` functions that a step of a Variant launches, compiled for the current device."""
    return {name: compiled(*made) for name, made in _makers(variant, dtype, grad_dtype).items()}


def kernels(variant: Variant, dtype: np.dtype[Any], grad_dtype: np.dtype[Any]) -> dict[str, Any]:
    """The handles of these functions on the current device; compiled once per architecture, or loaded from disk."""
    return {name: handle(*made) for name, made in _makers(variant, dtype, grad_dtype).items()}


def chunk_of(dtype: np.dtype[Any]) -> int:
    """The number of elements in a chunk: one vector per thread of a block.

    A block that loops over more would wait for its loads, compute and store, again and again. While its warps are at
    the same point of that, less is in flight: on an H200, eight rounds per block moved 8 to 24 % less than one.
    """
    return THREADS * VECTOR // compute_dtype(dtype).itemsize


def chunks(sizes: Sequence[int], dtype: np.dtype[Any]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """(row, start, stop) of every chunk of a batch of parameters of this dtype."""
    return chunk_list(sizes, chunk_of(dtype))


def sum_blocks(sizes: Sequence[int]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """(row, start, stop) of every block that has a partial sum."""
    return chunk_list(sizes, BLOCK)


class Launch(partial[None]):
    """A call that launches a kernel; `kernel` tells which one, and over which arrays."""

    kernel: str


class Addresses(NamedTuple):
    """Where the tables of a batch lie on its device."""

    table: int
    grads: int
    chunks: int
    scalars: int
    factors: int
    sum_blocks: int
    numbers: int
    firsts: int
    norms: int


def launches(
    kernels: Mapping[str, Any], stream: Any, batch: Batch, at: Addresses, n_chunks: int, n_sums: int, counts: bool
) -> dict[str, Launch]:
    """The calls that launch a step of a batch on a stream, by kernel name.

    `counts` tells whether this batch counts the skipped steps.
    """
    rows = len(batch.sizes)
    launched = {**grids(batch.variant, rows, n_sums), "update_kernel": (n_chunks, THREADS)}
    arguments: dict[str, tuple[int, ...]] = {
        "partials_kernel": (at.grads, at.sum_blocks, n_sums, at.firsts, at.norms),
        "prepare_kernel": (at.table, at.grads, at.scalars, at.factors, rows, at.numbers, at.norms, int(counts)),
        "update_kernel": (at.table, at.grads, at.chunks, at.scalars, at.factors),
    }
    handle = cuda.core.Stream.from_handle(stream.ptr)
    some = ", ".join([*batch.labels[:3], *["..."] * (len(batch.labels) > 3)])
    made = {}
    for name, kernel in kernels.items():
        grid, block = launched[name]
        config = cuda.core.LaunchConfig(grid=grid, block=block)
        made[name] = Launch(cuda.core.launch, handle, config, kernel, *arguments[name])
        made[name].kernel = f"{batch.title(name)} over {len(batch.labels)} arrays ({some})"
    return made
