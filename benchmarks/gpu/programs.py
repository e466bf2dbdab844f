"""Parts: the tests, and the other programs of benchmarks/."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Any
from xml.etree import ElementTree

from benchmarks.gpu.part import Part, Result, Run, read
from benchmarks.machine import cores
from benchmarks.report import digits, duration, short_ratio, table
from benchmarks.workloads import AGAIN, COPY, OURS

XML = "tests.xml"
REHEARSED_TESTS = "tests/steps/test_refresh.py"
TESTS_AT_ONCE = 12  # processes, each with its own context on the device
A_TEST = 90  # seconds at most
WORKLOADS = ("one-25m", "resnet50", "many-300", "one-1000")
CONTENDERS = (OURS, AGAIN, "cupy elementwise", "cupy fuse", "torch foreach", "torch fused adagrad", COPY)


# The tests


def tests(run: Run) -> list[str]:
    """Run all of them: a broken one must not hide the others."""
    words = ["-m", "pytest", "-m", "gpu", "-q", "--maxfail=40", "--tb=short", "-rfE", "--durations=8"]
    words += ["-p", "no:cacheprovider", "-p", "no:benchmark", f"--junitxml={run.folder / XML}"]
    if find_spec("xdist"):
        words += ["-n", str(max(1, min(TESTS_AT_ONCE, cores() - 1)))]
    if find_spec("pytest_timeout"):
        words += [f"--timeout={A_TEST}"]
    return [sys.executable, *words, *[REHEARSED_TESTS] * run.rehearse]


def tests_found(run: Run) -> Result | None:
    """Read the XML that pytest leaves, even if it was interrupted."""
    try:
        suites = list(ElementTree.parse(run.folder / XML).getroot().iter("testsuite"))
    except (OSError, ElementTree.ParseError):
        return None
    counts = ("tests", "failures", "errors", "skipped")
    numbers = {key: sum(int(suite.get(key, 0)) for suite in suites) for key in counts}
    failed = [
        {"test": f"{case.get('classname')}.{case.get('name')}", "said": first_line(found.get("message", ""))}
        for suite in suites
        for case in suite.iter("testcase")
        for found in case
        if found.tag in ("failure", "error")
    ]
    return {**numbers, "failed": failed}


def first_line(text: str) -> str:
    """The first line of a text, or nothing."""
    return next(iter(text.splitlines()), "")


def tests_headline(result: Result) -> str:
    """How many passed, failed and were skipped."""
    bad = result["failures"] + result["errors"]
    passed = result["tests"] - bad - result["skipped"]
    return f"{passed:,} passed, {result['skipped']:,} skipped, " + (f"**{bad:,} failed**" if bad else "none failed")


def tests_lines(result: Result) -> list[str]:
    """Those that failed."""
    return [f"* `{one['test']}`: {one['said']}" for one in result["failed"]]


# The workloads


def workloads(run: Run) -> list[str]:
    """``python -m benchmarks``, in short."""
    words = ["-m", "benchmarks", "--device", "cuda", "--rounds", "3", "--name", "workloads", "--to", str(run.folder)]
    words += ["--rehearse"] * run.rehearse
    return [sys.executable, *words, "--workloads", *WORKLOADS, "--contenders", *CONTENDERS]


def workloads_headline(result: Result) -> str:
    """Our time on each workload, beside the fastest of the others."""
    said = []
    for name, workload in result["workloads"].items():
        ours = workload["results"].get(OURS, {})
        if "seconds" in ours:
            said.append(f"`{name}` {duration(ours['seconds']['median'])}{beside(workload['results'])}")
        else:
            said.append(f"`{name}` {'agrees' if ours.get('agrees') else '**not timed**'}")
    absent = reasons(result)
    return "; ".join([*said, f"left out: {', '.join(absent)}"] if absent else said)


def reasons(result: Result) -> dict[str, str]:
    """Why contenders were left out, by name; one reason each."""
    rows = [pair for workload in result["workloads"].values() for pair in workload["results"].items()]
    return {who: row["left_out"] for who, row in rows if "left_out" in row}


def beside(rows: dict[str, Any]) -> str:
    """The fastest rival's time / ours, and our speed as a fraction of a copy's."""
    rivals = {name: row["ratio_to"][OURS]["median"] for name, row in rows.items()
              if name not in (AGAIN, COPY) and OURS in row.get("ratio_to", {})}  # fmt: skip
    fraction = rows[OURS].get("fraction_of_copy")
    said = [] if fraction is None else [f"{100 * fraction:.0f} % of a copy"]
    if rivals:
        name = min(rivals, key=lambda rival: rivals[rival])
        said.append(f"{name} takes {digits(rivals[name])} times as long")
    return f" ({', '.join(said)})" if said else ""


def workloads_lines(result: Result) -> list[str]:
    """Each contender's time / ours, by workload; all details are in workloads.md."""
    absent = [f"* {who}: {why}" for who, why in reasons(result).items()]
    if result.get("rehearsal"):
        return ["Only checked, in a rehearsal: `workloads.md`.", "", *absent]
    body = []
    for name, workload in result["workloads"].items():
        rows = workload["results"]
        ours = rows.get(OURS, {}).get("seconds")
        ratios = [short_ratio(who, rows.get(who)) for who in CONTENDERS[1:]]
        body.append((f"`{name}`", duration(ours["median"]) if ours else "left out", *ratios))
    text = ["Times as a multiple of ours, with quartiles in `workloads.md`; **bold** is faster than ours:", ""]
    text += table(("workload", "our time", *CONTENDERS[1:]), body)
    return [*text, "", *absent]


# What a step costs the host


def host(run: Run) -> list[str]:
    """``python -m benchmarks.cuda_host``."""
    words = ["-m", "benchmarks.cuda_host", "--to", str(run.folder)]
    return [sys.executable, *words, *["--no-bounds"] * run.rehearse]


def host_headline(result: Result) -> str:
    """Microseconds of a step."""
    said = [
        f"{row['tensors']}, gradients {row['gradients']}: {digits(row['us']['step'][1])} us"
        + (f" (**wanted: {row['bound']}**)" if row["bound"] and row["us"]["step"][1] > row["bound"] else "")
        for row in result["rows"]
    ]
    return "; ".join(said)


def host_lines(result: Result) -> list[str]:
    """A step and its parts."""
    parts = list(result["rows"][0]["us"])
    body = [
        (row["tensors"], row["gradients"], str(row["bound"] or "-"), *(digits(row["us"][part][1]) for part in parts))
        for row in result["rows"]
    ]
    head = ("tensors", "gradients", "at most", *parts)
    return ["Microseconds of the host, medians; quartiles are in `cuda-host.md`:", "", *table(head, body)]


TESTS = Part(
    "tests",
    "The GPU tests",
    150,
    tests,
    tests_found,
    tests_headline,
    tests_lines,
    missing=lambda: None if find_spec("pytest") else "pytest is not installed",
    files=(XML,),
)
BENCHMARKS = Part(
    "workloads",
    "The workloads, against others",
    75,
    workloads,
    lambda run: read(run.folder / "workloads.json"),
    workloads_headline,
    workloads_lines,
    environment={"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
    files=("workloads.json", "workloads.md"),
)
HOST = Part(
    "host",
    "What a step costs the host",
    20,
    host,
    lambda run: read(run.folder / "cuda-host.json"),
    host_headline,
    host_lines,
    files=("cuda-host.json", "cuda-host.md"),
)
