"""``python -m benchmarks.few_bytes``: how long a step takes on a CUDA device in each format of fewer bytes.

Measured with CUDA events around 30 steps enqueued one after another; medians of seven such rounds.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.workloads import STORED
from rmsprop_gpu import RMSProp

SIZES = (67_108_864, 16_777_216)
STEPS, ROUNDS = 30, 7
FORMATS = [("float32", {}, 20), *STORED.values()]


def main() -> None:
    """Measure and print."""
    import cupy

    for size in SIZES:
        print("elements", size)
        for dtype, arguments, moved in FORMATS:
            param, grad = _arrays(dtype, size)
            seconds = _seconds(RMSProp(param, lr=1e-5, alpha=0.99, **arguments), grad)
            said = f"{seconds * 1e6:8.1f} us {size * moved / seconds / 1e9:7.0f} GB/s"
            print(f"{dtype:9} {dict(arguments)!s:70} {said}", flush=True)
            del param, grad
            cupy.get_default_memory_pool().free_all_blocks()


def _arrays(dtype: str, size: int) -> tuple[Any, Any]:
    """A parameter of ones, and a gradient."""
    import cupy
    import ml_dtypes

    grad = cupy.asarray(np.random.default_rng(0).standard_normal(size, dtype=np.float32) * np.float32(1e-2))
    if dtype == "float32":
        return cupy.ones(size, np.float32), grad
    half = cupy.empty(size, ml_dtypes.bfloat16)
    half.view(np.uint16)[...] = (grad.view(np.uint32) >> 16).astype(np.uint16)
    return cupy.asarray(np.ones(1, ml_dtypes.bfloat16)).repeat(size), half


def _seconds(opt: RMSProp, grad: Any) -> float:
    import cupy

    for _ in range(3):
        opt.step(grad)
    begin, end, found = cupy.cuda.Event(), cupy.cuda.Event(), []
    for _ in range(ROUNDS):
        begin.record()
        for _ in range(STEPS):
            opt.step(grad)
        end.record()
        end.synchronize()
        found.append(cupy.cuda.get_elapsed_time(begin, end) / STEPS)
    return float(np.median(found)) / 1e3


if __name__ == "__main__":
    main()
