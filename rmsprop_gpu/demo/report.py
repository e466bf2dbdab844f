"""What is said at the end of the demo: a few lines, and the curves."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def print_summary(s: dict[str, Any], console: Console) -> None:
    """The final lines."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    update, us, speed = s["update_seconds"], s["update_seconds_median"] * 1e6, s["gb_per_second"]
    size, place = s["bytes_a_step"] / s["parameters"], "a CUDA device" if s["device"] == "cuda" else "the CPU"
    rows = [
        ("test accuracy", f"{s['accuracy']:.2%} of {s['digits']['test']} digits, training loss {s['loss']:.2g}"),
        ("model", f"{s['parameters']:,} parameters in {s['tensors']} tensors, on {place}"),
        ("time", f"{s['seconds']:.1f} s, {s['compile_seconds']:.1f} s of it to compile"),
        ("update", f"{update:.3f} s for {s['steps']:,} steps of {s['optimizer']}, {us:.0f} us a step (median)"),
        ("memory traffic", f"{s['bytes_moved'] / 1e6:,.0f} MB, {size:.0f} bytes an element, {speed:.1f} GB/s"),
    ]
    if d := s["deviation"]:
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
    """The curves of loss and accuracy, their finding as title."""
    from matplotlib.figure import Figure

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
    name, n, lr = s["optimizer"], len(epochs), s["hyperparameters"]["lr"]
    figure.suptitle(f"{name} (lr {lr:g}): {s['accuracy']:.1%} of {s['digits']['test']} unseen digits after {n} epochs")
    figure.savefig(path, dpi=150, format="png")
