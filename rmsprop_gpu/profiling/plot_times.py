"""Plots of times: their distribution over the repeats, and their growth with a size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

import numpy as np

from .plot import COLOURS, INK, MARKERS, ink, paper
from .results import Times
from .units import seconds


def strips(times: Sequence[tuple[str, Times]], said: str | None, ax: Any = None) -> Any:
    """A strip for each of the times: its repeats in order from top to bottom, with quartiles and median over them."""
    names = [fill(name.replace("+", " + "), 32) for name, _ in times]
    height = max(0.6, 0.16 * max(name.count("\n") + 1 for name in names))  # inches per strip
    ax = paper(ax, figsize=(8, 1.5 + height * len(times)))
    for i, (_, x) in enumerate(times):
        order = np.linspace(-0.3, 0.3, len(x.each)) if len(x.each) > 1 else np.zeros(1)
        ax.plot(np.array(x.each) * 1e6, i + order, ".", color=COLOURS[i % len(COLOURS)], alpha=0.6)
        ax.plot([x.q1 * 1e6, x.q3 * 1e6], [i, i], color=INK, linewidth=2)
        ax.plot(x.median * 1e6, i, "|", color=INK, markersize=16, markeredgewidth=2)
    ax.set(xscale="log", xlabel="time (µs); median and quartiles in black")
    ax.set_yticks(range(len(times)), names, fontsize="small")
    ax.set_ylim(len(times) - 0.5, -0.5)
    name, wide = max(times, key=lambda pair: pair[1].max / pair[1].median)
    longest = f"{wide.max / wide.median:.3g} times the median of {seconds(wide.median)}"
    ink(ax, said or f"The slowest repeat took {longest} ({name.partition('[')[0]})", 50)  # beside the names
    return ax


def lines(
    sizes: Sequence[int], times: Mapping[str, Sequence[Times]], copies: Sequence[float], title: str, ax: Any
) -> Any:
    """Medians over sizes with a band between the quartiles, beside the time of copies of as many bytes."""
    ax = paper(ax, figsize=(8, 4.5))
    for i, (name, found) in enumerate(times.items()):
        low, middle, high = (np.array([getattr(x, part) for x in found]) * 1e6 for part in ("q1", "median", "q3"))
        ax.plot(sizes, middle, MARKERS[i] + "-", color=COLOURS[i], label=name)
        ax.fill_between(sizes, low, high, color=COLOURS[i], alpha=0.25, linewidth=0)
    ax.plot(sizes, np.array(copies) * 1e6, "--", color=INK, linewidth=1, label="a copy of as many bytes")
    ax.set(xscale="log", yscale="log", xlabel="size", ylabel="time of a step (µs), median and quartiles")
    ax.legend(loc="best", labelcolor=INK)
    ink(ax, title)
    return ax
