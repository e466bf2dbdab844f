"""A Markdown page made from the JSON of a run. Rows where we lose stay, and say so."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks.workloads import AGAIN, BITSANDBYTES, COPY, FORMATS, OURS, PLAIN, VIEWS, WORKLOADS, Bar

Row = dict[str, Any]
Rows = Mapping[str, Row]  # by contender
Cells = tuple[str, ...]

NO_RIVALS = (OURS, AGAIN, VIEWS, PLAIN, *FORMATS, COPY)  # the copy computes nothing: it is a limit

HEAD = ("contender", "time a step", "quartiles", "time / ours (quartiles)", "GB/s", "of copy", "bytes per element",
        "extra memory")  # fmt: skip


def markdown(result: dict[str, Any]) -> str:
    """The whole page."""
    parts = rehearsed(result) if result.get("rehearsal") else measured(result)
    return "\n".join([f"# Benchmark: {result['name']}", "", *conditions(result), "", *parts]) + "\n"


def timed(results: Rows) -> dict[str, Row]:
    """The rows that have times."""
    return {name: row for name, row in results.items() if "seconds" in row}


def contenders_of(workloads: dict[str, Any]) -> list[str]:
    """All contenders, in the order of the workload that has the most of them."""
    fullest_first = sorted(workloads.values(), key=lambda workload: -len(workload["results"]))
    return list(dict.fromkeys(name for workload in fullest_first for name in workload["results"]))


def to_ours(row: Row) -> dict[str, float] | None:
    """Median and quartiles of the contender's time / ours, or None."""
    found: dict[str, float] | None = row.get("ratio_to", {}).get(OURS)
    return found


def conditions(result: dict[str, Any]) -> list[str]:
    """Where, when and how, in a few lines."""
    machine, versions = result["machine"], result["versions"]
    device = result.get("device", {"kind": "cpu"})
    there = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    absent = ", ".join(name for name, version in versions.items() if not version)
    return [
        *([f"{device['name']}, in this machine:"] if device["kind"] == "cuda" else []),
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {machine['os']}, transparent huge "
        f"pages: {machine['transparent_huge_pages']}, load at the start {machine['load_at_start']}.",
        f"{there}{f'; absent: {absent}' if absent else ''}.",
        f"{plural(result['threads'], 'thread')}, {plural(result['rounds'], 'round')}, {result['date']}: "
        f"`{result['command']}`.",
    ]


def measured(result: dict[str, Any]) -> list[str]:
    """The page of a run with times, below its head."""
    lines = ["## Summary", "", *legend(), "", *summary(result["workloads"]), "", *noise(result["workloads"]), ""]
    for name, workload in result["workloads"].items():
        lines += [f"## {workload['title']} (`{name}`)", "", *table(HEAD, rows(workload["results"])), ""]
        lines += scaling(workload, result["threads"])
    wishes = bars(result)
    if wishes:
        lines += [
            "## What the project wants",
            "",
            *table(("workload", "of", "against", "wanted", "got", "met"), wishes),
        ]
    return lines


def legend() -> list[str]:
    """How to read the tables."""
    return [
        "Times are medians over rounds. *time / ours* is a contender's time divided by ours round by round: below 1 it",
        "is faster than we are, and **bold** where its upper quartile is below 1 too. *again* is our own program once",
        "more, the noise. GB/s counts the bytes that a step of the workload cannot do without, 20 per element of plain",
        "RMSProp, and those of its own for a format of fewer bytes; small workloads sit in a cache and show no memory",
        "speed. *of copy* is the time of a plain copy of as many bytes divided by the contender's. *bytes per element*",
        "are those of its own passes, where known.",
    ]


def summary(workloads: dict[str, Any]) -> list[str]:
    """Everybody's time / ours, by workload."""
    rivals = [name for name in contenders_of(workloads) if name not in (OURS, AGAIN)]
    head = ("workload", "our time", "GB/s", "of copy", "again", *rivals)
    return table(head, [(f"`{name}`", *summary_cells(one["results"], rivals)) for name, one in workloads.items()])


def summary_cells(results: Rows, rivals: Sequence[str]) -> Cells:
    """Our time, speed and noise on a workload, and how many times ours each rival takes."""
    ours = results.get(OURS, {})
    time, speed, of_copy = ("",) * 3 if "seconds" not in ours else (duration(ours["seconds"]["median"]), *speeds(ours))
    return time or "left out", speed, of_copy, *(short_ratio(name, results.get(name)) for name in (AGAIN, *rivals))


