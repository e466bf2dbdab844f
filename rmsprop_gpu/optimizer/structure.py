"""The structures in which parameters and gradients come: one array, a sequence, a mapping, or groups of these."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableSequence
from operator import is_
from typing import Any, NamedTuple

from ..arrays.checks import Problems, is_sequence, quoted


class Leaf(NamedTuple):
    """A parameter in the structure: its key in the state, and how to write its place behind ``params`` or ``grads``."""

    key: str
    place: str
    array: Any


class Entries:
    """The entries of the caller's mapping or list: an array that is put there later is one that no step updates."""

    def __init__(self, given: Any, leaves: list[Leaf]) -> None:
        keys = list(given) if isinstance(given, Mapping) else range(len(leaves))
        self._given, self._leaves = given, dict(zip(keys, leaves, strict=True))
        self._arrays = [leaf.array for leaf in leaves]
        self._values = given.values if isinstance(given, Mapping) else given.__iter__
        # What makes its entries when they are asked for has another object each time.
        self._stable = not list(self._replaced())

    def moved(self) -> bool:
        """Is any entry another object than it was, or in another place? Asked in every step."""
        return self._stable and not all(map(is_, self._values(), self._arrays))

    def check(self, problems: Problems) -> None:
        """Note each entry that is another object now; one that is gone is the caller's affair."""
        for leaf in self._replaced() if self._stable else ():
            at = f"params{leaf.place}"
            problems.add(
                ValueError,
                f"{at} is another object than the parameter that the optimizer was built for, which is what a step "
                f"updates; wanted its values written into that ({at}[...] = ...), or a new optimizer",
            )

    def _replaced(self) -> Iterator[Leaf]:
        for key, leaf in self._leaves.items():
            there = key in self._given if isinstance(self._given, Mapping) else key < len(self._given)
            if there and self._given[key] is not leaf.array:
                yield leaf


class Structure(NamedTuple):
    """`groups` of leaves with their own settings; `flatten(grads)` lists gradients in the order of the leaves.

    `entries` are those of the mappings and lists that the caller can change.
    """

    groups: list[tuple[dict[str, Any], list[Leaf]]]
    flatten: Callable[[Any], list[Any]]
    entries: list[Entries]


def parse(params: Any) -> Structure:
    """The structure of `params`; a TypeError or ValueError says what cannot be one."""
    if is_sequence(params):
        params = params if isinstance(params, MutableSequence) else list(params)
        if any(isinstance(group, Mapping) for group in params):
            return _parse_groups(list(params))
    leaves, flatten = _parse_one(params, "", 0)
    if not leaves:
        raise ValueError("params is empty; wanted at least one array")
    return _unique(Structure([({}, leaves)], flatten, _entries(params, leaves)))


def _parse_groups(params: list[Any]) -> Structure:
    groups, flattens, entries, count = [], [], [], 0
    for i, group in enumerate(params):
        if not isinstance(group, Mapping) or "params" not in group:
            found = f"a mapping with keys {list(group)}" if isinstance(group, Mapping) else f"a {type(group).__name__}"
            raise TypeError(f'params[{i}] is {found}; wanted a group, a mapping with "params", as its neighbours are')
        leaves, flatten = _parse_one(group["params"], f"[{i}]", count)
        groups.append(({name: value for name, value in group.items() if name != "params"}, leaves))
        flattens.append(flatten)
        entries += _entries(group["params"], leaves)
        count += len(leaves)
    if not count:
        raise ValueError("params has groups, but no array in any of them; wanted at least one")

    def flatten_groups(grads: Any) -> list[Any]:
        grads = _as_list(grads, len(flattens), "grads", "entry for each group of params")
        return [g for flatten, entry in zip(flattens, grads, strict=True) for g in flatten(entry)]

    return _unique(Structure(groups, flatten_groups, entries))


def _entries(given: Any, leaves: list[Leaf]) -> list[Entries]:
    return [Entries(given, leaves)] if isinstance(given, (Mapping, MutableSequence)) else []


def _parse_one(params: Any, place: str, first: int) -> tuple[list[Leaf], Callable[[Any], list[Any]]]:
    """The leaves of one array, sequence or mapping, and the function that flattens its gradients."""
    where = f"grads{place}"
    if isinstance(params, Mapping):
        if isinstance(params.get("params"), (list, tuple, Mapping)):
            raise TypeError(f'params{place} is one group, a mapping with "params"; wanted a list of groups: [{{...}}]')
        for name in params:
            if not isinstance(name, str):
                raise TypeError(
                    f"params{place} has the name {name!r} (a {type(name).__name__}); wanted strings as names"
                )
        names = list(params)
        leaves = [Leaf(name, f"{place}[{quoted(name)}]", array) for name, array in params.items()]
        return leaves, lambda grads: _by_name(grads, names, where)
    if is_sequence(params):
        leaves = [Leaf(str(first + i), f"{place}[{i}]", array) for i, array in enumerate(params)]
        return leaves, lambda grads: _as_list(grads, len(leaves), where, "gradient (or None) for each parameter")
    if isinstance(params, (str, bytes, set, frozenset)) or params is None:
        raise TypeError(
            f"params{place} is a {type(params).__name__}; wanted an array, a sequence of arrays, "
            'a mapping from name to array, or a list of groups (mappings with "params")'
        )
    return [Leaf(str(first), place, params)], lambda grads: [grads]


def settled(x: Any) -> Any:
    """The same structure with lists in the place of what can be read only once."""
    if isinstance(x, Mapping):
        return {name: settled(entry) for name, entry in x.items()}
    return [settled(entry) for entry in x] if is_sequence(x) else x


def _as_list(grads: Any, count: int, where: str, what: str) -> list[Any]:
    if not is_sequence(grads):
        raise TypeError(f"{where} is a {type(grads).__name__}; wanted a sequence, one {what}")
    entries = list(grads)
    if len(entries) != count:
        raise ValueError(f"{where} has {len(entries)} entries; wanted {count}, one {what}")
    return entries


def _by_name(grads: Any, names: list[str], where: str) -> list[Any]:
    if not isinstance(grads, Mapping):
        raise TypeError(f"{where} is a {type(grads).__name__}; wanted a mapping with the names of params")
    if len(grads) != len(names) or not all(name in grads for name in names):  # a defaultdict would make what is missing
        problems = Problems()
        for name in names:
            if name not in grads:
                problems.add(
                    ValueError, f"{where}[{quoted(name)}] is missing; wanted a gradient, or None to leave it out"
                )
        for name in grads:
            if name not in names:
                problems.add(ValueError, f"{where}[{quoted(name)}] belongs to no parameter")
        problems.raise_any()
    return [grads[name] for name in names]


def _unique(structure: Structure) -> Structure:
    seen: dict[str, str] = {}
    for _, leaves in structure.groups:
        for leaf in leaves:
            if leaf.key in seen:
                raise ValueError(
                    f"params{leaf.place} and params{seen[leaf.key]} share the name {leaf.key!r}; wanted two"
                )
            seen[leaf.key] = leaf.place
    return structure
