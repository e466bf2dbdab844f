"""Machine code for the CPU: compiled by Numba, or loaded from disk. Only this file knows how Numba stores it."""

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
    """The function under a random, unique name.

    Machine code from several processes may be linked into one, by name, and Numba gives the first kernel of every
    process the same name.
    """
    function.__qualname__ += f"_{secrets.token_hex(8)}"
    return function


def address(make: Any, *key: Any) -> int:
    """The address of the kernel ``make(*key)``, compiled to a C function and ready to be called."""
    found: tuple[int, object] = once(_kept_or_compiled, _kernel, _load_kernel, make, *key)
    return found[0]


def entry(make: Any, *key: Any) -> Callable[..., Any]:
    """The function ``make(*key)``, which has one signature, to be called from Python."""
    found: tuple[Callable[..., Any], object] = once(_kept_or_compiled, _function, _load_function, make, *key)
    return found[0]


def _kept_or_compiled(take: Any, load: Any, make: Any, *key: Any) -> tuple[Any, object]:
    """What is called, and what has to live as long; read from disk, or compiled and written there."""
    name = disk.key_of(_target(), make, *key)
    code = disk.read(name)
    if code is not None:
        try:
            loaded: tuple[Any, object] = load(pickle.loads(code))
            return loaded
        except Exception:  # Numba and LLVM may raise anything on code they do not understand
            pass
    compiled = once(make, *key)
    taken, reduced = take(compiled)
    if name is not None:
        with suppress(Exception):  # Numba cannot store everything
            disk.write(name, dumps(reduced()))
    return taken, compiled


def _context() -> Any:
    """Numba's target, with the functions that code calls: compiling would have loaded them."""
    rtsys.initialize(cpu_target.target_context)
    return cpu_target.target_context


def _kernel(compiled: Any) -> tuple[int, Callable[[], Any]]:
    (made,) = compiled.overloads.values()
    symbol = made.fndesc.llvm_cfunc_wrapper_name
    # Asking for the pointer generates the code, and no fork may happen halfway through.
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
