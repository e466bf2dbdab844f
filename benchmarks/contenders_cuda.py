"""Contenders on CuPy arrays: this package, CuPy's two ways to a fused kernel, and the limit, a copy on the device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.contenders_base import (
    ALPHA,
    EPS,
    LR,
    Array,
    Contender,
    Running,
    Task,
    flat,
    in_fewer_bytes,
    schedule,
    streams,
)
from benchmarks.workloads import COPY, OURS


def build_rmsprop_gpu(task: Task) -> Running:
    """This package on CuPy arrays."""
    from rmsprop_gpu import RMSProp

    params, grads = on_device(task.params), on_device(task.grads)
    lr = schedule if task.scheduled else LR
    opt = RMSProp(task.grouped(params), lr=lr, alpha=ALPHA, eps=EPS, **task.hyper)
    entries = [[grad] for grad in grads] if task.groups else grads
    return on_cupy(functools.partial(opt.step, entries), params, grads)


def build_fuse(task: Task) -> Running:
    """NumPy's lines under cupy.fuse: one launch a tensor."""
    import cupy

    @cupy.fuse()
    def update(p: Any, g: Any, v: Any, lr: Any, alpha: Any, beta: Any, eps: Any) -> None:
        v *= alpha
        v += beta * g * g
        p -= lr * g / (cupy.sqrt(v) + eps)

    return one_launch_a_tensor(task, update)


def build_elementwise(task: Task) -> Running:
    """A kernel of three lines of C: one launch a tensor."""
    import cupy

    kernel = cupy.ElementwiseKernel(
        "float32 g, float32 lr, float32 alpha, float32 beta, float32 eps",
        "float32 p, float32 v",
        "v = alpha * v + beta * g * g; p -= lr * g / (sqrtf(v) + eps);",
        "rmsprop",
    )

    def update(p: Any, g: Any, v: Any, lr: Any, alpha: Any, beta: Any, eps: Any) -> None:
        kernel(g, lr, alpha, beta, eps, p, v)

    return one_launch_a_tensor(task, update)


def one_launch_a_tensor(task: Task, update: Callable[..., None]) -> Running:
    """A Python loop over the tensors."""
    import cupy

    task.refuse_beyond()
    params, grads = on_device(task.params), on_device(task.grads)
    square_avgs = [cupy.zeros_like(param) for param in params]
    numbers = [np.float32(value) for value in (LR, ALPHA, 1 - ALPHA, EPS)]  # Python's would make it float64

    def step() -> None:
        for p, g, v in zip(params, grads, square_avgs, strict=True):
            update(p, g, v, *numbers)

    return on_cupy(step, params, grads)


def build_copy(task: Task) -> Running:
    """A copy on the device that moves as many bytes as our streams, half of them read and half written."""
    import cupy

    size = task.size * task.bytes_per_element // 2
    source, target = cupy.zeros(size, np.uint8), cupy.zeros(size, np.uint8)
    step = functools.partial(cupy.copyto, target, source)
    return on_cupy(step, [], [])


def on_device(arrays: list[Array]) -> list[Any]:
    """Copies on the current device."""
    import cupy

    return [cupy.asarray(array) for array in arrays]


def on_cupy(step: Callable[[], object], params: list[Any], grads: list[Any]) -> Running:
    """A step over these arrays."""
    import cupy

    sync = cupy.cuda.Device().synchronize

    def set_grads(values: list[Array]) -> None:
        for grad, value in zip(grads, values, strict=True):
            grad.set(value)

    return Running(
        step=step,
        set_grads=set_grads,
        read_params=lambda: flat([param.get() for param in params]),
        sync=sync,
        extra_memory=functools.partial(rise, step, sync),
    )


def rise(step: Callable[[], object], sync: Callable[[], object]) -> int:
    """By how many bytes CuPy's pool, emptied of what nobody uses, grows during a step."""
    import cupy

    pool = cupy.get_default_memory_pool()
    sync()
    pool.free_all_blocks()
    before = pool.total_bytes()
    step()
    sync()
    return pool.total_bytes() - before


RMSPROP_GPU = Contender(OURS, build_rmsprop_gpu, traffic=streams)
STORED = in_fewer_bytes(build_rmsprop_gpu)
FUSE = Contender("cupy fuse", build_fuse, traffic=streams)
ELEMENTWISE = Contender("cupy elementwise", build_elementwise, traffic=streams)
DEVICE_COPY = Contender(COPY, build_copy, rule=None, traffic=streams)
