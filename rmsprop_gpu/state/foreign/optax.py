"""The states of optax.rmsprop and optax.adagrad."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

from ...arrays.checks import Problems, a, quoted
from .common import Entry, Mine, agreed, by_kind, count, is_index, number

# States that say nothing but a count or a learning rate, and may hold another one.
_OPTAX_PASSED = {
    "EmptyState", "MaskedState", "ApplyIfFiniteState", "ScaleByScheduleState",
    "InjectHyperparamsState", "InjectStatefulHyperparamsState",
}  # fmt: skip
_OPTAX = {
    "ScaleByRmsState": {"nu": "square_avg"},
    "ScaleByRmsWithCountState": {"nu": "square_avg"},
    "ScaleByRStdDevState": {"nu": "square_avg", "mu": "grad_avg"},
    "ScaleByRStdDevWithCountState": {"nu": "square_avg", "mu": "grad_avg"},
    "ScaleByRssState": {"sum_of_squares": "sum"},
    "TraceState": {"trace": "momentum_buffer"},
}


def read(state: Any, steps: int | None, mine: Mine, problems: Problems) -> dict[str, Any]:
    """The state of optax.rmsprop or optax.adagrad, inside whatever ``chain``, or ``inject_hyperparams``."""
    found, lr = dict[str, list[Entry]](), None
    before = None  # the kind of the state before this one in the chain
    for label, node in _nodes(state, "state"):
        kind = type(node).__name__
        fields = _OPTAX.get(kind, {})
        if not fields and kind not in _OPTAX_PASSED:
            problems.add(TypeError, f"{label} is {a(type(node))}; wanted the state of optax.rmsprop or optax.adagrad")
        if kind == "TraceState" and not ("square_avg" in found and before in {"EmptyState", "ScaleByScheduleState"}):
            text = "does not come behind the learning rate; wanted the order of optax.rmsprop, lr inside the momentum"
            problems.add(ValueError, f"{label} {text}")
        before = kind
        for field, name in fields.items():
            if name in found:
                problems.add(ValueError, f"{label}.{field} is a second one; wanted the state of one optimizer")
            elif (name == "sum") != mine.adagrad:
                problems.add(ValueError, f"{label}.{field} has no counterpart in {mine.optimizer}")
            else:
                found[name] = list(_leaves(getattr(node, field), (), f"{label}.{field}"))
        if hasattr(node, "_fields") and "count" in node._fields and (fields or kind in _OPTAX_PASSED):
            steps = agreed(count(node.count, f"{label}.count", problems), f"{label}.count", steps, problems)
        rate = getattr(node, "hyperparams", {})
        if isinstance(rate, Mapping) and "learning_rate" in rate:
            lr = number(rate["learning_rate"], f'{label}.hyperparams["learning_rate"]', problems)
    for i, h in enumerate(mine.hyper):
        wants = "bias_correction=True" if h.get("bias_correction") else "a callable lr" if callable(h["lr"]) else ""
        if steps is None and wants:
            problems.add(ValueError, f"state has no count, which {wants} in param_groups[{i}] needs; wanted steps=")
    keys = [tensor.key for tensor in mine.tensors]
    for name, entries in found.items():
        paths = [entry.param for entry in entries]
        late = _sorted_as_text(paths)
        if late and all(map(is_index, keys)) and set(paths) != set(keys) and not mine.by_order:
            text = f"has {quoted(late[0])} before {quoted(late[1])}, as text is sorted, and params has no names"
            wanted = 'wanted names, or match="order" for that order'
            problems.add(ValueError, f"state's {quoted(name)} {text}; {wanted}")
        dotted = [entry._replace(param=entry.param.replace("/", ".")) for entry in entries]
        if {entry.param for entry in dotted} == set(keys):
            found[name] = dotted
    return by_kind(found, {key: key for key in keys}, steps or 0, lr, mine, problems, lambda x: -x, ("ema",))


def _nodes(x: Any, label: str) -> Iterator[tuple[str, Any]]:
    """The named tuples of a state of optax in the order of the chain, with their places."""
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        yield label, x
        if hasattr(x, "inner_state"):
            yield from _nodes(x.inner_state, f"{label}.inner_state")
    elif isinstance(x, (list, tuple)):
        for i, entry in enumerate(x):
            yield from _nodes(entry, f"{label}[{i}]")
    else:
        yield label, x


def _sorted_as_text(names: list[str]) -> tuple[str, str] | None:
    """Two neighbours that numbers would put the other way: Dense_10 before Dense_2."""

    def parts(name: str) -> list[str]:
        return re.split(r"(\d+)", name)

    for before, name in pairwise(names):
        differing = next(((x, y) for x, y in zip(parts(before), parts(name), strict=False) if x != y), ("", ""))
        if all(x.isdecimal() for x in differing) and int(differing[0]) > int(differing[1]):
            return before, name
    return None


def _leaves(tree: Any, path: tuple[str, ...], label: str) -> Iterator[Entry]:
    """The arrays of a pytree in the order of jax.tree.leaves, under their names joined by slashes."""
    if isinstance(tree, Mapping):
        for key in tree if isinstance(tree, OrderedDict) else sorted(tree):
            yield from _leaves(tree[key], (*path, str(key)), f"{label}[{quoted(key)}]")
    elif isinstance(tree, (list, tuple)):
        for i, entry in enumerate(tree):
            yield from _leaves(entry, (*path, str(i)), f"{label}[{i}]")
    elif tree is not None:
        yield Entry("/".join(path), label, tree)
