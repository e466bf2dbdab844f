"""``python -m benchmarks.in_torch``: what the class for torch costs besides its pass over memory, and in an iteration.

It measures steps whose gradients stay at the same addresses, or move each time, and the first step after every
parameter was replaced; what a step allocates; and whole iterations of small networks with torch's class and with ours.
It uses one thread and one process per class and round, in turns; results go to ``results/in-torch.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import machine, versions
from benchmarks.workloads import SHAPES

RESULTS = Path(__file__).with_name("results")
CLASSES = ("torch.optim.RMSprop", "rmsprop_gpu.torch.RMSprop")
TENSORS, ELEMENTS = 161, 64  # as many as ResNet-50 has, and small
ROUNDS, REPEATS = 5, 300


def main() -> None:
    """Measure and write; with ``--of CLASS`` measure one class and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--of", choices=CLASSES)
    one = parser.parse_args().of
    if one:
        print(json.dumps(measured(one)))
        return
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in CLASSES}
    start = machine()
    for _ in range(ROUNDS):
        for name in CLASSES:
            command = [sys.executable, "-m", "benchmarks.in_torch", "--of", name]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rounds[name].append(json.loads(done.stdout))
    result = {
        "command": "python -m benchmarks.in_torch",
        "machine": start,
        "versions": versions("cpu"),
        "rounds": ROUNDS,
        "medians": {name: medians(found) for name, found in rounds.items()},
    }
    (RESULTS / "in-torch.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "in-torch.md").write_text(page(result))
    print(page(result))


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    """Over the rounds."""
    return {key: float(np.median([one[key] for one in rounds])) for key in rounds[0]}


def page(result: Mapping[str, Any]) -> str:
    """The result in Markdown."""
    m, v = result["machine"], result["versions"]
    torchs, ours = (result["medians"][name] for name in CLASSES)
    lines = [
        "# In torch",
        "",
        f"Microseconds, or bytes, on one thread; medians of {result['rounds']} processes, in turns: "
        f"`{result['command']}`.",
        f"{m['cpu']}, {m['cores']} cores, {m['os']}, load at the start {m['load_at_start']}; python {v['python']}, "
        f"torch {v['torch']}, numba {v['numba']}.",
        "",
        "| | " + " | ".join(CLASSES) + " | ratio |",
        "| --- | --- | --- | --- |",
    ]
    for key, value in ours.items():
        ratio = f"{torchs[key] / value:.3g}" if value and key.startswith(("a step", "an iteration")) else ""
        lines.append(f"| {key} | {torchs[key]:,.4g} | {value:,.4g} | {ratio} |")
    return "\n".join(lines) + "\n"


# One class, in a process of its own


def measured(name: str) -> dict[str, float]:
    """The figures of one class."""
    import torch

    torch.set_num_threads(1)
    cls = importlib.import_module(name.rpartition(".")[0]).RMSprop
    same, other, anew = host_costs(cls)
    return {
        f"a step of {TENSORS} tensors of {ELEMENTS} elements": same,
        "gradients at other addresses, more a tensor": (other - same) / TENSORS,
        "parameters at other addresses, more a tensor": (anew - same) / TENSORS,
        "ResNet-50: the most bytes that torch allocates in a step": allocated(cls),
        "an iteration of an agent's network, 4-64-64-2, batch 64": iteration(cls, agent()),
        "a step of the agent's network": iteration(cls, agent(), step_alone=True),
        "an iteration of a CNN over digits, 26,090 parameters, batch 64": iteration(cls, cnn()),
        "a step of the CNN": iteration(cls, cnn(), step_alone=True),
    }


def microseconds(call: Callable[[], object], between: Callable[[], object], repeats: int = REPEATS) -> float:
    """The median of a call, with something untimed before each."""
    found = []
    for _ in range(repeats + 20):  # the first warm up
        between()
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return 1e6 * float(np.median(found[20:]))


def host_costs(cls: Any) -> tuple[float, float, float]:
    """A step over small tensors: with the same gradients, with others each time, and with parameters that moved."""
    import torch

    params = [torch.nn.Parameter(torch.ones(ELEMENTS)) for _ in range(TENSORS)]
    grads = [[torch.ones(ELEMENTS) for _ in params] for _ in range(2)]
    opt = cls(params, momentum=0.9)

    def give(which: int) -> None:
        for p, g in zip(params, grads[which], strict=True):
            p.grad = g

    turn = iter(range(10**9))
    give(0)
    same = microseconds(opt.step, lambda: None)
    other = microseconds(opt.step, lambda: give(next(turn) % 2))

    def move() -> None:
        for p in params:
            p.data = p.data.clone()

    return same, other, microseconds(opt.step, move, 30)


def allocated(cls: Any) -> float:
    """The most bytes of additional tensors alive at one time, in a step of ResNet-50."""
    import torch

    params = [torch.nn.Parameter(torch.ones(shape)) for shape in SHAPES["resnet50"]["shapes"]]
    for p in params:
        p.grad = torch.ones_like(p)
    opt = cls(params, momentum=0.9)
    opt.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        opt.step()
    alive = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            most = max(most, alive)
    return float(most)


def agent() -> tuple[Any, Any, Any]:
    """A network typical of agents, with states and targets."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))
    return model, torch.randn(64, 4), torch.randn(64, 2)


def cnn() -> tuple[Any, Any, Any]:
    """The network of ``notebooks/04_in_torch.ipynb``, with images, and targets for its ten outputs."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    layers: list[Any] = []
    for n_in, n_out in ((1, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(n_in, n_out, 3, padding=1), nn.BatchNorm2d(n_out), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if n_in > 1 else []
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 10)), torch.randn(64, 1, 8, 8), torch.randn(64, 10)


def iteration(cls: Any, task: tuple[Any, Any, Any], *, step_alone: bool = False) -> float:
    """Forward, backward, step, and the gradients set to None; or the step alone."""
    from torch.nn.functional import mse_loss

    model, given, wanted = task
    opt = cls(model.parameters(), lr=1e-4)

    def backward() -> None:
        opt.zero_grad()
        mse_loss(model(given), wanted).backward()

    def whole() -> None:
        backward()
        opt.step()

    return microseconds(opt.step, backward) if step_alone else microseconds(whole, lambda: None)


if __name__ == "__main__":
    main()
