"""``python -m benchmarks.checkpoint``: saving and loading a state of 1 GB, beside ``cp`` of the same bytes, synced.

``cp`` overwrites a copy, while a save keeps the old file until the new one is complete. In turns, in one process; it
also measures how much the process grows meanwhile. Results go to ``results/checkpoint.json`` and ``.md``; ``--to
FOLDER`` chooses the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.machine import machine, versions
from rmsprop_gpu import RMSProp

RESULTS = Path(__file__).with_name("results")
ROUNDS = 9
SIZES = (100_000_000, 24_900_000, *[1000] * 100)  # elements per tensor: with momentum, 8 bytes of state per element


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--to", type=Path, default=None, metavar="FOLDER", help="default: that of temporary files")
    start = machine()
    with TemporaryDirectory(dir=parser.parse_args().to) as folder:
        found = measured(Path(folder))
    result = {"command": "python -m benchmarks.checkpoint", "machine": start, "versions": versions("cpu"), **found}
    (RESULTS / "checkpoint.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "checkpoint.md").write_text(page(result))
    print(page(result))


def measured(folder: Path) -> dict[str, Any]:
    """Seconds of each way, by round, and the most bytes by which the process grew."""
    params = {f"w{i}": np.ones(n, np.float32) for i, n in enumerate(SIZES)}
    opt = RMSProp(params, momentum=0.9)
    opt.step(params | {name: x.copy() for name, x in params.items()})
    first, second = folder / "run.safetensors", folder / "copy"
    opt.save(first)

    def copy() -> None:
        subprocess.run(["cp", first, second], check=True)
        subprocess.run(["sync", second], check=True)

    ways: dict[str, Callable[[], Any]] = {
        "save": lambda: opt.save(first),
        "load": lambda: opt.load(first),
        "cp, synced": copy,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    growth: dict[str, int] = {"save": 0, "load": 0}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            before = resident(peak=False)
            Path("/proc/self/clear_refs").write_text("5")  # begin a new peak
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
            if name in growth:
                growth[name] = max(growth[name], resident(peak=True) - before)
    return {
        "state_bytes": opt.state.nbytes,
        "file_bytes": os.stat(first).st_size,
        "seconds": seconds,
        "growth_bytes": growth,
    }


def resident(*, peak: bool) -> int:
    """Bytes of the process in memory, now or at the peak."""
    name = "VmHWM:" if peak else "VmRSS:"
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return 1024 * int(line.split()[1])


def page(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    m, v = result["machine"], result["versions"]
    copies = result["seconds"]["cp, synced"]
    lines = [
        "# Checkpoints",
        "",
        f"A state of {result['state_bytes'] / 1e9:.3f} GB, medians of {len(copies)} rounds in turns: "
        f"`{result['command']}`.",
        f"{m['cpu']}, {m['cores']} cores, {m['os']}, load at the start {m['load_at_start']}; python {v['python']}, "
        f"numpy {v['numpy']}.",
        "",
        "| | seconds | quartiles | of cp, round by round | the process grew by |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, seconds in result["seconds"].items():
        q1, median, q3 = np.quantile(seconds, (0.25, 0.5, 0.75))
        ratio = np.median(np.array(seconds) / np.array(copies))
        grew = result["growth_bytes"].get(name)
        said = "" if grew is None else f"{grew / 2**20:.0f} MiB"
        lines.append(f"| {name} | {median:.2f} | {q1:.2f} to {q3:.2f} | {ratio:.2f} | {said} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
