"""Gradients in the structure of the parameters, or by name, listed in parameter order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from operator import itemgetter
from typing import Any

from ..arrays.checks import Problems, is_sequence, quoted
from .structure import Branch, Leaf, leaves_of

_WRONG: Any = object()  # stands for anything with a noted problem


class Mirror:
    """Lists the gradients of a step; names every one that is missing or belongs to no parameter."""

    def __init__(self, tree: Leaf | Branch) -> None:
        self._branches = list(_branches(tree, 0))
        self._quick = [(at, _quick(branch)) for at, branch in self._branches]
        leaves = leaves_of(tree)
        self._by_name = {leaf.key: leaf for leaf in leaves} if all(leaf.named for leaf in leaves) else {}
        top = tree.entries if isinstance(tree, Branch) and tree.is_mapping else {}
        self._telling = self._by_name.keys() - top.keys()  # only gradients by name have these keys
        self._quick_by_name = _quick_mapping(self._by_name)

    def __call__(self, grads: Any) -> list[Any]:
        if self._telling and isinstance(grads, Mapping) and not self._telling.isdisjoint(grads):
            entries = self._quick_by_name(grads)
            return self._named(grads) if entries is None else list(entries)
        found = [grads]
        for at, entries_of in self._quick:
            entries = entries_of(found[at])
            if entries is None:
                return self._any(grads)
            found[at : at + 1] = entries
        return found

    def _named(self, grads: Mapping[Any, Any]) -> list[Any]:
        problems = Problems()
        found = _of_mapping(grads, self._by_name, "", problems)
        problems.raise_any()
        return found

    def _any(self, grads: Any) -> list[Any]:
        """The same for any mappings and sequences."""
        problems, found = Problems(), [grads]
        for at, branch in self._branches:
            if branch.is_mapping:
                found[at : at + 1] = _of_mapping(found[at], branch.entries, branch.place, problems)
            else:
                found[at : at + 1] = _of_sequence(found[at], branch, problems)
        problems.raise_any()
        return found


def _branches(tree: Leaf | Branch, at: int) -> Iterator[tuple[int, Branch]]:
    """Each mapping and sequence, and its position in a list in which entries replace the branch before them."""
    if isinstance(tree, Branch):
        yield at, tree
        for entry in tree.entries.values():
            yield from _branches(entry, at)
            at += len(leaves_of(entry))


def _quick(branch: Branch) -> Callable[[Any], Any]:
    """A function that returns the entries of gradients of the common kind, and None for others, right or wrong."""
    if branch.is_mapping:
        return _quick_mapping(branch.entries)
    count = len(branch.entries)

    def of_list(grads: Any) -> Any:
        return grads if type(grads) in (list, tuple) and len(grads) == count else None

    return of_list


def _quick_mapping(entries: Mapping[Any, Any]) -> Callable[[Any], Any]:
    count, keys = len(entries), list(entries)
    get = itemgetter(*keys) if count > 1 else lambda grads: [grads[key] for key in keys]

    def of_dict(grads: Any) -> Any:
        if type(grads) is dict and len(grads) == count:  # other mappings might make missing entries
            try:
                return get(grads)
            except KeyError:
                pass
        return None

    return of_dict


def _of_mapping(grads: Any, entries: Mapping[Any, Leaf | Branch], place: str, problems: Problems) -> list[Any]:
    wrong, before = [_WRONG] * len(entries), len(problems)
    if not isinstance(grads, Mapping):
        if grads is not _WRONG:
            wanted = f"a mapping with the names of params{place}"
            problems.add(TypeError, f"grads{place} is a {type(grads).__name__}; wanted {wanted}")
        return wrong
    grads = {key: grads[key] for key in grads}  # once: flax's FrozenDict makes new entries on every access
    for key, entry in entries.items():
        if key not in grads and leaves_of(entry):
            wanted = "a gradient, or None to leave it out" if isinstance(entry, Leaf) else "the gradients in it"
            problems.add(ValueError, f"grads{place}[{quoted(key)}] is missing; wanted {wanted}")
    for key in grads:
        if key not in entries:
            problems.add(ValueError, f"grads{place}[{quoted(key)}] belongs to no parameter")
    if len(problems) > before:
        return wrong
    # Branches without parameters may be missing.
    return [grads.get(key, entry.given) for key, entry in entries.items()]


def _of_sequence(grads: Any, branch: Branch, problems: Problems) -> list[Any]:
    count, at = len(branch.entries), f"grads{branch.place}"
    if branch.of_groups:
        what = "entry for each group of params"
    elif any(isinstance(entry, Branch) for entry in branch.entries.values()):
        what = f"entry for each of params{branch.place}"
    else:
        what = "gradient (or None) for each parameter"
    if is_sequence(grads):
        entries = list(grads)
        if len(entries) == count:
            return entries
        problems.add(ValueError, f"{at} has {len(entries)} entries; wanted {count}, one {what}")
    elif grads is not _WRONG:
        problems.add(TypeError, f"{at} is a {type(grads).__name__}; wanted a sequence, one {what}")
    return [_WRONG] * count
