"""Compile each function once per process, in a way that survives a fork."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

from numba.core import config as numba_config

# A fork waits for a compilation in another thread: otherwise the child would wait for Numba's compiler lock forever.
_lock = threading.RLock()
_forked = False
_compiled: dict[Any, Any] = {}
config: Any = numba_config  # mypy knows none of its settings
_jit_was_off = bool(config.DISABLE_JIT)  # functions decorated at that time stay plain Python


def why_not() -> str | None:
    """Why nothing can be compiled in this process; None if compiling works."""
    if not _jit_was_off and not config.DISABLE_JIT:
        return None
    return (
        "Numba's compiler is off (NUMBA_DISABLE_JIT is set, or was when rmsprop_gpu was imported), and no kernel runs "
        "without it; unset it in a new process, or use rmsprop_gpu.reference, the same mathematics in plain Python"
    )


def once(make: Callable[..., Any], *key: Any) -> Any:
    """Return ``make(*key)``, compiled at the first call; raise RuntimeError if nothing can be compiled."""
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
