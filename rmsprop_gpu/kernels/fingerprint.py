"""What a compiled kernel depends on: the code its maker reaches, in its current state, and the compiler's settings.

The text of the sources alone is not enough: a module may have been loaded from a stale ``.pyc``, edited since, or
reloaded, or one of its functions may have been replaced.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

PACKAGE = __name__.partition(".")[0]
_SIMPLE = (bool, int, float, str, bytes, type(None))

# Numba settings that do not change our code; any other may.
_INERT = {
    "CACHE_DIR",
    "CACHE_LOCATOR_CLASSES",
    "COLOR_SCHEME",
    "CUDA_DEFAULT_PTX_CC",
    "FULL_TRACEBACKS",
    "FUNCTION_CACHE_SIZE",
    "NUMBA_DEFAULT_NUM_THREADS",
    "NUMBA_NUM_THREADS",
    "THREADING_LAYER",
    "THREADING_LAYER_PRIORITY",
}


def settings(config: Any, *, without: str = " ") -> list[tuple[str, str]]:
    """The Numba settings that may change what it compiles, except those whose names start with `without`."""
    config.reload_config()  # from the environment, as compiling does
    names = [name for name in vars(config) if name.isupper() and name not in _INERT and not name.startswith(without)]
    return sorted((name, repr(getattr(config, name))) for name in names)


def fingerprint(*makers: FunctionType | type) -> str:
    """A hash of these functions and classes, and of all functions and constants of the package that they name."""
    found: dict[str, object] = {}
    todo: list[tuple[str, Any]] = [(f"{maker.__module__}.{maker.__qualname__}", maker) for maker in makers]
    while todo:
        name, x = todo.pop()
        if name in found:
            continue
        found[name] = _content(x)
        todo += _reached(name, x)
    return hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()


def _function(x: Any) -> Any:
    """The Python function wrapped by Numba or functools; anything else is returned unchanged."""
    for behind in ("py_func", "_defn", "fget"):  # of a dispatcher, an intrinsic, a property
        x = getattr(x, behind, x)
    return inspect.unwrap(x) if callable(x) else x


def _content(x: Any) -> object:
    x = _function(x)
    if isinstance(x, FunctionType):
        return _code(x.__code__), [repr(y) if _is_simple(y) else type(y).__name__ for y in x.__defaults__ or ()]
    return repr(x) if _is_simple(x) else type(x).__name__


def _is_simple(x: Any) -> bool:
    return isinstance(x, _SIMPLE) or (type(x) is tuple and all(map(_is_simple, x))) or type(x).__module__ == "numpy"


def _code(code: CodeType) -> tuple[object, ...]:
    constants = [_code(x) if isinstance(x, CodeType) else _constant(x) for x in code.co_consts]
    return code.co_name, code.co_code.hex(), code.co_names, code.co_varnames, code.co_freevars, constants


def _constant(x: object) -> str:
    return repr(sorted(map(repr, x))) if isinstance(x, frozenset) else repr(x)


def _reached(name: str, x: Any) -> Iterator[tuple[str, Any]]:
    """Our own objects that a function or class names; values in modules by their dotted names."""
    x = _function(x)
    if isinstance(x, type):
        yield from ((f"{name}.{key}", y) for key, y in vars(x).items() if isinstance(_function(y), FunctionType))
        yield f"{name}._fields", getattr(x, "_fields", ())
    if not isinstance(x, FunctionType):
        return
    names = set(_names(x.__code__))
    for key in names & x.__globals__.keys():
        y = x.__globals__[key]
        if isinstance(y, ModuleType):
            if y.__name__.startswith(f"{PACKAGE}."):
                yield from ((f"{y.__name__}.{key}", vars(y)[key]) for key in names & vars(y).keys())
        elif _is_simple(y):
            yield f"{x.__module__}.{key}", y
        elif (home := str(getattr(_function(y), "__module__", ""))).startswith(f"{PACKAGE}."):
            yield f"{home}.{key}", y


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for x in code.co_consts:
        if isinstance(x, CodeType):
            yield from _names(x)
