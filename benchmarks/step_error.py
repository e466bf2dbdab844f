"""``python -m benchmarks.step_error``: what storing the second moment in fewer bytes does to steps and to trainings.

Every format sees the gradients that a float32 state sees, and its steps are compared with those of the float32 state.
Whole trainings are compared seed by seed. Nothing is timed; results go to ``results/step-error.json`` and ``.md``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.machine import versions
from benchmarks.report import table
from rmsprop_gpu import RMSProp
from rmsprop_gpu.demo.train import Params, Run, Settings, loss_and_grads, make_params

Array = NDArray[np.float32]
Gradients = list[Array]

RESULTS = Path(__file__).with_name("results")
ALPHAS = (0.9, 0.99, 0.999)
SIZE, STEPS, TRAINED_STEPS, BIAS_STEPS = 4096, 5000, 1500, 10_000
SEEDS, EPOCHS, CNN_STEPS, BATCH = 16, 20, 900, 32
EXACT, NEAREST, OTHERS = "float32", "8 bits to nearest", "bitsandbytes, 8 bits"
CODED = ("uint16", "uint8")

# What the project wants: by alpha the largest rms error of steps, and how far the mean step may be from float32's.
WANTED = {
    "uint16": dict(zip(ALPHAS, (0.002, 0.006, 0.015), strict=True)),
    "uint8": dict(zip(ALPHAS, (0.04, 0.11, 0.12), strict=True)),
}
WANTED_RATIO = {"uint16": 0.005, "uint8": 0.02}
DECAYING = {"uint16": (0.005, 0.03), "uint8": (0.06, math.inf)}  # the same where gradients decay, at every alpha
WIDER = "eight decades"  # of scales within a block: more than the window of uint8 holds


class ToNearest(RMSProp):
    """RMSProp whose float32 averages are rounded to nearest after each step, on the grid of the uint8 codes."""

    def step(self, grads: Any) -> None:
        """Update, and round."""
        super().step(grads)
        for state in self.state.values():
            bits = state["square_avg"].view(np.uint32)
            bits += np.uint32(1 << 19)
            bits &= np.uint32(0xFFF0_0000)


# Gradients


def streams() -> dict[str, Callable[[], Iterator[Gradients]]]:
    """Functions that make a stream of gradients, the same each time, by name."""
    return {
        "narrow": lambda: normal(np.ones(SIZE)),
        "four decades": lambda: normal(spread(4)),
        WIDER: lambda: normal(spread(8)),
        "sparse": lambda: (_sparse(g, step) for step, g in enumerate(normal(np.ones(SIZE)))),
        "constant": constant,
        "decaying": lambda: (
            [g * np.float32(0.998**step) for g in grads] for step, grads in enumerate(normal(np.ones(SIZE)))
        ),
        "digits": digits,
        "a small CNN": cnn,
    }


def normal(scale: NDArray[np.float64], steps: int = STEPS) -> Iterator[Gradients]:
    """Normally distributed, each element on a scale of its own."""
    rng = np.random.default_rng(0)
    for _ in range(steps):
        yield [rng.standard_normal(len(scale), dtype=np.float32) * scale.astype(np.float32)]


def spread(decades: float) -> NDArray[np.float64]:
    """Scales of elements over this many decades, in random order, so that neighbours differ as much as any."""
    return 10 ** np.random.default_rng(1).uniform(-decades / 2, decades / 2, SIZE)


def _sparse(grads: Gradients, step: int) -> Gradients:
    """Keep one in a hundred."""
    left = np.random.default_rng((2, step)).random(SIZE) < 0.01
    return [grad * left.astype(np.float32) for grad in grads]


def constant() -> Iterator[Gradients]:
    """The same gradient in every step, another for each element."""
    (grad,) = next(normal(np.ones(SIZE)))
    for _ in range(STEPS):
        yield [grad]


def digits() -> Iterator[Gradients]:
    """Gradients of the demo's network, trained with a float32 state."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images, targets = (data.data / 16).astype(np.float32), np.eye(10, dtype=np.float32)[data.target]
    rng = np.random.default_rng(3)
    params = make_params(np, rng)
    opt = RMSProp(params, lr=1e-3, alpha=0.99)
    for _ in range(TRAINED_STEPS):
        some = rng.integers(0, len(images), BATCH)
        _, grads = loss_and_grads(np, params, images[some], targets[some])
        yield list(grads.values())
        opt.step(grads)


