"""The picture of ``python -m benchmarks.scaling``: a step's time and a GPU's memory by the number of GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks import scaling_model as model
from benchmarks.plots import LOOK
from benchmarks.scaling_model import INFINIBAND
from benchmarks.scaling_page import ELEMENTS, GPUS, OPTIMIZERS, saved_time

COLORS = dict(zip(OPTIMIZERS, ("#006BA4", "#C85200"), strict=True))


def draw(result: dict[str, Any], path: Path) -> None:
    """Write it."""
    with mpl.rc_context(LOOK):
        figure = Figure(figsize=(11, 4.8), layout="constrained")
        left, right = figure.subplots(1, 2)
        times(left, result["measured_memory"])
        memory(right)
        for axes in (left, right):
            axes.set_xscale("log", base=2)
            axes.set_xticks(GPUS[::2], [f"{n:,}" for n in GPUS[::2]])
            axes.set_xlabel("GPUs (log scale)")
            axes.grid(visible=True)
        figure.supxlabel(
            "By a model, not measured: 1e9 float32 elements, 450 GB/s of NVLink, 50 GB/s a port, nodes of 8, memory of "
            f"{result['measured_memory'] / 1e12:.2f} TB/s",
            x=0.01,
            ha="left",
            fontsize=7.5,
            color="#595959",
        )
        figure.savefig(path)


def times(axes: Any, speed: float) -> None:
    """Of a plain step, sharded and not."""
    for where, color in (("nodes of 8", "#006BA4"), ("a port each", "#595959")):
        links = {n: model.in_nodes(n) if where == "nodes of 8" else INFINIBAND for n in GPUS}
        ways: dict[str, tuple[Any, bool, Any]] = {
            "all-reduce, ring": (model.replicated, False, {"linestyle": "--"}),
            "sharded, ring": (model.sharded, False, {"marker": "o", "markersize": 4}),
            "sharded, tree": (model.sharded, True, {"linestyle": ":", "linewidth": 2}),
        }
        for way, (step, tree, look) in ways.items():
            found = [1e3 * step(n, ELEMENTS, links[n], speed, tree=tree).seconds for n in GPUS]
            axes.plot(GPUS, found, color=color, label=f"{where}: {way}", **look)
    axes.set_yscale("log")
    axes.set_ylim(4, 300)
    axes.set_yticks((5, 10, 20, 50, 100, 200), ("5", "10", "20", "50", "100", "200"))
    axes.minorticks_off()
    axes.set_ylabel("milliseconds a step of plain RMSProp (log scale)")
    saved = {n: saved_time(n, speed) for n in (8, GPUS[-1])}
    axes.set_title(f"A sharded step takes {saved[8]:.0%} less on 8 GPUs,\n{saved[GPUS[-1]]:.0%} less on {GPUS[-1]:,}")
    axes.legend(fontsize=8, ncols=2, loc="lower right")


def memory(axes: Any) -> None:
    """That a GPU holds, for an element."""
    for name, optimizer in OPTIMIZERS.items():
        axes.axhline(model.held_replicated(optimizer), color=COLORS[name], linestyle="--", label=f"{name}: replicated")
        held = [model.held(n, ELEMENTS, optimizer) for n in GPUS]
        axes.plot(GPUS, held, color=COLORS[name], marker="o", markersize=4, label=f"{name}: sharded")
    axes.axhline(model.WHOLE, color="#ABABAB", linestyle=":", label="parameters and gradients")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("bytes per element that a GPU holds")
    last = model.held_replicated(list(OPTIMIZERS.values())[-1])
    eight = model.held(8, ELEMENTS, list(OPTIMIZERS.values())[-1])
    axes.set_title(f"With all buffers {last:.0f} bytes per element become {eight:.1f}\non 8 GPUs")
    axes.legend(fontsize=8)
