"""The CPU backend: a loop over chunks around the rule, on all threads or on one.

One driver serves every Variant: it calls chunk kernels by their address, so it is compiled once, and a Variant is one
small serial function. All batches of a step go through one call of the driver, so that a Ctrl-C, which
Python delivers between calls, cannot leave a step half done.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numba import njit, prange, types

from ..arrays.dtypes import compute_dtype
from .compiling import in_forked_child, once
from .cpu_prepare import KERNEL, kernel, make_partials_kernel, make_prepare_kernel, make_totals_kernel
from .intrinsics import HOST, call, memory
from .norms import BLOCK, make_advance, make_factors, make_scalars
from .rule import Variant, make_rule
from .table import (
    COLUMNS,
    EMA,
    FACTOR_COLUMNS,
    FACTORS,
    GRAD_AVG,
    GRADS,
    MOMENTUM_BUFFER,
    PARAM,
    SCALARS,
    SKIP,
    SQUARE_AVG,
    TABLE,
    chunk_list,
)

CHUNK = 16_384  # elements: 64 KiB of each float32 stream, enough to forget the call, little enough to share work evenly
SERIAL_BELOW = 32_768  # elements of a step below which waking the threads costs more than they bring
BLOCKS = 4  # of partial sums: as many elements as a chunk
PARTS = 64  # equal shares of a step's elements; threads take neighbouring ones

WORK = 5  # int64 an item of work: kernel, batch, row, start, stop
_load, _store = memory(np.int64, HOST)


class Norms(Protocol):
    """What this backend needs to know of norms (batch.py)."""

    block: np.ndarray[Any, Any]


class Batch(Protocol):
    """What this backend needs to know of a batch (batch.py)."""

    variant: Variant
    dtype: np.dtype[Any]
    sizes: list[int]
    table: np.ndarray[Any, Any]
    grads: np.ndarray[Any, Any]
    scalars: np.ndarray[Any, Any]
    factors: np.ndarray[Any, Any]
    told: np.ndarray[Any, Any]
    numbers: np.ndarray[Any, Any]

    @property
    def norms(self) -> Norms: ...


def _make_update_kernel(variant: Variant, D: Any, make_rule: Any) -> Any:
    """The kernel of one chunk, elements start to stop of one tensor; parameters and gradients are of type D."""
    T: Any = compute_dtype(np.dtype(D)).type
    rule, advance, scalars = make_rule(variant, T), make_advance(variant, T, HOST), make_scalars(T, HOST)
    factors_of = make_factors(variant, T, HOST)
    (load, store), (load_state, store_state) = memory(D, HOST), memory(T, HOST)
    zero, prepared = T(0), variant.prepared

    @kernel
    def update_kernel(batch, index, start, stop):  # type: ignore[no-untyped-def]
        grad = _load(_load(batch, GRADS), index)
        if grad == 0:
            return
        row = _load(batch, TABLE) + index * 8 * COLUMNS
        s = scalars(_load(batch, SCALARS), row)
        factors = _load(batch, FACTORS)
        if prepared:
            if load_state(factors, index * FACTOR_COLUMNS + SKIP) != zero:
                if variant.zero_grads:
                    for i in range(start, stop):
                        store(grad, i, zero)
                return
        elif start == 0:
            advance(row, s)
        f = factors_of(factors, index, s)
        param, square_avg = _load(row, PARAM), _load(row, SQUARE_AVG)
        grad_avg, momentum_buffer, ema = _load(row, GRAD_AVG), _load(row, MOMENTUM_BUFFER), _load(row, EMA)
        for i in range(start, stop):
            p, v = load(param, i), load_state(square_avg, i)
            m = load_state(grad_avg, i) if variant.centered else p
            b = load_state(momentum_buffer, i) if variant.momentum else p
            e = load_state(ema, i) if variant.ema else p
            p, v, m, b, e = rule(p, load(grad, i), v, m, b, e, s, f)
            store(param, i, p)
            store_state(square_avg, i, v)
            if variant.centered:
                store_state(grad_avg, i, m)
            if variant.momentum:
                store_state(momentum_buffer, i, b)
            if variant.ema:
                store_state(ema, i, e)
            if variant.zero_grads:
                store(grad, i, zero)

    return update_kernel


def _drive(prepares, n_prepares, chunks, bounds, parts, steps):  # type: ignore[no-untyped-def]
    """One step: the prepare kernels in order, then the chunks of all batches by parts, then the count of the step."""
    for k in range(n_prepares):
        w = prepares + k * 8 * WORK
        call(_load(w, 0), _load(w, 1), _load(w, 2), _load(w, 3), _load(w, 4))
    for part in prange(parts):
        for k in range(_load(bounds, part), _load(bounds, part + 1)):
            w = chunks + k * 8 * WORK
            call(_load(w, 0), _load(w, 1), _load(w, 2), _load(w, 3), _load(w, 4))
    _store(steps, 0, _load(steps, 0) + 1)


# Numba's workqueue layer aborts the process when two threads enter a parallel region.
in_parallel = threading.Lock()


def _make_drivers() -> tuple[Any, Any]:
    """The driver for one thread and for all; together, since a forked child must not have to compile."""
    signature = types.void(*[types.int64] * 6)
    return njit(signature, nogil=True)(_drive), njit(signature, nogil=True, parallel=True)(_drive)


def functions(variant: Variant, dtype: np.dtype[Any], make: Any = None) -> dict[str, Any]:
    """The ``@njit`` functions that a step of a Variant calls, in this order."""
    made = {}
    if variant.measures:
        made["partials_kernel"] = once(make_partials_kernel, variant.of_sums, dtype.type)
        made["totals_kernel"] = once(make_totals_kernel)
    if variant.prepared:
        made["prepare_kernel"] = once(make_prepare_kernel, variant.of_prepare, compute_dtype(dtype).type)
    made["update_kernel"] = once(_make_update_kernel, variant.of_update, dtype.type, make or make_rule)
    return made


def _address(kernel: Any) -> int:
    """Where the machine code of a kernel starts; to ask makes it, which no fork may meet half done."""
    compiled = kernel.get_compile_result(KERNEL)
    return int(compiled.library.get_pointer_to_function(compiled.fndesc.llvm_cfunc_wrapper_name))


def _items(kernel: int, block: int, chunks: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The work of a kernel over the chunks of a batch."""
    return np.insert(chunks, [0, 0], [kernel, block], axis=1)


