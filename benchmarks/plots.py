"""Pictures made from the JSON of a run, on opaque white, so that they are readable on light and dark pages."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.report import Rows, digits, plural, thread_rows, timed, to_ours
from benchmarks.workloads import (
    AGAIN,
    ASSIGNED,
    BITSANDBYTES,
    C_OPENMP,
    COMPILED,
    COPY,
    DROP_IN,
    FORMATS,
    FUSED,
    OPTAX,
    OURS,
    PLAIN,
    TORCH,
    VIEWS,
    WORKLOADS,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# One colour and marker per contender in all pictures: torch is orange, JAX and we are blue, the rest grey. They are
# tableau-colorblind10 and two darker ones; within a hue the lightness differs. CuPy is to a device what NumPy is to the
# host, and no picture has both. Quartiles are a line across the marker, which makes a "+" of a "|".
STYLES = {
    OURS: ("#006BA4", "o"),
    DROP_IN: ("#00466F", "h"),
    "numpy": ("#595959", "x"),
    "numexpr": ("#898989", "+"),
    "cupy fuse": ("#595959", "x"),
    "cupy elementwise": ("#898989", "+"),
    "torch foreach": ("#FF800E", "s"),
    "torch for-loop": ("#7F3300", "D"),
    COMPILED: ("#FFBC79", ">"),
    FUSED: ("#C85200", "^"),
    OPTAX: ("#5F9ED1", "v"),
    "keras": ("#A2C8EC", "p"),
    **dict(zip(BITSANDBYTES, (("#898989", "P"), ("#ABABAB", "X")), strict=True)),
    C_OPENMP: ("#222222", "*"),
    COPY: ("#ABABAB", "d"),
}
DARK = "#222222"
LOOK: dict[str, Any] = {
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "axes.facecolor": "white",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "grid.color": "#E4E4E4",
    "legend.frameon": False,
    "font.size": 9.5,
    "savefig.dpi": 160,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), DARK),
}


def draw(result: dict[str, Any], folder: Path) -> list[Path]:
    """Write NAME-ratios.png, NAME-sizes.png and NAME-scaling.png, as far as there are times; return the paths."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    files = []
    for kind, plot in PLOTS.items():
        with mpl.rc_context(LOOK):
            figure = Figure(layout="constrained")
            if plot(figure, result):
                figure.supxlabel(small_print(result), x=0.01, ha="left", fontsize=7.5, color="#595959")
                files.append(folder / f"{result['name']}-{kind}.png")
                figure.savefig(files[-1])
    return files


def small_print(result: dict[str, Any]) -> str:
    """On what machine, how and when."""
    machine, device = result["machine"], result.get("device", {"kind": "cpu"})
    where = f"{machine['cpu']}, {plural(machine['cores'], 'core')}, {plural(result['threads'], 'thread')}"
    if device["kind"] == "cuda":
        where = device["name"]
    return f"{where}; medians of {plural(result['rounds'], 'round')}, {result['date'][:10]}"


def ratios(figure: Figure, result: dict[str, Any]) -> bool:
    """How many times as long as ours each contender takes, a band of dots for each workload."""
    workloads = {name: found for name, one in result["workloads"].items() if (found := rivals_of(one["results"]))}
    if not workloads:
        return False
    figure.set_size_inches(9.5, 1.7 + 0.48 * len(workloads))
    axes = figure.subplots()
    ends = [ratio[end] for rivals in workloads.values() for ratio in rivals.values() for end in ("q1", "q3")]
    low, high = min(*ends, 1) / 1.3, max(*ends, 1) * 1.3
    axes.set(xscale="log", xlim=(low, high), ylim=(len(workloads) - 0.5, -0.5))
    axes.axvspan(low, 1, color="#F1F1F1", zorder=0)
    axes.axvline(1, color=STYLES[OURS][0], linewidth=2.5, zorder=1, label=OURS)
    for y, rivals in enumerate(workloads.values()):
        lanes = lanes_of([math.log(ratio["median"]) for ratio in rivals.values()], math.log(high / low) / 45)
        for (name, ratio), lane in zip(rivals.items(), lanes, strict=True):
            dot(axes, name, ratio, y + 0.25 * lane)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g} x")
    axes.set_yticks(range(len(workloads)), [f"{name}\n{counts(result['workloads'][name])}" for name in workloads])
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    for y in range(1, len(workloads)):
        axes.axhline(y - 0.5, color=LOOK["grid.color"], linewidth=0.8, zorder=0.5)
    axes.set_xlabel(f"time of a step / time of {OURS} (log scale)\nmedians and quartiles; on grey: faster than {OURS}")
    axes.set_title(ratios_title(result["workloads"], workloads))
    legend(axes)
    return True