def cnn() -> Iterator[Gradients]:
    """Gradients of two convolutions and a dense layer that learn the digits, trained with a float32 state."""
    for model, _ in cnn_steps(0, {"alpha": 0.99}, TRAINED_STEPS):
        yield [param.grad.numpy() for param in model.parameters()]


def cnn_steps(seed: int, arguments: dict[str, Any], steps: int) -> Iterator[tuple[Any, float]]:
    """The model with the gradients of each step, before they are used, and the loss of the minibatch."""
    import torch
    from sklearn.datasets import load_digits
    from torch import nn

    from rmsprop_gpu.torch import RMSprop

    torch.manual_seed(seed)
    data = load_digits()
    images = torch.from_numpy((data.data / 16).astype(np.float32)).reshape(-1, 1, 8, 8)
    targets = torch.from_numpy(data.target)
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)),
    )
    opt = RMSprop(model.parameters(), lr=1e-3, **arguments)
    for _ in range(steps):
        some = torch.randint(0, len(images), (BATCH,))
        opt.zero_grad()
        loss = nn.functional.cross_entropy(model(images[some]), targets[some])
        loss.backward()
        yield model, loss.item()
        opt.step()


# Steps


@dataclass
class Compared:
    """Steps beside those of a float32 state."""

    length: float = 0.0
    exact_length: float = 0.0
    square_error: float = 0.0
    count: int = 0

    def add(self, step: Array, exact: Array) -> None:
        """One step of all elements."""
        seen = exact != 0
        self.length += float(np.abs(step, dtype=np.float64).sum())
        self.exact_length += float(np.abs(exact, dtype=np.float64).sum())
        error = step[seen] / exact[seen].astype(np.float64) - 1
        self.square_error += float(error @ error)
        self.count += error.size

    def found(self) -> dict[str, float]:
        """The ratio of the mean steps, and the root of the mean square of the relative errors."""
        return {"ratio": self.length / self.exact_length, "rms": math.sqrt(self.square_error / self.count)}


@dataclass
class Contender:
    """An optimizer over parameters that are 0 before each step, so that their values after it are the step."""

    opt: Any
    params: list[Any]
    compared: Compared = field(default_factory=Compared)

    def step(self, grads: Gradients) -> Array:
        """The step of all tensors, concatenated."""
        for param in self.params:
            param[...] = 0
        self.opt.step(grads)
        return -np.concatenate([np.ravel(param) for param in self.params])


class OfBitsandbytes:
    """bitsandbytes' RMSprop with 8 bits, over torch tensors that share memory with our arrays."""

    def __init__(self, params: list[Array], alpha: float) -> None:
        import bitsandbytes
        import torch

        self._torch = torch
        self._params = [torch.nn.Parameter(torch.from_numpy(param)) for param in params]
        self._opt = bitsandbytes.optim.RMSprop8bit(self._params, lr=1.0, alpha=alpha, eps=1e-8)

    def step(self, grads: Gradients) -> None:
        """Update in place."""
        for param, grad in zip(self._params, grads, strict=True):
            param.grad = self._torch.from_numpy(grad)
        self._opt.step()


def contenders(shapes: list[tuple[int, ...]], alpha: float) -> dict[str, Contender]:
    """Optimizers by format, float32 first; bitsandbytes if it is installed."""
    made: dict[str, Callable[[list[Array]], Any]] = {
        EXACT: lambda params: RMSProp(params, lr=1.0, alpha=alpha),
        **{
            name: lambda params, name=name: RMSProp(params, lr=1.0, alpha=alpha, square_avg_dtype=name)
            for name in CODED
        },
        NEAREST: lambda params: ToNearest(params, lr=1.0, alpha=alpha),
        OTHERS: lambda params: OfBitsandbytes(params, alpha),
    }
    found = {}
    for name, make in made.items():
        params = [np.zeros(shape, np.float32) for shape in shapes]
        try:
            found[name] = Contender(make(params), params)
        except ImportError:
            continue
    return found


