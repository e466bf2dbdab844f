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
import numba_cuda
import numpy as np
from cuda import pathfinder
from numba import types
from numba.cuda.core import config

from . import cuda_fit, disk
from .compiling import once
from .cuda_target import target
from .fingerprint import settings

_END = b"\0"  # ends the name of a kernel; its code follows


def signature(function: Any) -> tuple[Any, ...]:
    """The types of the arguments of a kernel, which are addresses and counts."""
    return (types.int64,) * len(inspect.signature(function).parameters)


def jitted(make: Any, *arguments: Any) -> Any:
    """The ``@cuda.jit`` kernel of ``make(*arguments)``, not yet compiled for any device.

    If the function gives its number of threads in ``launch_bounds``, it gets registers for that many.
    """
    function = make(*arguments)
    return target.jit(launch_bounds=getattr(function, "launch_bounds", None))(function)


def compiled(make: Any, *arguments: Any) -> Any:
    """The ``@cuda.jit`` kernel of ``make(*arguments)``, compiled for the current device."""
    return once(_compiled, make, arguments, _capability())


def _compiled(make: Any, arguments: tuple[Any, ...], capability: tuple[int, int]) -> Any:
    kernel = once(jitted, make, *arguments)
    try:
        kernel.compile(signature(kernel.py_func))
    except Exception as error:  # from Numba, libNVVM, nvJitLink, or anything inside them
        raise RuntimeError(cuda_fit.why_not_compiled(error)) from error
    return kernel


def handle(make: Any, *arguments: Any) -> Any:
    """The handle of the kernel ``make(*arguments)`` for ``cuda.core.launch``, on any device like the current one."""
    return once(_kept_or_compiled, make, arguments, _capability())[0]


def _kept_or_compiled(make: Any, arguments: tuple[Any, ...], capability: tuple[int, int]) -> tuple[Any, object]:
    """The handle, and what has to live as long; read from disk, or compiled and written there."""
    kernel = once(jitted, make, *arguments)
    name = _key(kernel, make, arguments)
    kept = disk.read(name)
    if kept is not None:
        entry, _, code = kept.partition(_END)
        try:
            image = cuda.core.ObjectCode.from_cubin(code)
            return image.get_kernel(entry.decode()), image
        except Exception:  # CUDA may raise anything on code it does not understand
            pass
    compiled(make, *arguments)
    made = kernel.overloads[signature(kernel.py_func)]
    # Code that CUDA loads serves all devices of an architecture. Asked on each device, Numba would load it each time,
    # and unload it as often when the process ends, which fails from the second time on.
    try:
        loaded = made._codelibrary.get_cufunc().kernel  # on a second architecture, this call links and loads
    except Exception as error:
        raise RuntimeError(cuda_fit.why_not_compiled(error)) from error
    if name is not None:
        with suppress(Exception):  # the linker may have kept nothing
            disk.write(name, made.entry_name.encode() + _END + made._codelibrary.get_cubin().code)
    return loaded, kernel


def _capability() -> tuple[int, int]:
    """The compute capability of the current device."""
    major, minor = target.get_current_device().compute_capability[:2]
    return major, minor


def trial() -> str | None:
    """Why a kernel cannot be compiled, linked and loaded on the current device; None if it can."""
    try:
        handle(_make_nothing)
    except Exception as error:
        return str(error)
    return None


def _make_nothing() -> Any:
    def nothing(address):  # type: ignore[no-untyped-def]
        pass

    return nothing


def _key(kernel: Any, make: Any, arguments: tuple[Any, ...]) -> str | None:
    try:
        return disk.key_of(_target(kernel), make, *arguments)
    except Exception:  # a library is not found, say: then the compiler cannot be identified
        return None


def _target(kernel: Any) -> tuple[object, ...]:
    """What compiles a kernel, and for what, on the current device."""
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
    return ("cuda", *versions, _capability(), _library("nvvm"), _linker(kernel), options, settings(config))


def _linker(kernel: Any) -> object:
    """What links the kernel: nvJitLink, which optimizes at link time, or else the driver."""
    if kernel.targetoptions["lto"]:
        return "lto", _library("nvJitLink")
    return "driver", cuda_fit.driver_version()


def _library(name: str) -> object:
    """A CUDA library, identified by its file, since its version does not tell one build from another."""
    found: Callable[[str], Any] = pathfinder.load_nvidia_dynamic_lib
    path = found(name).abs_path
    stat = os.stat(path)
    return path, stat.st_size, stat.st_mtime_ns
