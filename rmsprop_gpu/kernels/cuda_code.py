"""Machine code for CUDA devices: compiled by numba-cuda, or loaded from disk as a cubin."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import cuda.bindings
import cuda.core
import llvmlite
import numba
import numba.cuda
import numba_cuda
import numpy as np
from cuda import pathfinder
from numba import types
from numba.cuda.core import config

from . import disk
from .compiling import once
from .fingerprint import settings

_END = b"\0"  # of the name of a kernel, behind which its code stands


def signature(function: Any) -> tuple[Any, ...]:
    """The types of the arguments of a kernel, which are addresses and counts."""
    return (types.int64,) * len(inspect.signature(function).parameters)


def jitted(make: Any, *arguments: Any) -> Any:
    """The ``@cuda.jit`` kernel of ``make(*arguments)``, not yet compiled for any device."""
    kernel: Any = numba.cuda.jit
    return kernel(make(*arguments))


def compiled(make: Any, *arguments: Any, device: int) -> Any:
    """The ``@cuda.jit`` kernel of ``make(*arguments)``, compiled for this device, which is current."""
    return once(_compiled, make, arguments, device)


def _compiled(make: Any, arguments: tuple[Any, ...], device: int) -> Any:
    kernel = once(jitted, make, *arguments)
    kernel.compile(signature(kernel.py_func))
    return kernel


def handle(make: Any, *arguments: Any, device: int) -> Any:
    """What ``cuda.core.launch`` wants of the kernel ``make(*arguments)``, on this device, which is current."""
    return once(_kept_or_compiled, make, arguments, device)[0]


def _kept_or_compiled(make: Any, arguments: tuple[Any, ...], device: int) -> tuple[Any, object]:
    """The handle, and what has to live as long; from disk, else compiled, once an architecture, and kept there."""
    kernel = once(jitted, make, *arguments)
    name = _key(kernel, make, arguments)
    kept = disk.read(name)
    if kept is not None:
        entry, _, code = kept.partition(_END)
        try:
            image = cuda.core.ObjectCode.from_cubin(code)
            return image.get_kernel(entry.decode()), image
        except Exception:  # whatever CUDA makes of what it does not know
            pass
    compiled(make, *arguments, device=device)
    made = kernel.overloads[signature(kernel.py_func)]
    library = made._codelibrary
    loaded = library.get_cufunc().kernel
    if name is not None:
        with suppress(Exception):  # whatever the linker has kept of it
            disk.write(name, made.entry_name.encode() + _END + library.get_cubin().code)
    return loaded, kernel


def _key(kernel: Any, make: Any, arguments: tuple[Any, ...]) -> str | None:
    try:
        return disk.key_of(_target(kernel), make, *arguments)
    except Exception:  # a library that is not found, say: then it is not known what a kernel is compiled by
        return None


def _target(kernel: Any) -> tuple[object, ...]:
    """What a kernel is compiled by and for, on the current device."""
    versions = (
        numba.__version__,
        numba_cuda.__version__,
        llvmlite.__version__,
        np.__version__,
        cuda.core.__version__,
        cuda.bindings.__version__,
        sys.version,
    )
    options = sorted((name, repr(x)) for name, x in kernel.targetoptions.items())
    capability = numba.cuda.get_current_device().compute_capability
    return ("cuda", *versions, tuple(capability), _library("nvvm"), _linker(kernel), options, settings(config))


def _linker(kernel: Any) -> object:
    """What links the kernel: nvJitLink, with optimization at that time, or else the driver."""
    if kernel.targetoptions["lto"]:
        return "lto", _library("nvJitLink")
    from cupy.cuda import runtime

    return "driver", runtime.driverGetVersion()


def _library(name: str) -> object:
    """A library of CUDA's: its file, since its version does not tell one build from another."""
    found: Callable[[str], Any] = pathfinder.load_nvidia_dynamic_lib
    path = found(name).abs_path
    stat = os.stat(path)
    return path, stat.st_size, stat.st_mtime_ns
