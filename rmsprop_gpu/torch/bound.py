"""An optimizer's current groups, state and tensors: which step updates which tensors, and with what numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch

from .. import hyper
from ..arrays import dtypes
from ..kernels.codes import seed_of
from ..state.storage import check_storage
from ..steps.plan import Settings, settings_of
from ..steps.signals import SILENCE
from . import library, theirs
from .arguments import DeviceRate, hypers, keys_of, names_of, stored_otherwise, values
from .gradients import SPARSE, Changed, Row
from .rows import (
    dithers,
    extent,
    has_memory,
    is_plain,
    kind_of,
    memory_of,
    named,
    other_format,
    place,
    prepare,
    unusable,
    unusable_grad,
    unusable_state,
    wanted,
)
from .side import CudaSide, HostSide, Side, dtype_of

SHARED = "it shares memory with another"


class Examined:
    """Which parameters of an `RMSprop` our step updates, which torch's, and why; nothing is changed."""

    def __init__(self, opt: Any) -> None:
        self.values = list(map(values, opt.param_groups))
        self._capturable = [group["capturable"] for group in opt.param_groups]
        self.hypers = [hypers(values) for values in self.values]
        self._unfit: dict[tuple[int, str], str | None] = {}
        self.theirs: dict[int, str] = {}
        self.stateless: list[torch.Tensor] = []  # without a gradient so far
        self.ours: list[tuple[int, torch.Tensor]] = []
        for i, group in enumerate(opt.param_groups):
            for p in group["params"]:
                why = self.why_theirs(i, p, opt.state.get(p))
                if why is not None:
                    self.theirs[id(p)] = why
                elif p.grad is None and not opt.state.get(p):
                    self.stateless.append(p)
                else:
                    self.ours.append((i, p))
        self._part(opt)

    def why_theirs(self, group: int, p: torch.Tensor, state: Mapping[str, Any] | None) -> str | None:
        """Why torch's step updates this parameter; None if ours does."""
        h = self.hypers[group]
        if isinstance(h, str):
            return h
        if (why := unusable(p)) is not None:
            return why
        if self._capturable[group] and place(p) is None:
            return "capturable=True on the CPU"
        if p.grad is not None and (why := unusable_grad(p, p.grad)) is not None:
            return why
        if state and (why := unusable_state(p, state, h)) is not None:
            return why
        kind = group, dtypes.compute_dtype(dtype_of(p.dtype)).name
        if kind not in self._unfit:
            self._unfit[kind] = _why_unfit(h, kind[1])
        return self._unfit[kind]

    def _part(self, opt: Any) -> None:
        """Leave to torch those that share memory: with each other, with a state, or with one left to torch."""
        spans = []
        for _, p in self.ours:
            spans += [(*extent(x), p) for x in (p, *memory_of(opt.state.get(p)))]
        for p in chain.from_iterable(group["params"] for group in opt.param_groups):
            if id(p) in self.theirs and is_plain(p):
                spans.append((*extent(p), p))
        spans = sorted((span for span in spans if span[0] < span[1]), key=lambda span: span[:2])
        end, owner = 0, None
        for start, stop, p in spans:
            if start < end:
                for x in (p, owner):
                    self.theirs.setdefault(id(x), SHARED)
            if stop > end:
                end, owner = stop, p
        self.ours = [(i, p) for i, p in self.ours if id(p) not in self.theirs]


def _why_unfit(h: Mapping[str, Any], dtype: str) -> str | None:
    """Why these numbers cannot be represented in this dtype, such as an eps that is 0 there."""
    try:
        hyper.scalars(h, h["lr"], np.dtype(dtype))
    except ValueError as error:
        return str(error)
    return None


