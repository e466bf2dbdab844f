"""``python -m benchmarks.readme``: write the figures in the README and in pages from the committed results."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.speed import of_copy, rate
from benchmarks.gpu.torch import REPLAYED, times_ours
from benchmarks.plots import counts
from benchmarks.report import (
    bars,
    conditions,
    digits,
    duration,
    is_faster,
    noise,
    plural,
    short_ratio,
    speeds,
    table,
    timed,
    to_ours,
)
from benchmarks.startup import startup_lines
from benchmarks.step_error import CODED, NEAREST, WIDER
from benchmarks.workloads import (
    AGAIN,
    BITSANDBYTES,
    C_OPENMP,
    COMPILED,
    DROP_IN,
    FORMATS,
    FUSED,
    OPTAX,
    OURS,
    TORCH,
    WORKLOADS,
)

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).with_name("results")
SHOWN = (*TORCH, COMPILED, FUSED, OPTAX, "numpy", C_OPENMP)  # the rivals shown; the page of results has all of them
CARD = "gpu-nvidia-h200/summary"
LOOP, HOST = "gpu-nvidia-h200/workloads", "gpu-nvidia-h200/cuda-host"
FEW_BYTES = "few-bytes-nvidia-h200.txt"
ON_CPU, ERRORS = "cpu-bytes", "step-error"
CUPY = ("cupy elementwise", "cupy fuse")
SHORT = ("one-1000", "many-300", "resnet50", "gpt2")  # of the workloads, in the README
SHORT_OF_CARD = ("plain float32", "clipped by the norm", "ResNet-50's 161 tensors", "3,000 tensors of 256")
END = "<!-- end of figures -->"


def main() -> None:
    """Write all of them."""
    for file, name, lines in sections():
        file.write_text(replaced(file.read_text(), name, lines))


def sections() -> list[tuple[Path, str, list[str]]]:
    """The lines between the marks of each committed result, by page."""
    names = "cpu", "cpu-in-torch", CARD, LOOP, HOST, ON_CPU, ERRORS
    cpu, in_torch, card, loop, host, formats, errors = (
        json.loads((RESULTS / f"{name}.json").read_text()) for name in names
    )
    readme, benchmarks, measured = ROOT / "README.md", ROOT / "benchmarks" / "README.md", ROOT / "docs" / "measured"
    low_precision = ROOT / "docs" / "howto" / "low_precision.md"
    return [
        (readme, "cpu", in_short(cpu)),
        (readme, CARD, of_the_card(card, SHORT_OF_CARD)),
        (measured / "cpu.md", "cpu", of_the_project(cpu)),
        (measured / "torch.md", "cpu-in-torch", of_the_class_for_torch(in_torch)),
        (measured / "torch.md", CARD, of_the_class_on_a_card(card)),
        (measured / "gpu.md", CARD, of_the_card(card)),
        (measured / "gpu.md", LOOP, in_a_loop(loop)),
        (measured / "gpu.md", HOST, of_the_host(host)),
        (low_precision, ON_CPU, of_formats(formats)),
        (low_precision, ERRORS, of_step_errors(errors)),
        (low_precision, FEW_BYTES, of_few_bytes((RESULTS / FEW_BYTES).read_text())),
        (benchmarks, "cpu", of_the_benchmarks(cpu)),
        (benchmarks, "cpu-in-torch", wishes(in_torch, DROP_IN)),
    ]


def replaced(text: str, name: str, lines: list[str]) -> str:
    """The text with other lines between the marks of this result."""
    file = name if name.endswith(".txt") else f"{name}.json"
    first = f"<!-- figures of benchmarks/results/{file} -->"
    pattern = re.compile(f"{re.escape(first)}.*?{re.escape(END)}", re.DOTALL)
    made, count = pattern.subn(lambda _: "\n".join([first, *lines, END]), text)
    if count != 1:
        raise ValueError(f"{first} stands {count} times in a page; wanted once")
    return made


def in_short(result: dict[str, Any]) -> list[str]:
    """A few workloads against a few of the others."""
    shown = (*TORCH, OPTAX, C_OPENMP)
    body = []
    for name in SHORT:
        one = result["workloads"][name]
        ours = timed(one["results"])[OURS]["seconds"]["median"]
        others = (short_ratio(x, one["results"].get(x)) for x in shown)
        body.append((f"{name}: {counts(one)}", duration(ours), *others))
    return [
        *table(("a step on the CPU, float32", OURS, *shown), body),
        "",
        "In the columns of others: their time divided by ours; bold where they are faster. "
        f"{result['machine']['cpu']}, {plural(result['threads'], 'thread')}, {result['date'][:10]}.",
    ]


def of_the_project(result: dict[str, Any]) -> list[str]:
    """One table and one plot, on what machine, and where others are faster."""
    head = ("a step of RMSProp, float32", OURS, "of a copy's speed", *SHOWN, "ours again")
    body = [(f"{name}: {counts(one)}", *cells(one["results"])) for name, one in result["workloads"].items()]
    return [
        *table(head, body),
        "",
        "![How many times as long as ours each contender takes](../../benchmarks/results/cpu-ratios.png)",
        "",
        "In the columns of others: their time divided by ours; bold where they are faster. "
        f"{C_OPENMP} runs one flat array, {FUSED} another rule over the same streams.",
        *losses(result),
        *noise(result["workloads"]),
        "",
        *conditions(result),
        "With quartiles: [`benchmarks/results/cpu.md`](../../benchmarks/results/cpu.md);"
        " how it is measured: [`benchmarks/README.md`](../../benchmarks/README.md).",
        "",
        "The start of a program, by `python -m benchmarks.startup` "
        "([`startup.md`](../../benchmarks/results/startup.md)):",
        "",
        *startup_lines(json.loads((RESULTS / "startup.json").read_text())["startup"]),
    ]


def cells(results: dict[str, Any]) -> tuple[str, ...]:
    """Our time and part of the copy's speed, and how many times ours the others take."""
    ours = timed(results)[OURS]
    others = (short_ratio(name, results.get(name)) for name in (*SHOWN, AGAIN))
    return duration(ours["seconds"]["median"]), speeds(ours)[1], *others


