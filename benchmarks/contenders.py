"""Who competes: a name and a function that sets the contender up. Libraries are imported inside, in its own process."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

LR, ALPHA, EPS = 1e-3, 0.9, 1e-8
C_SOURCE = Path(__file__).with_name("rmsprop.c")
C_COMPILE = ("gcc", "-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")


class Unavailable(Exception):
    """The contender cannot run on this machine; the message says why."""


@dataclass(frozen=True)
class Running:
    """A contender that is set up: what the worker may do with it."""

    step: Callable[[], object]  # the only thing that is timed, with one sync after the last step
    set_grads: Callable[[list[Array]], None]  # copies new values into the gradients it steps with
    read_params: Callable[[], Array]  # the parameters now, flat, in order
    sync: Callable[[], object] = lambda: None  # waits for what step has started (a GPU)


@dataclass(frozen=True)
class Contender:
    """Set it up with ``build(params, grads, threads)``; it keeps copies, as its own library allocates them."""

    name: str
    build: Callable[[list[Array], list[Array], int], Running]
    bytes_per_element: int | None = None  # memory traffic of a step where a model is known, for GB/s


def build_rmsprop_gpu(params: list[Array], grads: list[Array], threads: int) -> Running:
    """This package on NumPy arrays."""
    import numba

    from rmsprop_gpu import RMSProp

    numba.set_num_threads(threads)
    params, grads = [param.copy() for param in params], [grad.copy() for grad in grads]
    opt = RMSProp(params, lr=LR, alpha=ALPHA, eps=EPS)
    return Running(
        step=functools.partial(opt.step, grads),
        set_grads=functools.partial(fill, grads),
        read_params=lambda: flat(params),
    )


def build_torch(params: list[Array], grads: list[Array], threads: int, *, foreach: bool) -> Running:
    """torch.optim.RMSprop on the CPU. Copies, so that torch allocates (and aligns) as it does for everybody."""
    import torch

    torch.set_num_threads(threads)
    parameters = [torch.nn.Parameter(torch.from_numpy(param).clone()) for param in params]
    gradients = [torch.from_numpy(grad).clone() for grad in grads]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    opt = torch.optim.RMSprop(parameters, lr=LR, alpha=ALPHA, eps=EPS, momentum=0, foreach=foreach)
    grads_there = [gradient.numpy() for gradient in gradients]  # views
    params_there = [parameter.detach().numpy() for parameter in parameters]
    return Running(
        step=opt.step, set_grads=functools.partial(fill, grads_there), read_params=lambda: flat(params_there)
    )


def build_c(params: list[Array], grads: list[Array], threads: int) -> Running:
    """rmsprop.c over one flat array, whatever the shapes. OMP_NUM_THREADS, set by the parent, gives it `threads`."""
    param, grad = flat(params), flat(grads)
    square_avg = np.zeros_like(param)
    addresses = [ctypes.c_void_p(array.ctypes.data) for array in (param, grad, square_avg)]
    scalars = [ctypes.c_float(value) for value in (LR, ALPHA, 1 - ALPHA, EPS)]
    step = functools.partial(compile_c().rmsprop_step, *addresses, ctypes.c_int64(param.size), *scalars)
    return Running(
        step=step,
        set_grads=lambda new: np.copyto(grad, flat(new)),
        read_params=lambda: (square_avg, param.copy())[1],  # keeps square_avg alive: C has its bare address
    )


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
    loaded.rmsprop_step.restype = None
    return loaded


def flat(arrays: list[Array]) -> Array:
    """One new array of all elements in order."""
    return np.concatenate([array.ravel() for array in arrays])


def fill(arrays: list[Array], values: list[Array]) -> None:
    """Copy new values into arrays that stay where they are."""
    for array, value in zip(arrays, values, strict=True):
        np.copyto(array, value)


OURS = Contender("rmsprop_gpu", build_rmsprop_gpu, bytes_per_element=20)

CONTENDERS = {
    contender.name: contender
    for contender in (
        OURS,
        replace(OURS, name="rmsprop_gpu, again"),  # the same once more: its ratio to the first is the noise
        Contender("torch foreach", functools.partial(build_torch, foreach=True)),
        Contender("torch for-loop", functools.partial(build_torch, foreach=False)),
        Contender("c openmp", build_c, bytes_per_element=20),
    )
}