def step_errors(stream: Callable[[], Iterator[Gradients]]) -> dict[str, dict[str, dict[str, float]]]:
    """By alpha and format."""
    shapes = [grad.shape for grad in next(stream())]
    by_alpha = {alpha: contenders(shapes, alpha) for alpha in ALPHAS}
    for grads in stream():
        for formats in by_alpha.values():
            exact = formats[EXACT].step(grads)
            for name, contender in formats.items():
                if name != EXACT:
                    contender.compared.add(contender.step(grads), exact)
    return {
        str(alpha): {name: x.compared.found() for name, x in formats.items() if name != EXACT}
        for alpha, formats in by_alpha.items()
    }


def biases() -> dict[str, dict[str, dict[str, float]]]:
    """How far v is from that of float32 on average, and the standard error of that, by alpha and format.

    The mean is over elements and every hundredth step; elements are independent of each other.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for alpha in ALPHAS:
        formats = contenders([(SIZE,)], alpha)
        formats = {name: formats[name] for name in (EXACT, *CODED)}
        sums = {name: np.zeros(SIZE) for name in CODED}
        for step, grads in enumerate(normal(np.ones(SIZE), BIAS_STEPS), 1):
            for contender in formats.values():
                contender.step(grads)
            if step % 100 == 0:
                for name, total in sums.items():
                    v, exact = (x.opt.decoded_state(0)["square_avg"] for x in (formats[name], formats[EXACT]))
                    np.add(total, v / exact.astype(np.float64) - 1, out=total)
        means = {name: total / (BIAS_STEPS // 100) for name, total in sums.items()}
        found[str(alpha)] = {
            name: {"bias": float(x.mean()), "standard_error": float(x.std(ddof=1) / math.sqrt(SIZE))}
            for name, x in means.items()
        }
    return found


# Trainings


class ToNearestRun(Run):
    """The demo's run with a float32 state that is rounded to nearest."""

    def _make_optimizer(self, params: Params) -> RMSProp:
        return ToNearest(params, **self.settings.hyper)


def dense_loss(name: str, alpha: float, seed: int) -> float:
    """The loss of the demo's network in its last epoch."""
    hyper: dict[str, Any] = {"lr": 1e-3, "alpha": alpha}
    if name in CODED:
        hyper["square_avg_dtype"] = name
    make = ToNearestRun if name == NEAREST else Run
    run = make(Settings(device="cpu", hyper=hyper, epochs=EPOCHS, seed=seed, check=False))
    run.load()
    *_, last = run.epochs()
    return last.loss


def cnn_loss(name: str, alpha: float, seed: int) -> float:
    """The mean loss of the CNN over its last hundred minibatches."""
    arguments: dict[str, Any] = {"alpha": alpha, **({"square_avg_dtype": name} if name in CODED else {})}
    losses = [loss for _, loss in cnn_steps(seed, arguments, CNN_STEPS)]
    return float(np.mean(losses[-100:]))


TRAININGS = {"digits": (dense_loss, (*CODED, NEAREST)), "a small CNN": (cnn_loss, CODED)}


def trainings() -> dict[str, dict[str, dict[str, list[float]]]]:
    """By network, alpha and format the loss of each seed."""
    return {
        network: {
            str(alpha): {name: [loss(name, alpha, seed) for seed in range(SEEDS)] for name in (EXACT, *names)}
            for alpha in ALPHAS
        }
        for network, (loss, names) in TRAININGS.items()
    }


# The page


