"""Part: are steps on the device and on the CPU bit-identical?"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np

from benchmarks.gpu.measuring import Record, main
from benchmarks.gpu.part import Result, measured
from benchmarks.report import plural, table

STEPS = 3  # of each case
ELEMENTS, REHEARSED = 1_000_003, 4_001
DTYPES = ("float32", "float64", "float16", "bfloat16")
EVERYTHING = {"momentum": 0.9, "centered": True, "nesterov": True, "weight_decay": 0.01, "bias_correction": True,
              "clipvalue": 3.0, "maximize": True}  # fmt: skip
DECOUPLED = {"momentum": 0.9, "lr_in_momentum": True, "weight_decay": 0.01, "decoupled_weight_decay": True,
             "eps_in_sqrt": True, "use_ema": True}  # fmt: skip
NORMS = {"global_clipnorm": 1.0, "skip_nonfinite": True, "momentum": 0.5}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("RMSProp", {}),
    "no eps": ("RMSProp", {"eps": 0.0}),
    "everything": ("RMSProp", EVERYTHING),
    "decoupled, averaged": ("RMSProp", DECOUPLED),
    "clipped by the norm": ("RMSProp", NORMS),
    "AdaGrad": ("AdaGrad", {"weight_decay": 0.01}),
}


def dtype_of(name: str) -> np.dtype[Any]:
    """NumPy's dtype, or that of ml_dtypes."""
    import ml_dtypes

    return np.dtype(getattr(ml_dtypes, name, name))


class Draw:
    """Numbers over many decades, a tenth of them special."""

    def __init__(self, dtype: np.dtype[Any], finite: bool) -> None:
        import ml_dtypes

        info, self._dtype = ml_dtypes.finfo(dtype), dtype
        small = [info.smallest_normal, -info.smallest_normal, info.smallest_subnormal, 0.0, -0.0]
        beyond = [] if finite else [np.inf, -np.inf, np.nan, info.max, -info.max]
        self._special = np.array(small + beyond, dtype)
        self._random = np.random.default_rng(2012)

    def __call__(self, size: int, decades: int) -> np.ndarray:
        draw = self._random
        with np.errstate(over="ignore"):  # in float16
            x = (draw.standard_normal(size) * 10.0 ** draw.uniform(-decades, 2, size)).astype(self._dtype)
        at = draw.random(size) < 0.1
        x[at] = self._special[draw.integers(len(self._special), size=int(at.sum()))]
        return x


def compare(dtype: str, case: str, size: int) -> dict[str, int]:
    """Take steps on both; return how many numbers in parameters and state differ, and how many there are."""
    import cupy

    import rmsprop_gpu

    name, given = CASES[case]
    draw, sizes = Draw(dtype_of(dtype), "global_clipnorm" in given), (size, size // 3)
    here = [draw(n, 4) for n in sizes]
    there = [cupy.asarray(x) for x in here]
    ours, device = (getattr(rmsprop_gpu, name)(params, lr=0.013, **given) for params in (here, there))
    with np.errstate(all="ignore"):
        for _ in range(STEPS):
            grads = [draw(n, 6) for n in sizes]
            ours.step(grads)
            device.step([cupy.asarray(g) for g in grads])
    pairs = [(y.get(), x) for x, y in zip(here, there, strict=True)]
    pairs += [(device.state[i][key].get(), x) for i in range(len(sizes)) for key, x in ours.state[i].items()]
    return {"differ": sum(differing(*pair) for pair in pairs), "of": sum(x.size for _, x in pairs)}


def differing(got: np.ndarray, want: np.ndarray) -> int:
    """How many numbers are not bit-identical; any NaN equals any NaN."""
    got, want = np.atleast_1d(got), np.atleast_1d(want)
    kind = f"u{want.dtype.itemsize}"
    return int(((got.view(kind) != want.view(kind)) & ~(np.isnan(got) & np.isnan(want))).sum())


def measure(record: Record, rehearse: bool) -> None:
    """Every case in every dtype; a difference is a failure."""
    for dtype, case in product(DTYPES, CASES):
        size = REHEARSED if rehearse else ELEMENTS if dtype == "float32" else ELEMENTS // 4
        record.row({"dtype": dtype, "case": case}, compare, dtype, case, size)
        record.failed = record.failed or record.found["rows"][-1]["differ"] > 0


def headline(result: Result) -> str:
    """How many cases are bit-identical."""
    rows = result["rows"]
    same, total = sum(row.get("differ") == 0 for row in rows), sum(row.get("of", 0) for row in rows)
    bad = [f"{row['dtype']} {row['case']}" for row in rows if row.get("differ") != 0]
    wrong = f"; **not the same: {', '.join(bad)}**" if bad else ""
    short = f", of {len(DTYPES) * len(CASES)}," if len(rows) < len(DTYPES) * len(CASES) else ""
    return (
        f"{same} of {plural(len(rows), 'case')}{short} hold the same bits on the device and on the CPU "
        f"({total:,} numbers after {STEPS} steps each){wrong}"
    )


def lines(result: Result) -> list[str]:
    """How many numbers differ: one row per dtype, one column per case."""
    found = {(row["dtype"], row["case"]): cell(row) for row in result["rows"]}
    body = [(dtype, *(found.get((dtype, case), "not run") for case in CASES)) for dtype in DTYPES]
    return ["Numbers that differ:", "", *table(("dtype", *CASES), body)]


def cell(row: dict[str, Any]) -> str:
    """The text of a cell; differences are bold."""
    if "failed" in row:
        return f"**failed**: {row['failed']}"
    return f"{row['differ']} of {row['of']:,}" if row["differ"] == 0 else f"**{row['differ']:,} of {row['of']:,}**"


PART = measured("bits", "The same bits as on the CPU", 75, headline=headline, lines=lines)

if __name__ == "__main__":
    main(measure)
