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

TESTS = Path(__file__).parents[1] / "tests" / "helpers"
RESULTS = Path(__file__).with_name("results")


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


def markdown(result: dict[str, Any]) -> str:
    """The table."""
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
    return "\n".join([*lines, "", f"{misses} {most}", "", f"{versions}.", ""])


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
    }
    (RESULTS / "sass.json").write_text(json.dumps(result, indent=1) + "\n")
    text = markdown(result)
    (RESULTS / "sass.md").write_text(text)
    print(text)
    return 1 if any(row["flaws"] for row in result["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
