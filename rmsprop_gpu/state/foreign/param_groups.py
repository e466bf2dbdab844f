"""States in torch's form, ``"state"`` and ``"param_groups"``, whichever optimizer wrote them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...arrays import dtypes
from ...arrays.checks import Problems, Tensor, a, quoted
from ...arrays.real import one_real
from ...conventions.group_keys import refusal
from .common import Mine, buffers_of, count, counters, empty, order_of, taken

# Options for how torch computes, which do not change a step.
_IGNORED = {"params", "param_names", "capturable", "foreach", "differentiable", "fused"}
# Our value if an optimizer does not have the option; what none of them has (such as clipping) stays unchanged here.
_PLAIN = {
    "momentum": 0.0,
    "centered": False,
    "nesterov": False,
    "eps_in_sqrt": False,
    "lr_in_momentum": False,
    "initial_scale": 0.0,
    "bias_correction": False,
    "decoupled_weight_decay": False,
    "maximize": False,
}


@dataclass(frozen=True)
class Dialect:
    """One optimizer with a ``state_dict()`` like torch's.

    Parameters
    ----------
    hyper : tuple of str
        The hyperparameters that every group has.
    others : tuple of str
        Those that only some versions have.
    translate : callable
        Translates a group to ours; a ValueError names a value that it must not have.
    buffers : mapping
        Maps the names of its arrays to ours.
    opened : callable
        Unwraps an entry of ``"state"``, given its name for messages and the problems.
    """

    hyper: tuple[str, ...]
    others: tuple[str, ...]
    translate: Callable[[Mapping[str, Any]], dict[str, Any]]
    buffers: Mapping[str, str]
    opened: Callable[[Mapping[str, Any], str, Problems], Mapping[str, Any]] = lambda entry, place, problems: entry


def read_groups(state: Any, steps: int | None, dialect: Dialect, mine: Mine, problems: Problems) -> dict[str, Any]:
    """A ``state_dict()`` in torch's form, translated to ours."""
    entries, groups = (state.get(n) if isinstance(state, Mapping) else None for n in ("state", "param_groups"))
    if not isinstance(entries, Mapping) or not isinstance(groups, (list, tuple)):
        problems.add(TypeError, f'state is {a(type(state))}; wanted torch\'s, with "state" and a list "param_groups"')
        return empty(mine)
    if len(groups) != len(mine.members):
        problems.add(ValueError, f'state["param_groups"] has {len(groups)} groups; wanted {len(mine.members)}')
        return empty(mine)
    used, every = set(), [name for group in groups for name in _names(group)]
    frame, counts = empty(mine), [0]
    for i, (group, tensors) in enumerate(zip(groups, mine.members, strict=True)):
        label = f'state["param_groups"][{i}]'
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), (list, tuple)):
            problems.add(TypeError, f'{label} is {a(type(group))}; wanted a mapping with a list "params"')
            return empty(mine)
        h = {**frame["param_groups"][i], **_hyper(group, dialect, mine.hyper[i], label, problems)}
        frame["param_groups"][i] = h
        ids = list(group["params"])
        used |= set(ids)
        names = _names(group)
        keys = [tensor.key for tensor in tensors]
        order = order_of(names if len(names) == len(ids) else ids, keys, label, mine, problems, every)
        for tensor, at in zip(tensors, order, strict=False):
            place, entry = f'state["state"][{ids[at]!r}]', entries.get(ids[at])
            if entry is not None and not isinstance(entry, Mapping):
                problems.add(TypeError, f"{place} is {a(type(entry))}; wanted a mapping from name to tensor")
                continue
            step, found = _entry(entry or {}, place, tensor, h, dialect, mine, problems)
            frame["state"][tensor.key] = {**counters(step, tensor, h, mine), **found}
            counts.append(step)
    for key in entries:
        if key not in used:
            problems.add(ValueError, f'state["state"][{key!r}] belongs to no parameter of state["param_groups"]')
    return {**frame, "steps": max(counts) if steps is None else steps}


def _names(group: Any) -> list[Any]:
    """The names of named parameters, or else their ids."""
    lists = [group.get(key) for key in ("param_names", "params")] if isinstance(group, Mapping) else []
    return next((list(names) for names in lists if isinstance(names, (list, tuple)) and names), [])


def _hyper(
    group: Mapping[str, Any], dialect: Dialect, ours: Mapping[str, Any], label: str, problems: Problems
) -> dict[str, Any]:
    """Our hyperparameters for one of their groups."""
    for name in dialect.hyper:
        if name not in group:
            problems.add(ValueError, f"{label} lacks {name!r}")
    known = {*dialect.hyper, *dialect.others, *_IGNORED}
    others = {name: value for name, value in group.items() if name not in known}
    for name in others:
        if why := refusal(name):
            problems.add(ValueError, f"{label} has {name!r}, {why}")
    try:
        values = {**_PLAIN, **dialect.translate(group)}
    except (TypeError, ValueError) as error:
        problems.add(type(error), f"{label}: {error}")
        values = {}
    own = {name: value for name, value in values.items() if name in ours}
    return {**own, **{name: value for name, value in others.items() if not refusal(name)}}


def _entry(
    entry: Mapping[str, Any],
    place: str,
    tensor: Tensor,
    h: Mapping[str, Any],
    dialect: Dialect,
    mine: Mine,
    problems: Problems,
) -> tuple[int, dict[str, Any]]:
    """The step and the buffers of one parameter; new ones if it has no entry, as after steps without gradient."""
    theirs = {ours: name for name, ours in dialect.buffers.items()}
    wanted = [name for name in buffers_of(h, mine) if name in theirs]  # none of them has averages of parameters
    if not entry:
        fill = one_real(h["initial_scale"]) or 0.0  # an invalid one is reported as a problem of the hyperparameters
        compute = dtypes.compute_dtype(tensor.layout.dtype)
        new = {name: np.zeros(tensor.layout.shape, compute) for name in wanted}
        new["sum" if mine.adagrad else "square_avg"] += compute.type(fill)
        return 0, new
    found, entry = {}, dialect.opened(entry, place, problems)
    for name in ["step", *(theirs[name] for name in wanted)]:
        if name not in entry:
            problems.add(ValueError, f"{place} lacks {name!r}, which its hyperparameters need")
    for name, value in entry.items():
        if name == "step":
            continue
        if name not in dialect.buffers:
            problems.add(ValueError, f"{place} has {name!r}, which has no counterpart here")
        elif value is not None:
            ours = dialect.buffers[name]
            found[ours] = taken(value, f"{place}[{quoted(name)}]", ours, tensor, problems)
    return count(entry.get("step", 0), f'{place}["step"]', problems), found
