"""The main job: a small network learns handwritten digits, and the optimizer is timed and checked on the way.

Plain array code over ``xp``, which is NumPy or CuPy. All random numbers come from NumPy, so a seed means the same on
both. scikit-learn, rich and matplotlib (the extra ``demo``) are imported where they are used.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np

from .. import AdaGrad, RMSProp, array_module, backend_of, hyper
from ..extras import extra
from ..kernels import disk
from ..profiling.traffic import bytes_per_element
from .oracle import Oracle

Array: TypeAlias = Any  # of NumPy or CuPy
Params: TypeAlias = dict[str, Array]

SIZES = (64, 128, 64, 10)
LR = {"rmsprop": 3e-3, "adagrad": 3e-2}  # AdaGrad's rate decays by itself: with 3e-3 it ends at 95 %
PLAIN = {"lr", "alpha", "eps", "initial_scale"}  # hyperparameters that the three lines of NumPy also have
LAST = 0.01  # fraction of lr at the end of the cosine
NOISE = 0.2  # drawn again in each epoch and added to the pixels (0 to 1), so that none is memorized


@dataclass(frozen=True)
class Settings:
    """The settings of a run; `hyper` holds the optimizer's hyperparameters that differ from its defaults."""

    device: str = "auto"
    optimizer: str = "rmsprop"
    hyper: Mapping[str, Any] = field(default_factory=dict)
    epochs: int = 60
    batch_size: int = 32
    seed: int = 0
    check: bool = True


@dataclass(frozen=True)
class Epoch:
    """Mean loss of the epoch's minibatches, each before its step, and the accuracy on the test digits."""

    epoch: int
    loss: float
    accuracy: float


# The network


def make_params(xp: ModuleType, rng: np.random.Generator) -> Params:
    """Weights as in He et al. (2015, arXiv:1502.01852), biases 0, all in float32."""
    params = {}
    for i, (n_in, n_out) in enumerate(pairwise(SIZES), 1):
        weight = rng.standard_normal((n_in, n_out)) * math.sqrt(2 / n_in)
        params[f"dense{i}.weight"] = xp.asarray(weight.astype(np.float32))
        params[f"dense{i}.bias"] = xp.zeros(n_out, np.float32)
    return params


def forward(xp: ModuleType, params: Params, images: Array) -> list[Array]:
    """The input of each layer, and finally the logits."""
    layers = len(SIZES) - 1
    values = [images]
    for i in range(1, layers + 1):
        x = values[-1] @ params[f"dense{i}.weight"] + params[f"dense{i}.bias"]
        values.append(xp.maximum(x, 0) if i < layers else x)
    return values


def loss_and_grads(
    xp: ModuleType, params: Params, images: Array, targets: Array, count: int | None = None
) -> tuple[Array, Params]:
    """Cross-entropy of the softmax, summed over the images, and the gradients of its mean.

    If these images are part of a batch, `count` is the size of the whole batch.
    """
    *inputs, logits = forward(xp, params, images)
    shifted = logits - logits.max(axis=1, keepdims=True)
    exps = xp.exp(shifted)
    total = exps.sum(axis=1, keepdims=True)
    loss = (targets * (xp.log(total) - shifted)).sum()

    grads = {}
    delta = (exps / total - targets) / (count or len(images))
    for i in range(len(inputs), 0, -1):
        x = inputs[i - 1]
        grads[f"dense{i}.weight"] = x.T @ delta
        grads[f"dense{i}.bias"] = delta.sum(axis=0)
        if i > 1:
            delta = (delta @ params[f"dense{i}.weight"].T) * (x > 0)
    return loss, {name: grads[name] for name in params}


# The optimizer


def make_optimizer(settings: Settings, params: Params) -> RMSProp | AdaGrad:
    """The optimizer of a run; TypeError or ValueError for a wrong hyperparameter."""
    given: dict[str, Any] = {"lr": LR[settings.optimizer], **settings.hyper}
    return AdaGrad(params, **given) if settings.optimizer == "adagrad" else RMSProp(params, **given)