def rivals_of(results: Rows) -> dict[str, dict[str, float]]:
    """Median and quartiles of time / ours, of all but ourselves."""
    found = {name: to_ours(row) for name, row in timed(results).items() if name not in (AGAIN, ASSIGNED, VIEWS, PLAIN)}
    return {} if FORMATS.keys() & found else {name: ratio for name, ratio in found.items() if ratio}  # see `formats`


def lanes_of(positions: list[float], distance: float) -> list[int]:
    """For each position the lane of 0, 1, -1 in which it is farthest from those before it; 0 if that is far enough."""
    lanes: list[int] = []
    for position in positions:
        room = {
            lane: min((abs(position - other) for other, its in zip(positions, lanes, strict=False) if its == lane),
                      default=math.inf)
            for lane in (0, 1, -1)
        }  # fmt: skip
        lanes.append(next((lane for lane in room if room[lane] >= distance), max(room, key=room.__getitem__)))
    return lanes


def dot(axes: Axes, name: str, found: dict[str, float], y: float) -> None:
    """A contender on a workload: the median, and its quartiles as a whisker."""
    color, marker = STYLES.get(name, (DARK, "."))
    labelled = name in axes.get_legend_handles_labels()[1]
    axes.plot([found["q1"], found["q3"]], [y, y], color=color, linewidth=1.5, zorder=2)
    axes.plot(
        found["median"], y, marker, color=color, label=None if labelled else name, zorder=3, **marker_look(marker)
    )


def marker_look(marker: str) -> dict[str, Any]:
    """A white edge parts filled markers that touch; strokes have to be thick instead."""
    if marker in "x+":
        return {"markersize": 7, "markeredgewidth": 2}
    return {"markersize": 11 if marker == "*" else 7.5, "markeredgewidth": 0.7, "markeredgecolor": "white"}


def counts(workload: dict[str, Any]) -> str:
    """The tensors and elements of a workload."""
    return f"{plural(workload['tensors'], 'tensor')}, {short(workload['elements'])} elements"


def short(number: float) -> str:
    """A count in three digits, with a unit."""
    factor, unit = next((pair for pair in ((1e6, " M"), (1e3, " k")) if number >= pair[0]), (1, ""))
    return f"{digits(number / factor)}{unit}"


def ratios_title(workloads: dict[str, Any], ratios: dict[str, dict[str, dict[str, float]]]) -> str:
    """On ResNet-50, or the first workload there is: torch's fastest and slowest RMSProp, or else the other rivals'."""
    where = "resnet50" if "resnet50" in ratios else next(iter(ratios))
    medians = {name: found["median"] for name, found in ratios[where].items()}
    torchs = [name for name in (*TORCH, COMPILED) if name in medians]
    rivals = sorted(torchs or [name for name in medians if name != COPY] or medians, key=medians.__getitem__)
    ends = [f"{name} takes {digits(medians[name])} times" for name in dict.fromkeys((rivals[0], rivals[-1]))]
    return f"{subject(workloads[where])}: " + ",\n".join(ends) + f" as long as {OURS}"


def subject(workload: dict[str, Any]) -> str:
    """What a workload is, without its counts."""
    return str(workload["title"].partition(":")[0])


def sizes(figure: Figure, result: dict[str, Any]) -> bool:
    """The bytes of the streams per second, by the size of one tensor."""
    single = {
        one["elements"]: timed(one["results"])
        for one in sorted(result["workloads"].values(), key=lambda one: one["elements"])
        if one["tensors"] == 1 and not one.get("hyper") and OURS in timed(one["results"])
    }
    if len(single) < 2:
        return False
    figure.set_size_inches(8, 4.4)
    axes = figure.subplots()
    lines(axes, single, (*TORCH, FUSED, OPTAX, "cupy fuse", "cupy elementwise", C_OPENMP, COPY, OURS))
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda x, _: short(x))
    axes.set_xlabel("elements of the one tensor, float32 (log scale)")
    axes.set_ylabel("GB/s, counting 20 bytes per element")
    axes.set_title(sizes_title(single))
    legend(axes)
    return True


def sizes_title(by_size: Mapping[int, Rows]) -> str:
    """Our speed on the largest tensor, beside the copy's."""
    elements = max(by_size)
    ours = by_size[elements][OURS]
    title = f"One tensor of {short(elements)}: {OURS} moves {digits(ours['gigabytes_per_second'])} GB/s"
    fraction = ours.get("fraction_of_copy")
    return title if fraction is None else f"{title}, {100 * fraction:.0f} % of a plain copy"


