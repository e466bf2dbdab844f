"""The variables of keras.optimizers.RMSprop and Adagrad, also within a LossScaleOptimizer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ...arrays.checks import Problems, a, is_sequence, quoted
from .by_kind import by_kind
from .common import Entry, Mine, agreed, count, empty, number, readable

_KERAS = {
    False: {"velocity": "square_avg", "momentum": "momentum_buffer", "average_gradient": "grad_avg", "average": "ema"},
    True: {"accumulator": "sum", "average": "ema"},
}


def read(state: Any, steps: int | None, mine: Mine, problems: Problems) -> dict[str, Any]:
    """Read Keras's ``optimizer.variables``, or a mapping from their paths to arrays."""
    if isinstance(state, Mapping):
        variables = list(state.items())
    elif is_sequence(state):
        variables = [(getattr(v, "path", None) or getattr(v, "name", None), v) for v in state]
    else:
        problems.add(TypeError, f"state is {a(type(state))}; wanted optimizer.variables, or a mapping by their paths")
        return empty(mine)
    kinds, found, lr = _KERAS[mine.adagrad], dict[str, list[Entry]](), None
    variables = _unscaled(variables)
    for i, (path, value) in enumerate(variables):
        if not isinstance(path, str):
            problems.add(TypeError, f"state[{i}] is {a(type(value))} without a path; wanted a variable of Keras")
            continue
        label, tail = f"state[{quoted(path)}]", path.rpartition("/")[2]
        kind = next((kind for kind in kinds if tail.endswith(f"_{kind}")), None)
        if re.match(r"(adam|adamw|adamax|nadam|lamb)(_\d+)?/", path):  # names as in RMSprop with momentum
            problems.add(ValueError, f"{label} is from another optimizer; wanted the variables of {_keras_name(mine)}")
        elif tail in ("iteration", "iterations"):
            steps = agreed(count(value, label, problems), label, steps, problems)
        elif tail == "learning_rate":
            lr = number(value, label, problems)
        elif tail.endswith("_gradient_accumulator"):
            array = readable(value, None)
            if not isinstance(array, np.ndarray) or array.any():
                problems.add(ValueError, f"{label} holds gradients between two steps; wanted zeros: save after a step")
        elif kind is None:
            problems.add(ValueError, f"{label} has no counterpart here; wanted the variables of {_keras_name(mine)}")
        else:
            found.setdefault(kinds[kind], []).append(Entry(tail[: -len(kind) - 1], label, value))
    if steps is None:
        problems.add(ValueError, 'state lacks "iteration"; wanted it there, or steps=')
    flat = {tensor.key: tensor.key.replace("/", "_") for tensor in mine.tensors}  # as Keras does
    found = {name: [entry._replace(lr=lr) for entry in entries] for name, entries in found.items()}
    return by_kind(found, flat, steps or 0, mine, problems)


def _unscaled(variables: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """The variables without a LossScaleOptimizer's own, whose count stays 0; the loss scale is up to the loop."""
    places = [path.rpartition("/") if isinstance(path, str) else ("", "", "") for path, _ in variables]
    tails = dict[str, set[str]]()
    for name, _, tail in places:
        tails.setdefault(name, set()).add(tail)
    scaling = {name for name, own in tails.items() if own >= {"step_counter", "dynamic_scale"}}
    return [v for v, (name, _, _) in zip(variables, places, strict=True) if name not in scaling]


def _keras_name(mine: Mine) -> str:
    return f"keras.optimizers.{'Adagrad' if mine.adagrad else 'RMSprop'}"
