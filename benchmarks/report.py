"""A Markdown page made from the JSON of a run. Rows where we lose stay, and say so."""

from __future__ import annotations

from typing import Any

from benchmarks.contenders import OURS
from benchmarks.startup import startup_lines
from benchmarks.workloads import WORKLOADS, Bar

HEAD = ("contender", "time a step", "quartiles", "best", "GB/s", "time / ours (quartiles)", "extra memory")


def markdown(result: dict[str, Any]) -> str:
    """The whole page."""
    lines = [f"# Benchmark: {result['name']}", "", *conditions(result), ""]
    for name, workload in result["workloads"].items():
        lines += [f"## {workload['title']} (`{name}`)", "", *table(HEAD, rows(workload["results"])), ""]
    if "startup" in result:
        lines += ["## Start", "", *startup_lines(result["startup"]), ""]
    lines += ["## What the project wants", "", *table(("workload", "against", "wanted / got", "met"), bars(result))]
    return "\n".join(lines) + "\n"


def conditions(result: dict[str, Any]) -> list[str]:
    """Where, when and how, in a few lines."""
    machine = result["machine"]
    versions = ", ".join(f"{name} {version or 'absent'}" for name, version in result["versions"].items())
    return [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {machine['os']}, transparent huge "
        f"pages: {machine['transparent_huge_pages']}, load at the start {machine['load_at_start']}.",
        f"{versions}. {result['threads']} threads, {result['rounds']} rounds, {result['date']}: `{result['command']}`.",
        "",
        f"Times are medians over rounds; `{OURS.name}, again` is the same program a second time and shows the noise.",
        "A ratio below 1 in *time / ours* is a contender that is faster than we are; bold where its upper quartile is",
        "below 1 too. GB/s counts 20 bytes an element.",
    ]


def rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """One a contender, in the order in which they are listed."""
    return [(name, *cells(row, name.startswith(OURS.name))) for name, row in results.items()]


def cells(row: dict[str, Any], ours: bool) -> tuple[str, ...]:
    """What stands beside a contender's name."""
    if "left_out" in row:
        return (f"not timed: {one_line(row['left_out'])}", *[""] * (len(HEAD) - 2))
    seconds, speed, memory = row["seconds"], row["gigabytes_per_second"], row["extra_memory_bytes"]
    return (
        duration(seconds["median"]),
        f"{duration(seconds['q1'])} to {duration(seconds['q3'])}",
        duration(seconds["min"]),
        "" if speed is None else f"{speed:.3g}",
        ratio(row["ratio_to"].get(OURS.name), ours),
        "unknown" if memory is None else f"{memory / 1e6:.0f} MB",
    )


def ratio(found: dict[str, float] | None, ours: bool) -> str:
    """The ratio with its quartiles; bold with a word where a rival is faster than we are, noise apart."""
    if found is None:
        return ""
    text = f"{found['median']:.3g} ({found['q1']:.3g} to {found['q3']:.3g})"
    return f"**{text}, faster than ours**" if found["q3"] < 1 and not ours else text


def bars(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """What was wanted and what came out, for each workload that was run."""
    return [
        (name, " or ".join(bar.peers) or "the clock", *verdict(bar, workload["results"]))
        for name, workload in result["workloads"].items()
        for bar in (WORKLOADS[name].bars if name in WORKLOADS else ())
    ]


def verdict(bar: Bar, results: dict[str, Any]) -> tuple[str, str]:
    """The cells "wanted / got" and "met" of a bar."""
    ours = results.get(OURS.name, {})
    peers = [peer for peer in bar.peers if "seconds" in results.get(peer, {})]
    wanted = f"at least {bar.at_least:g} x faster" if bar.at_least else f"at most {bar.at_most:g} x its time"
    if not bar.peers:
        wanted = f"below {duration(bar.at_most or 0.0)}"
    if "seconds" not in ours or (bar.peers and not peers):
        return f"{wanted} / not measured", ""
    if not bar.peers:
        got = ours["seconds"]["median"]
        return f"{wanted} / {duration(got)}", yes_or_no(got < (bar.at_most or 0.0))
    if bar.at_least:  # the fastest peer counts
        got = min(results[peer]["ratio_to"][OURS.name]["median"] for peer in peers)
        return f"{wanted} / {got:.3g} x", yes_or_no(got >= bar.at_least)
    got = max(ours["ratio_to"][peer]["median"] for peer in peers)
    return f"{wanted} / {got:.3g} x", yes_or_no(got <= (bar.at_most or 0.0))


def yes_or_no(met: bool) -> str:
    """A miss is bold."""
    return "yes" if met else "**no**"


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    unit, factor = next((pair for pair in (("s", 1.0), ("ms", 1e3)) if seconds * pair[1] >= 1), ("us", 1e6))
    return f"{seconds * factor:.3g} {unit}"


def one_line(text: str) -> str:
    """Text that fits a cell of a table."""
    return " ".join(text.split()).replace("|", r"\|")


def table(head: tuple[str, ...], body: list[tuple[str, ...]]) -> list[str]:
    """Lines of a Markdown table."""
    return ["| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *body)]
