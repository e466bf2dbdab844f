"""torch's optimizers, on either device: RMSprop in three forms, and Adagrad in the fused form that RMSprop lacks.

Beside them, over the same tensors, this package's class and those of bitsandbytes.
"""

from __future__ import annotations

import functools
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from benchmarks.contenders_base import ALPHA, EPS, LR, Array, Contender, Running, Task, Unavailable, streams
from benchmarks.workloads import BITSANDBYTES, COMPILED, DROP_IN, FUSED, TORCH, Workload

OF_TORCH = ("weight_decay", "momentum", "centered", "maximize")


def build(task: Task, make: Callable[..., Any], device: str = "cpu", compiled: bool = False) -> Running:
    """An optimizer of torch. Copies, so that torch allocates (and aligns) as it does for everybody."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise Unavailable("torch finds no CUDA device")
    torch.set_num_threads(task.threads)
    params = [torch.nn.Parameter(torch.from_numpy(param).to(device, copy=True)) for param in task.params]
    for param, grad in zip(params, task.grads, strict=True):
        param.grad = torch.from_numpy(grad).to(device, copy=True)
    opt = make(params, task)

    def set_grads(values: list[Array]) -> None:
        for param, value in zip(params, values, strict=True):
            param.grad.copy_(torch.from_numpy(value))

    most = None if make is drop_in else task.hyper.get("global_clipnorm")
    norms = [0.0]

    def clip_and_step() -> None:
        norms[0] = torch.nn.utils.clip_grad_norm_(params, most)
        opt.step()

    step = clip_and_step if most else scheduled(opt) if task.scheduled else opt.step
    running = Running(
        step=compile_step(opt) if compiled else step,
        last_norm=(lambda: float(norms[0])) if most else None,
        set_grads=set_grads,
        read_params=lambda: torch.cat([param.detach().flatten() for param in params]).cpu().numpy(),
    )
    if device == "cpu":
        return running
    return replace(running, sync=torch.cuda.synchronize, extra_memory=functools.partial(rise, running.step))


def scheduled(opt: Any) -> Callable[[], None]:
    """A step, and that of torch's scheduler behind it."""
    import torch

    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1.0)

    def step() -> None:
        opt.step()
        scheduler.step()

    return step


def rmsprop(params: list[Any], task: Task, foreach: bool | None = None) -> Any:
    """torch.optim.RMSprop; the form is torch's choice by default."""
    import torch

    task.refuse_beyond((*OF_TORCH, "global_clipnorm"))
    own = {name: value for name, value in task.hyper.items() if name != "global_clipnorm"}
    return torch.optim.RMSprop(task.grouped(params), lr=LR, alpha=ALPHA, eps=EPS, foreach=foreach, **own)


def drop_in(params: list[Any], task: Task) -> Any:
    """This package's class for torch."""
    from rmsprop_gpu.torch import RMSprop

    task.refuse_beyond((*OF_TORCH, "global_clipnorm"))
    return RMSprop(task.grouped(params), lr=LR, alpha=ALPHA, eps=EPS, **task.hyper)


def fused_adagrad(params: list[Any], task: Task) -> Any:
    """torch.optim.Adagrad in one pass: another rule with the same streams."""
    import torch

    task.refuse_beyond(("weight_decay", "maximize"))
    return torch.optim.Adagrad(params, lr=LR, eps=EPS, fused=True, **task.hyper)


def of_bitsandbytes(params: list[Any], task: Task, bits: int) -> Any:
    """Its RMSprop; with 8 bits the second moment is rounded to nearest, blockwise, on a signed map."""
    import bitsandbytes

    task.refuse_beyond(("weight_decay",))
    return bitsandbytes.optim.RMSprop(task.grouped(params), lr=LR, alpha=ALPHA, eps=EPS, optim_bits=bits, **task.hyper)


def compile_step(opt: Any) -> Callable[[], object]:
    """torch.compile of the step, which wants a C++ compiler."""
    import torch

    torch._logging.set_logs(all=logging.ERROR)  # it warns that the step's entry in torch's own profiler is left out

    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise Unavailable(f"no {compiler} on the PATH")
    return torch.compile(opt.step)


def rise(step: Callable[[], object]) -> int:
    """By how many bytes the tensors on the device grow during a step."""
    import torch

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def traffic(workload: Workload) -> int:
    """RMSprop's passes, of four bytes, as _multi_tensor_rmsprop and _single_tensor_rmsprop make them.

    (torch/optim/rmsprop.py, 2.13.) Plain: mul_ 2, addcmul_ 3, sqrt 2, add_ 2, addcdiv_ 4.
    """
    hyper = workload.hyper
    passes = 2 + 3 + 2 + 2 + 4
    passes += 1 + 2 if hyper.get("global_clipnorm") else 0  # clip_grad_norm_: the norm, and mul_
    passes += 2 if hyper.get("maximize") else 0  # neg
    passes += 3 if hyper.get("weight_decay") else 0  # add
    passes += 3 + 3 if hyper.get("centered") else 0  # lerp_ and addcmul
    passes += 2 + 3 if hyper.get("momentum") else 0  # mul_ and add_; the addcdiv_ goes to the buffer
    return 4 * passes


def on_cuda(contender: Contender) -> Contender:
    """The same on the device."""
    return replace(contender, build=functools.partial(contender.build, device="cuda"))


FOREACH, FOR_LOOP = (
    Contender(name, functools.partial(build, make=functools.partial(rmsprop, foreach=foreach)), traffic=traffic)
    for name, foreach in zip(TORCH, (True, False), strict=True)
)
OURS_IN_TORCH = Contender(DROP_IN, functools.partial(build, make=drop_in), traffic=streams)
COMPILE = Contender(COMPILED, functools.partial(build, make=rmsprop, compiled=True))
IN_32_BITS, IN_8_BITS = (
    Contender(name, functools.partial(build, make=functools.partial(of_bitsandbytes, bits=bits)), rule=rule)
    for name, bits, rule in zip(BITSANDBYTES, (32, 8), ("rmsprop", None), strict=True)
)
ADAGRAD = Contender(FUSED, functools.partial(build, make=fused_adagrad), rule="adagrad", traffic=streams)
