"""``python -m benchmarks``: run and write results; ``python -m benchmarks --report FILE``: print a run again."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.contenders import CONTENDERS, SCALING
from benchmarks.machine import cores, cuda_device, is_virtual, machine, versions, without_paths
from benchmarks.measure import measure, say
from benchmarks.report import markdown
from benchmarks.worker import Conditions
from benchmarks.workloads import WORKLOADS, Workload

RESULTS = Path(__file__).with_name("results")


class Parser(argparse.ArgumentParser):
    """argparse with one-line error messages."""

    def error(self, message: str) -> NoReturn:
        """Print what is wrong and exit."""
        self.exit(2, f"{self.prog}: {message}\n")


def main(words: Sequence[str]) -> None:
    """Run the command line."""
    parser = make_parser()
    options = parser.parse_args(words)
    if options.report:
        try:
            show(json.loads(options.report.read_text()), options.report)
        except (OSError, ValueError, KeyError, TypeError) as error:
            parser.error(f"{options.report} is not the result of a run ({type(error).__name__}: {error})")
        return
    try:
        device = find_device(options.device)
    except RuntimeError as error:
        parser.error(str(error))
    if not set(options.contenders) & set(CONTENDERS[device["kind"]]):
        parser.error(f"none of these contenders runs on {device['kind']}")
    if is_virtual(device["name"]) and not options.rehearse:
        say(f"{device['name']} is a virtual device, whose times mean nothing: this is a rehearsal.")
        options.rehearse = True
    name = options.name or (device["kind"] if is_whole(options) else f"{device['kind']}-part")
    file = options.to / f"{name}.json" if options.name or not options.rehearse else None

    def save(result: dict[str, Any]) -> None:
        if file:
            options.to.mkdir(parents=True, exist_ok=True)
            file.write_text(compact({"name": name, **result}))

    try:
        result = run(options, words, device, save)
    except KeyboardInterrupt:
        parser.exit(130, f"\ninterrupted: what was measured until then is in {file}\n" if file else "\ninterrupted\n")
    show({"name": name if file else "rehearsal", **result}, file)


def make_parser() -> Parser:
    """The options."""
    parser = Parser(prog="python -m benchmarks", description="Measure a step of each contender on each workload.")
    whole = checked(lambda word: int(word) if int(word) > 0 else None, "a whole number above 0")
    name = checked(lambda word: word if re.fullmatch(r"[\w-]+", word) else None, "letters, digits, - and _")
    names = list(dict.fromkeys(name for contenders in CONTENDERS.values() for name in contenders))
    parser.add_argument("--device", choices=("auto", *CONTENDERS), default="auto",
                        help="auto, the default: cuda where a device works, else cpu")  # fmt: skip
    parser.add_argument("--rounds", type=whole, default=9, help="bursts of each contender (default: %(default)s)")
    parser.add_argument("--threads", type=whole, default=cores(), help="default: all cores, %(default)s")
    parser.add_argument("--name", type=name,
                        help="NAME.json and .md (default: cpu or cuda, with -part for a subset)")  # fmt: skip
    parser.add_argument("--to", type=Path, default=RESULTS, metavar="FOLDER",
                        help="where NAME.* goes (default: benchmarks/results)")  # fmt: skip
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), metavar="NAME",
                        help=f"a subset of: {', '.join(WORKLOADS)}")  # fmt: skip
    parser.add_argument("--contenders", nargs="+", choices=names, default=names, metavar="NAME",
                        help=f"a subset of: {', '.join(map(repr, names))}")  # fmt: skip
    rehearsal = "check all on a few small tensors, time nothing, write only with --name"
    parser.add_argument("--rehearse", action="store_true", help=rehearsal)
    parser.add_argument("--report", type=Path, metavar="FILE",
                        help="measure nothing, print this JSON file as Markdown, write that beside it")  # fmt: skip
    return parser


def checked(convert: Callable[[str], Any], wanted: str) -> Callable[[str], Any]:
    """An argparse type: None or a ValueError from `convert` becomes a line that says what was wanted."""

    def convert_or_complain(word: str) -> Any:
        try:
            value = convert(word)
        except ValueError:
            value = None
        if value is None:
            raise argparse.ArgumentTypeError(f"{word!r} is not {wanted}")
        return value

    return convert_or_complain


def find_device(wanted: str) -> dict[str, str]:
    """The kind and the name of the measured device; RuntimeError if a GPU is requested and none works."""
    if wanted != "cpu":
        from rmsprop_gpu.arrays.selector import cuda_devices

        try:
            cuda_devices()
            return {"kind": "cuda", "name": cuda_device()}
        except RuntimeError as error:
            if wanted == "cuda":
                raise
            say(f"On the CPU: {error}.")
    return {"kind": "cpu", "name": machine()["cpu"]}


def is_whole(options: argparse.Namespace) -> bool:
    """Is everything measured? A partial run must not replace a complete one by accident."""
    names = {name for contenders in CONTENDERS.values() for name in contenders}
    return set(options.workloads) == set(WORKLOADS) and set(options.contenders) == names


def run(
    options: argparse.Namespace, words: Sequence[str], device: dict[str, str], save: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Measure everything that was requested, in the order of the lists in the code; save after each part."""
    rounds = 1 if options.rehearse else options.rounds
    conditions = Conditions(device["kind"], rounds, options.threads, options.rehearse)
    result: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": without_paths(shlex.join(["python", "-m", "benchmarks", *words])),
        "device": device,
        "rehearsal": options.rehearse,
        "rounds": rounds,
        "threads": options.threads,
        "machine": machine(),
        "versions": versions(device["kind"]),
        "workloads": {},
    }
    for name, workload in WORKLOADS.items():
        if name in options.workloads:
            result["workloads"][name] = run_workload(workload, options.contenders, conditions)
            save(result)
    return result


