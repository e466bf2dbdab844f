"""One process: one contender on one workload. It checks, warms up, and then runs a burst of steps whenever asked."""

from __future__ import annotations

import ctypes
import re
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.check import disagreement, seeded_data, split
from benchmarks.contenders import CONTENDERS, Running, Unavailable
from benchmarks.machine import without_paths
from benchmarks.workloads import WORKLOADS

BURST_SECONDS = 0.2


def serve(connection: Connection, contender: str, workload: str, threads: int) -> None:
    """Send {"steps_a_burst", "extra_memory_bytes"} or {"left_out": reason}; then answer each message with seconds."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent; its end of the pipe closing ends us
    try:
        running = prepare(contender, workload, threads)
        steps = steps_a_burst(running)
        connection.send({"steps_a_burst": steps, "extra_memory_bytes": extra_memory(running)})
    except Exception as error:  # the row says what happened, the other rows go on
        connection.send({"left_out": without_paths(reason(error))})
        return
    while True:
        try:
            connection.recv()
        except EOFError:
            return
        connection.send(burst(running, steps))


def prepare(contender: str, workload: str, threads: int) -> Running:
    """The contender, set up, compiled and shown to be right."""
    shapes = WORKLOADS[workload].shapes
    param, grad = seeded_data(WORKLOADS[workload].size)
    running = CONTENDERS[contender].build(split(param, shapes), split(grad, shapes), threads)
    complaint = disagreement(running, grad, shapes)
    if complaint:
        raise Unavailable(f"disagrees with the reference at {complaint}")
    return running


def reason(error: Exception) -> str:
    """Why a contender does not run, in a line."""
    if isinstance(error, Unavailable):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    return f"{type(error).__name__}: {error}"


def burst(running: Running, steps: int) -> float:
    """Seconds a step. The first step is not timed: it wakes threads and fetches what other processes evicted."""
    running.step()
    running.sync()
    start = time.perf_counter()
    for _ in range(steps):
        running.step()
    running.sync()
    return (time.perf_counter() - start) / steps


def steps_a_burst(running: Running) -> int:
    """How many steps take about BURST_SECONDS, at least 1. The trial bursts are the warm-up."""
    steps = 3
    while (seconds := burst(running, steps)) * steps < BURST_SECONDS / 4:
        steps *= 4
    return max(1, round(BURST_SECONDS / seconds))


def extra_memory(running: Running) -> int | None:
    """By how many bytes the resident set rises during a step, to about a megabyte; None where the system cannot tell.

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