def short_ratio(name: str, row: Row | None) -> str:
    """The median of time / ours; empty for who was not asked."""
    if row is None:
        return ""
    if "left_out" in row:
        return "left out"
    found = to_ours(row)
    if found is None:
        return ""
    text = digits(found["median"])
    return f"**{text}**" if is_faster(name, found) else text


def is_faster(name: str, found: Mapping[str, float]) -> bool:
    """Is a rival faster than we are, beyond the spread of its rounds?"""
    return name not in NO_RIVALS and found["q3"] < 1


def noise(workloads: dict[str, Any]) -> list[str]:
    """Whether the noise is below the smallest difference that the table claims, and where it is not."""
    spreads = {name: spread for name, one in workloads.items() if (spread := spread_of(one["results"]))}
    if not spreads:
        return [f"No noise is known: `{AGAIN}` was not timed."]
    claims = [claim for name, one in workloads.items() if name in spreads for claim in claims_of(name, one["results"])]
    if not claims:
        return ["No contender differs from ours beyond its quartiles."]
    factor, rival, where = min(claims)
    doubtful = [claim for claim in claims if claim[0] <= spreads[claim[2]]]
    above = "not above" if factor <= spreads[where] else "above"
    listed = "; ".join(f"{who} on `{name}` ({digits(by)}, noise {digits(spreads[name])})" for by, who, name in doubtful)
    return [
        f"The smallest difference beyond a contender's quartiles is a factor of {digits(factor)} ({rival} on `{where}`)"
        f": {above} the noise there, {digits(spreads[where])}, which is how far the quartiles of *again* go from 1.",
        f"Of {plural(len(claims), 'such difference')}, {len(doubtful) or 'none'} "
        f"{'lie' if len(doubtful) > 1 else 'lies'} within the noise of the workload"
        f"{': ' if doubtful else ''}{listed}.",
    ]


def spread_of(results: Rows) -> float | None:
    """The noise: the factor between our time and our own a second time, at the quartile farther from 1."""
    found = to_ours(results.get(AGAIN, {}))
    return max(found["q3"], 1 / found["q1"]) if found else None


def claims_of(workload: str, results: Rows) -> Iterator[tuple[float, str, str]]:
    """The contenders whose quartiles lie on one side of 1: the factor between the medians, who, and where."""
    for name, row in results.items():
        found = to_ours(row)
        if found and name not in NO_RIVALS and (found["q1"] > 1 or found["q3"] < 1):
            yield max(found["median"], 1 / found["median"]), name, workload


def rows(results: Rows) -> list[Cells]:
    """One a contender, in the order in which they are listed."""
    return [(name, *cells(name, row)) for name, row in results.items()]


def cells(name: str, row: Row) -> Cells:
    """What stands beside a contender's name."""
    if "seconds" not in row:
        return (f"not timed: {one_line(row.get('left_out', 'only checked'))}", *[""] * (len(HEAD) - 2))
    seconds, memory = row["seconds"], row["extra_memory_bytes"]
    return (
        duration(seconds["median"]),
        f"{duration(seconds['q1'])} to {duration(seconds['q3'])}",
        ratio(name, to_ours(row)),
        *speeds(row),
        str(row.get("bytes_per_element") or ""),
        "unknown" if memory is None else f"{memory / 1e6:.0f} MB",
    )


def speeds(row: Row) -> tuple[str, str]:
    """GB/s, and the fraction of the copy; results from before the copy was measured have neither for some."""
    speed, fraction = row.get("gigabytes_per_second"), row.get("fraction_of_copy")
    return "" if speed is None else digits(speed), "" if fraction is None else f"{100 * fraction:.0f} %"


def ratio(name: str, found: dict[str, float] | None) -> str:
    """The ratio with its quartiles; bold with a word where a rival is faster than we are."""
    if found is None:
        return ""
    text = f"{digits(found['median'])} ({digits(found['q1'])} to {digits(found['q3'])})"
    return f"**{text}, faster than ours**" if is_faster(name, found) else text


def scaling(workload: dict[str, Any], threads: int) -> list[str]:
    """Times and GB/s by the number of threads, where fewer than all were measured too."""
    by_threads = thread_rows(workload, threads)
    if len(by_threads) < 2:
        return []
    names = list(dict.fromkeys(name for results in by_threads.values() for name in timed(results)))
    head = ("contender", *(plural(count, "thread") for count in by_threads), "speed-up")
    return [
        *table(
            head, [(name, *scaling_cells([results.get(name, {}) for results in by_threads.values()])) for name in names]
        ),
        "",
    ]


