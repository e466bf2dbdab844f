"""``python -m benchmarks.gpu.few_steps``: a few steps, for tools that inspect each launch and slow it down."""

from __future__ import annotations

import argparse

import numpy as np


def main() -> None:
    """Take three steps with each requested optimizer."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.few_steps")
    parser.add_argument("--elements", type=int, default=100_003, help="of the largest tensor")
    parser.add_argument("--plain", action="store_true", help="plain RMSProp only")
    parser.add_argument("--no-pool", action="store_true", help="an allocation of its own for each array")
    options = parser.parse_args()
    import cupy

    from rmsprop_gpu import RMSProp

    if options.no_pool:
        cupy.cuda.set_allocator(None)
    switches = {"momentum": 0.9, "centered": True, "global_clipnorm": 1.0, "skip_nonfinite": True}
    sizes = (options.elements, 7, 0, 256)
    grads = [cupy.asarray(np.linspace(2, -2, size, dtype=np.float32)) for size in sizes]
    for given in ({},) if options.plain else ({}, switches):
        params = [cupy.asarray(np.linspace(-1, 1, size, dtype=np.float32)) for size in sizes]
        opt = RMSProp(params, lr=1e-3, **given)
        for _ in range(3):
            opt.step(grads)
        cupy.cuda.Device().synchronize()
        print(given or "plain", [float(np.abs(param.get()).sum()) for param in params], flush=True)


if __name__ == "__main__":
    main()
