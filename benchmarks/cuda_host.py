"""``python -m benchmarks.cuda_host``: what a step on a device costs the host.

It times ``opt.step(grads)`` alone. After every 20th step it waits for the device, untimed, so that the queue does not
grow. On the virtual device set VGPU_LAZY=1: a launch then only enqueues, as on a GPU; the driver's part differs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import CUDA_PACKAGES, cuda_device, machine, package_versions
from benchmarks.workloads import RESNET50
from rmsprop_gpu import RMSProp

RESULTS = Path(__file__).with_name("results")
SAMPLES = 2000
QUEUE = 20  # steps between two waits for the device, whose kernels may run on this processor and evict its caches
BOUNDS = {"one tensor": 15, "161 tensors": 120}  # us, of steps with unchanged gradients


def times(call: Callable[[], None], settle: Callable[[], None]) -> list[float]:
    """Microseconds of each of many calls."""
    found = []
    for i in range(SAMPLES):
        start = time.perf_counter()
        call()
        found.append((time.perf_counter() - start) * 1e6)
        if i % QUEUE == QUEUE - 1:
            settle()
    return found


def measure(shapes: Sequence[tuple[int, ...]], sets: int) -> dict[str, Any]:
    """A step over tensors of these shapes, with this many sets of gradients in turn, and its parts."""
    import cupy

    params = [cupy.zeros(shape, np.float32) for shape in shapes]
    choices = [[cupy.ones(shape, np.float32) for shape in shapes] for _ in range(sets)]
    opt = RMSProp(params)
    for grads in choices * 2:
        opt.step(grads)
    device = cupy.cuda.Device()
    turn = [0]

    def grads() -> list[Any]:
        turn[0] += 1
        return choices[turn[0] % sets]

    plan = opt._planner.plan()
    parts = {
        "step": lambda: opt.step(grads()),
        "flatten the gradients": lambda: opt._flatten(grads()),
        "find the plan": opt._planner.plan,
        "check the gradients": lambda: plan.bind(grads()),
        "launch": plan.launch,
    }
    found = {name: times(call, device.synchronize) for name, call in parts.items()}
    return {name: statistics.quantiles(x, n=4) for name, x in found.items()}


def markdown(result: dict[str, Any]) -> str:
    """The table."""
    m = result["machine"]
    parts = list(result["rows"][0]["us"])
    lines = [
        "# What a step on a device costs the host",
        "",
        f"Microseconds, medians of {SAMPLES:,} steps (in brackets the quartiles), by `{result['command']}`",
        f"on {result['device']}, and {m['cpu']}, {m['cores']} cores, {m['os']}. The parts are timed each by itself;",
        f"the device is waited for, untimed, after every {QUEUE}th step. The launch by itself is one that uploads no",
        "addresses. The 161 tensors have ResNet-50's dimensions and one element each: the host's work is the same.",
        "",
        f"| tensors | gradients | at most | {' | '.join(parts)} |",
        "| --- | --- | --- |" + " --- |" * len(parts),
    ]
    for row in result["rows"]:
        cells = [f"{q[1]:.1f} ({q[0]:.1f} to {q[2]:.1f})" for q in row["us"].values()]
        lines.append(f"| {row['tensors']} | {row['gradients']} | {row['bound'] or '-'} | {' | '.join(cells)} |")
    lines += ["", ", ".join(f"{n} {v}" for n, v in result["versions"].items() if v) + ".", ""]
    return "\n".join(lines)


def main() -> int:
    """Measure, write, print; the exit status is 1 if a bound is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda_host", description="What a step costs the host.")
    parser.add_argument("--to", type=Path, default=RESULTS, metavar="FOLDER",
                        help="where cuda-host.json and .md go (default: benchmarks/results)")  # fmt: skip
    parser.add_argument("--no-bounds", action="store_true", help="for a device that runs kernels within their launch")
    options = parser.parse_args()
    rows = []
    for title, shapes in (("one tensor", [(1000,)]), ("161 tensors", RESNET50.shapes)):
        # What the host does depends on the shapes alone; the elements are left out, for a device that computes slowly.
        small = [tuple(1 for _ in shape) if title != "one tensor" else shape for shape in shapes]
        for sets, gradients in ((1, "unchanged"), (2, "new in each step")):
            bound = BOUNDS[title] if sets == 1 and not options.no_bounds else None
            rows.append({"tensors": title, "gradients": gradients, "bound": bound, "us": measure(small, sets)})
    result = {
        "command": "python -m benchmarks.cuda_host",
        "device": cuda_device(),
        "machine": machine(),
        "versions": package_versions(CUDA_PACKAGES),
        "rows": rows,
    }
    (options.to / "cuda-host.json").write_text(json.dumps(result, indent=1) + "\n")
    text = markdown(result)
    (options.to / "cuda-host.md").write_text(text)
    print(text)
    return 0 if all(r["bound"] is None or r["us"]["step"][1] <= r["bound"] for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
