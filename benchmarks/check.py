"""Does a contender compute RMSProp? Judged against the float64 oracle before anything is timed."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from benchmarks.contenders import ALPHA, EPS, LR, Array, Running
from benchmarks.workloads import Shape

ULP = 2.0**-23
GRAD_FACTORS = (1.0, -0.5, 3.0)  # of the three steps that are checked
SAMPLES = 1_000_000


def seeded_data(size: int) -> tuple[Array, Array]:
    """Parameters as small as an update, so that rounding them hides nothing; gradients over 12 decades, around eps."""
    rng = np.random.default_rng(20120)
    param = np.float32(LR) * rng.standard_normal(size, dtype=np.float32)
    grad = np.exp(np.float32(math.log(1e12)) * (rng.random(size, dtype=np.float32) - np.float32(11 / 12)))
    return param, np.copysign(grad, rng.random(size, dtype=np.float32) - np.float32(0.5))


def split(array: Array, shapes: Sequence[Shape]) -> list[Array]:
    """Views of a flat array, one a shape."""
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    return [part.reshape(shape) for part, shape in zip(np.split(array, ends[:-1]), shapes, strict=True)]


def disagreement(running: Running, grad: Array, shapes: Sequence[Shape]) -> str | None:
    """Step three times; say how the updates differ from the oracle's, or None.

    Tolerance, with u = ULP / 2 for one rounding: v is two products, the decay and a sum, so its relative error is
    2u, 4u, 6u after steps 1, 2, 3. The root halves that and adds u; eps, the division and lr add u each:
    3u + u + 3u = 7u < 4 ULP of the update. Storing the parameter rounds by at most 1 ulp of it.
    """
    rmsprop = load_reference().rmsprop
    hyper = {"lr": LR, "alpha": ALPHA, "one_minus_alpha": 1 - ALPHA, "eps": EPS}
    hyper = {name: float(np.float32(value)) for name, value in hyper.items()}  # as every contender rounds them
    sample, state = sample_of(grad.size), None
    for number, factor in enumerate(GRAD_FACTORS, start=1):
        scaled = grad * np.float32(factor)
        running.set_grads(split(scaled, shapes))
        before = running.read_params()[sample].astype(np.float64)
        running.step()
        running.sync()
        after = running.read_params()[sample]
        wanted, state = rmsprop(before, scaled[sample], state, **hyper)
        error = np.abs((after - before) - (wanted - before))
        allowed = 4 * ULP * np.abs(wanted - before) + np.spacing(np.abs(after))
        wrong = ~(error <= allowed)  # a NaN is wrong too
        if wrong.any():
            worst = np.max(error[wrong] / np.abs(wanted - before)[wrong])
            return f"step {number}: {wrong.sum():,} of {wrong.size:,} updates are wrong, the worst by {worst:.1e} of it"
    return None


def sample_of(size: int) -> NDArray[np.int64]:
    """Indices of about a million elements: with an odd stride, to meet every vector lane, and the whole ragged end."""
    stride = size // SAMPLES | 1
    return np.union1d(np.arange(0, size, stride), np.arange(max(0, size - 64), size))


def load_reference() -> ModuleType:
    """rmsprop_gpu/reference.py by its path: importing the package would load Numba into the rivals' processes."""
    path = Path(__file__).parents[1] / "rmsprop_gpu" / "reference.py"
    spec = importlib.util.spec_from_file_location("reference", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
