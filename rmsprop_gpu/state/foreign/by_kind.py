"""States whose arrays are grouped by kind (all mean squares, all momenta), with the names of their parameters."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from ...arrays.checks import Problems, quoted
from ...kernels.table import BUFFERS
from ..saved import where
from .common import Entry, Mine, buffers_of, counters, empty, is_index, order_of, taken

_SWITCH = {"momentum_buffer": "momentum", "grad_avg": "centered", "ema": "use_ema"}


def by_kind(
    found: Mapping[str, list[Entry]],
    names: Mapping[str, str],
    steps: int,
    mine: Mine,
    problems: Problems,
    of_steps: Callable[[Any], Any] = lambda x: x,
    anew: tuple[str, ...] = (),
    spare: tuple[str, ...] = (),
) -> dict[str, Any]:
    """A state dict from arrays grouped by kind; `names` gives their names for our keys.

    `of_steps` turns their momentum into ours. Kinds in `anew` do not exist there, so they may be missing. Kinds in
    `spare` always exist there, so they may be unused. A kind covers all parameters, or just those whose group needs it.
    """
    frame = empty(mine)
    wanted = [buffers_of(h, mine) for h in mine.hyper]
    for i, h in enumerate(mine.hyper):
        _check_kinds(found, wanted, i, anew, spare, mine, problems)
        for tensor in mine.members[i]:
            frame["state"][tensor.key] = counters(steps, tensor, h, mine)
    theirs: dict[str, str] = {}  # for our keys, as matched for a kind that covers all parameters
    rates: dict[str, float | None] = {}
    for name, entries in sorted(found.items(), key=lambda item: -len(item[1])):
        if name not in BUFFERS:
            problems.add(ValueError, f"{entries[0].label} has no counterpart here: no {quoted(name)} is kept")
            continue
        needing = [t for own, group in zip(wanted, mine.members, strict=True) if name in own for t in group]
        tensors = needing if len(entries) < len(mine.tensors) else mine.tensors
        exact = tensors is needing and len(theirs) == len(mine.tensors)
        keys = [(theirs if exact else names)[tensor.key] for tensor in tensors]
        params, label = [entry.param for entry in entries], f"state's {quoted(name)}"
        order = order_of(params, keys, label, mine, problems, exact=exact)
        for tensor, at in zip(tensors, order, strict=False):
            if name in spare and tensor not in needing:
                continue
            entry = entries[at]
            array = taken(entry.value, entry.label, name, tensor, problems)
            if array is not None and name == "momentum_buffer":
                with where(array):
                    array = of_steps(array)
            frame["state"][tensor.key][name] = array
            rates.setdefault(tensor.key, entry.lr)
            theirs.setdefault(tensor.key, entry.param)
    for i, group in enumerate(frame["param_groups"]):
        group["lr"] = _rate(i, rates, mine, problems)
    return {**frame, "steps": steps}


def _check_kinds(
    found: Mapping[str, list[Entry]],
    wanted: Sequence[list[str]],
    i: int,
    anew: tuple[str, ...],
    spare: tuple[str, ...],
    mine: Mine,
    problems: Problems,
) -> None:
    """Refuse state that is missing although a group's hyperparameters need it, and state for which they have no use."""
    h = mine.hyper[i]
    if "momentum_buffer" in found and h.get("momentum") and not h["lr_in_momentum"]:
        text = "has lr_in_momentum=False, but the momentum in this state has lr inside; wanted True"
        problems.add(ValueError, f"param_groups[{i}] {text}")
    for name in wanted[i]:
        if name not in found and name not in anew:
            switch = _SWITCH.get(name)
            why = f"{switch}={h[switch]!r} in param_groups[{i}]" if switch else mine.optimizer
            problems.add(ValueError, f"state lacks the arrays of {quoted(name)}, which {why} needs")
    for name, entries in found.items():
        of_some = len(entries) < len(mine.tensors) and any(name in own for own in wanted)
        if name in BUFFERS and name not in wanted[i] and name not in spare and not of_some:
            switch = _SWITCH[name]
            text = f"has no use with {switch}={h.get(switch)!r} in param_groups[{i}]; wanted that of the other run"
            problems.add(ValueError, f"{entries[0].label if entries else 'state'} {text}")


def _rate(i: int, rates: Mapping[str, float | None], mine: Mine, problems: Problems) -> float | None:
    """The learning rate of a group: the state's if it has one, else ours; None if ours is a callable."""
    lr = mine.hyper[i]["lr"]
    if callable(lr):
        return None
    found = list(dict.fromkeys(rates.get(tensor.key) for tensor in mine.members[i]))
    if len(found) > 1:
        said = ", ".join(map(repr, found))
        problems.add(ValueError, f"param_groups[{i}] has the learning rates {said} in this state; wanted a group each")
    return lr if not found or found[0] is None else found[0]


def by_path(found: Mapping[str, list[Entry]], mine: Mine, problems: Problems) -> dict[str, list[Entry]]:
    """Arrays with slashes in their names, turned to dots where our keys have dots; refused if their order is a guess.

    A key may have both: haiku's names contain slashes, which stay where dots join nested parameters.
    """
    keys, spelled = [tensor.key for tensor in mine.tensors], {}
    ours = {key.replace("/", "."): key for key in keys}
    for name, entries in found.items():
        paths = [entry.param for entry in entries]
        late = _sorted_as_text(paths)
        if late and all(map(is_index, keys)) and set(paths) != set(keys) and not mine.by_order:
            text = f"has {quoted(late[0])} before {quoted(late[1])}, as text is sorted, and params has no names"
            wanted = 'wanted names, or match="order" for that order'
            problems.add(ValueError, f"state's {quoted(name)} {text}; {wanted}")
        dotted = [path.replace("/", ".") for path in paths]
        spelled[name] = entries
        if len(ours) == len(keys) and all(path in ours for path in dotted):
            spelled[name] = [entry._replace(param=ours[path]) for entry, path in zip(entries, dotted, strict=True)]
    return spelled


def _sorted_as_text(names: list[str]) -> tuple[str, str] | None:
    """Two neighbours that numerical order would swap: Dense_10 before Dense_2."""

    def parts(name: str) -> list[str]:
        return re.split(r"(\d+)", name)

    for before, name in pairwise(names):
        differing = next(((x, y) for x, y in zip(parts(before), parts(name), strict=False) if x != y), ("", ""))
        if all(x.isdecimal() for x in differing) and int(differing[0]) > int(differing[1]):
            return before, name
    return None
