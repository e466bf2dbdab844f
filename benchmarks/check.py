"""Does a contender compute RMSProp? It is checked against the float64 oracle before anything is timed."""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.contenders_base import ALPHA, EPS, LR, Array, Contender, Running
from benchmarks.workloads import Shape, Workload

UNIT = 2.0**-24  # one rounding, relative
GRAD_FACTORS = (1.0, -0.5, 3.0)  # of the three steps that are checked
SAMPLES = 1_000_000

Double = NDArray[np.float64]


def seeded_data(size: int) -> tuple[Array, Array]:
    """Parameters as small as an update, so that rounding them hides nothing; gradients over 12 decades, around eps."""
    rng = np.random.default_rng(20120)
    param = np.float32(LR) * rng.standard_normal(size, dtype=np.float32)
    grad = np.exp(np.float32(math.log(1e12)) * (rng.random(size, dtype=np.float32) - np.float32(11 / 12)))
    return param, np.copysign(grad, rng.random(size, dtype=np.float32) - np.float32(0.5))


def split(array: Array, shapes: Sequence[Shape]) -> list[Array]:
    """Views of a flat array, one per shape."""
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    return [part.reshape(shape) for part, shape in zip(np.split(array, ends[:-1]), shapes, strict=True)]


def disagreement(running: Running, contender: Contender, grad: Array, workload: Workload) -> str | None:
    """Step three times; return how the updates differ from the oracle's, or None.

    Each step is checked from the parameters that the contender had before it; the state is the oracle's own.
    """
    assert contender.rule is not None
    hyper = rounded({**hyper_of(contender.rule), **workload.hyper, **contender.switches})
    most = hyper.pop("global_clipnorm", None)
    for name in ("skip_nonfinite", "use_ema"):  # no effect here: gradients are finite, and averages are separate
        hyper.pop(name, None)
    step = functools.partial(getattr(load_reference(), contender.rule), **hyper)
    tolerance = Tolerance(hyper, step, clipped=most is not None)
    sample, state = sample_of(grad.size), None
    for number, factor in enumerate(GRAD_FACTORS, start=1):
        scaled = grad * np.float32(factor)
        running.set_grads(split(scaled, workload.shapes))
        before = running.read_params()[sample].astype(np.float64)
        running.step()
        running.sync()
        after = running.read_params()[sample]
        seen = scaled[sample].astype(np.float64)
        if running.last_norm:
            seen *= min(1.0, most / running.last_norm())
        elif most:
            seen *= load_reference().clip_factor([scaled.astype(np.float64)], most)
        allowed = tolerance.of_step(before, seen, state)
        wanted, state = step(before, seen, state)
        error = np.abs((after - before) - (wanted - before))
        wrong = ~(error <= allowed + np.spacing(np.abs(after)))  # a NaN is wrong too
        if wrong.any():
            worst = np.max(error[wrong] / np.abs(wanted - before)[wrong])
            return f"step {number}: {wrong.sum():,} of {wrong.size:,} updates are wrong, the worst by {worst:.1e} of it"
    return None


