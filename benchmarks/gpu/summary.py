"""What all parts have found: ``summary.md``, to be read first, and ``summary.json`` with all numbers."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.part import Part, Run
from benchmarks.gpu.processes import INTERRUPTED, TIME_LIMIT, Ended, last_line
from benchmarks.machine import without_paths
from benchmarks.report import one_line, plural, table
from benchmarks.worker import reason

Summary = dict[str, Any]
# How a part ended, or why it was not started.
DONE, FAILED, LEFT_OUT, NO_TIME, NO_DEVICE = "done", "failed", "left out", "no time", "no device"
SAID = 240  # characters of a last line


def outcome(part: Part, run: Run, ended: Ended, limit: float) -> dict[str, Any]:
    """A part's row: its result, or why there is none; or both, if it was stopped halfway."""
    result, unread = attempt(lambda: part.result(run))
    headline, unreadable = attempt(lambda: None if result is None else part.headline(result))
    why = [why_it_ended(ended, limit)] if ended.status != 0 or ended.stopped else []
    why += [f"its result cannot be read: {said}" for said in (unread or unreadable,) if said]
    if result is None and not why:
        why = ["it left no result"]
    if why and (last := last_line(run.log(part))):
        why.append(f"it said last: {last[:SAID]}")
    return {
        "state": ended.stopped or (FAILED if why else DONE),
        "why": "; ".join(why),
        "headline": headline,
        "seconds": round(ended.seconds, 1),
        "limit_seconds": round(limit),
        "exit_status": ended.status,
        "result": result,
    }


def why_it_ended(ended: Ended, limit: float) -> str:
    """In words."""
    if ended.stopped:
        words = f"stopped at its limit of {limit:.0f} s" if ended.stopped == TIME_LIMIT else ended.stopped
        return words + ", and did not end" * (ended.status is None)
    if ended.status is not None and ended.status < 0:
        return f"ended by {signal.Signals(-ended.status).name}"
    return f"exit status {ended.status}"


def left_out(why: str, state: str = LEFT_OUT) -> dict[str, Any]:
    """The row of a part that was not started."""
    return {"state": state, "why": why, "headline": None, "seconds": 0.0, "result": None}


def attempt(find: Callable[[], Any]) -> tuple[Any, str | None]:
    """What it finds, and why it found nothing. A part may leave anything; the others must still be readable."""
    try:
        return find(), None
    except Exception as error:
        return None, reason(error)


def write(summary: Summary, parts: Sequence[Part], folder: Path) -> None:
    """Write both files, without the folders of this machine; a reader at that time finds complete old ones."""
    cleaned = clean(summary)
    for name, text in (("summary.json", json.dumps(cleaned, indent=1)), ("summary.md", markdown(cleaned, parts))):
        part = folder / f"{name}.part"
        part.write_text(text + "\n")
        os.replace(part, folder / name)


def clean(x: Any) -> Any:
    """The same object without folders in its strings."""
    if isinstance(x, dict):
        return {key: clean(value) for key, value in x.items()}
    if isinstance(x, list):
        return [clean(value) for value in x]
    return without_paths(x) if isinstance(x, str) else x


def tidy(file: Path) -> None:
    """Remove the folders of this machine, and its name, from a text file."""
    if file.exists():
        text = without_paths(file.read_text(errors="replace"))
        file.write_text(re.sub(r' hostname="[^"]*"', "", text))


def markdown(summary: Summary, parts: Sequence[Part]) -> str:
    """The page."""
    rows, titles = summary["parts"], {part.name: part for part in parts}
    body = [
        (f"`{name}`", titles[name].title, cell(row), f"{row['seconds']:.0f}", str(row.get("limit_seconds", "")))
        for name, row in rows.items()
    ]
    text = [f"# First run on a card: {summary['device'] or 'no device'}", "", state(summary), ""]
    text += [f"There is {summary['no_device']}.", ""] if summary["no_device"] else []
    if summary["rehearsal"]:
        text += ["**A rehearsal: small sizes; the times of a virtual device mean nothing.**", ""]
    text += [f"{summary['date']}: `{summary['command']}`. What each part said is in `logs/`.", ""]
    text += table(("part", "what it is", "what came of it", "seconds", "at most"), body)
    for name, row in rows.items():
        if row["result"]:
            lines, why = attempt(lambda part=titles[name], result=row["result"]: part.lines(result))
            section = [f"No table: {why}"] if why else lines
            text += ["", f"## {titles[name].title}", "", *section] if section else []
    return "\n".join(text)


def state(summary: Summary) -> str:
    """Whether the run is complete."""
    rows = summary["parts"]
    with_result = sum(row["result"] is not None for row in rows.values())
    without = [name for name, row in rows.items() if row["result"] is None]
    bad = [name for name, row in rows.items() if row["state"] not in (DONE, LEFT_OUT)]
    said = {
        "running": f"Not at its end: {len(rows)} of {plural(summary['chosen'], 'part')}",
        "ended": "Ran to its end",
        INTERRUPTED: "Interrupted",
    }[summary["state"]]
    return (
        f"**{said}** after {summary['seconds']:.0f} s of at most {summary['limit_seconds']:g} s: "
        f"{plural(with_result, 'part')} with a result, {len(without)} without{listed(without)}; "
        f"{len(bad) or 'none'} not as it should be{listed(bad)}."
    )


def listed(names: Sequence[str]) -> str:
    """In brackets, if there are any."""
    return f" ({', '.join(names)})" if names else ""


def cell(row: dict[str, Any]) -> str:
    """The outcome of a part, in one line."""
    mark = row["state"] if row["state"] == LEFT_OUT else f"**{row['state']}**"
    ended = ": ".join(filter(None, (mark, row["why"]))) if row["state"] != DONE else None
    return one_line("; ".join(filter(None, (row["headline"], ended))))
