"""What the demo shows at the end: a few lines, and the curves."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def print_summary(s: dict[str, Any], console: Console, verbose: bool = False) -> None:
    """The final lines; `verbose` adds the traffic, and how far the updates are from the oracle's."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    us = s["update_seconds_median"] * 1e6
    place, library = ("a CUDA device", "CuPy") if s["device"] == "cuda" else ("the CPU", "NumPy")
    what = "three lines without the switches" if s["switches"] else "the same in three lines"
    rows = [
        ("test accuracy", f"{s['accuracy']:.2%} of {s['digits']['test']} digits, training loss {s['loss']:.2g}"),
        ("model", f"{s['parameters']:,} parameters in {s['tensors']} tensors, on {place}"),
        ("time", f"{s['seconds']:.1f} s, {s['compile_seconds']:.1f} s of it for the kernels: {s['kernels']}"),
        ("update", f"{us:.0f} us, the median of {s['steps']:,} steps of {s['optimizer']}"),
    ]
    if s["three_lines_seconds_median"] is not None:
        plain = s["three_lines_seconds_median"] * 1e6
        rows += [(f"in {library}", f"{plain:.0f} us for {what}, {plain / us:.1f} times as long")]
    if "ranks" in s:
        whole, most = sum(s["state_bytes"]), max(s["state_bytes"])
        end = "ended on the same parameters, to the bit" if s["same"] else "ended on DIFFERENT parameters"
        rows += [("ranks", f"{s['ranks']}, each with at most {most / whole:.0%} of the state; they {end}")]
    d = s["deviation"]
    if d:
        off = f"off the float64 reference by {d['beyond']:.1g} of the largest update"
        rows += [("updates", "match the float64 reference to rounding" if d["matches"] else off)]
    if verbose and s["bytes_moved"] is not None:
        size, speed, seconds = s["bytes_a_step"] / s["parameters"], s["gb_per_second"], s["update_seconds"]
        traffic = f"{s['bytes_moved'] / 1e6:,.0f} MB, {size:.0f} bytes per element"
        rows += [("memory traffic", f"{traffic}, {speed:.1f} GB/s over {seconds:.3f} s")]
    if verbose and d:
        rows += [
            ("off the oracle by", f"{d['largest']:.2g} at most, {d['relative']:.1g} of the largest update there"),
            ("  found in", d["place"]),
            ("  of which", f"{d['rounding']:.2g} is the parameter's rounding, half an ulp each time"),
            ("  beyond rounding", f"{d['beyond']:.1g} of the largest update of a tensor and step, at most"),
        ]
    for row in rows:
        table.add_row(*row)
    console.print(table)


def plot(s: dict[str, Any], path: Path) -> None:
    """Plot the curves of loss and accuracy, with the result as title."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = [epoch["epoch"] for epoch in s["history"]]
    left.plot(epochs, [epoch["loss"] for epoch in s["history"]], marker=".")
    left.set(xlabel="epoch", ylabel="training loss (cross-entropy)")
    if all(0 < epoch["loss"] < math.inf for epoch in s["history"]):
        left.set_yscale("log")
    right.plot(epochs, [100 * epoch["accuracy"] for epoch in s["history"]], marker=".", color="C1")
    right.set(xlabel="epoch", ylabel="digits of the test set read correctly (%)")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    name, n, lr = s["optimizer"], len(epochs), s["hyperparameters"]["lr"]
    figure.suptitle(f"{name} (lr {lr:g}): {s['accuracy']:.1%} of {s['digits']['test']} unseen digits after {n} epochs")
    figure.savefig(path, dpi=150, format=image_format(path))


def image_format(path: Path) -> str:
    """The image format from the name of a file; png if it has no extension, as in matplotlib, but under that name."""
    return path.suffix[1:].lower() or "png"
