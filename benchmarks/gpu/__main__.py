"""``python -m benchmarks.gpu``: all that is to be found out on a card, in nine minutes, into one folder."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.gpu import bits, chunks, processes, speed, torch, uploads, versions
from benchmarks.gpu.part import CUDA, Part, Run
from benchmarks.gpu.programs import BENCHMARKS, HOST, TESTS
from benchmarks.gpu.summary import (
    DONE,
    INTERRUPTED,
    LEFT_OUT,
    NO_DEVICE,
    NO_TIME,
    left_out,
    outcome,
    state,
    tidy,
    write,
)
from benchmarks.gpu.tools import INITCHECK, MEMCHECK, NSIGHT
from benchmarks.machine import is_virtual

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
LIMIT = 540  # seconds: more than all parts together
LEAST = 10  # the fewest seconds with which a part is still started
PATIENCE = 60  # seconds to find out whether there is a device

# First what everything else depends on, then what is asked most often. Tools for a closer look come last.
PARTS = (
    *(versions.PART, bits.PART, uploads.PART, TESTS),
    *(speed.PART, BENCHMARKS, HOST, torch.PART, chunks.PART),
    *(NSIGHT, MEMCHECK, INITCHECK),
)
FIND = """
from benchmarks.machine import cuda_device
from rmsprop_gpu.arrays.selector import cuda_devices
cuda_devices()
print(cuda_device())
"""


def main(words: Sequence[str]) -> int:
    """Run the command line; 0 if every part has its result or lacks its tool."""
    start = time.monotonic()
    for number in (signal.SIGINT, signal.SIGTERM):  # if they were ignored here, they would be ignored in the parts
        signal.signal(number, signal.default_int_handler)
    options = make_parser().parse_args(words)
    chosen = [part for part in PARTS if part.name in options.only]
    device, no_device = find_device()
    name = re.sub(r"[^a-z0-9]+", "-", (device or "no device").split(", ")[0].lower()).strip("-")
    folder = options.to or RESULTS / f"gpu-{name}"
    rehearse = options.rehearse or is_virtual(device or "")
    summary: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command(options),
        "device": device,
        "no_device": no_device,
        "rehearsal": rehearse,
        "limit_seconds": options.limit,
        "chosen": len(chosen),
        "parts": {},
    }
    print(f"{device or no_device}{', a rehearsal' * rehearse}", flush=True)
    with TemporaryDirectory() as work:
        run = Run(folder.resolve(), Path(work), rehearse, device=device is not None)
        run.folder.mkdir(parents=True, exist_ok=True)
        run_parts(chosen, run, summary, start)
    print(state(summary).replace("**", ""), f"Read {folder / 'summary.md'}.", flush=True)
    if summary["state"] == INTERRUPTED:
        return 130
    return 0 if all(row["state"] in (DONE, LEFT_OUT) for row in summary["parts"].values()) else 1


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split(": ", 1)[1])
    names = [part.name for part in PARTS]
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="default: benchmarks/results/gpu-NAME of the card")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="PART", help=", ".join(names))
    parser.add_argument("--limit", type=float, default=LIMIT, metavar="SECONDS", help="for all (default: %(default)s)")
    parser.add_argument("--rehearse", action="store_true",
                        help="small sizes; so it is on a virtual device anyway")  # fmt: skip
    return parser


def command(options: argparse.Namespace) -> str:
    """The command line, without where the results go."""
    words = ["--only", *options.only] if len(options.only) < len(PARTS) else []
    words += ["--limit", f"{options.limit:g}"] if options.limit != LIMIT else []
    return shlex.join(["python", "-m", "benchmarks.gpu", *words, *["--rehearse"] * options.rehearse])


def find_device() -> tuple[str | None, str]:
    """The device in words, or None and why there is none. A separate process asks, since it may crash or hang."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", FIND],
            cwd=ROOT,
            env={**os.environ, **environment()},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
    except subprocess.TimeoutExpired:
        return None, f"no CUDA device that answers in {PATIENCE} s"
    said = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines() or ["nothing was said"]
    if done.returncode == 0:
        return said[-1], ""
    return None, f"no CUDA device that works: {said[-1].removeprefix('RuntimeError: ')}"


def environment() -> dict[str, str]:
    """The environment of each process: the checkout first on the path, and the toolkit, if no variable names it."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    found = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
    if not {"CUDA_HOME", "CUDA_PATH"} & set(os.environ) and Path(CUDA).is_dir():
        found["CUDA_HOME"] = CUDA
    return found


def run_parts(chosen: Sequence[Part], run: Run, summary: dict[str, Any], start: float) -> None:
    """Run one after another; the summary is rewritten after each."""

    def save(now: str) -> None:
        summary.update(state=now, seconds=round(time.monotonic() - start, 1))
        write(summary, chosen, run.folder)

    save("running")
    try:
        for i, part in enumerate(chosen):
            left = summary["limit_seconds"] - (time.monotonic() - start)
            print(f"{part.name} ...", end=" ", flush=True)
            row = run_part(part, run, allowance(part, chosen[i + 1 :], left), left)
            summary["parts"][part.name] = row
            save("running")
            said = [f"{row['state']} in {row['seconds']:.0f} s", row["headline"], row["why"]]
            print("; ".join(filter(None, said)).replace("**", ""), flush=True)
            if row["state"] == INTERRUPTED:
                raise KeyboardInterrupt
        save("ended")
    except KeyboardInterrupt:
        for part in chosen:
            summary["parts"].setdefault(part.name, left_out("before it began", INTERRUPTED))
        save(INTERRUPTED)


def allowance(part: Part, later: Sequence[Part], left: float) -> float:
    """The seconds for a part: its own, plus up to as many again from the time that earlier parts have left over."""
    spare = left - sum(other.seconds for other in later)
    return min(max(part.seconds, min(spare, 2 * part.seconds)), left - processes.GRACE)


def run_part(part: Part, run: Run, limit: float, left: float) -> dict[str, Any]:
    """The row of a part, whatever happens in it."""
    if part.needs_device and not run.device:
        return left_out("", NO_DEVICE)
    if why := part.missing():
        return left_out(why)
    if left < LEAST:
        return left_out(f"{max(left, 0):.0f} s were left", NO_TIME)
    for name in part.files:  # from an earlier run
        (run.folder / name).unlink(missing_ok=True)
    kernels = {} if "RMSPROP_GPU_CACHE_DIR" in os.environ else {"RMSPROP_GPU_CACHE_DIR": str(run.work / "kernels")}
    variables = {**environment(), **kernels, **part.environment}
    ended = processes.run(part.command(run), limit, run.log(part), ROOT, variables)
    row = outcome(part, run, ended, limit)
    for file in (run.log(part), *(run.folder / name for name in part.files if name.endswith(".xml"))):
        tidy(file)
    return row


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