def main() -> None:
    """Compare and write."""
    result: dict[str, Any] = {"versions": versions("cpu"), "steps": {}}
    for name, stream in streams().items():
        result["steps"][name] = step_errors(stream)
        print(name, flush=True)
    result["bias"] = biases()
    result["trainings"] = trainings()
    text = page(result)
    (RESULTS / "step-error.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "step-error.md").write_text(text)
    print(text)


def page(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    said = ", ".join(f"{name} {x}" for name, x in result["versions"].items() if x and name != "gcc")
    lines = [
        "# Steps with a second moment of fewer bytes",
        "",
        f"`python -m benchmarks.step_error`; {said}. Nothing here is a time.",
        "",
        f"Every format sees the same gradients as a float32 state: {SIZE:,} elements over {STEPS:,} steps, or those of "
        f"a network over {TRAINED_STEPS:,} steps. Of each format the ratio of its mean step to that of float32, and in "
        f"brackets the root mean square of its relative error. *{NEAREST}* is the grid of `uint8`, rounded to nearest; "
        f"*{OTHERS}* is that library's class. Figures outside what the project wants are bold.",
        "",
        *_steps_table(result["steps"]),
        "",
        "## The average itself",
        "",
        f"How far `square_avg` is from float32's on average over {BIAS_STEPS:,} steps of narrow gradients, in standard "
        "errors of that average; within 1 is wanted.",
        "",
        *_bias_table(result["bias"]),
        "",
        "## Trainings",
        "",
        f"The mean loss at the end over {SEEDS} seeds. In brackets, paired by seed, how far it is from that of a "
        "float32 state: the mean and its standard error. Of uint16 at most two standard errors are wanted. The demo's "
        f"network learns the digits in {EPOCHS} epochs, the small CNN in {CNN_STEPS} steps.",
        "",
        *_trainings_table(result["trainings"]),
    ]
    return "\n".join(lines) + "\n"


def _steps_table(steps: dict[str, dict[str, dict[str, dict[str, float]]]]) -> list[str]:
    names = list(next(iter(next(iter(steps.values())).values())))
    rows = []
    for stream, by_alpha in steps.items():
        for alpha, formats in by_alpha.items():
            rows.append((stream, alpha, *(_step_cell(stream, float(alpha), name, formats[name]) for name in names)))
    return table(("gradients", "alpha", *names), rows)


def _step_cell(stream: str, alpha: float, name: str, found: dict[str, float]) -> str:
    said = f"{found['ratio']:.3f} ({found['rms']:.2g})"
    if name not in CODED:
        return said
    off, rms = DECAYING[name] if stream == "decaying" else (WANTED_RATIO[name], WANTED[name][alpha])
    # Rounded as they are wanted: 1.00 is from 0.995 to 1.005.
    return said if abs(found["ratio"] - 1) <= off + 1e-9 and found["rms"] <= rms else f"**{said}**"


def _bias_table(bias: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    rows = []
    for alpha, formats in bias.items():
        cells = []
        for found in formats.values():
            errors = found["bias"] / found["standard_error"]
            said = f"{errors:+.2f} ({found['bias']:+.1e})"
            cells.append(said if abs(errors) <= 1 else f"**{said}**")
        rows.append((alpha, *cells))
    return table(("alpha", *CODED), rows)


def _trainings_table(trainings: dict[str, dict[str, dict[str, list[float]]]]) -> list[str]:
    rows = []
    for network, by_alpha in trainings.items():
        for alpha, formats in by_alpha.items():
            exact, cells = np.array(formats[EXACT]), []
            for name in (*CODED, NEAREST):
                if name not in formats:
                    cells.append("")
                    continue
                losses = np.array(formats[name])
                off = losses - exact
                mean, error = off.mean(), off.std(ddof=1) / math.sqrt(len(off))
                said = f"{losses.mean():.4f} ({mean:+.4f} ± {error:.4f})"
                cells.append(f"**{said}**" if name == "uint16" and abs(mean) > 2 * error else said)
            rows.append((network, alpha, f"{exact.mean():.4f}", *cells))
    return table(("network", "alpha", EXACT, *CODED, NEAREST), rows)


if __name__ == "__main__":
    main()
