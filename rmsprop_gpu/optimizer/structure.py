"""The structures of parameters: arrays in sequences and mappings, nested or not, or groups of these."""

from __future__ import annotations

from collections.abc import Mapping, MutableSequence
from dataclasses import is_dataclass
from typing import Any, NamedTuple

from .. import hyper
from ..arrays.checks import a, is_sequence, quoted
from ..arrays.selector import kind_of


class Leaf(NamedTuple):
    """A parameter in the structure: its key in the state, and its place as written after ``params`` or ``grads``."""

    key: str
    place: str
    given: Any
    named: bool  # by a mapping somewhere above it, rather than only by positions in lists


class Branch(NamedTuple):
    """A mapping or sequence in the structure, or the list of groups, and its contents."""

    place: str
    given: Any
    entries: dict[Any, Leaf | Branch]
    kept: bool  # does it store its entries, rather than make a new object on each access?
    of_groups: bool = False

    @property
    def is_mapping(self) -> bool:
        return isinstance(self.given, Mapping)


class Structure(NamedTuple):
    """The given structure as a tree, and its leaves in groups with their own settings."""

    tree: Leaf | Branch
    groups: list[tuple[dict[str, Any], list[Leaf]]]


def leaves_of(tree: Leaf | Branch) -> list[Leaf]:
    """The parameters in a structure, in order."""
    if isinstance(tree, Leaf):
        return [tree]
    return [leaf for entry in tree.entries.values() for leaf in leaves_of(entry)]


def parse(params: Any) -> Structure:
    """The structure of `params`; a TypeError or ValueError if it is not a valid one."""
    if is_sequence(params):
        params = _indexed(params)
        if any(isinstance(x, Mapping) and ("params" in x or _has_settings(x)) for x in params):
            return _parse_groups(params)
    tree = _tree(params, "")
    leaves = leaves_of(tree)
    if not leaves:
        raise ValueError("params is empty; wanted at least one array")
    return _unique(Structure(tree, [({}, leaves)]))


def _parse_groups(params: Any) -> Structure:
    groups, entries, count = [], dict[Any, Leaf | Branch](), 0
    for i, group in enumerate(params):
        if not isinstance(group, Mapping) or "params" not in group:
            found = f"a mapping with keys {list(group)}" if isinstance(group, Mapping) else f"a {type(group).__name__}"
            raise TypeError(f'params[{i}] is {found}; wanted a group, a mapping with "params", like its neighbours')
        entries[i] = tree = _tree(group["params"], f"[{i}]", first=count)
        leaves = leaves_of(tree)
        groups.append(({name: value for name, value in group.items() if name != "params"}, leaves))
        # The next list continues after these, also after the empty entries of a list.
        count += max(len(leaves), 0 if isinstance(tree, Leaf) or tree.is_mapping else len(tree.entries))
    if not any(leaves for _, leaves in groups):
        raise ValueError("params has groups, but no array in any of them; wanted at least one")
    given = tuple(tree.given for tree in entries.values())
    return _unique(Structure(Branch("", given, entries, kept=True, of_groups=True), groups))


def _tree(x: Any, place: str, name: str | None = None, first: int = 0, named: bool = False) -> Leaf | Branch:
    """The tree of `params`, or of its entry under this name; the positions in a list at the top count from `first`."""
    if isinstance(x, Mapping):
        _check_mapping(x, place)
        named, entries = True, [(key, str(key), entry) for key, entry in x.items()]
    elif is_dataclass(x) and kind_of(x) is None:
        raise TypeError(f"params{place} is {a(type(x))}, a dataclass; wanted a mapping, such as its vars(...)")
    elif isinstance(x, tuple) and hasattr(x, "_fields"):
        raise TypeError(f"params{place} is {a(type(x))}, a named tuple; wanted a mapping, such as its _asdict()")
    elif isinstance(x, (tuple, MutableSequence)) or (name is None and is_sequence(x)):
        x = _indexed(x)
        entries = [(i, str(first + i), entry) for i, entry in enumerate(x)]
    else:
        if name is None and (isinstance(x, (str, bytes, set, frozenset)) or x is None):
            raise TypeError(
                f"params{place} is a {type(x).__name__}; wanted an array, a sequence of arrays, "
                'a mapping from name to array, these nested, or a list of groups (mappings with "params")'
            )
        return Leaf(str(first) if name is None else name, place, x, named)
    above = "" if name is None else f"{name}."
    made = {key: _tree(entry, f"{place}[{quoted(key)}]", f"{above}{text}", named=named) for key, text, entry in entries}
    return Branch(place, x, made, kept=all(x[key] is entry.given for key, entry in made.items()))


def _indexed(x: Any) -> Any:
    """A sequence unchanged, or a tuple made from something that can be read only once."""
    return x if isinstance(x, (tuple, MutableSequence)) else tuple(x)


def _check_mapping(x: Mapping[Any, Any], place: str) -> None:
    if "params" in x and _has_settings(x):
        raise TypeError(f'params{place} is one group, a mapping with "params"; wanted a list of groups: [{{...}}]')
    for name in x:
        if not isinstance(name, (str, int)) or isinstance(name, bool):
            found = f"the name {name!r} (a {type(name).__name__})"
            raise TypeError(f"params{place} has {found}; wanted strings or integers as names")


def _has_settings(x: Mapping[Any, Any]) -> bool:
    """Does it have a hyperparameter: an entry with such a name, whose value contains no parameters?"""
    named = (x[name] for name in hyper.ALL if name in x)
    return any(not isinstance(value, (Mapping, tuple, MutableSequence)) and kind_of(value) is None for value in named)


def _unique(structure: Structure) -> Structure:
    seen: dict[str, str] = {}
    for leaf in leaves_of(structure.tree):
        if leaf.key in seen:
            raise ValueError(f"params{leaf.place} and params{seen[leaf.key]} share the name {leaf.key!r}; wanted two")
        seen[leaf.key] = leaf.place
    return structure


def settled(x: Any) -> Any:
    """The same structure, with lists in place of anything that can be read only once."""
    if isinstance(x, Mapping):
        return {name: settled(entry) for name, entry in x.items()}
    return [settled(entry) for entry in x] if is_sequence(x) else x
