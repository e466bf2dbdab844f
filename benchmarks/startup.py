"""What a program waits for at its start: the import, beyond the arrays' own, and the first step, which compiles."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np

RUNS = 7
ARRAYS = {"cpu": "numpy", "cuda": "cupy"}
PROGRAM = """
import time
start = time.perf_counter()
import {arrays} as xp
arrays_there = time.perf_counter()
from rmsprop_gpu import RMSProp
imported = time.perf_counter()
param, grad = xp.ones(1000, xp.float32), xp.ones(1000, xp.float32)
{wait}
begin = time.perf_counter()
RMSProp(param).step(grad)
{wait}
print(arrays_there - start, imported - arrays_there, time.perf_counter() - begin)
"""
WAIT = {"cpu": "", "cuda": "xp.cuda.Device().synchronize()"}


def measure_startup(device: str) -> dict[str, dict[str, float]]:
    """Medians and quartiles of fresh processes, in seconds; the first, which reads the disk, is not counted."""
    arrays, runs = ARRAYS[device], []
    program = PROGRAM.format(arrays=arrays, wait=WAIT[device])
    for _ in range(RUNS + 1):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        runs.append([float(word) for word in done.stdout.split()])
    q1, median, q3 = np.quantile(runs[1:], (0.25, 0.5, 0.75), axis=0).round(3).tolist()
    names = (f"import {arrays}", f"import rmsprop_gpu after {arrays}", "first step")
    return {name: {"q1": q1[i], "median": median[i], "q3": q3[i]} for i, name in enumerate(names)}


def startup_lines(startup: dict[str, Any]) -> list[str]:
    """A line of Markdown for each."""
    return [
        f"* {name}: {row['median']:.2f} s ({row['q1']:.2f} to {row['q3']:.2f}) in a fresh process"
        for name, row in startup.items()
    ]
