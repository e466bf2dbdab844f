"""Contenders on NumPy arrays: this package, NumPy, numexpr, and the two limits in C.

Libraries are imported inside the functions, in the contender's own process.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.contenders_base import (
    ALPHA,
    EPS,
    LR,
    Array,
    Contender,
    Running,
    Task,
    Unavailable,
    fill,
    flat,
    in_fewer_bytes,
    schedule,
    streams,
)
from benchmarks.workloads import ASSIGNED, C_OPENMP, COPY, OURS, PLAIN, VIEWS, Workload

C_SOURCE = Path(__file__).with_name("rmsprop.c")
C_COMPILE = ("gcc", "-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")


def build_rmsprop_gpu(task: Task, together: bool = False, plain: bool = False, assigned: bool = False) -> Running:
    """This package on NumPy arrays, each by itself, or all of them views of two large ones."""
    import numba

    from rmsprop_gpu import RMSProp

    numba.set_num_threads(task.threads)
    copy = views if together else copies
    params, grads = copy(task.params), copy(task.grads)
    lr = schedule if task.scheduled and not plain and not assigned else LR
    entries = [[grad] for grad in grads] if task.groups else grads
    opt = RMSProp(task.grouped(params), lr=lr, alpha=ALPHA, eps=EPS, **({} if plain else task.hyper))

    def assign_and_step() -> None:
        opt.lr = LR
        opt.step(entries)

    step = assign_and_step if assigned else functools.partial(opt.step, entries)
    return on_numpy(step, params, grads)


def build_numpy(task: Task) -> Running:
    """RMSProp as people write it."""
    task.refuse_beyond()
    params, grads = copies(task.params), copies(task.grads)
    square_avgs = [np.zeros_like(param) for param in params]

    def update(p: Array, g: Array, v: Array) -> None:
        v *= ALPHA
        v += (1 - ALPHA) * g * g
        p -= LR * g / (np.sqrt(v) + EPS)

    def step() -> None:
        for p, g, v in zip(params, grads, square_avgs, strict=True):
            update(p, g, v)

    return on_numpy(step, params, grads)


def build_numexpr(task: Task) -> Running:
    """RMSProp as two expressions, each of which numexpr evaluates in blocks on all threads."""
    import numexpr

    task.refuse_beyond()
    numexpr.set_num_threads(task.threads)
    params, grads = copies(task.params), copies(task.grads)
    square_avgs = [np.zeros_like(param) for param in params]
    scalars = {"lr": LR, "alpha": ALPHA, "beta": 1 - ALPHA, "eps": EPS}
    numbers = {name: np.float32(value) for name, value in scalars.items()}  # a Python float would make it float64
    names = [{"p": p, "g": g, "v": v, **numbers} for p, g, v in zip(params, grads, square_avgs, strict=True)]

    def step() -> None:
        for arrays in names:
            numexpr.evaluate("alpha * v + beta * g * g", arrays, out=arrays["v"])
            numexpr.evaluate("p - lr * g / (sqrt(v) + eps)", arrays, out=arrays["p"])

    return on_numpy(step, params, grads)


def build_c(task: Task) -> Running:
    """rmsprop.c over one flat array, whatever the shapes. OMP_NUM_THREADS, set by the parent, gives it the threads."""
    task.refuse_beyond()
    param, grad = flat(task.params), flat(task.grads)
    square_avg = np.zeros_like(param)
    addresses = [ctypes.c_void_p(array.ctypes.data) for array in (param, grad, square_avg)]
    scalars = [ctypes.c_float(value) for value in (LR, ALPHA, 1 - ALPHA, EPS)]
    step = functools.partial(compile_c().rmsprop_step, *addresses, ctypes.c_int64(param.size), *scalars)
    return Running(
        step=step,
        set_grads=lambda new: np.copyto(grad, flat(new)),
        read_params=lambda: (square_avg, param.copy())[1],  # keeps square_avg alive: C has its bare address
    )


def build_copy(task: Task) -> Running:
    """The streams of the update without the update, over one flat array: the memory's limit."""
    grad = flat(task.grads)
    count = (task.bytes_per_element // grad.itemsize - 1) // 2  # all streams but the gradient are read and written
    written = [np.zeros_like(grad) for _ in range(count)]
    addresses = (ctypes.c_void_p * count)(*(array.ctypes.data for array in written))
    copy_step = compile_c().copy_step
    address, size = ctypes.c_void_p(grad.ctypes.data), ctypes.c_int64(grad.size)

    def step(_alive: object = (grad, written)) -> None:
        copy_step(addresses, count, address, size)

    return Running(step=step)


def compile_c() -> ctypes.CDLL:
    """rmsprop.c, compiled for this machine and loaded; the file may go once it is mapped."""
    if shutil.which(C_COMPILE[0]) is None:
        raise Unavailable(f"no {C_COMPILE[0]} on the PATH")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "rmsprop.so")
        done = subprocess.run([*C_COMPILE, str(C_SOURCE), "-o", str(library), "-lm"], capture_output=True, text=True)
        if done.returncode:
            raise Unavailable(f"{C_COMPILE[0]} failed: {done.stderr.strip()}")
        loaded = ctypes.CDLL(str(library))
    loaded.rmsprop_step.restype = loaded.copy_step.restype = None
    return loaded


def on_numpy(step: Callable[[], object], params: list[Array], grads: list[Array]) -> Running:
    """A step over these arrays."""
    return Running(step=step, set_grads=functools.partial(fill, grads), read_params=functools.partial(flat, params))


def copies(arrays: list[Array]) -> list[Array]:
    """One by one."""
    return [array.copy() for array in arrays]


def views(arrays: list[Array]) -> list[Array]:
    """Copies that lie one behind the other in one array."""
    ends = np.cumsum([array.size for array in arrays])
    parts = np.split(flat(arrays), ends[:-1])
    return [part.reshape(array.shape) for part, array in zip(parts, arrays, strict=True)]


def numpy_traffic(workload: Workload) -> int:
    """NumPy's passes: 2 + (2 + 3 + 3) + (2 + 2 + 2 + 3 + 3) reads and writes, line by line, of four bytes.

    Where it reuses a temporary (numpy/_core/src/multiarray/temp_elide.c) it reads and writes as often.
    """
    return 22 * 4


def numexpr_traffic(workload: Workload) -> int:
    """v and g to v; p, g and v to p: its blocks stay in the cache in between."""
    return (3 + 4) * 4


RMSPROP_GPU = Contender(OURS, build_rmsprop_gpu, traffic=streams)
TOGETHER = Contender(VIEWS, functools.partial(build_rmsprop_gpu, together=True), traffic=streams)
ASSIGNING = Contender(ASSIGNED, functools.partial(build_rmsprop_gpu, assigned=True), traffic=streams)
UNCLIPPED = Contender(PLAIN, functools.partial(build_rmsprop_gpu, plain=True), rule=None)
STORED = in_fewer_bytes(build_rmsprop_gpu)
NUMPY = Contender("numpy", build_numpy, traffic=numpy_traffic)
NUMEXPR = Contender("numexpr", build_numexpr, traffic=numexpr_traffic)
C_LOOP = Contender(C_OPENMP, build_c, traffic=streams)
C_COPY = Contender(COPY, build_copy, rule=None, traffic=streams)
