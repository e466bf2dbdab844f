"""torch's own step, for the parameters that our kernels cannot handle: its public function on its own state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.rmsprop import rmsprop

from .arguments import TORCHS, names_of, switched_on

_SWITCHES = ("foreach", "capturable", "differentiable")


def step(opt: Any, is_theirs: Callable[[Any], bool], why: Callable[[Any], str]) -> None:
    """Update the parameters of an `RMSprop` for which `is_theirs` is true; refuse any of our own switches there.

    Not ``super().step()``: once torch's class has been instantiated, its `step` calls the optimizer's hooks, and ours
    has already called them.
    """
    for group in opt.param_groups:
        params = [p for p in group["params"] if p.grad is not None and is_theirs(p)]
        if params and (on := switched_on(group)):
            names = names_of(opt.param_groups)
            raise RuntimeError(
                f"torch's RMSprop has no {', '.join(on)}, and our kernels cannot handle "
                + "; ".join(f"{names[id(p)]}: {why(p)}" for p in params)
            )
    with torch.set_grad_enabled(opt.defaults["differentiable"]):
        for group in opt.param_groups:
            params = [p for p in group["params"] if p.grad is not None and is_theirs(p)]
            if params:
                _update(opt, {**group, "params": params})


def _update(opt: Any, group: dict[str, Any]) -> None:
    lists: tuple[list[Any], ...] = ([], [], [], [], [], [])
    has_complex = opt._init_group(group, *lists)
    params, grads, square_avgs, momentum_buffers, grad_avgs, steps = lists
    # Its foreach form needs state in the parameters' dtype, but the state of halves may be our float32.
    mixed = any(p.dtype != x.dtype for p, x in zip(params, square_avgs, strict=True))
    switches = {name: group[name] for name in _SWITCHES} | ({"foreach": False} if mixed else {})
    rmsprop(
        params,
        grads,
        square_avgs,
        grad_avgs,
        momentum_buffers,
        steps,
        has_complex=has_complex,
        **switches,
        **{name: group[name] for name in TORCHS},
    )
