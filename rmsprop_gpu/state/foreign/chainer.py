"""The state of chainer.optimizers.RMSprop, RMSpropGraves and AdaGrad."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ...arrays.checks import Problems, a, quoted
from .by_kind import by_kind, by_path
from .common import Entry, Mine, agreed, count, empty

_RMSPROP = {"ms": "square_avg"}
_GRAVES = {"n": "square_avg", "g": "grad_avg", "delta": "momentum_buffer"}
_KINDS = {False: {**_RMSPROP, **_GRAVES}, True: {"h": "sum"}}
_IN_A_SNAPSHOT = re.compile(r"(?:.+/)?optimizer:([^/]+)/(.+)")  # from a trainer, which also holds models and iterators
_CLASSIFIER = "predictor/"  # chainer.links.Classifier puts this before all names of a model


def read(state: Any, steps: int | None, mine: Mine, problems: Problems) -> dict[str, Any]:
    """Read what ``serializers.save_npz`` writes for an optimizer, or for a trainer with one."""
    if not isinstance(state, Mapping):
        problems.add(TypeError, f"state is {a(type(state))}; wanted a mapping as in the file of save_npz(optimizer)")
        return empty(mine)
    paths, kinds = _of_one(state, problems), _KINDS[mine.adagrad]
    found = dict[str, list[Entry]]()
    for key, path in paths.items():
        label, (param, _, kind) = f"state[{quoted(key)}]", path.rpartition("/")
        if path == "t":
            steps = agreed(count(state[key], label, problems), label, steps, problems)
        elif param and kind in kinds:
            found.setdefault(kinds[kind], []).append(Entry(param, label, state[key]))
        elif path != "epoch" and not (param and kind == "t"):
            wanted = "AdaGrad" if mine.adagrad else "RMSprop or RMSpropGraves"
            problems.add(ValueError, f"{label} has no counterpart here; wanted the state of chainer's {wanted}")
    if steps is None:
        problems.add(ValueError, 'state lacks "t"; wanted it there, or steps=')
    entries = [entry for them in found.values() for entry in them]
    if all(e.param.startswith(_CLASSIFIER) for e in entries) and not any(
        t.key.startswith(_CLASSIFIER[:-1]) for t in mine.tensors
    ):
        found = {n: [e._replace(param=e.param[len(_CLASSIFIER) :]) for e in them] for n, them in found.items()}
    keys = {tensor.key: tensor.key for tensor in mine.tensors}
    spare = ("momentum_buffer",)  # in Graves's form, delta exists even without momentum
    found = by_path(found, mine, problems)
    return by_kind(found, keys, steps or 0, mine, problems, lambda x: -x, ("ema",), spare)


def _of_one(state: Mapping[Any, Any], problems: Problems) -> dict[Any, str]:
    """The keys of one optimizer, mapped to what follows its name in a snapshot."""
    paths = {key: str(key).lstrip("/") for key in state}
    inside = {key: match for key, path in paths.items() if (match := _IN_A_SNAPSHOT.fullmatch(path))}
    names = list(dict.fromkeys(match[1] for match in inside.values()))
    if len(names) > 1:
        said = ", ".join(map(repr, names))
        problems.add(ValueError, f"state holds the optimizers {said}; wanted the entries of one")
    return {key: match[2] for key, match in inside.items() if match[1] == names[0]} if inside else paths