def cosine(lr: float, steps: int) -> Callable[[int], float]:
    """A schedule: `lr` at the first step, then half a cosine down to a hundredth of it."""

    def cosine_schedule(step: int) -> float:
        return lr * (LAST + (1 - LAST) * (1 + math.cos(math.pi * step / steps)) / 2)

    return cosine_schedule


def bytes_a_step(opt: RMSProp | AdaGrad, params: Params) -> int:
    """The bytes per step according to the model: 20 bytes per element for plain float32."""
    variant = hyper.variant(opt.param_groups[0].hyper(), isinstance(opt, AdaGrad))
    return sum(param.size * bytes_per_element(variant, param.dtype) for param in params.values())


def to_host(array: Array) -> Any:
    """A copy in host memory."""
    return array.get() if hasattr(array, "get") else array.copy()


def three_lines(xp: ModuleType, params: Params, grads: Params, averages: Params, lr: float, group: Any) -> None:
    """A step as written without this package and without switches, to compare our time with."""
    alpha, eps = group.get("alpha"), group["eps"]
    for name, g in grads.items():
        v = averages[name]
        v = averages[name] = v + g**2 if alpha is None else alpha * v + (1 - alpha) * g**2
        params[name] -= lr * g / (xp.sqrt(v) + eps)


# The run


