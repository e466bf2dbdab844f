"""Share a step among threads: each gets an equal share of the elements, and tensors are cut where shares meet.

One driver serves every Variant, since it calls kernels by address. One call of it does all the work of a step, so a
Ctrl-C, which Python delivers between calls, cannot leave a step half done.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numba import get_num_threads, njit, prange, types

from .compiling import in_forked_child
from .cpu_code import entry, unique
from .intrinsics import HOST, call, memory

# A step with fewer elements than this uses one thread. With threads that are awake, two are faster from 65,536 on; with
# threads that sleep, as in a loop with other work in it, from a million on (benchmarks/results/busy.md).
SERIAL_BELOW = 131_072
# 16 to 50 us, about what it takes to wake a thread: spinning for that long and then sleeping never costs more than
# twice the better of the two (Karlin et al. 1991, "Empirical studies of competitive spinning").
SPIN_ROUNDS = "1000"
UNIT = 64  # elements: tensors are cut at multiples, so that parts share no cache line, at least of the state

WORK = 5  # int64 per item of work: kernel, batch, row, start, stop
BOUND = 2  # int64 per start of a part: item, element

_load, _store = memory(np.int64, HOST)

# Numba's workqueue layer aborts the process when two threads enter a parallel region. The same thread may come here
# again before it has entered, or after: in a signal handler or finalizer, which Python runs only between its own
# instructions.
in_parallel = threading.RLock()


def _load_openmp() -> None:
    """Load the OpenMP that Numba's threads use, set to spin only briefly before they sleep; no thread starts yet.

    By default, GNU OpenMP's threads spin for 300,000 rounds, waiting for work and for each other. When
    other processes want the cores, a spinning thread keeps the very thread it waits for from running.
    """
    if sys.platform != "linux" or "GOMP_SPINCOUNT" in os.environ or "OMP_WAIT_POLICY" in os.environ:
        return
    os.environ["GOMP_SPINCOUNT"] = SPIN_ROUNDS  # read on loading, and removed before others load theirs
    try:
        import numba.np.ufunc.omppool  # noqa: F401  # for its loading alone
    except ImportError:  # Numba was built without it
        pass
    finally:
        del os.environ["GOMP_SPINCOUNT"]


_load_openmp()


def _make_driver(parallel: bool) -> Any:
    """``drive(prepares, n_prepares, items, bounds, steps, parts)``: one step, by one thread or by all."""

    @njit(types.void(*[types.int64] * 6), nogil=True, parallel=parallel)
    @unique
    def drive(prepares, n_prepares, items, bounds, steps, parts):  # type: ignore[no-untyped-def]
        """Run the prepare kernels in order, then the items part by part, then count the step."""
        for k in range(n_prepares):
            w = prepares + k * 8 * WORK
            call(_load(w, 0), _load(w, 1), _load(w, 2), _load(w, 3), _load(w, 4))
        for part in prange(parts):
            here = bounds + part * 8 * BOUND
            first, begin, last, end = _load(here, 0), _load(here, 1), _load(here, BOUND), _load(here, BOUND + 1)
            for k in range(first, last):
                w = items + k * 8 * WORK
                call(_load(w, 0), _load(w, 1), _load(w, 2), _load(w, 3) if k > first else begin, _load(w, 4))
            if end > 0:  # the next part continues with the same item
                w = items + last * 8 * WORK
                call(_load(w, 0), _load(w, 1), _load(w, 2), begin if last == first else _load(w, 3), end)
        _store(steps, 0, _load(steps, 0) + 1)

    return drive


def shares(sizes: np.ndarray[Any, Any], parts: int, unit: int) -> np.ndarray[Any, Any]:
    """Where each part of the work over items of these sizes begins, and where the last ends: (item, element in it).

    Parts differ in size by less than a unit. An item without elements belongs to one of them, like any other.
    """
    starts = np.concatenate([[0], np.cumsum(sizes)])
    wanted = starts[-1] * np.arange(parts + 1) // parts
    item = np.searchsorted(starts[:-1], wanted, side="right") - 1
    bounds = np.stack([item, (wanted - starts[item]) // unit * unit], axis=1).astype(np.int64)
    bounds[0], bounds[-1] = (0, 0), (len(sizes), 0)
    return bounds


def _drivers() -> tuple[Any, Any]:
    """The drivers for one thread and for all, made together, since a forked child must not have to compile."""
    return entry(_make_driver, False), entry(_make_driver, True)


def items_of(kernel: int, block: int, sizes: Sequence[int]) -> np.ndarray[Any, Any]:
    """The items of work of a kernel over the tensors of a batch."""
    rows = np.arange(len(sizes), dtype=np.int64)
    zeros = np.zeros_like(rows)
    return np.stack([zeros + kernel, zeros + block, rows, zeros, np.array(sizes, np.int64)], axis=1)


def driven(
    prepares: Sequence[tuple[int, ...]],
    work: Sequence[np.ndarray[Any, Any]],
    steps: np.ndarray[Any, Any],
    unit: int | None = None,
    threads: Callable[[], int] | None = None,
) -> Callable[[], None]:
    """Run the prepares, then all work in equal shares of its elements, then count in `steps`.

    Tensors are cut at multiples of a unit from their start, `UNIT` by default. `threads` is called in each step and
    returns how many threads share it; the default asks Numba.
    """
    unit = unit or UNIT
    serial, parallel = _drivers()
    first = np.array(prepares, np.int64).reshape(-1, WORK)
    items = np.ascontiguousarray(np.concatenate([np.empty((0, WORK), np.int64), *work]))
    sizes = items[:, 4]
    size = int(sizes.sum())
    owners = first, items, steps
    known: dict[int, tuple[Any, ...]] = {}  # by number of parts: threads may change between steps

    def run() -> None:
        parts = parts_of(size)
        if threads and parts > 1:
            parts = threads()
        if parts not in known:
            bounds = shares(sizes, parts, unit)
            addresses = first.ctypes.data, len(first), *(x.ctypes.data for x in (items, bounds, steps))
            known[parts] = (*addresses, parts), (bounds, owners)  # raw addresses keep nothing alive
        arguments, _ = known[parts]
        if parts == 1:
            serial(*arguments)
        else:
            with in_parallel:
                parallel(*arguments)

    return run


def parts_of(size: int) -> int:
    """How many threads share the work over `size` elements."""
    # A forked child stays serial: GNU OpenMP would abort it, and other layers have lost their threads.
    return 1 if size < SERIAL_BELOW or in_forked_child() else get_num_threads()


def pieces(sizes: Sequence[int], unit: int | None = None) -> int:
    """How often a kernel is called for tensors of these sizes: once per tensor, and once more per cut at a unit."""
    bounds = shares(np.array(sizes, np.int64), parts_of(sum(sizes)), unit or UNIT)
    return len(sizes) + int(np.count_nonzero(bounds[:, 1]))
