"""``python -m benchmarks.startup``: what a program waits for at its start, the imports and the first step.

The first step compiles, or takes compiled kernels from disk. Every figure is of fresh processes, in turns; results go
to ``results/startup.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.machine import machine, versions

RUNS = 9
RESULTS = Path(__file__).with_name("results")
ARRAYS = {"cpu": "numpy", "cuda": "cupy"}
WAIT = {"cpu": "", "cuda": "xp.cuda.Device().synchronize()"}
STEPS = {"plain": "", "momentum, centered, clipnorm": "momentum=0.9, centered=True, clipnorm=1.0"}
PROGRAM = """
import time
start = time.perf_counter()
import {arrays} as xp
arrays_there = time.perf_counter()
from rmsprop_gpu import RMSProp
imported = time.perf_counter()
param, grad = xp.ones({size}, xp.float32), xp.ones({size}, xp.float32)
{wait}
begin = time.perf_counter()
RMSProp(param, {hyper}).step(grad)
{wait}
print(arrays_there - start, imported - arrays_there, time.perf_counter() - begin)
"""
SIZE = 200_000  # elements: enough for all threads of a CPU


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=tuple(ARRAYS), default="cpu")
    device = parser.parse_args().device
    result = {"machine": machine(), "versions": versions(device), "device": device, "startup": measure_startup(device)}
    lines = ["# Start", "", *conditions(result), "", *startup_lines(result["startup"])]
    name = "startup" if device == "cpu" else f"startup-{device}"
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def measure_startup(device: str) -> dict[str, dict[str, float]]:
    """Medians and quartiles in seconds; the first round, which reads the disk and fills the folder, is not counted."""
    arrays = ARRAYS[device]
    took: dict[str, list[float]] = {}
    with TemporaryDirectory() as folder:
        ways = {"compiled": {"RMSPROP_GPU_CACHE": "0"}, "from disk": {"RMSPROP_GPU_CACHE_DIR": folder}}
        for turn in range(RUNS + 1):
            for step, hyper in STEPS.items():
                for way, variables in ways.items():
                    seconds = _run(PROGRAM.format(arrays=arrays, wait=WAIT[device], hyper=hyper, size=SIZE), variables)
                    names = f"import {arrays}", f"import rmsprop_gpu after {arrays}", f"first step, {step}, {way}"
                    for name, one in zip(names, seconds, strict=True):
                        took.setdefault(name, []).extend([one] * (turn > 0))
    quartiles = {name: np.quantile(times, (0.25, 0.5, 0.75)).round(3).tolist() for name, times in took.items()}
    return {name: {"q1": q1, "median": median, "q3": q3} for name, (q1, median, q3) in quartiles.items()}


def _run(program: str, variables: Mapping[str, str]) -> list[float]:
    """The seconds that a fresh process prints."""
    environment = {name: x for name, x in os.environ.items() if not name.startswith("RMSPROP_GPU_CACHE")}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env={**environment, **variables}
    )
    return [float(word) for word in done.stdout.split()]


def conditions(result: Mapping[str, Any]) -> list[str]:
    """On what it was measured, and by what."""
    m, v = result["machine"], result["versions"]
    packages = ", ".join(f"{name} {v[name]}" for name in ("python", "numpy", "numba", "llvmlite"))
    return [f"{m['cpu']}, {m['cores']} cores, {m['os']}, load at the start {m['load_at_start']}; {packages}."]


def startup_lines(startup: Mapping[str, Any]) -> list[str]:
    """A line of Markdown for each."""
    return [
        f"* {name}: {row['median']:.3f} s ({row['q1']:.3f} to {row['q3']:.3f}) in a fresh process"
        for name, row in startup.items()
    ]


if __name__ == "__main__":
    main()