class Tolerance:
    """How far float32 may be from the oracle, besides the 1 ulp of storing the parameter; u = UNIT is one rounding.

    Plain: v is two products, the decay and a sum, so its relative error is 2u, 4u, 6u after steps 1, 2, 3. The root
    halves that and adds u; eps, the division (optax: an inverse and a product) and lr add u each, or 2u:
    3u + u + 4u = 8u. AdaGrad has fewer, and so has eps inside the root.

    `centered`: m has the errors of its products and sums, at most 8u of M = sum(w |g|) (torch's lerp: 3u a step less
    one at the first, and one for 1 - alpha rounded by itself). With W = sum(w) = 0.271 after three steps from zero,
    m^2 <= M^2 <= W v, so that v - m^2 >= 0.729 v: nothing cancels badly. Relative to the difference that is
    (6u + (2 * 8 + 1)u W) / 0.729 + u < 16u, and under the root 8u where it was 3u: 5u more.

    `bias_correction`: its weight, three steps of a decay and a sum, and a product or quotient: 5u, under the root 3u.

    `momentum` adds directions of either sign, so its error is relative to the sum of their sizes; a product and a sum
    in each step after the first: 4u. `nesterov`: once more, 2u.

    `weight_decay`, coupled: g = grad + decay * param is 2u of |grad| + |decay * param|, which is `condition` times 2u
    of g where they cancel; the largest so far counts. It enters the direction once, and v twice, under the root once:
    4u condition. Centered, v - m^2 has (2 + 2W) / 0.729 < 4 of it, the root 2: 6u. Decoupled: it is lr decay, 1e-5 at
    most, of the parameter, but one more store.

    `clipped`: some sum the norm in float32, by pairs, blocks or lanes: 25 M squares are off by less than
    log2(25e6 / 16) < 21 roundings, half of that under the root, and factor and product add three: 14u. It enters the
    direction once and v twice, under the root once. torch's steps are judged by the norm that it took.
    """

    def __init__(
        self,
        hyper: Mapping[str, Any],
        step: functools.partial[tuple[Double, dict[str, Double]]],
        clipped: bool = False,
    ) -> None:
        decoupled = hyper.get("decoupled_weight_decay", False)
        self.momentum, self.nesterov = hyper.get("momentum", 0.0), hyper.get("nesterov", False)
        self.stores = 1 if decoupled and hyper.get("weight_decay") else 0
        self.decay = 0.0 if decoupled else hyper.get("weight_decay", 0.0)
        self.clipvalue, self.maximize = hyper.get("clipvalue"), hyper.get("maximize", False)
        centered = hyper.get("centered", False)
        self.roundings = 8 + 5 * centered + 3 * hyper.get("bias_correction", False)
        self.roundings += 4 * bool(self.momentum) + 2 * self.nesterov + 28 * clipped
        self.roundings_of_decay = 6 if centered else 4
        alone = {"momentum": 0.0, "nesterov": False, "weight_decay": self.decay}
        self.direction = functools.partial(step, **{name: value for name, value in alone.items() if name in hyper})
        self.condition: Double | float = 1.0
        self.sizes: Double | float = 0.0

    def of_step(self, param: Double, grad: Double, state: Mapping[str, Double] | None) -> Double:
        """The tolerance for the step that the oracle would take from here."""
        direction = np.abs(self.direction(param, grad, state)[0] - param)  # times lr
        self.sizes = self.momentum * self.sizes + direction
        size = self.momentum * self.sizes + direction if self.nesterov else self.sizes
        store = self.stores * np.spacing(np.abs(param).astype(np.float32))
        return (self.roundings + self.of_decay(param, grad)) * UNIT * size + store

    def of_decay(self, param: Double, grad: Double) -> Double | float:
        """Roundings of coupled weight decay, element by element."""
        if not self.decay:
            return 0.0
        effective = functools.partial(load_reference().effective_gradient, clipvalue=self.clipvalue)
        whole = effective(np.abs(grad), np.abs(param), weight_decay=self.decay)
        left = np.abs(effective(grad, param, maximize=self.maximize, weight_decay=self.decay))
        self.condition = np.maximum(self.condition, whole / left)
        return self.roundings_of_decay * self.condition


def hyper_of(rule: str) -> dict[str, float]:
    """The hyperparameters that all contenders get."""
    return {"lr": LR, "eps": EPS} | ({"alpha": ALPHA, "one_minus_alpha": 1 - ALPHA} if rule == "rmsprop" else {})


def rounded(hyper: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers as every contender rounds them."""
    return {name: float(np.float32(value)) if isinstance(value, float) else value for name, value in hyper.items()}


def sample_of(size: int) -> NDArray[np.int64]:
    """Indices of about a million elements: with an odd stride, to meet every vector lane, and the whole ragged end."""
    stride = size // SAMPLES | 1
    return np.union1d(np.arange(0, size, stride), np.arange(max(0, size - 64), size))


@functools.cache
def load_reference() -> ModuleType:
    """rmsprop_gpu/reference.py by its path: importing the package would load Numba into the rivals' processes."""
    path = Path(__file__).parents[1] / "rmsprop_gpu" / "reference.py"
    spec = importlib.util.spec_from_file_location("reference", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
