"""``python -m benchmarks.sass``: registers and instructions of the CUDA kernels on every architecture, with no GPU."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import CUDA_PACKAGES, package_versions
from benchmarks.workloads import STORED

TESTS = Path(__file__).parents[1] / "tests" / "helpers"
RESULTS = Path(__file__).with_name("results")
# The switches of the largest kernels of fewer bytes, as the tests have them.
MOST = dict.fromkeys(
    ["scale", "told", "clipvalue", "weight_decay", "bias_correction", "momentum", "nesterov", "ema", "zero_grads"], True
)
ON_HOPPER = 32, 40  # registers of a plain kernel of fewer bytes on 9.0; with codes of 8 bits


def facts() -> list[dict[str, Any]]:
    """Of all dtypes and architectures: the plain kernel, and the largest over a pairwise cover of the switches."""
    import ml_dtypes
    from machine_code_bounds import CAPABILITIES, bounds, flaws_of_update, instructions_per_element
    from rich.progress import track
    from variants import cover, name

    from rmsprop_gpu.kernels import cuda
    from rmsprop_gpu.kernels.rule import Variant
    from rmsprop_gpu.profiling.machine_code import read

    variants = list(dict.fromkeys([Variant(), *cover(2)]))
    halves = (np.float16, ml_dtypes.bfloat16)
    dtypes = [
        *((dtype, dtype) for dtype in (np.float32, np.float64, *halves)),
        *((np.float32, half) for half in halves),
    ]
    rows = []
    for (dtype, grads), cc in track([(pair, cc) for pair in dtypes for cc in CAPABILITIES], "compiling"):
        found = read([cuda.make_update_kernel(variant, dtype, grads) for variant in variants], cc)
        sizes = [instructions_per_element(f, dtype) for f in found]
        registers = [f.registers for f in found]
        (prepare,) = read([cuda.make_prepare_kernel(Variant(bias_correction=True), dtype)], cc)
        rows.append(
            {
                "dtype": np.dtype(dtype).name,
                "grad_dtype": np.dtype(grads).name,
                "cc": f"{cc[0]}.{cc[1]}",
                "variants": len(variants),
                "plain": {"registers": registers[0], "instructions": sizes[0], "accesses": found[0].accesses},
                "most_registers": {"registers": max(registers), "variant": name(variants[np.argmax(registers)])},
                "most_instructions": {"instructions": max(sizes), "variant": name(variants[np.argmax(sizes)])},
                "wanted": [bounds(v, dtype, grads) for v in (Variant(), Variant(momentum=True))],
                "flaws": sorted(
                    {x for f, v in zip(found, variants, strict=True) for x in flaws_of_update(f, v, dtype, grads)}
                ),
                "prepare_registers": prepare.registers,
            }
        )
    return rows


def facts_of_formats() -> list[dict[str, Any]]:
    """The plain kernel of each format of fewer bytes, and the one with most switches."""
    from machine_code_bounds import CAPABILITIES, bounds, flaws_of_update, instructions_per_element
    from rich.progress import track
    from variants import name

    from rmsprop_gpu import RMSProp, hyper
    from rmsprop_gpu.kernels import cuda
    from rmsprop_gpu.profiling.machine_code import read

    formats = {title: (np.dtype(dtype), given) for title, (dtype, given, _) in STORED.items() if given}
    rows = []
    for (title, (dtype, given)), cc in track([(x, cc) for x in formats.items() for cc in CAPABILITIES], "of formats"):
        plain = hyper.variant(RMSProp(np.ones(3, dtype), **given).param_groups[0].hyper(), adagrad=False, dtype=dtype)
        variants = [plain.of_update, plain._replace(**MOST).of_update]
        found = read([cuda.update_function(variant, dtype) for variant in variants], cc)
        rows.append(
            {
                "format": title,
                "dtype": dtype.name,
                "cc": f"{cc[0]}.{cc[1]}",
                "kernels": [
                    {
                        "variant": name(variant),
                        "registers": facts.registers,
                        "spill_bytes": facts.spill_bytes,
                        "instructions": instructions_per_element(facts, dtype),
                        "accesses": facts.accesses,
                        "wanted": bounds(variant, dtype),
                        "flaws": list(flaws_of_update(facts, variant, dtype)),
                    }
                    for facts, variant in zip(found, variants, strict=True)
                ],
            }
        )
    return rows


def markdown(result: dict[str, Any]) -> str:
    """The tables."""
    rows = result["rows"]
    lines = [
        "# Machine code of the update kernels",
        "",
        f"By `{result['command']}`: each kernel as it is linked, for plain RMSProp and over the",
        f"{rows[0]['variants']} Variants of a cover of all pairs of switches. Instructions are those of the loop",
        "over vectors, whether they are executed or not (the slow ways of division and root too), divided by the",
        "elements that a thread takes at a time. Wanted: 40 registers and 42 instructions for plain float32,",
        "64 and 64 for all others.",
        "",
        "| dtype | cc | plain: registers | instructions | accesses of the loop | most registers | most instructions | "
        "float64, spills, stack, local memory, calls |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        plain, most = row["plain"], (row["most_registers"]["registers"], row["most_instructions"]["instructions"])
        mixed = row["dtype"] != row["grad_dtype"]
        wanted = (40, 42) if row["dtype"] == "float32" and not mixed else (64, 64)
        accesses = ", ".join(f"{n} {opcode}" for opcode, n in sorted(plain["accesses"].items()))
        cells = [
            f"{row['dtype']}, {row['grad_dtype']} gradients" if mixed else row["dtype"],
            row["cc"],
            _bold(plain["registers"], wanted[0]),
            _bold(plain["instructions"], wanted[1]),
            accesses,
            _bold(most[0], 64),
            _bold(most[1], 64),
            "; ".join(row["flaws"]) or "none" if row["dtype"] != "float64" else "float64 by nature; nothing else",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    misses = "In bold what is beyond: float64, where IEEE division and root alone take most of it."
    largest = max(rows, key=lambda row: row["most_instructions"]["instructions"] * (row["dtype"] != "float64"))
    most = (
        f"The largest but for float64: {largest['most_instructions']['variant']}, {largest['dtype']}, {largest['cc']}."
    )
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items() if number)
    return "\n".join([*lines, "", f"{misses} {most}", "", *_formats(result["formats"]), "", f"{versions}.", ""])


def _formats(rows: list[dict[str, Any]]) -> list[str]:
    """The table of formats."""
    lines = [
        "## In fewer bytes",
        "",
        f"Plain RMSProp, and with {', '.join(MOST)}.",
        f"Wanted of plain ones on 9.0: at most {ON_HOPPER[False]} registers, {ON_HOPPER[True]} with codes of 8 bits.",
        "",
        "| format | cc | plain: registers | bytes of spills | instructions | accesses of the loop "
        "| with most: registers | bytes of spills | instructions | float64, spills, stack, local memory, calls |",
        f"|{' --- |' * 10}",
    ]
    for row in rows:
        plain, most = row["kernels"]
        accesses = ", ".join(f"{n} {opcode}" for opcode, n in sorted(plain["accesses"].items()))
        wanted = ON_HOPPER["uint8" in row["format"]] if row["cc"] == "9.0" else plain["wanted"][0]
        cells = [row["format"], row["cc"], _bold(plain["registers"], wanted)]
        cells += [str(plain["spill_bytes"]), f"{plain['instructions']:g}", accesses]
        cells += [_bold(most["registers"], most["wanted"][0]), str(most["spill_bytes"]), f"{most['instructions']:g}"]
        cells.append("; ".join(plain["flaws"] + most["flaws"]) or "none")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _bold(x: float, wanted: float) -> str:
    return f"**{x:g}**" if x > wanted else f"{x:g}"


def main() -> int:
    """Compile, write, print; the exit status is 1 where a kernel is not as the tests want it."""
    sys.path.insert(0, str(TESTS))  # what machine code should be is the tests'
    from rmsprop_gpu.profiling.machine_code import tool, why_not

    if why_not():
        print(why_not(), file=sys.stderr)
        return 2
    said = subprocess.run([tool("ptxas"), "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"V([\d.]+)", said)
    result = {
        "command": "python -m benchmarks.sass",
        "versions": {**package_versions(CUDA_PACKAGES), "ptxas": release[1] if release else said.strip()},
        "rows": facts(),
        "formats": facts_of_formats(),
    }
    (RESULTS / "sass.json").write_text(json.dumps(result, indent=1) + "\n")
    text = markdown(result)
    (RESULTS / "sass.md").write_text(text)
    print(text)
    kernels = [kernel for row in result["formats"] for kernel in row["kernels"]]
    return 1 if any(x["flaws"] for x in [*result["rows"], *kernels]) else 0


if __name__ == "__main__":
    sys.exit(main())
