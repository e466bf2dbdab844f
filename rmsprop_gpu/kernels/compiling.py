"""Compile each function once a process, so that a fork can live with it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

from numba.core import config as numba_config

# A fork waits for a compilation in another thread: the child would else wait for Numba's compiler lock for ever.
_lock = threading.RLock()
_forked = False
_compiled: dict[Any, Any] = {}
config: Any = numba_config  # of which mypy knows no setting
_jit_was_off = bool(config.DISABLE_JIT)  # what was decorated then are plain functions for good


def why_not() -> str | None:
    """Why nothing can be compiled in this process; None where it can."""
    if not _jit_was_off and not config.DISABLE_JIT:
        return None
    return (
        "Numba's compiler is off (NUMBA_DISABLE_JIT is set, or was when rmsprop_gpu was imported), without which no "
        "kernel runs; unset it in a new process, or take rmsprop_gpu.reference, the same mathematics in plain Python"
    )


def once(make: Callable[..., Any], *key: Any) -> Any:
    """Return ``make(*key)``, which compiles, made at the first call; a RuntimeError where nothing can be compiled."""
    name = (make, *key)
    if name not in _compiled:
        with _lock:
            if name not in _compiled:
                if why := why_not():
                    raise RuntimeError(why)
                _compiled[name] = make(*key)
    return _compiled[name]


def in_forked_child() -> bool:
    """Was this process forked from one that had imported this package?"""
    return _forked


def _after_fork_in_child() -> None:
    global _forked
    _forked = True
    _lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_after_fork_in_child)
