"""``python -m benchmarks.copies``: small tensors packed into a bucket and unpacked, beside a loop of NumPy's copies.

On the CPU, in turns, in one process; results go to ``results/copies.json`` and ``.md``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np

from benchmarks.machine import cores, machine, versions
from benchmarks.report import duration, table
from benchmarks.startup import conditions
from rmsprop_gpu.steps.copies import HostCopies

RESULTS = Path(__file__).with_name("results")
COUNT, SIZE = 3000, 256  # tensors of float32, and the elements of each
ROUNDS, BURST = 25, 20


def main() -> None:
    """Measure and write."""
    result = {"machine": machine(), "versions": versions("cpu"), "seconds": measured()}
    text = page(result)
    (RESULTS / "copies.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "copies.md").write_text(text)
    print(text, end="")


def measured() -> dict[str, dict[str, list[float]]]:
    """By kind and way, the quartiles over rounds of the mean seconds of a burst."""
    tensors, bucket = [np.ones(SIZE, np.float32) for _ in range(COUNT)], np.zeros((COUNT, SIZE), np.float32)
    rows = np.array([(i, 0, place.ctypes.data, SIZE) for i, place in enumerate(bucket)])
    column = np.array([tensor.ctypes.data for tensor in tensors])
    places = list(bucket)

    def loop(targets: list[Any], sources: list[Any]) -> None:
        for target, source in zip(targets, sources, strict=True):
            np.copyto(target, source)

    pack, unpack = HostCopies(rows, 4, "pack"), HostCopies(rows, 4, "unpack")
    kinds = {"pack": (pack, places, tensors), "unpack": (unpack, tensors, places)}
    threads_of = {"one thread": 1, f"all {cores()} threads": cores()}
    found = {}
    for kind, (copies, targets, sources) in kinds.items():
        ways: dict[str, tuple[int, Callable[[], None]]] = {
            "NumPy": (1, lambda targets=targets, sources=sources: loop(targets, sources)),
            **{way: (n, lambda copies=copies: copies(column)) for way, n in threads_of.items()},
        }
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(ROUNDS):
            for way, (threads, call) in ways.items():
                numba.set_num_threads(threads)
                call()
                start = time.perf_counter()
                for _ in range(BURST):
                    call()
                times[way].append((time.perf_counter() - start) / BURST)
        found[kind] = {way: np.quantile(x, (0.25, 0.5, 0.75)).tolist() for way, x in times.items()}
    return found


def page(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    body = [
        (kind, way, duration(median), f"{duration(q1)} to {duration(q3)}", f"{median / ways['NumPy'][1]:.3f}")
        for kind, ways in result["seconds"].items()
        for way, (q1, median, q3) in ways.items()
    ]
    lines = [
        "# Copies between tensors and a bucket",
        "",
        *conditions(result),
        "",
        f"{COUNT:,} tensors of {SIZE} float32: `HostCopies` beside `np.copyto` in a loop over views that are there.",
        f"Medians and quartiles of {ROUNDS} bursts of {BURST}, in turns: `python -m benchmarks.copies`.",
        "",
        *table(("", "by", "median", "quartiles", "of NumPy's"), body),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
