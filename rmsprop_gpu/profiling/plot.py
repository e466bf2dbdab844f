"""The roofline of a profile: what memory and arithmetic allow on this machine, and where each launch stands."""

from __future__ import annotations

from textwrap import fill
from typing import Any

import numpy as np

from ..extras import extra
from .results import Results

INK, PAPER, GRID = "#222222", "#ffffff", "#cccccc"  # opaque: readable on a dark page too
NEAR = 0.5  # of a ceiling, from where on it is what limits
COLOURS = ("#006BA4", "#C85200", "#595959", "#5F9ED1", "#A2C8EC", "#898989", "#FFBC79")  # of tableau-colorblind10


def roofline(report: Results, ax: Any = None) -> Any:
    """Draw it on the axes, or on new ones of pyplot; return them."""
    with extra("profile"):
        import matplotlib.pyplot as plt
    if ax is None:
        _, ax = plt.subplots(figsize=(8, 5), layout="constrained")
    ax.figure.set_facecolor(PAPER)
    ax.set_facecolor(PAPER)

    launches = report.launches
    points = [x.intensity for x in launches]
    most = max(report.flop_rates.values())
    low, high = min(points) / 4, 8 * most / report.memory_rate
    x = np.geomspace(low, high, 200)
    for i, (dtype, rate) in enumerate(report.flop_rates.items()):
        roof = np.minimum(x * report.memory_rate, rate) / 1e9
        ax.plot(x, roof, color=INK, linestyle=("-", "--")[i % 2], linewidth=1.5)
        ax.annotate(f"{dtype}: {rate / 1e9:,.0f} GFLOP/s, fma", (high, rate / 1e9), (-2, (5, -5)[i % 2]),
                    textcoords="offset points", ha="right", va=("bottom", "top")[i % 2], color=INK)  # fmt: skip
    text = f"memory: {report.memory_rate / 1e9:,.1f} GB/s, a copy"
    middle = np.sqrt(low * most / report.memory_rate)
    ax.annotate(text, (middle, middle * report.memory_rate / 1e9), (-8, 4), textcoords="offset points", ha="right",
                color=INK)  # fmt: skip
    for i, (launch, point) in enumerate(zip(launches, points, strict=True)):
        switches = fill(launch.variant.replace("+", " + "), 60)
        ax.plot(point, launch.flop_rate / 1e9, "o", markersize=9, color=COLOURS[i % len(COLOURS)], zorder=3,
                label=f"{launch.dtype}, {switches}: {launch.fraction_of_copy:.0%} of a copy")  # fmt: skip
    ax.set(xscale="log", yscale="log", xlabel="arithmetic intensity (FLOP/byte)", ylabel="arithmetic (GFLOP/s)")
    ax.set_ylim(top=2 * most / 1e9)
    ax.set_title(_finding(report), color=INK)
    ax.grid(color=GRID, linewidth=0.5)
    ax.tick_params(colors=INK, which="both")
    for label in (ax.xaxis.label, ax.yaxis.label):
        label.set_color(INK)
    ax.legend(loc="upper left", bbox_to_anchor=(0, -0.14), title=report.device, alignment="left", frameon=False,
              labelcolor=INK).get_title().set_color(INK)  # fmt: skip
    return ax


def _finding(report: Results) -> str:
    """The title: what holds back the launch that moves the most."""
    launch = max(report.launches, key=lambda launch: launch.bytes)
    slope, roof = launch.intensity * report.memory_rate, report.flop_rates[launch.compute_dtype]
    limit = "memory" if slope < roof else "arithmetic"
    said = f"its limit is {limit}" if launch.flop_rate > NEAR * min(slope, roof) else "it is far below both ceilings"
    return f"A step moves {report.rate / 1e9:,.1f} GB/s, {report.fraction_of_copy:.0%} of a copy: {said}"
