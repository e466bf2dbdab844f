"""``python -m benchmarks.busy``: what a step costs when other processes want the cores too, by how its threads wait.

Each figure comes from fresh processes, in turns; results go to ``results/busy.json`` and ``.md``.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import cores, machine, versions
from benchmarks.report import duration, table
from benchmarks.startup import conditions

RESULTS = Path(__file__).with_name("results")
TURNS = 5
SECONDS = 0.25  # per turn and size
SIZES = (32_768, 65_536, 131_072, 300_000, 1_000_000, 5_000_000)
WAYS: dict[str, dict[str, str]] = {  # how threads wait: environment variables
    "rmsprop_gpu": {},
    "all threads, whatever the size": {"BENCHMARK_SERIAL_BELOW": "0"},
    "one thread": {"NUMBA_NUM_THREADS": "1"},
    "OpenMP's default": {"GOMP_SPINCOUNT": "300000"},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
    "workqueue": {"NUMBA_THREADING_LAYER": "workqueue"},
}
# Other processes per core, and milliseconds of other work between two steps, as in a loop that trains a small network.
MACHINES = {
    "idle, one step behind the other": (0, 0.0),
    "idle, 1 ms of other work between steps": (0, 1.0),
    "as many other processes as cores": (1, 0.0),
    "as many, 1 ms of other work between steps": (1, 1.0),
    "five other processes a core": (5, 0.0),
}
OURS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "NUMBA_NUM_THREADS", "NUMBA_THREADING_LAYER", "OMP_NUM_THREADS")


def main() -> None:
    """Measure and write, or be one of the measured processes."""
    if len(sys.argv) > 1:
        print(json.dumps(step_times(float(sys.argv[1]))))
        return
    result: dict[str, Any] = {"machine": machine(), "versions": versions("cpu"), "busy": measure()}
    lines = ["# Threads on a busy machine", "", *conditions(result), "", *legend(), *tables(result["busy"])]
    (RESULTS / "busy.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "busy.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def step_times(gap: float) -> list[float]:
    """Mean seconds of a step of each size, with this many milliseconds of other work before each."""
    from rmsprop_gpu import RMSProp
    from rmsprop_gpu.kernels import cpu_drive

    cpu_drive.SERIAL_BELOW = int(os.environ.get("BENCHMARK_SERIAL_BELOW", cpu_drive.SERIAL_BELOW))
    found = []
    for size in SIZES:
        opt, grad = RMSProp(np.ones(size, np.float32)), np.ones(size, np.float32)
        for _ in range(3):
            opt.step(grad)
        times, end = [], time.perf_counter() + SECONDS
        while time.perf_counter() < end:
            work(gap)
            start = time.perf_counter()
            opt.step(grad)
            times.append(time.perf_counter() - start)
        found.append(float(np.mean(times)))  # not the median: a run pays for its slow steps too
    return found


def work(milliseconds: float) -> None:
    """Do something else on this thread."""
    end = time.perf_counter() + milliseconds / 1e3
    while time.perf_counter() < end:
        pass


def measure() -> dict[str, dict[str, list[float]]]:
    """The seconds of a step of each size, by machine and way: medians over turns."""
    found: dict[str, dict[str, list[float]]] = {}
    for name, (others, gap) in MACHINES.items():
        with loaded(others * cores()):
            turns = [{way: run(variables, gap) for way, variables in WAYS.items()} for _ in range(TURNS)]
        found[name] = {way: np.median([turn[way] for turn in turns], axis=0).tolist() for way in WAYS}
    return found


def run(variables: dict[str, str], gap: float) -> list[float]:
    """What a fresh process measures."""
    environment = {name: value for name, value in os.environ.items() if name not in OURS}
    command = [sys.executable, "-m", "benchmarks.busy", str(gap)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**environment, **variables})
    times: list[float] = json.loads(done.stdout)
    return times


@contextmanager
def loaded(processes: int) -> Iterator[None]:
    """Run this many other processes that want a core each."""
    others = [multiprocessing.Process(target=_spin, daemon=True) for _ in range(processes)]
    for other in others:
        other.start()
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.join()


def _spin() -> None:
    while True:
        pass


def legend() -> list[str]:
    """How to read the tables."""
    return [
        "The mean time of a step of RMSProp over one tensor of float32, by its elements: the median of "
        f"{TURNS} processes. `rmsprop_gpu` is the package as it comes. The others differ in one thing: "
        "*OpenMP's default* is `GOMP_SPINCOUNT=300000`, what GNU OpenMP has where nobody says otherwise; "
        "*workqueue* is `NUMBA_THREADING_LAYER=workqueue`.",
        "",
    ]


def tables(busy: dict[str, dict[str, list[float]]]) -> list[str]:
    """One table per machine."""
    head = ("", *(f"{size:,}" for size in SIZES))
    lines: list[str] = []
    for name, ways in busy.items():
        rows = [(way, *map(duration, times)) for way, times in ways.items()]
        lines += [f"## {name[0].upper()}{name[1:]}", "", *table(head, rows), ""]
    return lines[:-1]


if __name__ == "__main__":
    main()
