"""The CUDA backend: a loop over chunks around the rule, a block of threads for each chunk.

A kernel gets addresses, not arrays: unpacking array arguments costs more than a small update.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import cuda.core
import numba.cuda
import numpy as np
from numba import types

from ..compiling import once
from ..dtypes import compute_dtype
from ..intrinsics import GLOBAL, make_lanes, memory, opaque
from ..norms import make_advance, make_scalars
from ..rule import Variant, inline, make_rule
from ..table import (
    CHUNK_COLUMNS,
    COLUMNS,
    GRAD_AVG,
    MOMENTUM_BUFFER,
    PARAM,
    ROW,
    SQUARE_AVG,
    START,
    STOP,
    chunk_list,
)

CHUNK = 8192  # elements: a block that moves 160 KiB forgets what it cost to read its row of the table
THREADS = 256  # a block
VECTOR = 16  # bytes of the widest access

target: Any = numba.cuda  # what kernels call it; CUDA's words are attributes of it that no stub knows
_load_int, _ = memory(np.int64, GLOBAL)


class Batch(Protocol):
    """What this backend needs to know of a batch (batch.py)."""

    variant: Variant
    dtype: np.dtype[Any]
    labels: list[str]
    sizes: list[int]

    def title(self, kernel: str) -> str: ...


def _make_update(variant: Variant, D: Any, T: Any, width: int) -> Any:
    """``update(param, grad, ..., i, s, correction)``: load what the elements from i on need, update, store."""
    lanes = make_lanes(make_rule(variant, T), T, width)
    (load, store), (load_state, store_state) = memory(D, GLOBAL, width), memory(T, GLOBAL, width)

    @inline
    def update(param, grad, square_avg, grad_avg, momentum_buffer, i, s, correction):  # type: ignore[no-untyped-def]
        p, g, v = load(param, i), load(grad, i), load_state(square_avg, i)
        m = load_state(grad_avg, i) if variant.centered else v
        b = load_state(momentum_buffer, i) if variant.momentum else v
        p, v, m, b = lanes(p, g, v, m, b, s, correction)
        store(param, i, p)
        store_state(square_avg, i, v)
        if variant.centered:
            store_state(grad_avg, i, m)
        if variant.momentum:
            store_state(momentum_buffer, i, b)

    return update


def make_update_kernel(variant: Variant, D: Any) -> Any:
    """The kernel of all chunks of a batch, as a Python function; parameters and gradients are of type D."""
    T: Any = compute_dtype(np.dtype(D)).type
    size, state_size = np.dtype(D).itemsize, np.dtype(T).itemsize
    # Elements a thread takes at a time: 128 bits of state. With 128 bits of halves a thread would have two such vectors
    # side by side, and each access of a warp would touch every second half of a sector.
    width = VECTOR // state_size
    update_one, update_many = _make_update(variant, D, T, 1), _make_update(variant, D, T, width)
    advance, scalars_of = make_advance(variant, T, GLOBAL), make_scalars(T, GLOBAL)
    load_factor, _ = memory(T, GLOBAL)
    one = T(1)
    # 64 bits cost a kernel of halves up to an instruction an element, and bfloat16 on 10.0 would exceed its 64; 32 bits
    # cost registers on Turing, where plain float32 may have 40.
    Index = np.int64 if size == state_size else np.int32

    def update_kernel(table, grads, chunks, scalars, factors):  # type: ignore[no-untyped-def]
        chunk = chunks + np.int64(target.blockIdx.x) * (8 * CHUNK_COLUMNS)
        index, start, stop = _load_int(chunk, ROW), _load_int(chunk, START), _load_int(chunk, STOP)
        grad = _load_int(grads, index)
        if grad == 0:
            return
        row = table + index * 8 * COLUMNS
        s = scalars_of(scalars, row)
        correction = one
        if variant.bias_correction:
            correction = load_factor(factors, index)
        elif start == 0 and target.threadIdx.x == 0:
            advance(row, s)

        # From here on the chunk is all there is: its addresses moved once, in 64 bits.
        grad += start * size
        param = _load_int(row, PARAM) + start * size
        square_avg = _load_int(row, SQUARE_AVG) + start * state_size
        grad_avg = _load_int(row, GRAD_AVG) + start * state_size
        momentum_buffer = _load_int(row, MOMENTUM_BUFFER) + start * state_size
        n = Index(stop - start)
        whole = Index(n - n % width)
        if (param | grad) % (width * size) != 0 or (square_avg | grad_avg | momentum_buffer) % VECTOR != 0:
            whole = Index(0)

        i = Index(target.threadIdx.x * width)
        while i < whole:
            update_many(param, grad, square_avg, grad_avg, momentum_buffer, i, s, correction)
            i = opaque(Index(i + THREADS * width))
        i = Index(whole + Index(target.threadIdx.x))
        while i < n:  # the ragged end of a chunk, or all of one that is not aligned
            update_one(param, grad, square_avg, grad_avg, momentum_buffer, i, s, correction)
            i = opaque(Index(i + THREADS))

    return update_kernel


def make_prepare_kernel(variant: Variant, D: Any) -> Any:
    """The kernel before the updates of a batch that needs factors, a thread for each row; as a Python function."""
    T: Any = compute_dtype(np.dtype(D)).type
    advance, scalars_of = make_advance(variant, T, GLOBAL), make_scalars(T, GLOBAL)
    _, store = memory(T, GLOBAL)

    def prepare_kernel(table, grads, scalars, factors, rows):  # type: ignore[no-untyped-def]
        index = np.int64(target.blockIdx.x) * THREADS + np.int64(target.threadIdx.x)
        if index < rows and _load_int(grads, index) != 0:
            row = table + index * 8 * COLUMNS
            store(factors, index, advance(row, scalars_of(scalars, row)))

    return prepare_kernel


SIGNATURE = (types.int64,) * 5


def _compile(make: Any, variant: Variant, D: Any) -> Any:
    """The ``@cuda.jit`` kernel of a Variant and dtype, not yet compiled for any device."""
    return target.jit(make(variant, D))


def _load(make: Any, variant: Variant, D: Any, device: int) -> Any:
    """The handle that ``cuda.core.launch`` wants, on this device, which is current; compiled once an architecture."""
    kernel = once(_compile, make, variant, D)
    kernel.compile(SIGNATURE)
    return kernel.overloads[SIGNATURE]._codelibrary.get_cufunc().kernel


def _makers(variant: Variant) -> dict[str, Any]:
    """What makes the kernels that a step of a Variant launches, in this order."""
    prepare = {"prepare_kernel": make_prepare_kernel} if variant.bias_correction else {}
    return {**prepare, "update_kernel": make_update_kernel}


def functions(variant: Variant, dtype: np.dtype[Any]) -> dict[str, Any]:
    """The ``@cuda.jit`` functions that a step of a Variant launches."""
    return {name: once(_compile, make, variant, dtype.type) for name, make in _makers(variant).items()}


def kernels(variant: Variant, dtype: np.dtype[Any], device: int) -> dict[str, Any]:
    """The handles of these functions on a device, compiled where that has not been done."""
    import cupy

    with cupy.cuda.Device(device):
        return {name: once(_load, make, variant, dtype.type, device) for name, make in _makers(variant).items()}


def chunks(sizes: Sequence[int]) -> np.ndarray[Any, np.dtype[np.int64]]:
    return chunk_list(sizes, CHUNK)


class Launch(partial[None]):
    """A call that launches a kernel; `kernel` says which, and over which arrays."""

    kernel: str


def launches(
    kernels: Mapping[str, Any], stream: Any, n_chunks: int, batch: Batch, addresses: Sequence[int]
) -> list[Launch]:
    """The calls that launch a step of a batch on a stream, by the addresses of its tables."""
    table, grads, chunk_table, scalars, factors = addresses
    rows = len(batch.sizes)
    grids = {"prepare_kernel": -(-rows // THREADS), "update_kernel": n_chunks}
    arguments = {
        "prepare_kernel": (table, grads, scalars, factors, rows),
        "update_kernel": (table, grads, chunk_table, scalars, factors),
    }
    handle = cuda.core.Stream.from_handle(stream.ptr)
    some = ", ".join([*batch.labels[:3], *["..."] * (len(batch.labels) > 3)])
    made = []
    for name, kernel in kernels.items():
        config = cuda.core.LaunchConfig(grid=grids[name], block=THREADS)
        made.append(Launch(cuda.core.launch, handle, config, kernel, *arguments[name]))
        made[-1].kernel = f"{batch.title(name)} over {len(batch.labels)} arrays ({some})"
    return made
