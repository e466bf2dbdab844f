"""The state of torch.optim.RMSprop and Adagrad, in both directions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import numpy as np

from ...arrays.checks import Problems, quoted
from ...extras import extra
from ...kernels.table import BUFFERS
from ..formats import decoded
from ..kinds import MOMENTS, needed
from .common import Mine
from .param_groups import Dialect, read_groups

_TORCH = {
    False: ("lr", "alpha", "eps", "weight_decay", "momentum", "centered"),
    True: ("lr", "eps", "weight_decay", "lr_decay"),
}


def _rmsprop(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: group[name] for name in (*_TORCH[False], "maximize") if name in group}


def _adagrad(group: Mapping[str, Any]) -> dict[str, Any]:
    if group.get("lr_decay"):
        raise ValueError(f"lr_decay is {group['lr_decay']!r}; wanted 0, or a callable lr here")
    ours = {name: group[name] for name in ("lr", "eps", "weight_decay", "maximize") if name in group}
    return {**ours, "initial_scale": group.get("initial_accumulator_value", 0)}


_DIALECTS = {
    False: Dialect(
        _TORCH[False], ("maximize",), _rmsprop, {n: n for n in ("square_avg", "grad_avg", "momentum_buffer")}
    ),
    True: Dialect(_TORCH[True], ("maximize", "initial_accumulator_value"), _adagrad, {"sum": "sum"}),
}


def read(state: Any, steps: int | None, mine: Mine, problems: Problems) -> dict[str, Any]:
    """Read the ``state_dict()`` of torch.optim.RMSprop or Adagrad."""
    return read_groups(state, steps, _DIALECTS[mine.adagrad], mine, problems)


def to_torch(snapshot: Callable[[], Mapping[str, Any]], hyper: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Our `state_dict()` in the form of torch's ``load_state_dict``; no snapshot is taken if torch cannot have it."""
    refused = [f"param_groups[{i}][{quoted(n)}] = {h[n]!r}" for i, h in enumerate(hyper) for n in _not_in_torch(h)]
    if refused:
        raise ValueError(f"torch has no {', '.join(refused)}; wanted these off, or at the values that torch has")
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
        own = {n: x for n, x in group.items() if n not in h and n != "params"}  # added by other code
        own |= {n: h[n] for n in (*_TORCH[adagrad], "maximize") if n in h}
        ids = list(range(len(state), len(state) + len(keys)))
        for index, key in zip(ids, keys, strict=True):
            arrays = _widened({n: x for n, x in state_dict["state"][key].items() if n in needed(h, adagrad)})
            step = torch.tensor(float(arrays.pop("step")), dtype=torch.float32)
            state[index] = {"step": step, **{n: tensor(x) for n, x in arrays.items() if n in BUFFERS}}
        if adagrad:
            own |= {"lr_decay": 0, "initial_accumulator_value": h["initial_scale"], "fused": None}
        else:
            own |= {"capturable": False}
        groups.append({**own, "foreach": None, "differentiable": False, "params": ids})
    return {"state": state, "param_groups": groups}


def _widened(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a parameter with its second moment in float32."""
    found = dict(arrays)
    for kind, base in MOMENTS.items():
        if kind in found and found[kind].dtype.kind == "u":
            found[kind] = decoded(found[kind], found.pop(base, None))
    return found


def _not_in_torch(h: Mapping[str, Any]) -> list[str]:
    """The hyperparameters of a group that have an effect here but do not exist in torch."""
    # Only the initial value of the state; codes are widened, and nothing is rounded stochastically after that.
    off = {"initial_scale", "square_avg_dtype", "sum_dtype", "seed"}
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
