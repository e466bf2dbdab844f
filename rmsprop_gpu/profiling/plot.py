"""The roofline of profiles: what memory and arithmetic allow on this machine, and where each launch is."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from textwrap import fill
from typing import Any

import numpy as np

from ..extras import extra
from . import busy, units
from .results import Launch, Results, Times
from .units import flop_rate, seconds

INK, PAPER, GRID = "#222222", "#ffffff", "#cccccc"  # opaque: readable on a dark page too
NEAR = 0.5  # fraction of a ceiling from which on it counts as the limit
COLOURS = ("#006BA4", "#C85200", "#595959", "#5F9ED1", "#A2C8EC", "#898989", "#FFBC79")  # of tableau-colorblind10
MARKERS = "osD^vPX"
TITLE, LEGEND = 76, 80  # characters per line


def paper(ax: Any, **size: Any) -> Any:
    """The axes, or new ones of pyplot, on paper."""
    with extra("profile"):
        import matplotlib.pyplot as plt
    if ax is None:
        _, ax = plt.subplots(layout="constrained", **size)
    ax.figure.set_facecolor(PAPER)
    ax.set_facecolor(PAPER)
    return ax


def ink(ax: Any, title: str, width: int = TITLE) -> None:
    """Set the colours of all text, once everything is drawn."""
    ax.set_title(fill(title[0].upper() + title[1:], width), color=INK, fontsize="medium")
    ax.set_axisbelow(True)
    ax.grid(color=GRID, linewidth=0.5)
    ax.tick_params(colors=INK, which="both")
    for label in (ax.xaxis.label, ax.yaxis.label):
        label.set_color(INK)


def roofline(measured: Mapping[str, Results | Times], ax: Any = None, title: str = "") -> Any:
    """Draw it on the axes, or on new ones from pyplot; return them.

    The launches of a report are points of one colour, or of different colours if it is the only report. Times are of a
    step that does the work of the first report's.
    """
    ax = paper(ax, figsize=(8, 5))
    reports = {name: x for name, x in measured.items() if isinstance(x, Results)}
    first = next(iter(reports.values()))
    points = []  # intensity, rate, the name of the report, and the label
    for name, x in measured.items():
        if isinstance(x, Times):
            points.append((first.flops / first.bytes, first.flops / x.median, name, f"{seconds(x.median)} a step"))
        else:
            points += [(y.intensity, y.flop_rate, name, _said(y)) for y in x.launches]

    devices: dict[str, list[Results]] = {}
    for report in reports.values():
        devices.setdefault(report.device, []).append(report)
    _roofs(ax, list(devices.values()), [(x, y) for x, y, *_ in points])

    names = list(measured)
    for i, (intensity, rate, name, said) in enumerate(points):
        look, marker = (i, MARKERS[0]) if len(names) == 1 else (names.index(name), MARKERS[names.index(name) % 7])
        label = fill(f"{name}: {said}" if name else said, LEGEND)
        ax.plot(intensity, rate / 1e9, marker, markersize=9, zorder=3, color=COLOURS[look % len(COLOURS)], label=label)
    ax.set(xlabel="arithmetic intensity (FLOP/byte)", ylabel="arithmetic (GFLOP/s)")
    ink(ax, title or _finding(first))
    ax.legend(loc="upper left", bbox_to_anchor=(0, -0.14), title=fill(", ".join(devices), LEGEND), alignment="left",
              frameon=False, labelcolor=INK).get_title().set_color(INK)  # fmt: skip
    return ax


def _said(launch: Launch) -> str:
    return f"{launch.dtype}, {launch.variant.replace('+', ' + ')}: {launch.fraction_of_copy:.0%} of a copy"


def _roofs(ax: Any, devices: list[list[Results]], points: list[tuple[float, float]]) -> None:
    """Draw the ceilings of each device, the best among its reports, with limits that include them and the points."""
    memory = [max(report.memory_rate for report in reports) for reports in devices]
    flops = [
        {dtype: max(r.flop_rates.get(dtype, 0.0) for r in reports) for r in reports for dtype in r.flop_rates}
        for reports in devices
    ]
    bends = [max(rates.values()) / rate for rates, rate in zip(flops, memory, strict=True)]
    left = min(*bends, *(x for x, _ in points)) / 8
    right = 8 * max(*bends, *(x for x, _ in points))
    roofs = [rate for rates in flops for rate in rates.values()]
    bottom = min(left * min(memory), *(y for _, y in points), *roofs) / 2
    # A sixth of the height above the highest ceiling, for its name.
    top = bottom * (max(*(y for _, y in points), *roofs) / bottom) ** (6 / 5)
    ax.set(xscale="log", yscale="log", xlim=(left, right), ylim=(bottom / 1e9, top / 1e9))

    x, number, highest = np.geomspace(left, right, 400), count(), roofs.index(max(roofs))
    for i, (rate, rates, bend) in enumerate(zip(memory, flops, bends, strict=True)):
        color = (INK, "#777777")[i % 2]
        for j, (dtype, roof) in enumerate(rates.items()):
            ax.plot(x, np.minimum(x * rate, roof) / 1e9, color=color, linestyle=("-", "--")[j % 2], linewidth=1.5)
            _write(ax, f"{dtype}: {flop_rate(roof)}, fma", (right, roof), "right", next(number) == highest, color)
        # From the left edge, at the height of the slope near its end: no text is long enough to meet the line there.
        height = rate * left * (bend / left) ** (0.85 - 0.25 * i)
        _write(ax, f"memory: {units.rate(rate)}, a copy", (left, height), "left", True, color)


def _write(ax: Any, text: str, at: tuple[float, float], side: str, above: bool, color: str) -> None:
    """A label inside the axes, at their edge, above or below a point there."""
    x, y = at
    ax.annotate(text, (x, y / 1e9), (-4 if side == "right" else 4, 4 if above else -4), textcoords="offset points",
                ha=side, va="bottom" if above else "top", color=color)  # fmt: skip


def _finding(report: Results) -> str:
    """The title: what limits the launch that moves the most, unless others were using the machine."""
    if said := busy.sentence(report, most=1):
        return said
    launch = max(report.launches, key=lambda launch: launch.bytes)
    slope, roof = launch.intensity * report.memory_rate, report.flop_rates[launch.compute_dtype]
    limit = "memory" if slope < roof else "arithmetic"
    said = f"its limit is {limit}" if launch.flop_rate > NEAR * min(slope, roof) else "it is far below both ceilings"
    return f"A step moves {report.rate / 1e9:,.1f} GB/s, {report.fraction_of_copy:.0%} of a copy: {said}"
