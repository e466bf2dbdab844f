"""The state of torch.optim.RMSprop and Adagrad, both ways."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import numpy as np

from ...arrays import dtypes
from ...arrays.checks import Problems, Tensor, a, quoted
from ...arrays.real import one_real
from ...conventions.group_keys import refusal
from ...extras import extra
from ...kernels.table import BUFFERS
from ..kinds import needed
from .common import Mine, buffers_of, count, counters, empty, order_of, taken

# Ours that torch's rule has fixed; what has no counterpart there (clipping, say) stays as it is here.
_TORCH_FIXED = {
    "nesterov": False,
    "eps_in_sqrt": False,
    "lr_in_momentum": False,
    "initial_scale": 0.0,
    "bias_correction": False,
    "decoupled_weight_decay": False,
}
_TORCH = {
    False: ("lr", "alpha", "eps", "weight_decay", "momentum", "centered"),
    True: ("lr", "eps", "weight_decay", "lr_decay"),
}
# How torch computes: nothing that changes a step.
_TORCH_IGNORED = {"params", "param_names", "capturable", "foreach", "differentiable", "fused"}


def read(state: Any, steps: int | None, mine: Mine, problems: Problems) -> dict[str, Any]:
    """torch.optim.RMSprop's or Adagrad's ``state_dict()``."""
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
        h = frame["param_groups"][i] = {**frame["param_groups"][i], **_torch_hyper(group, mine, i, label, problems)}
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
            count, found = _torch_entry(entry or {}, place, tensor, h, mine, problems)
            frame["state"][tensor.key] = {**counters(count, tensor, h, mine), **found}
            counts.append(count)
    for key in entries:
        if key not in used:
            problems.add(ValueError, f'state["state"][{key!r}] belongs to no parameter of state["param_groups"]')
    return {**frame, "steps": max(counts) if steps is None else steps}


def _names(group: Any) -> list[Any]:
    """The names of named parameters, else their ids."""
    lists = [group.get(key) for key in ("param_names", "params")] if isinstance(group, Mapping) else []
    return next((list(names) for names in lists if isinstance(names, (list, tuple)) and names), [])


def _torch_hyper(group: Mapping[str, Any], mine: Mine, i: int, label: str, problems: Problems) -> dict[str, Any]:
    """Our hyperparameters for a group of torch's."""
    wanted = _TORCH[mine.adagrad]
    for name in wanted:
        if name not in group:
            problems.add(ValueError, f"{label} lacks {name!r}")
    known = {*wanted, "maximize", "initial_accumulator_value", *_TORCH_IGNORED}
    others = {name: value for name, value in group.items() if name not in known}
    for name in others:
        if why := refusal(name):
            problems.add(ValueError, f"{label} has {name!r}, {why}")
    if mine.adagrad and group.get("lr_decay"):
        problems.add(ValueError, f'{label}["lr_decay"] is {group["lr_decay"]!r}; wanted 0, or here a callable lr')
    ours = mine.hyper[i]
    values = {n: group[n] for n in (*wanted, "maximize") if n in group and n in ours}
    fixed = {n: value for n, value in _TORCH_FIXED.items() if n in ours}
    if mine.adagrad:
        fixed["initial_scale"] = group.get("initial_accumulator_value", 0)
    return {**fixed, "maximize": False, **values, **{n: x for n, x in others.items() if not refusal(n)}}


def _torch_entry(
    entry: Mapping[str, Any], place: str, tensor: Tensor, h: Mapping[str, Any], mine: Mine, problems: Problems
) -> tuple[int, dict[str, Any]]:
    """The step and the buffers of one parameter; without an entry, as torch leaves one without gradient, new ones."""
    wanted = [name for name in buffers_of(h, mine) if name in _TORCH_BUFFERS]  # it has no averages of parameters
    if not entry:
        fill = one_real(h["initial_scale"]) or 0.0  # what is none is a problem of the hyperparameters
        compute = dtypes.compute_dtype(tensor.layout.dtype)
        new = {name: np.zeros(tensor.layout.shape, compute) for name in wanted}
        if mine.adagrad:
            new["sum"] += compute.type(fill)
        return 0, new
    found = {}
    for name in ["step", *wanted]:
        if name not in entry:
            problems.add(ValueError, f"{place} lacks {name!r}, which its hyperparameters need")
    for name, value in entry.items():
        if name == "step":
            continue
        if name not in _TORCH_BUFFERS or (name == "sum") != mine.adagrad:
            problems.add(ValueError, f"{place} has {name!r}, which has no counterpart here")
        elif value is not None:
            found[name] = taken(value, f"{place}[{quoted(name)}]", name, tensor, problems)
    return count(entry.get("step", 0), f'{place}["step"]', problems), found


_TORCH_BUFFERS = ("square_avg", "sum", "grad_avg", "momentum_buffer")


def to_torch(snapshot: Callable[[], Mapping[str, Any]], hyper: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Our `state_dict()`, taken once it is known that torch can have it, as ``load_state_dict`` there takes it."""
    refused = [f"param_groups[{i}][{quoted(n)}] = {h[n]!r}" for i, h in enumerate(hyper) for n in _not_in_torch(h)]
    if refused:
        raise ValueError(f"torch has no {', '.join(refused)}; wanted each at its neutral value")
    with extra("bench"):
        torch: Any = import_module("torch")
    state_dict = snapshot()
    adagrad = state_dict["optimizer"] == "AdaGrad"

    def tensor(x: Any) -> Any:
        return torch.from_numpy(x) if isinstance(x, np.ndarray) else torch.from_dlpack(x)

    groups: list[dict[str, Any]] = []
    state: dict[int, dict[str, Any]] = {}
    for h, group in zip(hyper, state_dict["param_groups"], strict=True):
        keys = group["params"]
        own = {n: x for n, x in group.items() if n not in h and n != "params"}  # what others have put there
        own |= {n: h[n] for n in (*_TORCH[adagrad], "maximize") if n in h}
        ids = list(range(len(state), len(state) + len(keys)))
        for index, key in zip(ids, keys, strict=True):
            arrays = {n: x for n, x in state_dict["state"][key].items() if n in needed(h, adagrad)}
            step = torch.tensor(float(arrays.pop("step")), dtype=torch.float32)
            state[index] = {"step": step, **{n: tensor(x) for n, x in arrays.items() if n in BUFFERS}}
        if adagrad:
            own |= {"lr_decay": 0, "initial_accumulator_value": h["initial_scale"], "fused": None}
        else:
            own |= {"capturable": False}
        groups.append({**own, "foreach": None, "differentiable": False, "params": ids})
    return {"state": state, "param_groups": groups}


def _not_in_torch(h: Mapping[str, Any]) -> list[str]:
    """The hyperparameters of a group that have an effect, and none in torch."""
    off = {"initial_scale"}  # what the state has started from
    if h["eps"] == 0:
        off.add("eps_in_sqrt")
    if not h["weight_decay"]:
        off.add("decoupled_weight_decay")
    if not h.get("momentum"):
        off |= {"lr_in_momentum", "nesterov"}
    if not h.get("use_ema"):
        off |= {n for n in h if n.startswith("ema_")}
    own = {"alpha", "eps", "weight_decay", "momentum", "centered", "maximize"}
    return [n for n, value in h.items() if n not in own | off and value and (n != "lr" or callable(value))]
