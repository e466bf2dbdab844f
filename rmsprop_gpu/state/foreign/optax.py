"""The states of optax.rmsprop and optax.adagrad."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...arrays.checks import Problems, a, quoted
from .by_kind import by_kind, by_path
from .common import Entry, Mine, agreed, check_counted, count, number

# States that contain only a count or a learning rate, and may wrap another state.
_PASSED = {
    "EmptyState", "MaskedState", "ApplyIfFiniteState", "ScaleByScheduleState",
    "InjectHyperparamsState", "InjectStatefulHyperparamsState",
}  # fmt: skip
_KINDS = {
    "ScaleByRmsState": {"nu": "square_avg"},
    "ScaleByRmsWithCountState": {"nu": "square_avg"},
    "ScaleByRStdDevState": {"nu": "square_avg", "mu": "grad_avg"},
    "ScaleByRStdDevWithCountState": {"nu": "square_avg", "mu": "grad_avg"},
    "ScaleByRssState": {"sum_of_squares": "sum"},
    "TraceState": {"trace": "momentum_buffer"},
}
_PARTITIONS = ("PartitionState", "MultiTransformState")  # the second is its older name


def read(state: Any, steps: int | None, mine: Mine, problems: Problems) -> dict[str, Any]:
    """Read the state of optax.rmsprop or optax.adagrad, inside any ``chain``, ``partition`` or ``MultiSteps``."""
    reading = _Reading(mine, problems, steps)
    reading.chain(state, "state")
    check_counted(reading.steps, mine, problems)
    found = {name: sorted(entries, key=lambda entry: entry.at) for name, entries in reading.found.items()}
    found = by_path(found, mine, problems)
    keys = {tensor.key: tensor.key for tensor in mine.tensors}
    return by_kind(found, keys, reading.steps or 0, mine, problems, lambda x: -x, ("ema",))


@dataclass
class _Reading:
    """What has been found so far: the arrays of each kind, and the count."""

    mine: Mine
    problems: Problems
    steps: int | None
    found: dict[str, list[Entry]] = field(default_factory=dict)

    def chain(self, state: Any, label: str, lr: float | None = None) -> None:
        """Read the states of one chain; each part of a partition is a chain, maybe with another learning rate."""
        nodes, before, scaled = list(_nodes(state, label)), None, False
        for place, node in nodes:
            rate = getattr(node, "hyperparams", {})
            if isinstance(rate, Mapping) and "learning_rate" in rate:
                lr = number(rate["learning_rate"], f'{place}.hyperparams["learning_rate"]', self.problems)
        for place, node in nodes:
            kind = type(node).__name__
            if kind in _PARTITIONS:
                for part, inner in node.inner_states.items():
                    self.chain(inner, f"{place}.inner_states[{quoted(str(part))}]", lr)
            elif kind == "MultiStepsState":
                self._multi_steps(node, place)
            elif kind in _KINDS or kind in _PASSED:
                if kind == "TraceState" and not (scaled and before in {"EmptyState", "ScaleByScheduleState"}):
                    text = "does not follow the learning rate; wanted the order of optax.rmsprop, with lr inside the"
                    self.problems.add(ValueError, f"{place} {text} momentum")
                if hasattr(node, "_fields") and "count" in node._fields:
                    self._count(node.count, f"{place}.count")
                for name, own in _KINDS.get(kind, {}).items():
                    self._take(own, f"{place}.{name}", getattr(node, name), lr)
                    scaled |= own == "square_avg"
            else:
                text = f"{place} is {a(type(node))}; wanted the state of optax.rmsprop or optax.adagrad"
                self.problems.add(TypeError, text)
            before = kind

    def _multi_steps(self, node: Any, place: str) -> None:
        """Read MultiSteps: its count is of whole steps, and gradients between two of them would be lost."""
        waiting = count(node.mini_step, f"{place}.mini_step", self.problems)
        if waiting:
            text = f"is {waiting}, and acc_grads holds the gradients since the last step; wanted 0: save after a step"
            self.problems.add(ValueError, f"{place}.mini_step {text}")
        self._count(node.gradient_step, f"{place}.gradient_step")

    def _count(self, value: Any, label: str) -> None:
        self.steps = agreed(count(value, label, self.problems), label, self.steps, self.problems)

    def _take(self, name: str, label: str, tree: Any, lr: float | None) -> None:
        if (name == "sum") != self.mine.adagrad:
            self.problems.add(ValueError, f"{label} has no counterpart in {self.mine.optimizer}")
            return
        entries = [entry._replace(lr=lr) for entry in _leaves(tree, label)]
        known = self.found.setdefault(name, [])
        if {entry.at for entry in known} & {entry.at for entry in entries}:
            self.problems.add(ValueError, f"{label} appears a second time; wanted the state of one optimizer")
        else:
            known += entries


def _nodes(x: Any, label: str) -> Iterator[tuple[str, Any]]:
    """The named tuples of a chain, in order, with their places."""
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        yield label, x
        for inner in ("inner_state", "inner_opt_state"):
            if hasattr(x, inner):
                yield from _nodes(getattr(x, inner), f"{label}.{inner}")
    elif isinstance(x, (list, tuple)):
        for i, entry in enumerate(x):
            yield from _nodes(entry, f"{label}[{i}]")
    else:
        yield label, x


def _leaves(tree: Any, label: str, path: tuple[str, ...] = (), at: tuple[int, ...] = ()) -> Iterator[Entry]:
    """The arrays of a pytree in the order of jax.tree.leaves, under their names joined by slashes.

    What a mask leaves out is an empty tuple, so the arrays of each part of a partition fill the holes of the others.
    """
    if isinstance(tree, Mapping):
        for i, key in enumerate(tree if isinstance(tree, OrderedDict) else sorted(tree)):
            yield from _leaves(tree[key], f"{label}[{quoted(key)}]", (*path, str(key)), (*at, i))
    elif isinstance(tree, (list, tuple)):
        for i, entry in enumerate(tree):
            yield from _leaves(entry, f"{label}[{i}]", (*path, str(i)), (*at, i))
    elif tree is not None:
        yield Entry("/".join(path), label, tree, at=at)