def make_launch(batches: Sequence[Batch], steps: np.ndarray[Any, Any], make: Any = None) -> Callable[[], None]:
    """Compile what these batches need; the function returned runs one step over them all and counts it in `steps`.

    `make` makes what is done with each element: by default the rule, or what a profiler puts in its place.
    """
    sums, work, blocks = [], [], []
    prepares: list[tuple[int, ...]] = []
    totals: dict[int, Any] = {}
    for batch in batches:
        norms = batch.norms.block.ctypes.data
        owners = (batch.table, batch.grads, batch.scalars, batch.factors, batch.told, batch.numbers)
        blocks.append(np.array([*(a.ctypes.data for a in owners), norms], np.int64))
        block = blocks[-1].ctypes.data
        kernels = {name: once(_address, f) for name, f in functions(batch.variant, batch.dtype, make).items()}
        if batch.variant.measures:
            sums.append(_items(kernels["partials_kernel"], block, chunk_list(batch.sizes, BLOCKS * BLOCK)))
            totals[norms] = (kernels["totals_kernel"], norms, 0, 0, 0)
        if batch.variant.prepared:
            prepares.append((kernels["prepare_kernel"], block, not prepares, 0, len(batch.sizes)))
        work.append(_items(kernels["update_kernel"], block, chunk_list(batch.sizes, CHUNK)))

    run = _driven([*totals.values(), *prepares], work, steps)
    run.kept = blocks, batches  # type: ignore[attr-defined]  # addresses do not own
    if not sums:
        return run
    # Sums change nothing of a step: between the two calls it may be interrupted.
    add_up = _driven([], sums, np.zeros(1, np.int64))

    def add_up_and_run() -> None:
        add_up()
        run()

    return add_up_and_run


def _driven(
    prepares: Sequence[tuple[int, ...]], work: Sequence[np.ndarray[Any, Any]], steps: np.ndarray[Any, Any]
) -> Callable[[], None]:
    """Run the prepares, then all work by parts, then count in `steps`."""
    serial, parallel = once(_make_drivers)
    first = np.array(prepares, np.int64).reshape(-1, WORK)
    items = np.ascontiguousarray(np.concatenate([np.empty((0, WORK), np.int64), *work]))
    done = np.concatenate([[0], np.cumsum(items[:, 4] - items[:, 3])])
    size = int(done[-1])
    bounds = np.searchsorted(done, np.linspace(0, size, PARTS + 1)).astype(np.int64)
    bounds[0], bounds[-1] = 0, len(items)  # empty tensors at the ends belong to the first and the last part
    arguments = (first.ctypes.data, len(first), items.ctypes.data, bounds.ctypes.data, PARTS, steps.ctypes.data)

    def run() -> None:
        # A forked child stays serial: GNU OpenMP aborts it, other layers have lost their threads.
        if size < SERIAL_BELOW or in_forked_child():
            serial(*arguments)
        else:
            with in_parallel:
                parallel(*arguments)

    run.owners = first, items, bounds, steps  # type: ignore[attr-defined]
    return run