def run_workload(workload: Workload, wanted: Sequence[str], conditions: Conditions) -> dict[str, Any]:
    """The part of the result for one workload."""
    say(workload.title)
    allowed = [name for name in wanted if workload.has(name)]
    contenders = [name for name in CONTENDERS[conditions.device] if name in allowed]
    found = {
        "title": workload.title,
        "tensors": len(workload.shapes),
        "elements": workload.size,
        "bytes_per_element": workload.bytes_per_element,
        "hyper": dict(workload.hyper),
        "results": measure(workload.name, contenders, conditions),
    }
    if workload.scaling and conditions.device == "cpu" and not conditions.rehearse:
        found["scaling"] = scaling(workload.name, [name for name in contenders if name in SCALING], conditions)
    return found


def scaling(workload: str, contenders: Sequence[str], conditions: Conditions) -> dict[str, Any]:
    """The same with 1, 2, 4, ... threads, as long as that is fewer."""
    found = {}
    for threads in (2**i for i in range(conditions.threads.bit_length()) if 2**i < conditions.threads):
        say(f"  with {threads} thread{'s' * (threads > 1)}")
        found[str(threads)] = measure(workload, contenders, replace(conditions, threads=threads))
    return found


def compact(result: dict[str, Any]) -> str:
    """JSON with lists of numbers on one line."""
    text = json.dumps(result, indent=1)
    return re.sub(r"\[[\s\d.,e+-]+\]", lambda found: " ".join(found[0].split()), text) + "\n"


def show(result: dict[str, Any], file: Path | None) -> None:
    """Print the page; write it and its pictures beside the JSON, if there is a file."""
    page = markdown(result)
    print(page, end="")
    if file is None:
        return
    file.with_suffix(".md").write_text(page)
    if not result.get("rehearsal"):
        draw_plots(result, file.parent)


def draw_plots(result: dict[str, Any], folder: Path) -> None:
    """Draw the pictures of a run, if matplotlib is installed."""
    try:
        from benchmarks.plots import draw

        draw(result, folder)
    except ModuleNotFoundError as error:
        say(f"No pictures: {error.name} is not installed.")


if __name__ == "__main__":
    main(sys.argv[1:])