def losses(result: dict[str, Any]) -> list[str]:
    """Which contenders are faster than we are, where, and by how much."""
    found: dict[str, list[str]] = {}
    for workload, one in result["workloads"].items():
        for name, row in one["results"].items():
            ratio = to_ours(row)
            if ratio and is_faster(name, ratio):
                found.setdefault(name, []).append(f"{workload} ({short_ratio(name, row).strip('*')})")
    if not found:
        return ["No contender was faster beyond the quartiles of its rounds."]
    return ["Faster than ours: " + "; ".join(f"{name} on {', '.join(where)}" for name, where in found.items()) + "."]


def of_the_class_for_torch(result: dict[str, Any]) -> list[str]:
    """A table of its times, and how many times as long torch's take."""
    shown = (*TORCH, FUSED, OURS)
    body = []
    for name, one in result["workloads"].items():
        rows = timed(one["results"])
        ratios = (digits(rows[x]["ratio_to"][DROP_IN]["median"]) if x in rows else "" for x in shown)
        body.append((f"{name}: {counts(one)}", duration(rows[DROP_IN]["seconds"]["median"]), *ratios))
    return [
        *table(("a step, float32, on the CPU", DROP_IN, *shown), body),
        "",
        f"In the columns of others: their time divided by that of {DROP_IN}. {FUSED} is another rule over the same "
        f"streams, {OURS} is over NumPy arrays. "
        "All of it: [`cpu-in-torch.md`](../../benchmarks/results/cpu-in-torch.md).",
        "",
        *conditions(result),
    ]


