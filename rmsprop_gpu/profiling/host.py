"""The clock and the ceilings of the CPU: the time for memory alone, and the operations per second."""

from __future__ import annotations

import platform
import re
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numba import njit, prange

from ..kernels import cpu, cpu_drive
from ..kernels.compiling import in_forked_child, once
from ..kernels.intrinsics import fma
from ..kernels.rule import Variant, inline
from ..optimizer.rmsprop import RMSProp
from ..steps.batch import Batch
from .traffic import bytes_per_element

WARM_UP, SOME = 3, 10  # calls before the measured ones; a ceiling is the best of at least SOME of those
BIG = 1 << 24  # elements of three float32 streams, 192 MiB: larger than the caches
DEPTH = 16  # fma in a chain
PARTS, WIDTH = 64, 2048  # chains: independent ones hide each other's latency, and a part's fit in a cache


def make_touch(variant: Variant, T: Any) -> Any:
    """A stand-in for the rule: it reads and writes every stream as the rule does, with one addition each."""

    @inline
    def touch(p, grad, v, m, b, e, s, f):  # type: ignore[no-untyped-def]
        return p + grad, v + grad, m + grad, b + grad, e + grad

    return touch


def _make_fma_loop(T: Any, parallel: bool) -> Any:
    @njit(parallel=parallel, error_model="numpy")
    def loop(x, rounds, factor, term):  # type: ignore[no-untyped-def]
        for part in prange(x.shape[0]):
            for _ in range(rounds):
                for i in range(x.shape[1]):
                    t = x[part, i]
                    for _ in range(DEPTH):
                        t = fma(t, factor, term)
                    x[part, i] = t

    return loop


class HostProbe:
    """Measures on the CPU."""

    def __init__(self) -> None:
        threads = numba.get_num_threads()
        self.name = f"{_processor()}, {threads} thread{'s' * (threads > 1)}"

    def step(
        self, bind: Callable[[], Callable[[], object]], repeats: int, within: AbstractContextManager[Any]
    ) -> tuple[list[float], list[float]]:
        """Seconds for ``bind()``, which checks a step, and for running what it returns."""
        host, device = [], []
        for _ in range(WARM_UP + repeats):
            with within:
                start = time.perf_counter()
                launch = bind()
                checked = time.perf_counter()
                launch()
                done = time.perf_counter()
            host.append(checked - start)
            device.append(done - checked)
        return host[WARM_UP:], device[WARM_UP:]

    def launch(
        self, call: Callable[[], object], batch: Batch, moved: int, repeats: int, within: AbstractContextManager[Any]
    ) -> tuple[list[float], list[float], int]:
        """Seconds of a launch over a batch, and of its streams in the same loop without the rule, with their bytes."""
        return *self._beside_a_copy(call, batch, repeats, within), moved

    def _beside_a_copy(
        self, call: Callable[[], object], batch: Batch, repeats: int, within: AbstractContextManager[Any]
    ) -> tuple[list[float], list[float]]:
        """Seconds of both, in turns: memory speed changes from second to second if others use it too."""
        copy = cpu.make_launch([batch], np.zeros(1, np.int64), make_touch)

        def run() -> Callable[[], object]:
            with within:
                call()
            return copy

        return self.step(run, repeats, nullcontext())

    def memory_rate(self, repeats: int) -> tuple[float, float | None]:
        """Bytes per second for arrays too large for any cache; the fraction of time that threads had a processor."""
        # Written to first, since all pages of untouched zeros are the same page.
        opt, grad = RMSProp(np.ones(BIG, np.float32)), np.ones(BIG, np.float32)
        plan = opt._planner.plan()
        plan.bind([grad])
        (batch,) = plan.batches
        start, used = time.perf_counter(), time.process_time()
        _, copies = self._beside_a_copy(plan.launch, batch, max(repeats, SOME), nullcontext())
        wanted = (time.perf_counter() - start) * cpu_drive.parts_of(BIG)
        had = (time.process_time() - used) / wanted
        return BIG * bytes_per_element(batch.variant, batch.dtype, batch.grad_dtype) / min(copies), had

    def flop_rate(self, T: Any, repeats: int) -> float:
        """Operations per second, for fma of type T on all threads."""
        loop = once(_make_fma_loop, T, not in_forked_child())  # a child has lost its parent's threads
        x, rounds = np.ones((PARTS, WIDTH), T), 20
        with nullcontext() if in_forked_child() else cpu_drive.in_parallel:
            run = partial(loop, x, rounds, T(0.5), T(0.5))
            _, seconds = self.step(lambda: run, max(repeats, SOME), nullcontext())
        return 2 * DEPTH * rounds * x.size / min(seconds)

    def facts(self, batch: Batch) -> dict[str, Any]:
        """How the work of a batch is cut."""
        chunks = cpu_drive.pieces(batch.sizes, cpu.unit_of([batch.variant]))
        return {"chunks": chunks, "grid": None, "block": None, "code": None}


def _processor() -> str:
    """The name of the processor, if the system tells."""
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()
