"""The CPU backend: a loop over elements around the rule. cpu_drive.py shares a step among threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from ..arrays.dtypes import compute_dtype, of, type_of
from .codes import BLOCK as CODED
from .compiling import once
from .cpu_code import address
from .cpu_coded import make_update_kernel as make_coded_update_kernel
from .cpu_drive import driven, items_of
from .cpu_prepare import kernel, make_partials_kernel, make_prepare_kernel, make_totals_kernel
from .intrinsics import HOST, memory
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

_load, _ = memory(np.int64, HOST)


class Norms(Protocol):
    """What this backend needs to know about norms (steps/batch.py)."""

    block: np.ndarray[Any, Any]
    complete: Callable[[], None] | None


class Batch(Protocol):
    """What this backend needs to know about a batch (steps/batch.py)."""

    variant: Variant
    dtype: np.dtype[Any]
    grad_dtype: np.dtype[Any]
    sizes: list[int]
    table: np.ndarray[Any, Any]
    grads: np.ndarray[Any, Any]
    scalars: np.ndarray[Any, Any]
    factors: np.ndarray[Any, Any]
    told: np.ndarray[Any, Any]
    numbers: np.ndarray[Any, Any]
    firsts: np.ndarray[Any, Any]

    @property
    def norms(self) -> Norms: ...


def _make_update_kernel(variant: Variant, D: Any, G: Any, make_rule: Any) -> Any:
    """The kernel for elements start to stop of a tensor; parameters have type D, gradients type G."""
    T: Any = compute_dtype(of(D)).type
    rule, advance, scalars = make_rule(variant, T), make_advance(variant, T, HOST), make_scalars(T, HOST)
    factors_of = make_factors(variant, T, HOST)
    (load, store), (load_state, store_state) = memory(D, HOST), memory(T, HOST)
    load_grad, store_grad = memory(G, HOST)
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
                        store_grad(grad, i, zero)
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
            p, v, m, b, e = rule(p, load_grad(grad, i), v, m, b, e, s, f)
            store(param, i, p)
            store_state(square_avg, i, v)
            if variant.centered:
                store_state(grad_avg, i, m)
            if variant.momentum:
                store_state(momentum_buffer, i, b)
            if variant.ema:
                store_state(ema, i, e)
            if variant.zero_grads:
                store_grad(grad, i, zero)

    return update_kernel


def _makers(
    variant: Variant, dtype: np.dtype[Any], grad_dtype: np.dtype[Any], make: Any = None
) -> dict[str, tuple[Any, ...]]:
    """The makers of the kernels that a step of a Variant calls, in this order, with their arguments."""
    made: dict[str, tuple[Any, ...]] = {}
    if variant.measures:
        made["partials_kernel"] = make_partials_kernel, variant.of_sums, type_of(grad_dtype)
        made["totals_kernel"] = (make_totals_kernel,)
    if variant.prepared:
        made["prepare_kernel"] = make_prepare_kernel, variant.of_prepare, compute_dtype(dtype).type
    types = type_of(dtype), type_of(grad_dtype)
    update = make_coded_update_kernel if variant.coded else _make_update_kernel
    made["update_kernel"] = update, variant.of_update, *types, make or make_rule
    return made


def functions(variant: Variant, dtype: np.dtype[Any], grad_dtype: np.dtype[Any]) -> dict[str, Any]:
    """The compiled ``@njit`` functions that a step of a Variant calls."""
    return {name: once(*maker) for name, maker in _makers(variant, dtype, grad_dtype).items()}


def unit_of(variants: Iterable[Variant]) -> int | None:
    """Threads cut tensors at multiples of this: a block of codes, or with None `cpu_drive.UNIT`."""
    return CODED if any(variant.coded for variant in variants) else None


def make_launch(
    batches: Sequence[Batch], steps: np.ndarray[Any, Any], make: Any = None, threads: Callable[[], int] | None = None
) -> Callable[[], None]:
    """Compile what these batches need; the returned function runs one step over them all and counts it in `steps`.

    `make` makes what is done with each element: the rule by default, or what a profiler puts in its place. `threads` is
    called in each step and returns how many threads share it; the default asks Numba.
    """
    sums, work, blocks = [], [], []
    prepares: list[tuple[int, ...]] = []
    totals: dict[int, Any] = {}
    for batch in batches:
        norms = batch.norms.block.ctypes.data
        owners = (batch.table, batch.grads, batch.scalars, batch.factors, batch.told, batch.numbers, batch.firsts)
        blocks.append(np.array([*(a.ctypes.data for a in owners), norms], np.int64))
        block = blocks[-1].ctypes.data
        makers = _makers(batch.variant, batch.dtype, batch.grad_dtype, make)
        kernels = {name: address(*maker) for name, maker in makers.items()}
        if batch.variant.measures:
            sums.append(items_of(kernels["partials_kernel"], block, batch.sizes))
            totals[norms] = (kernels["totals_kernel"], norms, 0, 0, 0)
        if batch.variant.prepared:
            prepares.append((kernels["prepare_kernel"], block, not prepares, 0, len(batch.sizes)))
        work.append(items_of(kernels["update_kernel"], block, batch.sizes))

    run = driven([*totals.values(), *prepares], work, steps, unit_of(b.variant for b in batches), threads)
    run.kept = blocks, batches  # type: ignore[attr-defined]  # raw addresses keep nothing alive
    if not sums:
        return run
    # The sums change no state, so an interrupt between the two calls is harmless.
    add_up = driven([], sums, np.zeros(1, np.int64), BLOCK, threads)

    completions = {id(batch.norms): batch.norms.complete for batch in batches if batch.variant.measures}
    (complete,) = completions.values()  # host memory is one device

    def add_up_and_run() -> None:
        add_up()
        if complete is not None:
            complete()
        run()

    return add_up_and_run