class Bound:
    """An `RMSprop` that is ready to step, until anything in it changes.

    Missing state is made; nothing else is written.
    """

    def __init__(self, opt: Any) -> None:
        if any(p.grad is not None and p.grad.is_sparse for group in opt.param_groups for p in group["params"]):
            raise RuntimeError(SPARSE)
        found = Examined(opt)
        self._found, self._values, self._hypers = found, found.values, found.hypers
        self._stateless, self._theirs = found.stateless, found.theirs
        names = names_of(opt.param_groups)
        for group, h in zip(opt.param_groups, found.hypers, strict=True):
            if isinstance(h, dict):  # else a text with the reason, if torch's step cannot handle it either
                check_formats(group["params"], h, names, opt.state)
        _refuse(opt, found, names)
        if any(place(p) is not None for _, p in found.ours):
            library.refuse_capture()
        self._told = _told(opt)
        self.broken: str | None = None  # why it cannot go on
        keys = keys_of(opt.param_groups)
        rows = [self._row(opt, i, p, names[id(p)], keys[id(p)]) for i, p in found.ours]
        self._sides = self._made_sides(rows)
        # Compared by identity in each step, so the compared objects live as long as this one.
        self._groups, self._state, self._params = opt.param_groups, opt.state, _params(opt)
        self._param_ids = list(map(id, self._params))
        self._note_state(opt)
        self._group_of = {id(p): i for i, group in enumerate(opt.param_groups) for p in group["params"]}

    def _note_state(self, opt: Any) -> None:
        self._entries = list(opt.state.values())
        self._entry_ids = list(map(id, self._entries))

    def _row(self, opt: Any, group: int, p: torch.Tensor, name: str, key: str) -> Row:
        h, state, its = self._hypers[group], opt.state[p], opt.param_groups[group]
        assert isinstance(h, dict)  # otherwise the group's parameters would be torch's
        # If a step may be skipped on a device, or is captured there, only the device knows whether it counts; and
        # stochastic rounding there depends on the count.
        there = bool(its["capturable"] or its["fused"] or its["skip_nonfinite"] or self._told or dithers(h, p))
        prepare(p, state, h, counts_there=there and place(p) is not None)
        kept = tuple(dict.fromkeys([*wanted(h, p), *["bias_weight"] * ("bias_weight" in state)]))
        seed = seed_of(key, h["seed"]) if dithers(h, p) else None
        return Row(name, p, group, state, kept, p.dtype if p.grad is None else p.grad.dtype, seed)

    def _made_sides(self, rows: Sequence[Row]) -> list[Side]:
        cuda = [row for row in rows if place(row.param) is not None]
        host = [row for row in rows if place(row.param) is None]
        rates = {}
        for i, (one, h) in enumerate(zip(self._values, self._hypers, strict=True)):
            if isinstance(one[0], DeviceRate) and isinstance(h, dict):
                rates[i] = one[0].tensor, h["weight_decay"] if h["decoupled_weight_decay"] else 0.0
        # The device first: it works while the host does, and only its launches can fail.
        return [*([CudaSide(cuda, rates)] if cuda else []), *([HostSide(host)] if host else [])]

    def fits(self, opt: Any) -> bool:
        """Are these still the optimizer's groups, parameters and state?"""
        return (
            opt.param_groups is self._groups
            and opt.state is self._state
            and list(map(id, _params(opt))) == self._param_ids
            and list(map(id, opt.state.values())) == self._entry_ids
        )

    def run(self, opt: Any) -> None:
        """Run one step; raise `Changed`, before anything is written, if tensors differ from those that were bound."""
        if any(p.grad is not None for p in self._stateless):
            raise Changed
        told = _told(opt)
        if told and not self._told:
            raise Changed  # steps that may be skipped are counted where it is known whether they were
        self._take_values(opt)
        launches = [side.bind(side.told(*told) if told else SILENCE, self._settings) for side in self._sides]
        written = False
        if self._theirs:  # before ours are written, so that an error in torch leaves ours unchanged
            self._step_theirs(opt)
            self._note_state(opt)
            written = any(p.grad is not None for p in self._params if id(p) in self._theirs)
        for side, launch in zip(self._sides, launches, strict=True):
            try:
                launch()
            except RuntimeError as error:
                self.broken = side.broken
                if written and not self.broken:
                    self.broken = (
                        f"{error}. But other parameters were updated earlier in this step: restore all of them, then "
                        "load_state_dict makes the optimizer usable again"
                    )
                    raise RuntimeError(self.broken) from error
                raise
            written = True

    @property
    def captured(self) -> bool:
        """Does a CUDA graph hold a step of this?"""
        return any(plan.captured for side in self._sides for plan in side.plans.values())

    def _step_theirs(self, opt: Any) -> None:
        for p in self._params:
            if id(p) not in self._theirs or p.grad is None:
                continue
            if p.grad.is_sparse:
                raise RuntimeError(SPARSE)
            why = self._found.why_theirs(self._group_of[id(p)], p, opt.state.get(p))
            if why != self._theirs[id(p)] and self._theirs[id(p)] != SHARED:
                raise Changed
        theirs.step(opt, lambda p: id(p) in self._theirs, lambda p: self._theirs[id(p)])

    def _take_values(self, opt: Any) -> None:
        """Write the numbers of the groups if they differ from those of the last step."""
        now = list(map(values, opt.param_groups))
        if now == self._values:
            return
        for side in self._sides:
            side.refuse_numbers()
        if [one[1:] for one in now] != [one[1:] for one in self._values] or not self._follow(now):
            raise Changed  # other changes are rare, and may need other state, or torch's step
        self._values = now

    def _follow(self, now: Sequence[tuple[Any, ...]]) -> bool:
        """Write other learning rates, if they are numbers that our kernels accept."""
        for (new, *_), (old, *_) in zip(now, self._values, strict=True):
            if new != old and (isinstance(new, DeviceRate) or isinstance(old, DeviceRate)):
                return False
        lrs = [0.0 if isinstance(one[0], DeviceRate) else hyper.rate_alone(one[0]) for one in now]
        if None in lrs:
            return False
        pairs = zip(self._hypers, lrs, strict=True)
        rates = [hyper.Rates(0.0, 0.0) if isinstance(h, str) else hyper.rates(h, lr) for h, lr in pairs]  # type: ignore[arg-type]
        if not all(map(hyper.finite, rates)):
            return False
        for side in self._sides:
            for plan in side.plans.values():
                plan.write_rates(rates)
        return True

    def _settings(self, side: Side, asked: hyper.Asked) -> Settings:
        rates = [0.0 if isinstance(one[0], DeviceRate) else one[0] for one in self._values]
        return settings_of(side.kinds, self._hypers, rates, asked, adagrad=False)


