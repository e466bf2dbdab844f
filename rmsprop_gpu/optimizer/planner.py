"""Which plan a step uses: for the current hyperparameters, during capture, and for the replays of a graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from threading import get_ident
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import hyper
from ..arrays.checks import Tensor
from ..arrays.dtypes import compute_dtype, grad_dtypes
from ..arrays.layout import NDArray
from ..hyper import NOTHING_ASKED, Asked
from ..kernels import cpu
from ..kernels.codes import seed_of
from ..kernels.rule import Variant
from ..state.buffers import State
from ..state.kinds import needed
from ..state.outcome import Outcome
from ..steps.batch import OtherDtypes, Parts, kernel_name
from ..steps.plan import Plan, Settings, array_steps, batched, settings_of, variants_of
from ..steps.signals import Signals
from .groups import Groups

if TYPE_CHECKING:
    from ..steps.order import Order

RECENT = 4  # kept plans for steps with other arguments; beyond that, plans are made again
CAPTURED = "the current stream is captured in a CUDA graph"


class Planner:
    """An optimizer's plans: a new plan for a new switch or buffer, new numbers in the old plan otherwise."""

    def __init__(
        self,
        tensors: Sequence[Tensor],
        groups: Groups,
        group_of: Sequence[int],
        state: State,
        steps: NDArray,
        order: Order | None,
        outcome: Outcome,
        *,
        adagrad: bool,
        parts: Parts | None = None,
    ) -> None:
        self._tensors, self._groups, self._changes = tensors, groups, groups.changes
        self._group_of, self._parts = group_of, parts
        self._state, self._steps, self._order, self._adagrad = state, steps, order, adagrad
        self._kinds = {(i, t.layout.dtype) for t, i in zip(tensors, group_of, strict=True)}
        self._devices = sorted({t.device for t in tensors if t.device is not None})
        self._outcome = outcome
        self._scheduled = True
        self._plan: Plan | None = None
        self._grad_dtypes = tuple(t.layout.dtype for t in tensors)  # of the last step, or else those of the parameters
        self._asked = NOTHING_ASKED  # by the last step
        self._recent: list[Plan] = []  # for the same hyperparameters and other arguments of steps
        self._graphs: list[Plan] = []  # those with steps held by CUDA graphs; the last is the one to refresh
        self._written: dict[Plan, list[dict[str, Any]]] = {}  # the hyperparameters last written to each
        self._hypers: list[dict[str, Any]] | None = None  # those of the coming step, if examined ahead
        self._ahead: dict[int, float] = {}  # the answers of schedules for it, by their ids
        self._seeded: tuple[tuple[int, ...], list[int]] = ((), [])  # the seeds of groups, and of tensors

    def bound(self, grads: list[Any], signals: Signals) -> Plan:
        """The plan of the next step, bound to these gradients, which are in the order of the tensors.

        A plan is made for certain gradient dtypes, and checks gradients against them. So a step with the same dtypes as
        the last needs no further look at them, and only a step with other dtypes checks the gradients twice.
        """
        if self._plan is None:  # it would be made, and compiled, for the wrong gradient dtypes
            self._grad_dtypes = tuple(map(_grad_dtype, self._tensors, grads))
        plan = self.plan(signals.asked)
        try:
            plan.bind(grads, signals)
            return plan
        except OtherDtypes as found:
            others = found.of
        plan = self._for_other(plan, others)
        plan.bind(grads, signals)
        return plan

    def plan(self, asked: Asked = NOTHING_ASKED) -> Plan:
        """The plan of the next step, with these arguments."""
        if self._order:
            self._order.refuse_broken()
            if self._order.capturing():
                return self._to_capture(asked)
        if self._plan is None or self._changes.pending or asked != self._asked:
            return self._current(asked)
        if self._changes.rates or self._scheduled:
            self._follow(self._plan)
        return self._plan

    def send(self) -> None:
        """Send numbers that were assigned or loaded to where replays of a graph read them, without running Python."""
        if self._order is None or self._plan is None or self._order.capturing():
            return
        if self._changes.turn:  # a schedule is assigning, which applies from the next step on
            return
        hypers = self._groups.hypers()
        if _scheduled(hypers):
            return
        if not self._changes.pending:
            self._follow(self._plan)
            if self._graphs:
                self._tell_graphs(hypers, self._rates(hypers, int(self._steps[0])))
            return
        rates = self._rates(hypers, int(self._steps[0]))
        settings = self._settings(hypers, rates, self._asked)
        try:
            hyper.check_shared(hypers, self._devices)
            agreed = True
        except ValueError:  # halfway through an assignment to all groups; the next step raises if it stays like this
            agreed = False
        if agreed and variants_of(settings) == self._plan.variants:
            self._current(self._asked, settings)
        self._tell_graphs(hypers, rates, agreed)

    def _tell_graphs(self, hypers: list[dict[str, Any]], rates: Sequence[float], agreed: bool = True) -> None:
        """Send numbers to every plan that a graph holds; a plan with other switches gets only the learning rate.

        So does every plan if the groups have not `agreed` on what they share.
        """
        for plan in self._graphs:
            settings = self._settings(hypers, rates, plan.asked)
            if agreed and variants_of(settings) == plan.variants:
                self._written[plan] = hypers
            else:
                pairs = zip(self._written[plan], hypers, strict=True)
                self._written[plan] = [{**old, "lr": new["lr"]} for old, new in pairs]
                settings = self._settings(self._written[plan], rates, plan.asked)
            plan.write_scalars(settings)
            plan.write_seeds(self._seeds(hypers))

    def refresh(self, step: int | None) -> None:
        """Do what an optimizer's `refresh` does."""
        if self._order is None:
            raise RuntimeError("refresh is for replays of CUDA graphs, but the parameters are in host memory")
        at = int(self._steps[0]) if step is None else step
        if isinstance(at, bool) or not isinstance(at, (int, np.integer)) or not 0 <= at < 2**62:
            raise ValueError(f"step is {step!r}; wanted a count >= 0, or None for opt.steps")
        self._order.refuse_broken()
        hypers = self._groups.hypers()
        hyper.check_shared(hypers, self._devices)
        captured = [plan for plan in self._graphs if plan.captured]  # not those from a refused capture
        asked = captured[-1].asked if captured else self._asked
        rates = self._rates(hypers, int(at))
        settings = self._settings(hypers, rates, asked)
        if captured and variants_of(settings) != captured[-1].variants:
            raise RuntimeError("a switch of the rule has changed since the graph was captured; capture it again")
        self._current(asked, settings)
        self._tell_graphs(hypers, rates)
        if self._scheduled:
            self._steps[0] = at + 1

    def look(self, grads: list[Any], signals: Signals) -> None:
        """Refuse the gradients that a step would refuse; none is kept, and no hyperparameter is checked."""
        captured = self._order and self._order.capturing()
        plan = self._to_capture(signals.asked) if captured else self.compile(signals.asked)
        with suppress(OtherDtypes):  # another plan would accept them
            plan.bind(grads, signals)
        plan.bind([None] * len(grads))  # so that it holds none of them

    def compile(self, asked: Asked, grad_dtype: np.dtype[Any] | None = None) -> Plan:
        """Make the plan for a step with these arguments, which compiles; no schedule is called, no number is sent.

        All parameters that accept gradients of this dtype are assumed to have them.
        """
        if self._order:
            self._order.refuse_broken()
        hypers = self._groups.hypers()
        hyper.check_shared(hypers, self._devices)
        rates = [0.0 if callable(h["lr"]) else h["lr"] for h in hypers]
        self.allocate()
        dtypes = self._grad_dtypes
        if grad_dtype is not None:
            own = [t.layout.dtype for t in self._tensors]
            dtypes = tuple(grad_dtype if grad_dtype.name in grad_dtypes(x) else x for x in own)
        return self._plan_for(self._settings(hypers, rates, asked), asked, dtypes, False)

    def kernels(self) -> dict[str, Any]:
        """The jitted functions, by name, that a step like the last would launch with the current hyperparameters."""
        found = {}
        for tensor, i, grad_dtype in zip(self._tensors, self._group_of, self._grad_dtypes, strict=True):
            dtype = tensor.layout.dtype
            variant = hyper.variant(self._groups.all[i].hyper(), self._adagrad, self._asked, dtype)
            for name, function in _functions(variant, dtype, grad_dtype, tensor.device).items():
                found[kernel_name(name, dtype, grad_dtype, variant)] = function
        return found

    def allocate(self, groups: list[dict[str, Any]] | None = None) -> None:
        """Allocate the missing state that the hyperparameters need, by default the current ones."""
        groups = groups or self._hypers or self._groups.hypers()
        variants = {(i, dtype): hyper.variant(groups[i], self._adagrad, dtype=dtype) for i, dtype in self._kinds}
        batches = batched(self._tensors, self._group_of, variants, self._grad_dtypes)
        self._state.order = [i for rows in batches.values() for i in rows]
        hypers = [groups[i] for i in self._group_of]
        names = [needed(h, self._adagrad, tensor.layout.dtype) for h, tensor in zip(hypers, self._tensors, strict=True)]
        self._state.ensure(names, [h["initial_scale"] for h in hypers])

    def _to_capture(self, asked: Asked) -> Plan:
        """The plan of a step that a CUDA graph captures; everything it needs must be on the device."""
        if self._plan is None:
            raise RuntimeError(f"{CAPTURED}, but the optimizer has not taken a step yet; take the same step first")
        if self._changes.pending or self._changes.rates:
            raise RuntimeError(f"{CAPTURED}, but hyperparameters were assigned since the last step; refresh() first")
        if asked != self._asked:
            raise RuntimeError(f"{CAPTURED}, but the last step had other arguments; take the same step first")
        self._graphs = [*(plan for plan in self._graphs if plan is not self._plan), self._plan]
        return self._plan

    def _rates(self, hypers: Sequence[Mapping[str, Any]], step: int) -> list[float]:
        """The learning rate of each group; a schedule shared by groups is called once for all of them."""
        lrs = [h["lr"] for h in hypers]  # read before a schedule assigns
        schedules = {id(lr): lr for lr in lrs if id(lr) not in self._ahead}
        turn = self._changes.turn
        before, turn.asking = turn.asking, get_ident()
        try:
            answers = {key: hyper.lr_at(lr, step) for key, lr in schedules.items()}
        finally:
            turn.asking = before
        return [self._ahead[id(lr)] if id(lr) in self._ahead else answers[id(lr)] for lr in lrs]

    @contextmanager
    def ahead(self) -> Iterator[tuple[list[dict[str, Any]], list[float]]]:
        """The hyperparameters and learning rates of the coming step, so that they can be checked before it.

        The step itself does not call schedules again; what a schedule has assigned applies from the next step on.
        """
        changes, hypers = self._changes, self._groups.hypers()
        before, changes.pending, changes.rates = (changes.pending, changes.rates), False, False
        try:
            rates = self._rates(hypers, int(self._steps[0]))
            if not all(map(hyper.finite, map(hyper.rates, hypers, rates))):
                for i, dtype in self._kinds:
                    hyper.scalars(hypers[i], rates[i], compute_dtype(dtype))  # which refuses what is infinite there
        finally:
            assigned = changes.pending, changes.rates
            changes.pending, changes.rates = (new or old for new, old in zip(assigned, before, strict=True))
        changes.pending, changes.rates = before
        self._hypers = hypers
        self._ahead = {id(h["lr"]): rate for h, rate in zip(hypers, rates, strict=True) if callable(h["lr"])}
        try:
            yield hypers, rates
        finally:
            self._hypers, self._ahead = None, {}
            changes.pending, changes.rates = changes.pending or assigned[0], changes.rates or assigned[1]

    def _follow(self, plan: Plan) -> None:
        """Write the current learning rates; all else is unchanged since the plan was written."""
        self._changes.rates = False  # a schedule may assign, which applies next time
        try:
            hypers = self._hypers or self._groups.look()
            lrs = self._rates(hypers, int(self._steps[0])) if self._scheduled else [h["lr"] for h in hypers]
            rates = list(map(hyper.rates, hypers, lrs))
            if self._scheduled and not all(map(hyper.finite, rates)):  # assigned rates were checked at assignment
                for i, dtype in self._kinds:
                    hyper.scalars(hypers[i], lrs[i], compute_dtype(dtype))  # which refuses what is infinite there
            plan.write_rates(rates)
        except BaseException:
            self._changes.rates = True
            raise

    def _seeds(self, hypers: Sequence[Mapping[str, Any]]) -> list[int]:
        """What each tensor's dither keys are made from: its name and its group's seed."""
        seeds = tuple(h["seed"] for h in hypers)
        if seeds != self._seeded[0]:
            pairs = zip(self._tensors, self._group_of, strict=True)
            self._seeded = seeds, [seed_of(tensor.of or tensor.key, seeds[i]) for tensor, i in pairs]
        return self._seeded[1]

    def _settings(self, hypers: Sequence[Mapping[str, Any]], rates: Sequence[float], asked: Asked) -> Settings:
        return settings_of(self._kinds, hypers, rates, asked, adagrad=self._adagrad)

    def _current(self, asked: Asked, settings: Settings | None = None) -> Plan:
        """The plan for the current hyperparameters, with its numbers written."""
        # A schedule may assign, which applies next time.
        changed, self._changes.pending, self._changes.rates = self._changes.pending, False, False
        try:
            hypers = self._hypers or self._groups.hypers()
            if settings is None:
                hyper.check_shared(hypers, self._devices)
                settings = self._settings(hypers, self._rates(hypers, int(self._steps[0])), asked)
            if self._plan is None or changed or asked != self._asked:
                if self._plan is None or variants_of(settings) != self._plan.variants:  # so may the state
                    self.allocate(hypers)
                    self._plan = self._plan_for(settings, asked, self._grad_dtypes, changed)
                self._scheduled, self._asked = _scheduled(hypers), asked
                self._plan.write_seeds(self._seeds(hypers))
                self._written[self._plan] = hypers
            self._plan.write_scalars(settings)
        except BaseException:
            self._changes.pending = True
            raise
        return self._plan

    def _for_other(self, plan: Plan, others: dict[Tensor, np.dtype[Any]]) -> Plan:
        """The plan of the same step with the same numbers, for gradients with other dtypes."""
        if self._order and self._order.capturing():
            raise RuntimeError(
                f"{CAPTURED}, but the gradients of the last step had other dtypes; take the same step first"
            )
        pairs = zip(self._tensors, self._grad_dtypes, strict=True)
        dtypes = tuple(others.get(tensor, dtype) for tensor, dtype in pairs)
        settings, written = plan.settings, self._written.get(plan) or self._groups.hypers()
        made = self._plan_for(settings, self._asked, dtypes, False)
        made.write_seeds(self._seeds(written))
        made.write_scalars(settings)
        self._plan, self._grad_dtypes, self._written[made] = made, dtypes, written
        return made

    def _plan_for(
        self, settings: Settings, asked: Asked, grad_dtypes: tuple[np.dtype[Any], ...], changed: bool
    ) -> Plan:
        for plan in [*self._graphs, *self._recent]:
            if plan.variants == variants_of(settings) and plan.grad_dtypes == grad_dtypes:
                return plan
        made = Plan(
            self._tensors,
            self._group_of,
            self._state.buffers,
            settings,
            grad_dtypes,
            array_steps(self._tensors, grad_dtypes, self._steps, self._order),
            self._outcome.addresses,
            asked,
            self._parts,
        )
        self._recent = [made, *([] if changed else self._recent)][:RECENT]
        if self._order:
            self._order.release()  # the memory of earlier plans
        kept = [*self._graphs, *self._recent]
        self._written = {plan: hypers for plan, hypers in self._written.items() if plan in kept}
        return made


def _functions(variant: Variant, dtype: np.dtype[Any], grad_dtype: np.dtype[Any], device: int | None) -> dict[str, Any]:
    if device is None:
        return cpu.functions(variant, dtype, grad_dtype)
    from cupy.cuda import Device

    from ..kernels import cuda  # it imports Numba's CUDA target

    with Device(device):
        return cuda.functions(variant, dtype, grad_dtype)


def _grad_dtype(tensor: Tensor, grad: Any) -> np.dtype[Any]:
    """The dtype that a gradient of any library reports, read without exporting its memory; else the tensor's.

    The gradient is checked later, and that check decides.
    """
    own = tensor.layout.dtype
    try:
        name = str(grad.dtype).rpartition(".")[2]  # torch.float16
        return np.dtype(name) if name in grad_dtypes(own) else own
    except Exception:  # a None, an array whose attributes raise, a bfloat16 not registered with NumPy yet
        return own


def _scheduled(hypers: Sequence[Mapping[str, Any]]) -> bool:
    return any(callable(h["lr"]) for h in hypers)
