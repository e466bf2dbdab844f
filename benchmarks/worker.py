"""One process: one contender on one workload. It checks it, then warms up and runs bursts of steps on request."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.check import disagreement, seeded_data, split
from benchmarks.contenders import CONTENDERS
from benchmarks.contenders_base import Array, Running, Task, Unavailable
from benchmarks.machine import without_paths
from benchmarks.workloads import WORKLOADS, Workload

BURST_SECONDS = {"cpu": 0.2, "cuda": 0.1}
REHEARSED_TENSORS, REHEARSED_SIZE = 4, 1000


@dataclass(frozen=True)
class Conditions:
    """The conditions under which a workload is measured."""

    device: str  # "cpu" or "cuda"
    rounds: int
    threads: int
    rehearse: bool = False  # check everything on small tensors, time nothing


def serve(connection: Connection, contender: str, workload: str, conditions: Conditions) -> None:
    """Send {}, or {"left_out": reason}; then answer "warm up" with facts for the row, "burst" with seconds per step."""
    begin_process(conditions.threads)
    steps = 1
    with contextlib.suppress(OSError):  # nobody listens any more
        try:
            running = prepare(contender, workload, conditions)
            connection.send({})
            for request in requests(connection):
                if request == "warm up":
                    steps = steps_a_burst(running, BURST_SECONDS[conditions.device])
                    connection.send({"steps_a_burst": steps, "extra_memory_bytes": extra_memory(running)})
                else:
                    connection.send(burst(running, steps))
        except Exception as error:  # the row says what happened, the other rows go on
            connection.send({"left_out": without_paths(reason(error))})


def begin_process(threads: int) -> None:
    """Lead a process group, to end together with all compilers we start; use only as many cores as threads."""
    if hasattr(os, "setsid"):
        os.setsid()
    if hasattr(os, "sched_setaffinity"):  # before libraries are loaded: some start one thread per core that they see
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def requests(connection: Connection) -> Iterator[Any]:
    """Messages until the parent closes its end."""
    with contextlib.suppress(EOFError):
        while True:
            yield connection.recv()


def prepare(contender: str, workload: str, conditions: Conditions) -> Running:
    """The contender, set up, compiled and checked."""
    chosen, work = CONTENDERS[conditions.device][contender], WORKLOADS[workload]
    if conditions.rehearse:
        work = shrunk(work)
    param, grad = seeded_data(work.size)
    running = chosen.build(task_of(work, conditions.threads, param, grad))
    complaint = disagreement(running, chosen, grad, work) if chosen.rule else None
    if complaint:
        raise Unavailable(f"disagrees with the reference at {complaint}")
    return running


def task_of(workload: Workload, threads: int, param: Array, grad: Array) -> Task:
    """The workload with these values."""
    arrays = split(param, workload.shapes), split(grad, workload.shapes)
    return Task(
        *arrays,
        threads,
        workload.hyper,
        workload.bytes_per_element,
        groups=workload.groups,
        scheduled=workload.scheduled,
    )


def shrunk(workload: Workload) -> Workload:
    """The workload with a few small tensors instead of its own."""
    sizes = [min(math.prod(shape), REHEARSED_SIZE) for shape in workload.shapes[:REHEARSED_TENSORS]]
    return replace(workload, shapes=tuple((size,) for size in sizes))


def reason(error: Exception) -> str:
    """Why a contender does not run, in a line."""
    if isinstance(error, Unavailable):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    return f"{type(error).__name__}: {error}"


def burst(running: Running, steps: int) -> float:
    """Seconds per step. The first step is not timed: it wakes threads and fetches what other processes evicted."""
    running.step()
    running.sync()
    start = time.perf_counter()
    for _ in range(steps):
        running.step()
    running.sync()
    return (time.perf_counter() - start) / steps


def steps_a_burst(running: Running, wanted_seconds: float) -> int:
    """How many steps take about this long, at least 1. The trial bursts are the warm-up."""
    steps = 3
    while (seconds := burst(running, steps)) * steps < wanted_seconds / 4:
        steps *= 4
    return max(1, round(wanted_seconds / seconds))


def extra_memory(running: Running) -> int | None:
    """By how many bytes memory rises during a step; None if that is unknown."""
    return running.extra_memory() if running.extra_memory else rise_of_resident_set(running)


def rise_of_resident_set(running: Running) -> int | None:
    """By how many bytes the resident set rises during a step, to about a megabyte; None if the system cannot tell.

    Freed memory that malloc keeps would hide temporaries, so it is given back first.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from the present (Linux)
        before = peak_memory()
        for _ in range(2):
            running.step()
        running.sync()
        return peak_memory() - before
    except (OSError, AttributeError, TypeError):
        return None


def peak_memory() -> int:
    """The highest resident set since the process started or the peak was reset, in bytes."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise OSError("no VmHWM")
    return 1024 * int(found[1])
