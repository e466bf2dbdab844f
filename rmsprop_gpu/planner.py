"""Which plan a step takes: for the hyperparameters as they are now, under capture, for the replays of a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from . import hyper
from .arrays import Tensor
from .backends import cpu
from .batch import kernel_name
from .dtypes import compute_dtype
from .groups import Groups
from .hyper import NOTHING_ASKED, Asked
from .layout import NDArray
from .outcome import Outcome
from .plan import Plan, Settings, variants_of
from .rule import Variant
from .state import State, needed

if TYPE_CHECKING:
    from .streams import Order

CAPTURED = "the current stream is captured in a CUDA graph"


class Planner:
    """An optimizer's plans: a new one where a switch or a buffer is new, new numbers where only they are."""

    def __init__(
        self,
        tensors: Sequence[Tensor],
        groups: Groups,
        state: State,
        steps: NDArray,
        order: Order | None,
        outcome: Outcome,
        *,
        adagrad: bool,
    ) -> None:
        self._tensors, self._groups, self._changes = tensors, groups, groups.changes
        self._state, self._steps, self._order, self._adagrad = state, steps, order, adagrad
        self._kinds = {(i, t.layout.dtype) for t, i in zip(tensors, groups.of_tensor, strict=True)}
        self._devices = sorted({t.device for t in tensors if t.device is not None})
        self._outcome = outcome
        self._scheduled = True
        self._plan: Plan | None = None
        self._graphs: list[Plan] = []  # those that CUDA graphs hold steps of; the last is the one to refresh
        self._written: dict[Plan, list[dict[str, Any]]] = {}  # the hyperparameters that each was written with

    def plan(self, asked: Asked = NOTHING_ASKED) -> Plan:
        """The plan of the next step, which asks for this."""
        if self._order:
            self._order.refuse_broken()
            if self._order.capturing():
                return self._to_capture(asked)
        if self._changes.pending or self._scheduled or self._plan is None or asked != self._plan.asked:
            return self._current(int(self._steps[0]), asked)
        return self._plan

    def send(self) -> None:
        """Send numbers that were assigned or loaded, where replays of a graph read them without asking us.

        A graph of other switches than are on now gets the learning rate alone.
        """
        hypers = self._groups.hypers()
        if self._order is None or self._plan is None or self._order.capturing() or _scheduled(hypers):
            return
        step = int(self._steps[0])
        settings = self._settings(hypers, step, self._plan.asked)
        if variants_of(settings) == self._plan.variants:
            self._current(step, self._plan.asked, settings)
        for plan in dict.fromkeys([self._plan, *self._graphs]):
            settings = self._settings(hypers, step, plan.asked)
            if variants_of(settings) != plan.variants:
                pairs = zip(self._written[plan], hypers, strict=True)
                self._written[plan] = [{**old, "lr": new["lr"]} for old, new in pairs]
                plan.write_scalars(self._settings(self._written[plan], step, plan.asked))
            elif plan is not self._plan:
                self._written[plan] = hypers
                plan.write_scalars(settings)

    def refresh(self, step: int | None) -> None:
        """What an optimizer's `refresh` does."""
        if self._order is None:
            raise RuntimeError("refresh is for replays of CUDA graphs, but the parameters lie in host memory")
        asked = int(self._steps[0]) if step is None else step
        if isinstance(asked, bool) or not isinstance(asked, (int, np.integer)) or not 0 <= asked < 2**62:
            raise ValueError(f"step is {step!r}; wanted a count >= 0, or None for opt.steps")
        self._order.refuse_broken()
        captured = [plan for plan in self._graphs if plan.captured]  # not those of a capture that was refused
        current = captured[-1] if captured else self._plan
        flags = current.asked if current else NOTHING_ASKED
        settings = self._settings(self._groups.hypers(), int(asked), flags)
        if captured and variants_of(settings) != captured[-1].variants:
            raise RuntimeError("a switch of the rule has changed since the graph was captured; capture it anew")
        self._current(int(asked), flags, settings)
        if self._scheduled:
            self._steps[0] = asked + 1

    def kernels(self) -> dict[str, Any]:
        """The jitted functions that a step would launch with the hyperparameters as they are, by name; compiled."""
        found = {}
        for tensor, i in zip(self._tensors, self._groups.of_tensor, strict=True):
            asked, dtype = self._plan.asked if self._plan else NOTHING_ASKED, tensor.layout.dtype
            variant = hyper.variant(self._groups.all[i].hyper(), self._adagrad, asked)
            for name, function in _functions(variant, dtype, tensor.device).items():
                found[kernel_name(name, dtype, variant)] = function
        return found

    def allocate(self) -> None:
        """Make the state that the hyperparameters need and that is not there yet."""
        hypers = [self._groups.all[i].hyper() for i in self._groups.of_tensor]
        self._state.ensure([needed(h, self._adagrad) for h in hypers], [h["initial_scale"] for h in hypers])

    def _to_capture(self, asked: Asked) -> Plan:
        """The plan of a step that a CUDA graph captures; all that it needs must be on the device."""
        if self._plan is None:
            raise RuntimeError(f"{CAPTURED}, but the optimizer has not taken a step yet; take the same one before")
        if self._changes.pending:
            raise RuntimeError(f"{CAPTURED}, but hyperparameters were assigned since the last step; refresh() before")
        if asked != self._plan.asked:
            raise RuntimeError(f"{CAPTURED}, but the last step had other arguments than this; take the same one before")
        self._graphs = [*(plan for plan in self._graphs if plan is not self._plan), self._plan]
        return self._plan

    def _settings(self, hypers: Sequence[Mapping[str, Any]], step: int, asked: Asked) -> Settings:
        """Variant and scalars of a step, for every group and dtype in it, by the hyperparameters of each group."""
        hyper.check_shared(hypers, self._devices)
        schedules = {id(h["lr"]): h["lr"] for h in hypers}  # groups that share one ask it once together
        answers = {key: hyper.lr_at(lr, step) for key, lr in schedules.items()}
        rates = [answers[id(h["lr"])] for h in hypers]
        return {
            (i, dtype): (
                hyper.variant(hypers[i], self._adagrad, asked),
                hyper.scalars(hypers[i], rates[i], compute_dtype(dtype)),
            )
            for i, dtype in self._kinds
        }

    def _current(self, step: int, asked: Asked, settings: Settings | None = None) -> Plan:
        """The plan for the hyperparameters as they are now, its numbers written."""
        changed, self._changes.pending = self._changes.pending, False  # a schedule may assign: that counts next time
        try:
            hypers = self._groups.hypers()
            settings = settings or self._settings(hypers, step, asked)
            if self._plan is None or changed or asked != self._plan.asked:
                changed = True
                if self._plan is None or variants_of(settings) != self._plan.variants:  # so is what state they need
                    self.allocate()
                    self._plan = self._plan_for(settings, asked)
                self._scheduled = _scheduled(hypers)
            self._plan.write_scalars(settings)
            if changed:
                self._written[self._plan] = hypers
        except BaseException:
            self._changes.pending = True
            raise
        return self._plan

    def _plan_for(self, settings: Settings, asked: Asked) -> Plan:
        for plan in self._graphs:
            if plan.variants == variants_of(settings):
                return plan
        made = Plan(
            self._tensors,
            self._groups.of_tensor,
            self._state.buffers,
            settings,
            self._steps,
            self._order,
            self._outcome.addresses,
            asked,
        )
        if self._order:
            self._order.release()  # the memory of the plan before
        self._written = {plan: hypers for plan, hypers in self._written.items() if plan in self._graphs}
        return made


def _functions(variant: Variant, dtype: np.dtype[Any], device: int | None) -> dict[str, Any]:
    if device is None:
        return cpu.functions(variant, dtype)
    from .backends import cuda  # it imports Numba's CUDA target

    cuda.kernels(variant, dtype, device)  # compiles
    return cuda.functions(variant, dtype)


def _scheduled(hypers: Sequence[Mapping[str, Any]]) -> bool:
    return any(callable(h["lr"]) for h in hypers)