def of_the_card(summary: dict[str, Any], only: Sequence[str] = ()) -> list[str]:
    """Steps on a card beside a copy of as many bytes; of those that are shown in short, the largest of each kind."""
    found = [row for row in summary["parts"]["speed"]["result"]["rows"] if "seconds" in row]
    if only:
        found = [max((r for r in found if r["what"] == what), key=lambda r: r["elements"]) for what in only]
    body = [
        (
            row["what"],
            f"{row['elements']:,}",
            duration(row["seconds"]["median"]),
            digits(rate(row)),
            f"{of_copy(row):.0f} %",
        )
        for row in found
    ]
    return [
        *table(
            (f"a step on an {summary['device'].split(',')[0]}", "elements", "device time", "GB/s", "of a copy's speed"),
            body,
        ),
        "",
        "Device time is that of the kernels alone, by CUDA events, without the host's call. "
        f"`{summary['command']}`, {summary['date'][:10]}.",
    ]


def in_a_loop(result: dict[str, Any]) -> list[str]:
    """Steps on a card one behind the other, beside those of others."""
    shown = (TORCH[0], *CUPY)
    body = []
    for name, one in result["workloads"].items():
        rows = timed(one["results"])
        ratios = (short_ratio(x, rows.get(x)) for x in (*shown, AGAIN))
        body.append((f"{name}: {counts(one)}", duration(rows[OURS]["seconds"]["median"]), *ratios))
    return [
        *table((f"a step in a loop, {result['device']['name'].split(',')[0]}", OURS, *shown, "ours again"), body),
        "",
        "In the columns of others: their time divided by ours; bold where they are faster. "
        f"CuPy {result['versions']['cupy-cuda13x']}, torch {result['versions']['torch']}, {result['date'][:10]}: "
        f"[`workloads.md`](../../benchmarks/results/{LOOP}.md).",
    ]


def of_the_host(result: dict[str, Any]) -> list[str]:
    """What a call of `step` costs the host of a card."""
    body = [(row["tensors"], row["gradients"], f"{row['us']['step'][1]:.0f} us") for row in result["rows"]]
    return [
        *table(("a step over CuPy arrays", "gradient arrays", "host time"), body),
        "",
        f"`{result['command']}`, {result['device'].split(',')[0]}, {result['machine']['cpu']}: "
        f"[`cuda-host.md`](../../benchmarks/results/{HOST}.md).",
    ]


def of_formats(result: dict[str, Any]) -> list[str]:
    """Steps in formats of fewer bytes on the CPU, and bitsandbytes' steps."""
    ((workload, one),) = result["workloads"].items()
    rows, moved_by = timed(one["results"]), WORKLOADS[workload].moved_by
    body = []
    for name in (OURS, *FORMATS, *BITSANDBYTES):
        ratio = "1" if name == OURS else digits(1 / rows[name]["ratio_to"][OURS]["median"])
        by_bytes = "" if name in BITSANDBYTES else digits(moved_by(OURS) / moved_by(name))
        said = "float32" if name == OURS else name.removeprefix(f"{OURS}, ")
        body.append((said, duration(rows[name]["seconds"]["median"]), ratio, by_bytes))
    return [
        *table(("a step over 25 M elements, on the CPU", "time", "times as fast as float32", "by bytes"), body),
        "",
        "![Times of formats, and what their bytes alone would take](../../benchmarks/results/cpu-bytes-formats.png)",
        "",
        f"*dithered* is `bf16_stochastic_round=True`, *remainder* is `store_param_remainders=True`; the gradients of "
        f"bfloat16 parameters are bfloat16. {result['machine']['cpu']}, {plural(result['threads'], 'thread')}, "
        f"bitsandbytes {result['versions']['bitsandbytes']}, {result['date'][:10]}: "
        "[`cpu-bytes.md`](../../benchmarks/results/cpu-bytes.md).",
    ]


def of_step_errors(result: dict[str, Any]) -> list[str]:
    """How far steps are from those of a float32 state."""
    shown = {
        "narrow": "normally distributed",
        "digits": "of a network that learns digits",
        WIDER: f"{WIDER} in a block",
    }
    body = []
    for stream, said in shown.items():
        for alpha, formats in result["steps"][stream].items():
            cells = (f"{x['ratio']:.3f} ({x['rms']:.2g})" for x in (formats[name] for name in (*CODED, NEAREST)))
            body.append((said, alpha, *cells))
    return [
        *table(("gradients", "`alpha`", '`"uint16"`', '`"uint8"`', NEAREST), body),
        "",
        "The mean length of a step divided by float32's, and in brackets the root mean square of the relative error, "
        'on the same gradients. *8 bits to nearest* is the grid of `"uint8"` without stochastic rounding. '
        "[More gradients, bitsandbytes, and whole trainings](../../benchmarks/results/step-error.md).",
    ]


