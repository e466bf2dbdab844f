"""What a program waits for at its start: the import, beyond NumPy's own, and the first step, which compiles."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np

RUNS = 7
PROGRAM = """
import time
start = time.perf_counter()
import numpy as np
numpy_there = time.perf_counter()
from rmsprop_gpu import RMSProp
imported = time.perf_counter()
param, grad = np.ones(1000, np.float32), np.ones(1000, np.float32)
begin = time.perf_counter()
RMSProp(param).step(grad)
print(numpy_there - start, imported - numpy_there, time.perf_counter() - begin)
"""


def measure_startup() -> dict[str, dict[str, float]]:
    """Medians and quartiles of fresh processes, in seconds; the first, which reads the disk, is not counted."""
    runs = []
    for _ in range(RUNS + 1):
        done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
        runs.append([float(word) for word in done.stdout.split()])
    q1, median, q3 = np.quantile(runs[1:], (0.25, 0.5, 0.75), axis=0).round(3).tolist()
    names = ("import numpy", "import rmsprop_gpu after numpy", "first step")
    return {name: {"q1": q1[i], "median": median[i], "q3": q3[i]} for i, name in enumerate(names)}


def startup_lines(startup: dict[str, Any]) -> list[str]:
    """A line of Markdown for each."""
    return [
        f"* {name}: {row['median']:.2f} s ({row['q1']:.2f} to {row['q3']:.2f}) in a fresh process"
        for name, row in startup.items()
    ]
