"""The CPU backend: a loop over elements around the rule, on all threads or on one.

One driver serves every Variant: it calls kernels by their address, so it is compiled once, and a Variant is one
small serial function. Each thread takes an equal share of the elements; tensors are cut where shares meet. All batches
of a step go through one call of the driver, so that a Ctrl-C, which Python delivers between calls, cannot leave a step
half done.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numba import get_num_threads, njit, prange, types

from ..arrays.dtypes import compute_dtype
from .compiling import in_forked_child, once
from .cpu_code import address, entry, unique
from .cpu_prepare import kernel, make_partials_kernel, make_prepare_kernel, make_totals_kernel
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
)

SERIAL_BELOW = 32_768  # elements of a step below which waking the threads costs more than they bring
UNIT = 64  # elements: where a tensor may be cut, so that no two threads write to one cache line

WORK = 5  # int64 an item of work: kernel, batch, row, start, stop
BOUND = 2  # int64 where a part begins: item, element
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
    """The kernel of a piece of a tensor, elements start to stop; parameters and gradients are of type D."""
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


def _make_driver(parallel: bool) -> Any:
    """``drive(prepares, n_prepares, items, bounds, steps, parts)``: one step, of one thread or of all."""

    @njit(types.void(*[types.int64] * 6), nogil=True, parallel=parallel)
    @unique
    def drive(prepares, n_prepares, items, bounds, steps, parts):  # type: ignore[no-untyped-def]
        """The prepare kernels in order, then the items by parts, then the count of the step."""
        for k in range(n_prepares):
            w = prepares + k * 8 * WORK
            call(_load(w, 0), _load(w, 1), _load(w, 2), _load(w, 3), _load(w, 4))
        for part in prange(parts):
            here = bounds + part * 8 * BOUND
            first, begin, last, end = _load(here, 0), _load(here, 1), _load(here, BOUND), _load(here, BOUND + 1)
            for k in range(first, last):
                w = items + k * 8 * WORK
                call(_load(w, 0), _load(w, 1), _load(w, 2), _load(w, 3) if k > first else begin, _load(w, 4))
            if end > 0:  # of the item that the next part goes on with
                w = items + last * 8 * WORK
                call(_load(w, 0), _load(w, 1), _load(w, 2), begin if last == first else _load(w, 3), end)
        _store(steps, 0, _load(steps, 0) + 1)

    return drive


def shares(sizes: np.ndarray[Any, Any], parts: int, unit: int) -> np.ndarray[Any, Any]:
    """Where each part of the work over items of these sizes begins, and the last one ends: (item, element in it).

    The parts are equal but for less than a unit. An item without elements is in one of them, as any other.
    """
    starts = np.concatenate([[0], np.cumsum(sizes)])
    wanted = starts[-1] * np.arange(parts + 1) // parts
    item = np.searchsorted(starts[:-1], wanted, side="right") - 1
    bounds = np.stack([item, (wanted - starts[item]) // unit * unit], axis=1).astype(np.int64)
    bounds[0], bounds[-1] = (0, 0), (len(sizes), 0)
    return bounds


# Numba's workqueue layer aborts the process when two threads enter a parallel region.
in_parallel = threading.Lock()


def _drivers() -> tuple[Any, Any]:
    """The driver for one thread and for all; together, since a forked child must not have to compile."""
    return entry(_make_driver, False), entry(_make_driver, True)


def _makers(variant: Variant, dtype: np.dtype[Any], make: Any = None) -> dict[str, tuple[Any, ...]]:
    """What makes the kernels that a step of a Variant calls, in this order, and what they are made for."""
    made: dict[str, tuple[Any, ...]] = {}
    if variant.measures:
        made["partials_kernel"] = make_partials_kernel, variant.of_sums, dtype.type
        made["totals_kernel"] = (make_totals_kernel,)
    if variant.prepared:
        made["prepare_kernel"] = make_prepare_kernel, variant.of_prepare, compute_dtype(dtype).type
    made["update_kernel"] = _make_update_kernel, variant.of_update, dtype.type, make or make_rule
    return made


def functions(variant: Variant, dtype: np.dtype[Any]) -> dict[str, Any]:
    """The ``@njit`` functions that a step of a Variant calls, compiled."""
    return {name: once(*maker) for name, maker in _makers(variant, dtype).items()}


def items_of(kernel: int, block: int, sizes: Sequence[int]) -> np.ndarray[Any, Any]:
    """The work of a kernel over the tensors of a batch."""
    rows = np.arange(len(sizes), dtype=np.int64)
    zeros = np.zeros_like(rows)
    return np.stack([zeros + kernel, zeros + block, rows, zeros, np.array(sizes, np.int64)], axis=1)


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
        kernels = {name: address(*maker) for name, maker in _makers(batch.variant, batch.dtype, make).items()}
        if batch.variant.measures:
            sums.append(items_of(kernels["partials_kernel"], block, batch.sizes))
            totals[norms] = (kernels["totals_kernel"], norms, 0, 0, 0)
        if batch.variant.prepared:
            prepares.append((kernels["prepare_kernel"], block, not prepares, 0, len(batch.sizes)))
        work.append(items_of(kernels["update_kernel"], block, batch.sizes))

    run = driven([*totals.values(), *prepares], work, UNIT, steps)
    run.kept = blocks, batches  # type: ignore[attr-defined]  # addresses do not own
    if not sums:
        return run
    # Sums change nothing of a step: between the two calls it may be interrupted.
    add_up = driven([], sums, BLOCK, np.zeros(1, np.int64))

    def add_up_and_run() -> None:
        add_up()
        run()

    return add_up_and_run


def driven(
    prepares: Sequence[tuple[int, ...]], work: Sequence[np.ndarray[Any, Any]], unit: int, steps: np.ndarray[Any, Any]
) -> Callable[[], None]:
    """Run the prepares, then all work by equal shares of its elements, cut at units, then count in `steps`."""
    serial, parallel = _drivers()
    first = np.array(prepares, np.int64).reshape(-1, WORK)
    items = np.ascontiguousarray(np.concatenate([np.empty((0, WORK), np.int64), *work]))
    sizes = items[:, 4]
    size = int(sizes.sum())
    owners = first, items, steps
    known: dict[int, tuple[Any, ...]] = {}  # the arguments by the number of parts: threads may change between steps

    def run() -> None:
        parts = parts_of(size)
        if parts not in known:
            bounds = shares(sizes, parts, unit)
            addresses = first.ctypes.data, len(first), *(x.ctypes.data for x in (items, bounds, steps))
            known[parts] = (*addresses, parts), (bounds, owners)  # addresses do not own
        arguments, _ = known[parts]
        if parts == 1:
            serial(*arguments)
        else:
            with in_parallel:
                parallel(*arguments)

    return run


def parts_of(size: int) -> int:
    """Among how many threads the work over so many elements is shared."""
    # A forked child stays serial: GNU OpenMP aborts it, other layers have lost their threads.
    return 1 if size < SERIAL_BELOW or in_forked_child() else get_num_threads()


def pieces(sizes: Sequence[int]) -> int:
    """How often a kernel is called for tensors of these sizes: once each, and once more for every cut."""
    bounds = shares(np.array(sizes, np.int64), parts_of(sum(sizes)), UNIT)
    return len(sizes) + int(np.count_nonzero(bounds[:, 1]))