def of_few_bytes(text: str) -> list[str]:
    """Steps in formats of fewer bytes on a card, of the first size."""
    first, _, rest = text.partition("elements ")
    lines = rest.split("elements ")[0].splitlines()
    body = []
    for dtype, arguments, time, speed in re.findall(r"(\S+) +(\{.*?\}) +(\S+ us) +(\S+) GB/s", "\n".join(lines)):
        words = [f"`{key}={value!r}`" for key, value in ast.literal_eval(arguments).items()]
        body.append((dtype, ", ".join(words), time, speed))
    card = re.search(r"on one (.*?):", first)
    return [
        *table(("parameters", "arguments", f"device time, {card[1] if card else ''}", "GB/s"), body),
        "",
        f"A plain step over one tensor of {int(lines[0]):,} elements, by CUDA events around steps in a row: "
        f"[the record, with a smaller tensor](../../benchmarks/results/{FEW_BYTES}). The figures "
        "[On a GPU](../measured/gpu.md) are from another run; the same step differs a little.",
    ]


def of_the_class_on_a_card(result: dict[str, Any]) -> list[str]:
    """Its times there, eager and replayed, and how many times as long torch's take."""
    part = result["parts"]["torch"]["result"]
    body = []
    for row in part["rows"]:
        if row["who"] != DROP_IN:
            continue
        others = ((x["who"], times_ours(x, part["rows"])) for x in part["rows"] if is_beside(x, row))
        ratios = {who: " / ".join(map(two_sided, times.values())) for who, times in others}
        how = "replay of a graph" if row["how"] == REPLAYED else "eager"
        times = " / ".join(duration(row[key]["median"]) for key in ("host_seconds", "device_seconds"))
        body.append((f"{row['what']}, {how}", times, *(ratios.get(who, "") for who in TORCH)))
    versions = part["versions"]
    what = f"a step of a class for torch, float32, on an {versions['device']}: host / device"
    return [
        *table((what, DROP_IN, *TORCH), body),
        "",
        "Medians. Host: until the call returns, with an idle device. Device: the kernels alone, by CUDA events. In the "
        f"columns of torch: its time divided by that of {DROP_IN}, bold where torch is faster. *Replay*: a CUDA graph, "
        "captured with `capturable=True`; its step counters lie on the device, and the host only launches the graph. "
        "Where a step is more than 1,000 launches (torch for-loop, many tensors), the device waits for the host. "
        f"torch {versions['torch']}, {result['date']}: `{result['command']}`, "
        f"[all of it](../../benchmarks/results/{CARD}.md).",
    ]


def is_beside(row: dict[str, Any], ours: dict[str, Any]) -> bool:
    """Does this row measure the same step as ours?"""
    return all(row[key] == ours[key] for key in ("what", "how"))


def two_sided(ratio: float) -> str:
    """A ratio to ours, bold where ours is slower."""
    return f"**{digits(ratio)}**" if ratio < 1 else digits(ratio)


def of_the_benchmarks(result: dict[str, Any]) -> list[str]:
    """The project's goals, and what came out."""
    return [
        "The whole of the last run: [results/cpu.md](results/cpu.md). What the project wants of it:",
        "",
        *wishes(result, OURS),
        "",
        "![GB/s by the size of one tensor](results/cpu-sizes.png)",
        "",
        "![GB/s by threads](results/cpu-scaling.png)",
    ]


def wishes(result: dict[str, Any], who: str) -> list[str]:
    """The goals for one of our contenders."""
    return table(("workload", "of", "against", "wanted", "got", "met"), [row for row in bars(result) if row[1] == who])


if __name__ == "__main__":
    main()
