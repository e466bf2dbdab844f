"""``python -m benchmarks.cuda_traffic``: how many bytes a step moves, counted by the device, and how often it launches.

The counts come from the file that VGPU_STATS names: one JSON line a launch, as the virtual device writes them, with
the bytes that a perfect cache would leave for memory (``dram_read_bytes``, ``dram_write_bytes``) and the 32-byte
sectors over all requests (``load_sectors``, ``store_sectors``). On a GPU, Nsight Compute counts the same.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import CUDA_PACKAGES, cuda_device, package_versions
from benchmarks.workloads import RESNET50, STORED
from rmsprop_gpu import RMSProp, hyper
from rmsprop_gpu.profiling.traffic import bytes_per_element

RESULTS = Path(__file__).with_name("results")
SIZE = 1 << 20  # elements
SECTOR = 32  # bytes
MORE_BYTES, MORE_SECTORS = 1.01, 1.05  # at most, of what the streams alone are

# What is stepped: dtype, hyperparameters. Behind it come the formats of fewer bytes.
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("plain", "float32", {}),
    ("momentum", "float32", {"momentum": 0.9}),
    ("centered", "float32", {"centered": True}),
    ("momentum, centered", "float32", {"momentum": 0.9, "centered": True}),
    ("everything", "float32", {"momentum": 0.9, "centered": True, "nesterov": True, "weight_decay": 0.1,
                               "clipvalue": 1.0, "bias_correction": True, "maximize": True}),
    ("plain", "float64", {}),
    ("plain", "float16", {}),
    ("momentum", "float16", {"momentum": 0.9}),
    ("plain", "bfloat16", {}),
    ("plain", "float32, float16 gradients", {}),
    ("momentum, centered", "float32, bfloat16 gradients", {"momentum": 0.9, "centered": True}),
    ("momentum, centered", "bfloat16", {"momentum": 0.9, "centered": True}),
]  # fmt: skip  # a table, read as one


class Counter:
    """What the device counts of our kernels."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def of_a_step(self, opt: RMSProp, grads: Any) -> list[dict[str, Any]]:
        """The launches of one step that is not the first."""
        import cupy

        opt.step(grads)
        cupy.cuda.Device().synchronize()
        before = self._path.stat().st_size if self._path.exists() else 0
        opt.step(grads)
        cupy.cuda.Device().synchronize()
        if not self._path.exists():
            return []
        with self._path.open() as file:
            file.seek(before)
            return [json.loads(line) for line in file]


def count(counter: Counter) -> dict[str, Any]:
    """All cases, and the launches of a model of many tensors."""
    import cupy
    import ml_dtypes  # noqa: F401  # NumPy knows bfloat16 by its name from here on

    rows = []
    stored = [(title, *how) for title, how in STORED.items() if how[1]]
    for title, name, given, said in [*((*case, None) for case in CASES), *stored]:
        dtype, *other = (np.dtype(x.split()[0]) for x in name.split(", "))
        grad_dtype = other[0] if other else dtype
        param, grad = cupy.zeros(SIZE, dtype), cupy.asarray(np.ones(SIZE, grad_dtype))
        opt = RMSProp(param, **given)
        model = bytes_per_element(hyper.variant(opt.param_groups[0].hyper(), False, dtype=dtype), dtype, grad_dtype)
        launches = counter.of_a_step(opt, grad)
        total = {
            key: sum(launch[key] for launch in launches) for key in launches[0] if key.endswith(("bytes", "sectors"))
        }
        moved = total["dram_read_bytes"] + total["dram_write_bytes"]
        sectors = total["load_sectors"] + total["store_sectors"]
        wanted = said or model
        rows.append(
            {
                "case": title,
                "dtype": name,
                "launches": len(launches),
                "model": model,
                "said": said,  # of a format, whatever the model is
                "bytes_an_element": moved / SIZE,
                "sectors_over_bytes": sectors * SECTOR / (model * SIZE),
                "bytes_are_fine": wanted <= moved / SIZE <= MORE_BYTES * wanted,
                "sectors_are_fine": sectors * SECTOR <= MORE_SECTORS * model * SIZE,
            }
        )
    models = {}
    for corrected in (False, True):
        params = [
            cupy.zeros((min(shape[0], 8),), np.float32) for shape in RESNET50.shapes
        ]  # small: only launches count
        launches = counter.of_a_step(RMSProp(params, bias_correction=corrected), [p.copy() for p in params])
        models["with bias_correction" if corrected else "plain"] = len(launches)
    return {"rows": rows, "launches_of_161_tensors": models}


def markdown(result: dict[str, Any]) -> str:
    """The table."""
    lines = [
        "# Bytes that a step moves",
        "",
        f"Counted on {result['device']}, in one step of one tensor of {SIZE:,} elements, by `{result['command']}`.",
        f"Wanted: at most {MORE_BYTES - 1:.0%} more bytes than the streams are, and sectors for at most "
        f"{MORE_SECTORS - 1:.0%} more. Each block reads its row and numbers anew, out of the caches.",
        "",
        *_table([r for r in result["rows"] if not r["said"]], "step", "streams"),
        "",
        "Formats of fewer bytes (`square_avg_dtype`, `bf16_stochastic_round`, `store_param_remainders`), beside the",
        "bytes stated for them. What each block of threads reads in addition is a larger share of fewer bytes.",
        "",
        *_table([r for r in result["rows"] if r["said"]], "format", "said"),
    ]
    launches = ", ".join(f"{n} {title}" for title, n in result["launches_of_161_tensors"].items())
    lines += ["", f"ResNet-50's 161 tensors, launches a step: {launches}.", "", _versions(result), ""]
    return "\n".join(lines)


def _table(rows: list[dict[str, Any]], what: str, wanted: str) -> list[str]:
    head = [what, "dtype", "launches", f"bytes per element: {wanted}", "counted", "bytes as wanted"]
    head += ["sectors x 32 / streams", "sectors as wanted"]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for r in rows:
        fine = ["yes" if r[key] else "**no**" for key in ("bytes_are_fine", "sectors_are_fine")]
        cells = [r["case"], r["dtype"], str(r["launches"]), f"{r['said'] or r['model']:.7g}"]
        cells += [f"{r['bytes_an_element']:.4f}", fine[0], f"{r['sectors_over_bytes']:.4f}", fine[1]]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _versions(result: dict[str, Any]) -> str:
    return ", ".join(f"{name} {number}" for name, number in result["versions"].items() if number) + "."


def main() -> int:
    """Count, write, print; the exit status is 1 where a bound is missed."""
    path = os.environ.get("VGPU_STATS")
    if not path:
        print("nothing counts: VGPU_STATS names no file", file=sys.stderr)
        return 2
    try:
        counted = count(Counter(Path(path)))
    except IndexError:
        print("the device wrote no statistics", file=sys.stderr)
        return 2
    result = {
        "command": "VGPU_STATS=FILE python -m benchmarks.cuda_traffic",
        "device": cuda_device(),
        "versions": package_versions(CUDA_PACKAGES),
        **counted,
    }
    (RESULTS / "cuda-traffic.json").write_text(json.dumps(result, indent=1) + "\n")
    text = markdown(result)
    (RESULTS / "cuda-traffic.md").write_text(text)
    print(text)
    fine = all(row["bytes_are_fine"] and row["sectors_are_fine"] for row in result["rows"])
    return 0 if fine and list(result["launches_of_161_tensors"].values()) == [1, 2] else 1


if __name__ == "__main__":
    sys.exit(main())