def thread_rows(workload: dict[str, Any], threads: int) -> dict[int, Rows]:
    """The rows by number of threads, ascending, of the contenders that were measured with fewer threads than all."""
    fewer = {int(count): results for count, results in workload.get("scaling", {}).items()}
    names = {name for results in fewer.values() for name in results}
    full = {name: row for name, row in workload["results"].items() if name in names}
    return dict(sorted({**fewer, threads: full}.items())) if fewer else {}


def scaling_cells(row_by_threads: Iterable[Row]) -> Cells:
    """A contender's times, and how many times as fast the most threads are as the fewest."""
    seconds = [row["seconds"]["median"] if "seconds" in row else None for row in row_by_threads]
    first, last = seconds[0], seconds[-1]
    return (
        *("" if time is None else duration(time) for time in seconds),
        f"{digits(first / last)} x" if first and last else "",
    )


def bars(result: dict[str, Any]) -> list[Cells]:
    """What was wanted and what came out, for each workload that was run; wishes are about CPUs."""
    if result.get("device", {}).get("kind", "cpu") != "cpu":
        return []
    return [
        (f"`{name}`", bar.who, " or ".join(bar.peers) or "the clock", *verdict(bar, workload["results"]))
        for name, workload in result["workloads"].items()
        for bar in (WORKLOADS[name].bars if name in WORKLOADS else ())
        if bar.who in workload["results"]
    ]


def verdict(bar: Bar, results: Rows) -> tuple[str, str, str]:
    """The cells "wanted", "got" and "met" of a bar."""
    rows_there = timed(results)
    peers = [peer for peer in bar.peers if peer in rows_there]
    if bar.who not in rows_there or (bar.peers and not peers):
        return wanted(bar), "not measured", ""
    if not bar.peers:
        seconds = rows_there[bar.who]["seconds"]["median"]
        return wanted(bar), duration(seconds), yes_or_no(seconds < (bar.at_most or 0.0))
    if bar.at_least:  # the fastest peer counts
        got = min(rows_there[peer]["ratio_to"][bar.who]["median"] for peer in peers)
        return wanted(bar), f"{digits(got)} x", yes_or_no(got >= bar.at_least)
    got = max(rows_there[bar.who]["ratio_to"][peer]["median"] for peer in peers)
    return wanted(bar), f"{digits(got)} x", yes_or_no(got <= (bar.at_most or 0.0))


def wanted(bar: Bar) -> str:
    """The wish in words."""
    if bar.at_least:
        return f"at least {bar.at_least:g} x as fast"
    return f"at most {digits(bar.at_most or 0.0)} x its time" if bar.peers else f"below {duration(bar.at_most or 0.0)}"


def yes_or_no(met: bool) -> str:
    """A miss is bold."""
    return "yes" if met else "**no**"


def rehearsed(result: dict[str, Any]) -> list[str]:
    """The page of a run without times, below its head."""
    workloads = result["workloads"]
    names = contenders_of(workloads)
    body = [
        (f"`{name}`", *(outcome(contender, workload["results"].get(contender)) for contender in names))
        for name, workload in workloads.items()
    ]
    reasons = reasons_of(workloads)
    return [
        "A rehearsal: every contender steps a few small tensors and is compared with the reference; nothing was timed.",
        "",
        *table(("workload", *names), body),
        *(["", "Left out:", "", *reasons] if reasons else []),
    ]


def outcome(name: str, row: Row | None) -> str:
    """What became of a contender; empty for who was not asked.

    There is nothing in which a copy could agree, and no oracle of codes.
    """
    if row is None:
        return ""
    return "left out" if "left_out" in row else "runs" if name in (COPY, *FORMATS, *BITSANDBYTES[1:]) else "agrees"


def reasons_of(workloads: dict[str, Any]) -> list[str]:
    """A line for each contender and reason, with the workloads."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, workload in workloads.items():
        for contender, row in workload["results"].items():
            if "left_out" in row:
                found.setdefault((contender, " ".join(row["left_out"].split())), []).append(f"`{name}`")
    return [f"* {contender}: {reason} ({', '.join(names)})" for (contender, reason), names in found.items()]


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    unit, factor = next((pair for pair in (("s", 1.0), ("ms", 1e3)) if seconds * pair[1] >= 1), ("us", 1e6))
    return f"{digits(seconds * factor)} {unit}"


def digits(number: float) -> str:
    """Three digits, more before the point where there are more, and no exponent for large numbers."""
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def plural(count: int, noun: str) -> str:
    """The count and the noun."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def one_line(text: str) -> str:
    """Text that fits a cell of a table."""
    return " ".join(text.split()).replace("|", r"\|")


def table(head: Cells, body: list[Cells]) -> list[str]:
    """Lines of a Markdown table."""
    return ["| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *body)]