class Run:
    """One training: `epochs` trains, and `summary` gives the results so far, at any time.

    Raises
    ------
    TypeError, ValueError
        For a wrong hyperparameter; RuntimeError for a device that does not work; before anything is loaded or compiled.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings, self.xp = settings, array_module(settings.device)
        self._rng = np.random.default_rng(settings.seed)
        self.params = make_params(self.xp, self._rng)
        self.opt = self._make_optimizer(self.params)
        self.lr = float(self.opt.param_groups[0]["lr"])
        self.oracle = Oracle(self.opt) if settings.check else None
        self.history: list[Epoch] = []
        self._update_times: list[float] = []
        self._plain_times: list[float] = []
        self._group = self.opt.param_groups[0]  # used by the three lines, whatever `opt` becomes
        start = self._group.get("initial_scale", 0.0)
        self._plain = {name: param.copy() for name, param in self.params.items()}
        self._averages = {name: self.xp.full_like(param, start) for name, param in self.params.items()}
        self._kernels, self._compile_time, self._start = "compiled", 0.0, time.perf_counter()

    def _make_optimizer(self, params: Params) -> RMSProp | AdaGrad:
        return make_optimizer(self.settings, params)

    def load(self) -> None:
        """Load the digits: a stratified random fifth of them is kept for testing."""
        with extra("demo"):
            from sklearn.datasets import load_digits
            from sklearn.model_selection import train_test_split
        digits = load_digits()
        images = (digits.data / 16).astype(np.float32)
        train, test, train_labels, test_labels = train_test_split(
            images, digits.target, test_size=0.2, stratify=digits.target, random_state=self.settings.seed
        )
        self._train, self._targets = train, np.eye(SIZES[-1], dtype=np.float32)[train_labels]
        self._test, self._test_labels = self.xp.asarray(test), self.xp.asarray(test_labels)
        self._schedule = cosine(self.lr, math.ceil(len(train) / self.settings.batch_size) * self.settings.epochs)
        self.opt.lr = self._schedule

    @property
    def digits(self) -> tuple[int, int]:
        """How many digits there are to learn from, and how many to test on."""
        return len(self._train), len(self._test)

    def epochs(self) -> Iterator[Epoch]:
        """Train, one epoch at a time."""
        self._compile()
        for epoch in range(1, self.settings.epochs + 1):
            with np.errstate(all="ignore"):  # a diverging run shows in its loss
                done = Epoch(epoch, self._train_epoch(), self._accuracy())
            self.history.append(done)
            yield done

    def _compile(self) -> None:
        """Take a step on copies, so that no step of the run includes compiling."""
        kept = disk.usage().kernels
        start = time.perf_counter()
        copies = {name: param.copy() for name, param in self.params.items()}
        self._make_optimizer(copies).step({name: self.xp.zeros_like(param) for name, param in copies.items()})
        self._synchronize()
        self._compile_time = time.perf_counter() - start
        if disk.folder() is not None:
            self._kernels = "compiled, and kept on disk" if disk.usage().kernels > kept else "found on disk"

    def _train_epoch(self) -> float:
        xp, rng, size = self.xp, self._rng, self.settings.batch_size
        order = rng.permutation(len(self._train))
        noise = NOISE * rng.standard_normal(self._train.shape, dtype=np.float32)
        images, targets = xp.asarray(self._train[order] + noise), xp.asarray(self._targets[order])
        total = xp.zeros((), np.float32)
        for start in range(0, len(order), size):
            batch = slice(start, min(start + size, len(order)))
            mine, count = self._part(batch), batch.stop - batch.start
            loss, grads = loss_and_grads(xp, self.params, images[mine], targets[mine], count)
            total = total + loss  # on the device: a float here would wait for it at every step
            self._step(grads)
        return self._total(float(total)) / len(order)

    # Overridden for ranks, which share the work

    def _part(self, batch: slice) -> slice:
        """The rows of a batch that are used here."""
        return batch

    def _total(self, loss: float) -> float:
        """The loss, summed over all ranks."""
        return loss

    def _seen(self, grads: Params) -> Params:
        """The gradients that a step used."""
        return {name: to_host(grad) for name, grad in grads.items()}

    def _step(self, grads: Params) -> None:
        oracle, step = self.oracle, self.opt.steps
        before = {name: to_host(param) for name, param in self.params.items()} if oracle else {}
        self._synchronize()
        start = time.perf_counter()
        self.opt.step(grads)
        self._synchronize()
        self._update_times.append(time.perf_counter() - start)
        self._time_three_lines(grads, step)
        seen = self._seen(grads) if self.settings.check else {}
        if oracle:
            after = {name: to_host(param) for name, param in self.params.items()}
            oracle.compare(before, after, seen, self._schedule(step), step)

    def _time_three_lines(self, grads: Params, step: int) -> None:
        start = time.perf_counter()
        three_lines(self.xp, self._plain, grads, self._averages, self._schedule(step), self._group)
        self._synchronize()
        self._plain_times.append(time.perf_counter() - start)

    def _synchronize(self) -> None:
        if self.xp is not np:
            self.xp.cuda.get_current_stream().synchronize()

    def _accuracy(self) -> float:
        read = forward(self.xp, self.params, self._test)[-1].argmax(axis=1)
        return float((read == self._test_labels).mean())

    def summary(self) -> dict[str, Any]:
        """Everything about the run so far, in plain numbers, strings, lists and dicts."""
        times, last, moved = self._update_times, self.history[-1], bytes_a_step(self.opt, self.params)
        group = {name: x for name, x in self.opt.param_groups[0].items() if name != "params"}
        return {
            "optimizer": type(self.opt).__name__,
            "hyperparameters": {**group, "lr": self.lr},
            "device": backend_of(next(iter(self.params.values()))),
            "seed": self.settings.seed,
            "batch_size": self.settings.batch_size,
            "epochs": len(self.history),
            "epochs_wanted": self.settings.epochs,
            "digits": dict(zip(("train", "test"), self.digits, strict=True)),
            "loss": last.loss,
            "accuracy": last.accuracy,
            "parameters": sum(param.size for param in self.params.values()),
            "tensors": len(self.params),
            "steps": len(times),
            "seconds": time.perf_counter() - self._start,
            "compile_seconds": self._compile_time,
            "kernels": self._kernels,
            "update_seconds": sum(times),
            "update_seconds_median": statistics.median(times),
            "three_lines_seconds_median": statistics.median(self._plain_times) if self._plain_times else None,
            "switches": sorted(set(self.settings.hyper) - PLAIN),  # those that the three lines do not have
            "bytes_a_step": moved,
            "bytes_moved": moved * len(times),
            "gb_per_second": moved * len(times) / sum(times) / 1e9,
            "deviation": self.oracle.summary(len(times)) if self.oracle else None,
            "history": [asdict(epoch) for epoch in self.history],
        }