def check_formats(
    params: Sequence[torch.Tensor], h: Mapping[str, Any], names: Mapping[int, str], state: Mapping[Any, Any]
) -> None:
    """Raise ValueError for a format that parameters cannot have, or if their state was made for another one."""
    if stored_otherwise(h):
        check_storage(h, [kind_of(p, names[id(p)]) for p in params])
    for p in params:
        if (found := other_format(state.get(p) or {}, h)) is not None:
            raise ValueError(
                f"square_avg_dtype is {h['square_avg_dtype']!r}, but the square_avg of {names[id(p)]} is {found}: the "
                "state was made for that, and it cannot change; wanted load_state_dict, which converts it"
            )


def _params(opt: Any) -> list[torch.Tensor]:
    return list(chain.from_iterable([group["params"] for group in opt.param_groups]))


def _told(opt: Any) -> tuple[Any, Any] | None:
    """The scale and found_inf that ``GradScaler.step`` left on the optimizer; None if it left none."""
    scale, found = getattr(opt, "grad_scale", None), getattr(opt, "found_inf", None)
    return None if scale is None and found is None else (scale, found)


def _refuse(opt: Any, found: Examined, names: Mapping[int, str]) -> None:
    """Refuse what neither step can do, and what ``fused=True`` does not allow."""
    ours = [h for h in found.hypers if isinstance(h, dict)]
    if ours:
        hyper.check_shared(ours, list(dict.fromkeys(named(place(p)) for _, p in found.ours)))
    for p in (p for _, p in found.ours):
        for x, what in [(p, ""), *((x, "a state of ") for x in memory_of(opt.state.get(p)))]:
            if not has_memory(x):
                raise RuntimeError(f"{what}{names[id(p)]} has no memory: its storage was resized to nothing")
    insisted = [p for group in opt.param_groups if group["fused"] for p in group["params"] if id(p) in found.theirs]
    if insisted:
        reasons = "; ".join(f"{names[id(p)]}: {found.theirs[id(p)]}" for p in insisted)
        raise RuntimeError(f"`fused=True` requires parameters that the kernels can handle, but {reasons}")
