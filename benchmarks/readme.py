"""``python -m benchmarks.readme``: the figures of README.md and benchmarks/README.md, from the committed results."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.plots import counts
from benchmarks.report import bars, conditions, duration, is_faster, noise, short_ratio, speeds, table, timed, to_ours
from benchmarks.startup import startup_lines
from benchmarks.workloads import AGAIN, C_OPENMP, COMPILED, FUSED, OPTAX, OURS, TORCH

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).with_name("results")
SHOWN = (*TORCH, COMPILED, FUSED, OPTAX, "numpy", C_OPENMP)  # of the rivals; all of them stand in the page of results
MARKS = "<!-- figures of benchmarks/results/cpu.json -->", "<!-- end of figures -->"


def main() -> None:
    """Write both."""
    result = json.loads((RESULTS / "cpu.json").read_text())
    for file, lines in sections(result).items():
        text = file.read_text()
        file.write_text(replaced(text, lines))


def sections(result: dict[str, Any]) -> dict[Path, list[str]]:
    """What stands between the marks of each README."""
    return {ROOT / "README.md": of_the_project(result), ROOT / "benchmarks" / "README.md": of_the_benchmarks(result)}


def replaced(text: str, lines: list[str]) -> str:
    """The text with other lines between the marks."""
    first, last = MARKS
    pattern = re.compile(f"{re.escape(first)}.*?{re.escape(last)}", re.DOTALL)
    made, count = pattern.subn(lambda _: "\n".join([first, *lines, last]), text)
    if count != 1:
        raise ValueError(f"{first} stands {count} times in a README; wanted once")
    return made


def of_the_project(result: dict[str, Any]) -> list[str]:
    """One table and one plot, on what machine, and where others are faster."""
    head = ("a step of RMSProp, float32", OURS, "of a copy's speed", *SHOWN, "ours again")
    body = [(f"{name}: {counts(one)}", *cells(one["results"])) for name, one in result["workloads"].items()]
    return [
        *table(head, body),
        "",
        "![How many times as long as ours each contender takes](benchmarks/results/cpu-ratios.png)",
        "",
        "In the columns of others: their time divided by ours; bold where they are faster. "
        f"{C_OPENMP} runs one flat array, {FUSED} another rule over the same streams.",
        *losses(result),
        *noise(result["workloads"]),
        "",
        *conditions(result),
        "All of it, with quartiles: [`benchmarks/results/cpu.md`](benchmarks/results/cpu.md);"
        " how it is measured: [`benchmarks/README.md`](benchmarks/README.md).",
        "",
        *startup_lines(json.loads((RESULTS / "startup.json").read_text())["startup"]),
    ]


def cells(results: dict[str, Any]) -> tuple[str, ...]:
    """Our time and part of the copy's speed, and how many times ours the others take."""
    ours = timed(results)[OURS]
    others = (short_ratio(name, results.get(name)) for name in (*SHOWN, AGAIN))
    return duration(ours["seconds"]["median"]), speeds(ours)[1], *others


def losses(result: dict[str, Any]) -> list[str]:
    """Who is faster than we are, where, and by how much."""
    found: dict[str, list[str]] = {}
    for workload, one in result["workloads"].items():
        for name, row in one["results"].items():
            ratio = to_ours(row)
            if ratio and is_faster(name, ratio):
                found.setdefault(name, []).append(f"{workload} ({short_ratio(name, row).strip('*')})")
    if not found:
        return ["No contender was faster beyond the quartiles of its rounds."]
    return ["Faster than ours: " + "; ".join(f"{name} on {', '.join(where)}" for name, where in found.items()) + "."]


def of_the_benchmarks(result: dict[str, Any]) -> list[str]:
    """What the project wants of itself, and what came out."""
    head = ("workload", "against", "wanted", "got", "met")
    return [
        "The whole of the last run: [results/cpu.md](results/cpu.md). What the project wants of it:",
        "",
        *table(head, bars(result)),
        "",
        "![GB/s by the size of one tensor](results/cpu-sizes.png)",
        "",
        "![GB/s by threads](results/cpu-scaling.png)",
    ]


if __name__ == "__main__":
    main()