def scaling(figure: Figure, result: dict[str, Any]) -> bool:
    """The bytes of the streams per second, by the number of threads, one picture per workload that has them."""
    measured = [one for one in result["workloads"].values() if one.get("scaling")]
    if not measured:
        return False
    figure.set_size_inches(6.5 * len(measured), 4)
    for axes, workload in zip(figure.subplots(1, len(measured), squeeze=False)[0], measured, strict=True):
        rows = {threads: timed(results) for threads, results in thread_rows(workload, result["threads"]).items()}
        lines(axes, rows, (*TORCH, C_OPENMP, COPY, OURS))
        axes.set_xticks(list(rows))
        axes.set_xlabel("threads")
        axes.set_ylabel(f"GB/s, counting {workload['bytes_per_element']} bytes per element")
        axes.set_title(scaling_title(workload, rows))
        legend(axes)
    return True


def scaling_title(workload: dict[str, Any], by_threads: Mapping[int, Rows]) -> str:
    """How much faster we are with the most threads than with the fewest."""
    few, many = min(by_threads), max(by_threads)
    if OURS not in by_threads[few] or OURS not in by_threads[many]:
        return subject(workload)
    gain = by_threads[few][OURS]["seconds"]["median"] / by_threads[many][OURS]["seconds"]["median"]
    return f"{subject(workload)}:\n{OURS} is {digits(gain)} times as fast on {plural(many, 'thread')} as on {few}"


def formats(figure: Figure, result: dict[str, Any]) -> bool:
    """How long a step takes in each format, and how long it would take if only its bytes counted."""
    found = {name: timed(x["results"]) for name, x in result["workloads"].items()}
    workload = next((name for name, rows in found.items() if OURS in rows and FORMATS.keys() & rows), None)
    if workload is None:
        return False
    rows = {OURS: {"median": 1.0, "q1": 1.0, "q3": 1.0}}
    rows |= {name: ratio for name in FORMATS if (ratio := to_ours(found[workload].get(name, {})))}
    moved = {name: WORKLOADS[workload].moved_by(name) for name in rows}
    figure.set_size_inches(8, 1.6 + 0.34 * len(rows))
    axes = figure.subplots()
    for y, (name, ratio) in enumerate(rows.items()):
        axes.barh(y, ratio["median"], height=0.6, color=STYLES[OURS][0] if name == OURS else STYLES[OPTAX][0])
        axes.plot([ratio["q1"], ratio["q3"]], [y, y], color=DARK, linewidth=1.5)
        expected = moved[name] / moved[OURS]
        axes.plot(
            [expected] * 2,
            [y - 0.4, y + 0.4],
            color=STYLES[FUSED][0],
            linewidth=2,
            label="if only bytes counted" if y == 0 else None,
        )
        axes.text(0.01, y, f"{moved[name]:.4g} bytes", va="center", fontsize=8, color="white" if name == OURS else DARK)
    names = [name.removeprefix(f"{OURS}, ") if name != OURS else "float32" for name in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    axes.set_xlabel("time of a step / time of the float32 step; medians and quartiles")
    best = min(rows, key=lambda name: rows[name]["median"])
    least, by_bytes = digits(rows[best]["median"]), digits(moved[best] / moved[OURS])
    axes.set_title(f"{best.removeprefix(f'{OURS}, ')}:\n{least} of float32's time, {by_bytes} of its bytes")
    axes.legend(loc="lower right")
    return True


def lines(axes: Axes, rows_by_x: Mapping[int, Rows], names: tuple[str, ...]) -> None:
    """GB/s against x, one line for each name that has values. Ours is thick, and hides none of the others."""
    for name in names:
        speeds = {x: rows[name].get("gigabytes_per_second") for x, rows in rows_by_x.items() if name in rows}
        speeds = {x: speed for x, speed in speeds.items() if speed is not None}
        if speeds:
            color, marker = STYLES[name]
            look = {"linewidth": 4, "zorder": 2} if name == OURS else {"linewidth": 1.5, "zorder": 3}
            look |= {"linestyle": "--"} if name == COPY else {"marker": marker, **marker_look(marker)}
            axes.plot(list(speeds), list(speeds.values()), color=color, label=name, **look)
    axes.set_ylim(bottom=0)
    axes.grid(visible=True)


def legend(axes: Axes) -> None:
    """Names beside the picture, in the order of the styles, so that nothing is covered."""
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    names = sorted(handles, key=[*STYLES, *handles].index)
    axes.legend([handles[name] for name in names], names, loc="upper left", bbox_to_anchor=(1.01, 1))


# Each draws into an empty figure, or says that it has nothing to draw.
PLOTS: dict[str, Callable[[Figure, dict[str, Any]], bool]] = {
    "ratios": ratios,
    "sizes": sizes,
    "scaling": scaling,
    "formats": formats,
}
