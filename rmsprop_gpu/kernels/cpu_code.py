"""Machine code for the CPU: compiled by Numba, or loaded from disk. The only file that knows how Numba stores it."""

from __future__ import annotations

import pickle
import secrets
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import llvmlite
import numba
import numpy as np
from numba.core import config
from numba.core.compiler import CompileResult
from numba.core.registry import cpu_target
from numba.core.runtime.nrt import rtsys
from numba.core.serialize import dumps

from . import disk
from .compiling import once
from .fingerprint import settings


def _target() -> tuple[object, ...]:
    versions = numba.__version__, llvmlite.__version__, np.__version__, sys.version
    return ("cpu", *versions, cpu_target.target_context.codegen().magic_tuple(), settings(config, without="CUDA_"))


def unique(function: Any) -> Any:
    """The function under a name of its own, by chance.

    Machine code from several processes is linked into one by its names, and Numba gives the first kernel that a process
    compiles the same name in each.
    """
    function.__qualname__ += f"_{secrets.token_hex(8)}"
    return function


def address(make: Any, *key: Any) -> int:
    """Where the machine code of the kernel ``make(*key)`` starts, a C function; ready to be called."""
    found: tuple[int, object] = once(_kept_or_compiled, _kernel, _load_kernel, make, *key)
    return found[0]


def entry(make: Any, *key: Any) -> Callable[..., Any]:
    """The function ``make(*key)`` of one signature, to be called from Python."""
    found: tuple[Callable[..., Any], object] = once(_kept_or_compiled, _function, _load_function, make, *key)
    return found[0]


def _kept_or_compiled(take: Any, load: Any, make: Any, *key: Any) -> tuple[Any, object]:
    """What is called, and what has to live as long; from disk, else compiled and kept there."""
    name = disk.key_of(_target(), make, *key)
    code = disk.read(name)
    if code is not None:
        try:
            loaded: tuple[Any, object] = load(pickle.loads(code))
            return loaded
        except Exception:  # whatever Numba and LLVM make of what they do not know
            pass
    compiled = once(make, *key)
    taken, reduced = take(compiled)
    if name is not None:
        with suppress(Exception):  # what Numba does not know how to store
            disk.write(name, dumps(reduced()))
    return taken, compiled


def _context() -> Any:
    """Numba's target, with the functions that code calls: a compilation would have brought them."""
    rtsys.initialize(cpu_target.target_context)
    return cpu_target.target_context


def _kernel(compiled: Any) -> tuple[int, Callable[[], Any]]:
    (made,) = compiled.overloads.values()
    symbol = made.fndesc.llvm_cfunc_wrapper_name
    # To ask for the pointer makes the code, which no fork may meet half done.
    start = int(made.library.get_pointer_to_function(symbol))
    return start, lambda: (made.library.serialize_using_object_code(), symbol)


def _load_kernel(kept: Any) -> tuple[int, object]:
    code, symbol = kept
    library = _context().codegen().unserialize_library(code)
    return int(library.get_pointer_to_function(symbol)), library


def _function(compiled: Any) -> tuple[Callable[..., Any], Callable[[], Any]]:
    (made,) = compiled.overloads.values()
    return made.entry_point, made._reduce


def _load_function(kept: Any) -> tuple[Callable[..., Any], object]:
    made = CompileResult._rebuild(_context(), *kept)
    return made.entry_point, made
