"""The 32-bit state of bitsandbytes.optim.RMSprop and Adagrad."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...arrays.checks import Problems, is_sequence
from ...conventions.presets import PRESETS
from .common import Mine
from .param_groups import Dialect, read_groups

_PRESET = PRESETS["bitsandbytes"]
_WRAPPED = "__bnb_optimizer_quant_state__"  # hides arrays without the parameter's shape from FSDP
_OF_8_BITS = ("qmap1", "absmax1", "max1", "new_max1")


def _rmsprop(group: Mapping[str, Any]) -> dict[str, Any]:
    betas = group.get("betas", (0.0, 0.0))
    if not is_sequence(betas) or len(betas) != 2:
        raise ValueError(f"betas is {betas!r}; wanted those of RMSprop, alpha and momentum")
    given = {name: group[name] for name in ("lr", "eps", "weight_decay") if name in group}
    return _PRESET.translate(_PRESET.effective("bitsandbytes", {**given, "alpha": betas[0], "momentum": betas[1]}))


def _adagrad(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: group[name] for name in ("lr", "eps", "weight_decay") if name in group}


def _opened(entry: Mapping[str, Any], place: str, problems: Problems) -> Mapping[str, Any]:
    """An entry with its wrapped content; an 8-bit one is reported, and then empty."""
    inner = entry.get(_WRAPPED)
    if isinstance(inner, Mapping):
        entry = {**{name: value for name, value in entry.items() if name != _WRAPPED}, **inner}
    found = [name for name in _OF_8_BITS if name in entry]
    if found:
        text = f"has {found[0]!r}, so it is 8-bit; wanted a 32-bit one, from optim_bits=32"
        problems.add(ValueError, f"{place} {text}")
        return {"step": 0, "state1": None}
    return entry


_HYPER = ("lr", "betas", "eps", "weight_decay")
_DIALECTS = {
    False: Dialect(_HYPER, (), _rmsprop, {"state1": "square_avg"}, _opened),
    True: Dialect(_HYPER, (), _adagrad, {"state1": "sum"}, _opened),
}


def read(state: Any, steps: int | None, mine: Mine, problems: Problems) -> dict[str, Any]:
    """Read the ``state_dict()`` of bitsandbytes.optim.RMSprop or Adagrad."""
    return read_groups(state, steps, _DIALECTS[mine.adagrad], mine, problems)
