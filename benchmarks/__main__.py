"""``python -m benchmarks``: run and write results; ``python -m benchmarks --report FILE``: print a run again."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.contenders import CONTENDERS, OURS
from benchmarks.machine import machine, versions
from benchmarks.measure import measure, say
from benchmarks.report import markdown
from benchmarks.startup import measure_startup
from benchmarks.workloads import WORKLOADS

RESULTS = Path(__file__).with_name("results")


class Parser(argparse.ArgumentParser):
    """argparse whose complaint is one line."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and end."""
        self.exit(2, f"{self.prog}: {message}\n")


def main(words: Sequence[str]) -> None:
    """Run the command line."""
    parser = make_parser()
    options = parser.parse_args(words)
    if options.report:
        try:
            print_report(json.loads(options.report.read_text()), options.report)
        except (OSError, ValueError, KeyError, TypeError) as error:
            parser.error(f"{options.report} is not the result of a run ({type(error).__name__}: {error})")
        return
    result = run(options, words)
    partial = len(result["workloads"]) < len(WORKLOADS) or len(options.contenders) < len(CONTENDERS)
    name = options.name or ("cpu-part" if partial else "cpu")  # a part must not replace the whole by accident
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name}.json"
    file.write_text(compact({"name": name, **result}))
    print_report({"name": name, **result}, file)


def make_parser() -> Parser:
    """The options."""
    parser = Parser(prog="python -m benchmarks", description="Measure a step of each contender on each workload.")
    whole = checked(lambda word: int(word) if int(word) > 0 else None, "a whole number above 0")
    name = checked(lambda word: word if re.fullmatch(r"[\w-]+", word) else None, "letters, digits, - and _")
    parser.add_argument("--rounds", type=whole, default=15, help="bursts of each contender (default: %(default)s)")
    parser.add_argument("--threads", type=whole, default=os.cpu_count(), help="default: all cores, %(default)s")
    parser.add_argument("--name", type=name, help="results/NAME.json and .md (default: cpu, or cpu-part for a subset)")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), metavar="NAME",
                        help=f"a subset of: {', '.join(WORKLOADS)}")  # fmt: skip
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="NAME",
                        help=f"a subset of: {', '.join(map(repr, CONTENDERS))}")  # fmt: skip
    parser.add_argument("--report", type=Path, metavar="FILE",
                        help="measure nothing, print this JSON file as Markdown, write that beside it")  # fmt: skip
    return parser


def checked(convert: Callable[[str], Any], wanted: str) -> Callable[[str], Any]:
    """An argparse type: None or a ValueError of `convert` becomes a line that says what was wanted."""

    def convert_or_complain(word: str) -> Any:
        try:
            value = convert(word)
        except ValueError:
            value = None
        if value is None:
            raise argparse.ArgumentTypeError(f"{word!r} is not {wanted}")
        return value

    return convert_or_complain


def run(options: argparse.Namespace, words: Sequence[str]) -> dict[str, Any]:
    """Measure everything that was asked for, in the order in which it is listed in the code."""
    result = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "benchmarks", *words]),
        "rounds": options.rounds,
        "threads": options.threads,
        "machine": machine(),
        "versions": versions(),
        "workloads": {},
    }
    contenders = [name for name in CONTENDERS if name in options.contenders]
    for name, workload in WORKLOADS.items():
        if name in options.workloads:
            say(workload.title)
            results = measure(name, contenders, options.rounds, options.threads)
            result["workloads"][name] = {
                "title": workload.title,
                "tensors": len(workload.shapes),
                "elements": workload.size,
                "results": results,
            }
    if OURS.name in options.contenders:
        result["startup"] = measure_startup()
    return result


def compact(result: dict[str, Any]) -> str:
    """JSON with lists of numbers on one line."""
    text = json.dumps(result, indent=1)
    return re.sub(r"\[[\s\d.,e+-]+\]", lambda found: " ".join(found[0].split()), text) + "\n"


def print_report(result: dict[str, Any], file: Path) -> None:
    """Print the page and write it beside the JSON."""
    page = markdown(result)
    file.with_suffix(".md").write_text(page)
    print(page, end="")


if __name__ == "__main__":
    main(sys.argv[1:])
