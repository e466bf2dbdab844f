"""The entries of the caller's mappings and lists of parameters, which may later be replaced."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableSequence
from itertools import chain
from operator import is_, methodcaller
from typing import Any

from ..arrays.checks import Problems
from .structure import Branch, Leaf, leaves_of

_call = methodcaller("__call__")


class Entries:
    """The entries of the caller's mappings and lists: an array put there later would not be updated by any step."""

    def __init__(self, tree: Leaf | Branch) -> None:
        self._tree = tree
        watched = list(_watched(tree))
        self._values = [x.given.values if x.is_mapping else x.given.__iter__ for x in watched]
        self._given = [entry.given for x in watched for entry in x.entries.values()]

    def moved(self) -> bool:
        """Was any entry replaced or moved? Checked in every step."""
        values = self._values
        there = values[0]() if len(values) == 1 else chain.from_iterable(map(_call, values))
        return not all(map(is_, there, self._given))

    def check(self) -> None:
        """Refuse each parameter that was replaced by another object; removing one is up to the caller."""
        problems = Problems()
        for leaf in _replaced(self._tree, self._tree.given):
            at = f"params{leaf.place}"
            problems.add(
                ValueError,
                f"{at} is no longer the parameter that the optimizer was built for, and a step updates only that one; "
                f"wanted its values written into the old one ({at}[...] = ...), or a new optimizer",
            )
        problems.raise_any()


def _watched(tree: Leaf | Branch) -> Iterator[Branch]:
    """The mappings and lists that can change, except those that make their entries on access."""
    if isinstance(tree, Branch) and tree.kept:
        if isinstance(tree.given, (Mapping, MutableSequence)):
            yield tree
        for entry in tree.entries.values():
            yield from _watched(entry)


def _replaced(tree: Leaf | Branch, now: Any) -> Iterator[Leaf]:
    """The leaves that were replaced by another object, given `now` in the place of the tree."""
    if isinstance(tree, Leaf):
        if now is not tree.given:
            yield tree
    elif not isinstance(now, Mapping if tree.is_mapping else (tuple, MutableSequence)):
        yield from leaves_of(tree)
    elif tree.kept:
        for key, entry in tree.entries.items():
            if key in now if tree.is_mapping else key < len(now):
                yield from _replaced(entry, now[key])
