"""What every optimizer here does: groups, hyperparameters that may change, steps, state that goes out and comes in."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import numpy as np

from . import hyper
from .arrays import Problems, Tensor, check_disjoint, check_one_place, make_tensor, quoted
from .dtypes import compute_dtype
from .hyper import Changes, ParamGroup, Schedule
from .plan import Plan, Settings, variants_of
from .state import VERSION, LoadReport, State, check_state_dict, needed
from .structure import Leaf, parse
from .summary import summary

if TYPE_CHECKING:
    from .streams import Order

CAPTURED = "the current stream is captured in a CUDA graph"


class Optimizer:
    """RMSProp and AdaGrad differ from it in their hyperparameters and in one line of the rule."""

    _adagrad: ClassVar[bool]

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        self._plan: Plan | None = None
        for name, value in defaults.items():
            defaults[name] = hyper.checked(name, value)
        structure = parse(params)
        self._flatten = structure.flatten
        problems = Problems()
        made = [[_tensor(leaf, problems) for leaf in leaves] for _, leaves in structure.groups]
        self._members = [[tensor for tensor in tensors if tensor] for tensors in made]
        self._tensors = [tensor for tensors in self._members for tensor in tensors]
        check_one_place(self._tensors, problems)
        check_disjoint([(t.label, t.address, t.layout.nbytes) for t in self._tensors], problems)
        problems.raise_any()

        self._changes = Changes()
        self._scheduled = True
        self._param_groups = []
        for i, ((overrides, _), tensors) in enumerate(zip(structure.groups, self._members, strict=True)):
            for name in overrides:
                if name not in defaults:
                    raise TypeError(f"params[{i}] has {name!r}; wanted hyperparameters among {', '.join(defaults)}")
            try:
                values = {**defaults, **{name: hyper.checked(name, value) for name, value in overrides.items()}}
                computes = {compute_dtype(t.layout.dtype) for t in tensors}
                self._param_groups.append(ParamGroup(values, tuple(t.array for t in tensors), computes, self._changes))
            except (TypeError, ValueError, NotImplementedError) as error:
                if not overrides:
                    raise
                raise type(error)(f"params[{i}]: {error}") from None
        self._group_of = [i for i, tensors in enumerate(self._members) for _ in tensors]
        self._steps = np.zeros(1, np.int64)
        self._order = self._make_order()
        self._captured_plans: list[Plan] = []  # those of which a CUDA graph holds steps; the last is the one to refresh
        self._state = State(self._tensors, self._order)
        self._kinds = {(i, t.layout.dtype) for t, i in zip(self._tensors, self._group_of, strict=True)}
        self._allocate()

    def _make_order(self) -> Order | None:
        """The order of streams, where the arrays lie on devices."""
        devices = sorted({t.device for t in self._tensors if t.device is not None})
        if not devices:
            return None
        from .streams import Order  # it imports CuPy

        order = Order(devices)
        if order.capturing():
            raise RuntimeError(f"{CAPTURED}; build the optimizer before")
        weakref.finalize(self, order.release).atexit = False
        return order

    # Hyperparameters

    @property
    def param_groups(self) -> tuple[ParamGroup, ...]:
        """The groups, each a mapping of its hyperparameters and ``"params"``; an assignment counts at the next step."""
        return tuple(self._param_groups)

    @property
    def lr(self) -> float | Schedule:
        """The learning rate that all groups share; assigning it assigns that of every group."""
        rates = [group["lr"] for group in self._param_groups]
        if any(rate != rates[0] for rate in rates):
            raise ValueError(f'the groups differ in lr: {rates}; ask param_groups[i]["lr"]')
        return rates[0]  # type: ignore[no-any-return]

    @lr.setter
    def lr(self, value: float | Schedule) -> None:
        value = hyper.checked("lr", value)
        for group in self._param_groups:
            group._check({**group.hyper(), "lr": value})
        nothing_else = not self._changes.pending
        for group in self._param_groups:
            group["lr"] = value
        # Replays of a graph read it without asking us; it belongs to no switch, so the plan stays.
        if self._order and self._plan and nothing_else and not callable(value) and not self._order.capturing():
            self._current_plan()

    @property
    def steps(self) -> int:
        """How often `step` was called, and what a callable `lr` is given; 0 at the first call."""
        return int(self._steps[0])

    # Steps

    def step(self, grads: Any, *, grad_scale: Any = None, found_inf: Any = None) -> None:
        """Update every parameter in place.

        Parameters
        ----------
        grads : array, sequence, mapping or list of these
            Mirrors the structure of the parameters; for groups a list with one entry a group. Each gradient has its
            parameter's shape and dtype, in any layout: one that lies as its parameter does is read where it is,
            another is copied into a buffer that is kept. Gradients are only read. ``None`` in the place of one leaves
            its parameter and state alone.
        grad_scale, found_inf : None
            Reserved for device scalars; anything else raises NotImplementedError.

        Raises
        ------
        TypeError, ValueError
            Naming everything that is wrong with any gradient, or with a parameter that was changed in place. Then
            nothing at all was written: a step is all or nothing.
        """
        if grad_scale is not None or found_inf is not None:
            hyper.refuse_later(grad_scale=grad_scale, found_inf=found_inf)
        arrays = self._flatten(grads)
        plan = self._plan
        if self._order and self._order.capturing():
            plan = self._plan_to_capture()
        elif self._changes.pending or self._scheduled or plan is None:
            plan = self._current_plan()
        plan.bind(arrays)
        plan.launch()

    def refresh(self, step: int | None = None) -> None:
        """Send the hyperparameters as they are now to the device, for the next replay of a captured CUDA graph.

        No Python runs in a replay. ``opt.lr = ...`` sends the new rate at once; after an assignment to `param_groups`,
        and with a callable `lr` before each replay, call this, under the stream on which the graph is replayed.

        Parameters
        ----------
        step : int, optional
            What a callable `lr` is asked for; by default `steps`. With a callable `lr` it counts as the replay's step:
            `steps` is one more afterwards. (The counters in `state` are the device's and count every replay.)

        Raises
        ------
        RuntimeError
            For arrays in host memory; while a stream is captured; and after a change of a switch (momentum that was 0,
            say), which a captured graph cannot follow: capture it anew.
        """
        if self._order is None:
            raise RuntimeError("refresh is for replays of CUDA graphs, but the parameters lie in host memory")
        self._refuse_capture("refresh")
        asked = self.steps if step is None else step
        if isinstance(asked, bool) or not isinstance(asked, (int, np.integer)) or asked < 0:
            raise ValueError(f"step is {step!r}; wanted a count >= 0, or None for opt.steps")
        if self._captured_plans:
            settings = self._settings(int(asked))
            if variants_of(settings) != self._captured_plans[-1].variants:
                raise RuntimeError("a switch of the rule has changed since the graph was captured; capture it anew")
        self._current_plan(int(asked))
        if self._scheduled:
            self._steps[0] = asked + 1

    def _refuse_capture(self, what: str) -> None:
        if self._order and self._order.capturing():
            raise RuntimeError(f"{CAPTURED}, which can hold no {what}; end the capture first")

    def _plan_to_capture(self) -> Plan:
        """The plan of a step that a CUDA graph captures; all that it needs must be on the device."""
        if self._plan is None:
            raise RuntimeError(f"{CAPTURED}, but the optimizer has not taken a step yet; take the same one before")
        if self._changes.pending:
            raise RuntimeError(f"{CAPTURED}, but hyperparameters were assigned since the last step; refresh() before")
        if self._plan not in self._captured_plans:
            self._captured_plans.append(self._plan)
        return self._plan

    def _settings(self, step: int) -> Settings:
        """Variant and scalars of a step, for every group and dtype in it."""
        hypers = [group.hyper() for group in self._param_groups]
        schedules = {id(h["lr"]): h["lr"] for h in hypers}  # groups that share one ask it once together
        asked = {key: hyper.lr_at(lr, step) for key, lr in schedules.items()}
        rates = [asked[id(h["lr"])] for h in hypers]
        return {
            (i, dtype): (
                hyper.variant(hypers[i], self._adagrad),
                hyper.scalars(hypers[i], rates[i], compute_dtype(dtype)),
            )
            for i, dtype in self._kinds
        }

    def _current_plan(self, step: int | None = None) -> Plan:
        """The plan for the hyperparameters as they are now: a new one only if a switch or a buffer is new."""
        changed, self._changes.pending = self._changes.pending, False  # a schedule may assign: that counts next time
        try:
            settings = self._settings(self.steps if step is None else step)
            if self._plan is None or changed:
                self._allocate()
                if self._plan is None or variants_of(settings) != self._plan.variants:
                    self._plan = self._plan_for(settings)
                self._scheduled = any(callable(group["lr"]) for group in self._param_groups)
            self._plan.write_scalars(settings)
        except BaseException:
            self._changes.pending = True
            raise
        return self._plan

    def _plan_for(self, settings: Settings) -> Plan:
        for plan in self._captured_plans:
            if plan.variants == variants_of(settings):
                return plan
        made = Plan(self._tensors, self._group_of, self._state.buffers, settings, self._steps, self._order)
        if self._order:
            self._order.release()  # the memory of the plan before
        return made

    def _allocate(self) -> None:
        """Make the state that the hyperparameters need and that is not there yet."""
        hypers = [self._param_groups[i].hyper() for i in self._group_of]
        self._state.ensure([needed(h, self._adagrad) for h in hypers], [h["initial_scale"] for h in hypers])

    # State

    @property
    def state(self) -> State:
        """``opt.state[name_or_index]["square_avg"]``: the state itself, arrays of the parameter's shape beside it."""
        return self._state

    def state_dict(self) -> dict[str, Any]:
        """A snapshot of state, hyperparameters and steps, of plain dicts, lists, numbers and arrays; it may be kept.

        Unlike torch's it copies, so that later steps do not change it, and goes by name. A callable ``lr`` is a
        program, not a number: it is saved as None, and given again to the optimizer that loads.

        Returns
        -------
        dict
            ``"optimizer"``, ``"version"``, ``"steps"``; ``"state"``, by name the arrays of each parameter, on its
            device (no copies of the host); ``"param_groups"``, a list of dicts of hyperparameters, with names as
            ``"params"``.
        """
        self._refuse_capture("state_dict")
        self._allocate()  # what was assigned since the last step
        members = [[tensor.key for tensor in tensors] for tensors in self._members]
        groups = [group.hyper() for group in self._param_groups]
        return {
            "optimizer": type(self).__name__,
            "version": VERSION,
            "steps": self.steps,
            "state": self._state.snapshot(),
            "param_groups": [
                {"params": names, **h, "lr": None if callable(h["lr"]) else h["lr"]}
                for names, h in zip(members, groups, strict=True)
            ],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> LoadReport:
        """Continue from a `state_dict`: everything is validated by name before anything changes.

        Parameters
        ----------
        state_dict : mapping
            As `state_dict` returned it, or read back from wherever it was kept.
        strict : bool
            True: the same parameters in the same groups; the hyperparameters are loaded too (a callable ``lr``
            stays, and has to be there where one was saved). False: parameters that both have are loaded, the others
            and all hyperparameters stay as they are; `steps` is loaded.

        Returns
        -------
        LoadReport
            The names ``missing`` in the dict, and the ``unexpected`` ones in it; both empty with `strict`.

        Raises
        ------
        TypeError, ValueError
            Naming everything that does not fit; then nothing was changed. torch finds a wrong shape at the next step,
            and casts float32 state to the parameter's dtype.
        """
        self._refuse_capture("load_state_dict")
        problems = Problems()
        loaded = check_state_dict(state_dict, type(self).__name__, problems)
        problems.raise_any()
        keys = [tensor.key for tensor in self._tensors]
        report = LoadReport(
            [key for key in keys if key not in loaded["state"]], [key for key in loaded["state"] if key not in keys]
        )
        groups = [group.hyper() for group in self._param_groups]
        if strict:
            for name, what in (
                (report.missing, "is missing in"),
                (report.unexpected, "has no parameter here, but is in"),
            ):
                for key in name:
                    problems.add(ValueError, f'{quoted(key)} {what} state_dict["state"]')
            groups = self._loaded_groups(loaded["param_groups"], problems)
        names = [needed(groups[i], self._adagrad) for i in self._group_of]
        found = self._state.check(loaded["state"], names, problems)
        problems.raise_any()

        self._state.load(found)
        self._steps[0] = int(loaded["steps"])
        for group, values in zip(self._param_groups, groups, strict=True):
            group.replace(values)
        if self._order:
            self._order.broken = None  # if it was between two steps, it is not now
        return report

    def _loaded_groups(self, saved: list[Any], problems: Problems) -> list[dict[str, Any]]:
        """The hyperparameters of every group in a state dict, validated; ours where they cannot be."""
        if len(saved) != len(self._param_groups):
            problems.add(ValueError, f"param_groups has {len(saved)} groups; wanted {len(self._param_groups)}")
            return [group.hyper() for group in self._param_groups]
        keys = [[tensor.key for tensor in tensors] for tensors in self._members]
        return [
            group.loaded(entry, names, f"param_groups[{i}]", problems)
            for i, (group, entry, names) in enumerate(zip(self._param_groups, saved, keys, strict=True))
        ]

    def __repr__(self) -> str:
        return summary(self, self._members, self._state.nbytes)

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "lr" and not name.startswith("_"):
            raise AttributeError(f"{name!r} cannot be assigned here; wanted opt.param_groups[i][{name!r}] = ...")
        super().__setattr__(name, value)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__} holds addresses of its parameters and cannot be copied or pickled; "
            "save its state_dict(), and load that into an optimizer built for the new parameters"
        )


def _tensor(leaf: Leaf, problems: Problems) -> Tensor | None:
    return make_tensor(
        leaf.array,
        problems,
        key=leaf.key,
        label=f"params{leaf.place}",
        grad_label=f"grads{leaf.place}",
        state_label=f"state{leaf.place}.",
    )
