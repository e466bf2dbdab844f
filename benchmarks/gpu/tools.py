"""Parts: Nsight Compute and compute-sanitizer on a few steps, if they are installed."""

from __future__ import annotations

import re
import sys

from benchmarks.gpu.part import Part, Result, Run, not_installed, tool
from benchmarks.report import plural

STEPS = (sys.executable, "-m", "benchmarks.gpu.few_steps")
ELEMENTS = 1 << 26  # in the launch for Nsight Compute: larger than the caches
SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "LaunchStats", "SchedulerStats", "WarpStateStats")
METRICS = ("Duration", "DRAM Throughput", "Memory Throughput", "Compute (SM) Throughput", "L2 Hit Rate",
           "Registers Per Thread", "Theoretical Occupancy", "Achieved Occupancy", "Local Memory Spilling Requests",
           "Issued Warp Per Scheduler", "Warp Cycles Per Issued Instruction", "SM Frequency")  # fmt: skip
WRONG = 99  # the exit status of a sanitizer that found something


def nsight(run: Run) -> list[str]:
    """One launch of the plain kernel, with its counters, in a report and as text."""
    report = str(run.folder / "update_kernel")
    words = [tool("ncu") or "ncu", "--clock-control", "none", "--kernel-name-base", "mangled"]
    words += ["-k", "regex:update_kernel", "--launch-skip", "1", "-c", "1", "-f", "-o", report]
    words += [word for name in SECTIONS for word in ("--section", name)]
    elements = ELEMENTS >> 10 if run.rehearse else ELEMENTS
    return [*words, "--page", "details", "--print-details", "all", *STEPS, "--plain", "--elements", str(elements)]


def nsight_found(run: Run) -> Result | None:
    """Its tables are lines of a name, a unit and a number."""
    found: Result = {}
    for line in said(run, NSIGHT).splitlines():
        cells = re.split(r"\s{2,}", line.strip())
        if len(cells) >= 2 and cells[0] in METRICS:
            number, unit = cells[-1], cells[1] if len(cells) > 2 else ""
            found[f"{cells[0]} ({unit})" if unit else cells[0]] = number
    return found or None


def nsight_headline(result: Result) -> str:
    """Some of it."""
    return ", ".join(f"{name} {number}" for name, number in list(result.items())[:6])


def nsight_lines(result: Result) -> list[str]:
    """All of it."""
    return [f"* {name}: {number}" for name, number in result.items()]


def sanitizer(kind: str, seconds: int, *words: str) -> Part:
    """A tool of compute-sanitizer."""

    def command(run: Run) -> list[str]:
        found = tool("compute-sanitizer") or "compute-sanitizer"
        limits = ["--error-exitcode", str(WRONG), "--print-limit", "20"]
        limits += ["--report-api-errors", "no"]  # cuda-bindings asks for functions that older drivers do not have
        return [found, "--tool", kind, *limits, *STEPS, "--no-pool", *words]

    def result(run: Run) -> Result | None:
        summary = re.search(r"ERROR SUMMARY: (\d+) error", said(run, part))
        return {"errors": int(summary[1])} if summary else None

    def headline(result: Result) -> str:
        text = plural(result["errors"], "error")
        return f"**{text}**" if result["errors"] else text

    missing = not_installed("compute-sanitizer")
    part = Part(kind, f"compute-sanitizer, {kind}", seconds, command, result, headline, missing=missing)
    return part


def said(run: Run, part: Part) -> str:
    """Its log."""
    try:
        return run.log(part).read_text(errors="replace")
    except OSError:
        return ""


NSIGHT = Part(
    "ncu",
    "Nsight Compute",
    25,
    nsight,
    nsight_found,
    nsight_headline,
    nsight_lines,
    missing=not_installed("ncu"),
    files=("update_kernel.ncu-rep",),
)
MEMCHECK = sanitizer("memcheck", 25)
INITCHECK = sanitizer("initcheck", 20, "--plain")
