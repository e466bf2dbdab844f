"""What a contender is given and what it gives back, and the few things that all of them do."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.workloads import FORMATS, Workload

Array = NDArray[np.float32]

LR, ALPHA, EPS = 1e-3, 0.9, 1e-8


class Unavailable(Exception):
    """The contender cannot run on this machine; the message says why."""


@dataclass(frozen=True)
class Task:
    """What is to be stepped. The arrays are on the host and to be copied, as the contender's own library allocates."""

    params: list[Array]
    grads: list[Array]
    threads: int
    hyper: Mapping[str, Any]  # beside LR, ALPHA and EPS, in rmsprop_gpu.RMSProp's argument names
    bytes_per_element: int  # that a step cannot do without
    groups: bool = False  # each tensor is a parameter group of its own
    scheduled: bool = False  # the learning rate of each step is said anew: LR, so that the result is that of the others

    @property
    def size(self) -> int:
        """Elements in all tensors together."""
        return sum(param.size for param in self.params)

    def grouped(self, params: list[Any]) -> list[Any]:
        """The parameters as the optimizer is to have them."""
        return [{"params": [param]} for param in params] if self.groups else params

    def refuse_beyond(self, known: Collection[str] = ()) -> None:
        """Raise Unavailable for hyperparameters that a contender has not."""
        missing = [name for name in self.hyper if name not in known]
        if missing:
            raise Unavailable(f"has no {', '.join(missing)}")


@dataclass(frozen=True)
class Running:
    """A contender that is set up: what the worker may do with it."""

    step: Callable[[], object]  # the only thing that is timed, with one sync after the last step
    set_grads: Callable[[list[Array]], None] = lambda grads: None  # copies new values into the gradients it steps with
    read_params: Callable[[], Array] = lambda: np.empty(0, np.float32)  # the parameters now, flat, in order
    sync: Callable[[], object] = lambda: None  # waits for what step has started
    # The norm by which it clipped last, where it is too rough to be judged by the exact one: torch sums in float32.
    last_norm: Callable[[], float] | None = None
    extra_memory: Callable[[], int] | None = None  # bytes that a step needs for itself; None: ask the resident set


@dataclass(frozen=True)
class Contender:
    """A name, how to set it up, and what it computes."""

    name: str
    build: Callable[[Task], Running]
    rule: str | None = "rmsprop"  # the function of rmsprop_gpu/reference.py that it must agree with; None: no rule
    switches: Mapping[str, Any] = field(default_factory=dict)  # of that rule, which this contender cannot turn off
    traffic: Callable[[Workload], float] | None = None  # bytes per element by its own passes, where they can be counted


def schedule(step: int) -> float:
    """What a schedule says."""
    return LR


def streams(workload: Workload) -> int:
    """One pass: each stream is read or written once, and nothing else is."""
    return workload.bytes_per_element


def in_fewer_bytes(build: Callable[[Task], Running]) -> tuple[Contender, ...]:
    """This package with each format, by what sets it up with a task; no oracle here has its rounding."""
    return tuple(
        Contender(name, functools.partial(_build_stored, build, dtype, options), rule=None, traffic=lambda _, x=x: x)
        for name, (dtype, options, x) in FORMATS.items()
    )


def _build_stored(build: Callable[[Task], Running], dtype: str, options: Mapping[str, Any], task: Task) -> Running:
    import ml_dtypes  # noqa: F401  # NumPy knows bfloat16 by its name from here on

    params, grads = ([array.astype(dtype) for array in arrays] for arrays in (task.params, task.grads))
    return build(replace(task, params=params, grads=grads, hyper={**task.hyper, **options}))


def flat(arrays: list[Array]) -> Array:
    """One new array of all elements in order."""
    return np.concatenate([array.ravel() for array in arrays])


def fill(arrays: list[Array], values: list[Array]) -> None:
    """Copy new values into arrays that stay where they are."""
    for array, value in zip(arrays, values, strict=True):
        np.copyto(array, value)
