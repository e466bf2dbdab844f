"""``python -m benchmarks.scaling``: what a sharded step costs, counted, measured, and by a model of 2 to 4,096 GPUs.

Jobs of 1 to 4 ranks on this machine, in turns, over shared memory and over TCP, whose bytes are counted; needs the
extra mpi. Results go to ``results/scaling.json``, ``.md`` and ``.png``; ``--rehearse`` runs everything on few elements
and writes nothing, ``--report`` makes page and plot of the results again.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import scaling_model as model
from benchmarks.machine import cores, load, machine, package_versions, versions
from benchmarks.scaling_page import page

RESULTS = Path(__file__).with_name("results")
ELEMENTS, STEPS, TURNS, ROUNDS = 1 << 24, 7, 3, 9
LIMIT = 120  # seconds per job
RANKS = (1, 2, 3, 4)
# How ranks reach each other here. TCP goes over the loopback interface, which counts.
WAYS = {
    "shared memory": {},
    "TCP": {"MPIR_CVAR_NOLOCAL": "1", "MPIR_CVAR_CH4_NETMOD": "ofi", "FI_PROVIDER": "tcp"},
}
H200_RECORD = RESULTS / "gpu-nvidia-h200" / "summary.json"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rehearse", action="store_true", help="few elements, nothing timed or written")
    parser.add_argument("--report", action="store_true", help="page and plot from the results that are there")
    options = parser.parse_args()
    file = RESULTS / "scaling.json"
    if options.rehearse:
        print("\n".join(rehearsal()))
        return
    result = json.loads(file.read_text()) if options.report else measured()
    file.write_text(json.dumps(result, indent=1) + "\n")
    file.with_suffix(".md").write_text(page(result))
    print(page(result), end="")
    from benchmarks.scaling_plot import draw  # matplotlib

    draw(result, file.with_suffix(".png"))


# Measuring


def measured() -> dict[str, Any]:
    """Everything that is measured; the rest comes from the model."""
    start = machine()
    jobs = [(way, ranks) for way in WAYS for ranks in RANKS if ranks > 1 or way == "shared memory"]
    turns = [[run(ranks, WAYS[way], ELEMENTS, STEPS) for way, ranks in jobs] for _ in range(TURNS)]
    found = [{"way": way, **merged([turn[i] for turn in turns])} for i, (way, _) in enumerate(jobs)]
    one = run(1, {}, ELEMENTS, ROUNDS, "one")
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": "python -m benchmarks.scaling",
        "machine": {**start, "load_at_end": load()},
        "versions": {**versions("cpu"), **package_versions(("mpi4py", "mpich"))},
        "turns": TURNS,
        "steps": STEPS,
        "jobs": found,
        "one": one,
        "measured_memory": speed_of_the_card(),
    }


def run(ranks: int, variables: dict[str, str], elements: int, steps: int, *words: str) -> dict[str, Any]:
    """The findings of a new job with this many ranks, which share the cores; in a process group, with a time limit."""
    beside = Path(sys.executable).with_name("mpiexec")
    environment = {**os.environ, "NUMBA_NUM_THREADS": str(max(1, cores() // ranks)), **variables}
    command = [str(beside) if beside.exists() else "mpiexec", "-n", str(ranks), sys.executable, "-m", "mpi4py"]
    command += ["-m", "benchmarks.scaling_rank", *words, str(elements), str(steps)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True) as job:
        try:
            out, _ = job.communicate(timeout=LIMIT)
        except BaseException:
            os.killpg(job.pid, signal.SIGKILL)
            raise
    if job.returncode != 0:
        raise SystemExit(f"{' '.join(command[1:])}: exit status {job.returncode}")
    found: dict[str, Any] = json.loads(out)
    return found


def merged(turns: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Several turns as one job: all of their times, and the median of what is one number per turn."""
    first = turns[0]
    found: dict[str, Any] = {}
    for name, value in first.items():
        values = [turn[name] for turn in turns]
        found[name] = [x for some in values for x in some] if isinstance(value, list) else float(np.median(values))
    return {**found, **{name: first[name] for name in ("ranks", "threads", "elements")}}


def speed_of_the_card() -> float:
    """Bytes/s of a plain step of 67 M elements on an H200, as recorded."""
    rows = json.loads(H200_RECORD.read_text())["parts"]["speed"]["result"]["rows"]
    row = next(row for row in rows if row["what"] == "plain float32" and row["elements"] == 1 << 26)
    return float(row["bytes"] / row["seconds"]["median"])


def rehearsal() -> list[str]:
    """A line for each kind of job, with few elements: that it runs, and what fraction of the model's bytes it sends."""
    lines = []
    for way, variables in WAYS.items():
        found = run(2, variables, 1 << 20, 2)
        sent = found["sent"] / model.sent(2, 4 * found["elements"])
        lines.append(f"2 ranks over {way}: runs" + (f", sends {sent:.3f} of the model's bytes" if way == "TCP" else ""))
    one = run(1, {}, 1 << 16, 1, "one")
    return [*lines, *(f"one rank, {name}: runs" for name in one)]


if __name__ == "__main__":
    main()
