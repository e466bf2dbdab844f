"""What every optimizer here does: groups, hyperparameters that may change, steps, state that goes out and comes in."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import numpy as np

from . import foreign, hyper
from .arrays import Problems, Tensor, check_disjoint, check_one_place, make_tensor, quoted
from .explain import Explanation, explain
from .groups import Groups, ParamGroup
from .hyper import Schedule
from .outcome import Outcome
from .planner import CAPTURED, Planner
from .signals import signals
from .state import VERSION, Averages, LoadReport, State, check_skipped, check_state_dict, needed
from .structure import Leaf, parse
from .summary import summary

if TYPE_CHECKING:
    from .streams import Order


class Optimizer:
    """RMSProp and AdaGrad differ from it in their hyperparameters and in one line of the rule."""

    _adagrad: ClassVar[bool]

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        for name, value in defaults.items():
            defaults[name] = hyper.checked(name, value)
        structure = parse(params)
        self._flatten = structure.flatten
        problems = Problems()
        members = [[_tensor(leaf, problems) for leaf in leaves] for _, leaves in structure.groups]
        usable = [[tensor for tensor in tensors if tensor] for tensors in members]
        self._tensors = [tensor for tensors in usable for tensor in tensors]
        check_one_place(self._tensors, problems)
        check_disjoint([(t.label, t.address, t.layout.nbytes) for t in self._tensors], problems)
        problems.raise_any()
        self._groups = Groups([overrides for overrides, _ in structure.groups], usable, defaults)
        self._devices = sorted({t.device for t in self._tensors if t.device is not None})
        hyper.check_shared(self._groups.hypers(), self._devices)
        self._steps = np.zeros(1, np.int64)
        self._order = self._make_order()
        self._state = State(self._tensors, self._order)
        self._outcome = Outcome(self._devices, self._order)
        self._planner = Planner(
            self._tensors,
            self._groups,
            self._state,
            self._steps,
            self._order,
            self._outcome,
            adagrad=self._adagrad,
        )
        self._planner.allocate()

    def _make_order(self) -> Order | None:
        """The order of streams, where the arrays lie on devices."""
        if not self._devices:
            return None
        from .streams import Order  # it imports CuPy

        order = Order(self._devices)
        if order.capturing():
            raise RuntimeError(f"{CAPTURED}; build the optimizer before")
        weakref.finalize(self, order.release).atexit = False
        return order

    # Hyperparameters

    @property
    def param_groups(self) -> tuple[ParamGroup, ...]:
        """The groups, each a mapping of its hyperparameters and ``"params"``; an assignment counts at the next step."""
        return self._groups.all

    @property
    def lr(self) -> float | Schedule:
        """The learning rate that all groups share; assigning it assigns that of every group."""
        return self._groups.lr

    @lr.setter
    def lr(self, value: float | Schedule) -> None:
        self._groups.lr = value
        self._planner.send()

    @property
    def steps(self) -> int:
        """How often `step` was called, and what a callable `lr` is given; 0 at the first call."""
        return int(self._steps[0])

    @property
    def skipped_steps(self) -> int:
        """How many steps were skipped, by `found_inf` or `skip_nonfinite`; on a device the host waits for the answer.

        They are among `steps`, but not among the ``step`` of any parameter's state.
        """
        self._refuse_capture("answer")
        return self._outcome.skipped

    @property
    def last_grad_norm(self) -> float:
        """The norm of the gradients, over all tensors and before any clip, in the last step that took norms.

        Such is a step with `clipnorm` or `global_clipnorm` (infinity, to know it and clip nothing), over the tensors
        of groups that have one; 0 before the first. It is of the gradients as they are after ``grad_scale``. On a
        device the host waits for the answer.
        """
        self._refuse_capture("answer")
        return self._outcome.norm

    # Steps

    def step(self, grads: Any, *, grad_scale: Any = None, found_inf: Any = None, zero_grads: bool = False) -> None:
        """Update every parameter in place.

        Parameters
        ----------
        grads : array, sequence, mapping or list of these
            Mirrors the structure of the parameters; for groups a list with one entry a group. Each gradient has its
            parameter's shape and dtype and lies where it does (host or device), in any layout: one that lies as its
            parameter is read where it is, another is copied into a buffer that is kept. Gradients are only read, and
            on a device held until the step is enqueued. ``None`` in the place of one leaves its parameter and state
            alone.
        grad_scale : float or array of one element, optional
            By what the gradients have been multiplied (a loss scale): they are divided by it before all else. An array
            of float32 or float64 lies where the parameters do and is read there, when the step runs.
        found_inf : bool, number or array of one element, optional
            Anything but 0 skips the step, as torch's ``GradScaler`` wants it: no byte of parameters, state or counters
            changes, `skipped_steps` counts. An array may also be of bool or integers, and is read where it lies.
        zero_grads : bool
            Write zeros into the gradients in the same pass, also where the step is skipped; a gradient that is
            read-only or overlaps another is then refused. 4 bytes more an element of float32.

        Raises
        ------
        TypeError, ValueError
            Naming everything that is wrong with any gradient, or with a NumPy parameter that was changed in place (the
            memory of an array on a device cannot move). Then nothing at all was written: a step is all or nothing.
        RuntimeError
            Where CUDA fails, naming the kernel and its arrays and saying whether the optimizer can go on; and where a
            step that a CUDA graph captures would need something that is not on the device yet.
        """
        arrays, told = self._flatten(grads), signals(grad_scale, found_inf, zero_grads, self._devices)
        plan = self._planner.plan(told.asked)
        plan.bind(arrays, told)
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
        self._refuse_capture("refresh")
        self._planner.refresh(step)

    def kernels(self) -> dict[str, Any]:
        """What a step launches: Numba's functions themselves, compiled, to look inside.

        Returns
        -------
        dict
            From a name, ``"update_kernel[float32, momentum]"``, to the ``@cuda.jit`` function, or the ``@njit`` one
            that the CPU calls for each chunk. Each has ``inspect_llvm()`` and ``inspect_asm()``, on a device also
            ``inspect_sass()`` (with nvdisasm on the PATH); they return a dict from signature to text.

        Examples
        --------
        >>> import numpy as np
        >>> from rmsprop_gpu import RMSProp
        >>> opt = RMSProp(np.ones(3, np.float32), momentum=0.9)
        >>> for name, kernel in opt.kernels().items():
        ...     (llvm,) = kernel.inspect_llvm().values()
        ...     print(name, "fdiv" in llvm)
        update_kernel[float32, momentum] True
        """
        self._refuse_capture("compilation")
        return self._planner.kernels()

    def _refuse_capture(self, what: str) -> None:
        if self._order and self._order.capturing():
            raise RuntimeError(f"{CAPTURED}, which can hold no {what}; end the capture first")

    # State

    @property
    def state(self) -> State:
        """``opt.state[name_or_index]["square_avg"]``: the state itself, arrays of the parameter's shape beside it."""
        return self._state

    @property
    def ema(self) -> Averages:
        """``opt.ema[name_or_index]``: the moving average of a parameter, where `use_ema` is on; the state itself.

        Before the first step it is the parameter. The first step sets it to the new parameter, each later one takes
        ``ema_momentum * ema + (1 - ema_momentum) * param``; a step that is skipped leaves it.
        """
        return Averages(self._state)

    def state_dict(self) -> dict[str, Any]:
        """A snapshot of state, hyperparameters and steps, of plain dicts, lists, numbers and arrays; it may be kept.

        Unlike torch's it copies, so that later steps do not change it, and goes by name. A callable ``lr`` is a
        program, not a number: it is saved as None, and given again to the optimizer that loads.

        Returns
        -------
        dict
            ``"optimizer"``, ``"version"``, ``"steps"``, ``"skipped_steps"``; ``"state"``, by name the arrays of each
            parameter, on its device (no copies of the host); ``"param_groups"``, a list of dicts of hyperparameters,
            with names as
            ``"params"``.
        """
        self._refuse_capture("state_dict")
        self._planner.allocate()  # what was assigned since the last step
        return {
            "optimizer": type(self).__name__,
            "version": VERSION,
            "steps": self.steps,
            "skipped_steps": self._outcome.snapshot(),
            "state": self._state.snapshot(),
            "param_groups": [
                {"params": names, **h, "lr": None if callable(h["lr"]) else h["lr"]}
                for names, h in zip(self._groups.keys, self._groups.hypers(), strict=True)
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
        groups = self._groups.hypers()
        if strict:
            for name, what in (
                (report.missing, "is missing in"),
                (report.unexpected, "has no parameter here, but is in"),
            ):
                for key in name:
                    problems.add(ValueError, f'{quoted(key)} {what} state_dict["state"]')
            groups = self._groups.loaded(loaded["param_groups"], problems)
        names = [needed(groups[i], self._adagrad) for i in self._groups.of_tensor]
        found = self._state.check(loaded["state"], names, problems)
        skipped = check_skipped(loaded, problems)
        problems.raise_any()

        self._state.load(found)
        self._steps[0] = int(loaded["steps"])
        self._outcome.load(skipped)
        self._groups.replace(groups)
        if self._order:
            self._order.broken = None  # if it was between two steps, it is not now
            self._planner.send()
        return report

    def explain(self) -> Explanation:
        """The update in words: what a step computes now, line by line, and how it differs from the default.

        The lines are Python: ``g`` is the gradient, ``p`` the parameter, and the other names are the state, as noted
        behind them. A callable `lr` is asked for its value at `steps`.

        Returns
        -------
        Explanation
            A str; in a notebook it is shown as mathematics.

        Examples
        --------
        >>> import numpy as np
        >>> from rmsprop_gpu import RMSProp
        >>> RMSProp.from_preset("keras", np.ones(3), learning_rate=0.01, momentum=0.5).explain()
        RMSProp:
          v = 0.9 * v + 0.1 * g**2  # square_avg
          u = g / sqrt(v + 1e-07)
          u = 0.01 * u              # lr in momentum
          b = 0.5 * b + u           # momentum_buffer
          p = p - b
        It differs from the default:
          - eps=1e-07 (1e-08): a floor of 0.000316 on the RMS
          - momentum=0.5 (0.0): a gradient that stays moves up to 2 times as far
          - eps_in_sqrt=True (False): eps stands inside the root, so that the floor is sqrt(eps) = 0.000316
          - lr_in_momentum=True (False): the buffer holds steps, so that a new lr counts for new gradients alone
          - decoupled_weight_decay=True (False): without effect, since weight_decay is 0.0
        """
        return explain(self)

    def load_foreign(self, framework: str, state: Any, *, steps: int | None = None) -> None:
        """Continue a run that was started in torch, Keras or optax, on the same trajectory.

        Parameters are matched by name where both sides have the same names, by order (groups in order) where they have
        none in common, and refused in between. Load the parameters yourself: they are no part of an optimizer's state.

        Parameters
        ----------
        framework : {"torch", "keras", "optax"}
            Whose state it is.
        state : object
            torch: ``state_dict()`` of ``torch.optim.RMSprop`` (`AdaGrad`: of ``Adagrad``), of tensors or NumPy arrays.
            Its hyperparameters are loaded too, with eps outside the root and lr outside the momentum; what torch does
            not have (clipping, say) stays. A parameter that has no state yet starts anew. Names are those of named
            parameters, ``param_names``.

            Keras: ``optimizer.variables`` of ``keras.optimizers.RMSprop`` (``Adagrad``), or a mapping from their paths
            to arrays; names have underscores for slashes. The learning rate is loaded unless `lr` is a callable here;
            the other hyperparameters are not in it: build with the same ones, ``eps_in_sqrt=True``,
            ``lr_in_momentum=True``, ``decoupled_weight_decay=True``.

            optax: the state of ``optax.rmsprop`` (``adagrad``), also inside ``chain`` or ``inject_hyperparams``. A
            nested tree matches names joined by slashes or dots, or the order of ``jax.tree.leaves``. Only the learning
            rate of ``inject_hyperparams`` is loaded; build with the same ones, ``eps_in_sqrt=True`` (optax's default),
            ``lr_in_momentum=True``.
        steps : int, optional
            The count of steps where the state has none: optax without ``bias_correction`` or schedule (0 if not given;
            needed where `bias_correction` or a callable `lr` here read it). For torch, what a callable `lr` is given
            later; by default the largest step of a parameter.

        Raises
        ------
        TypeError, ValueError
            Naming every entry that cannot be mapped; then nothing was changed.

        Notes
        -----
        An array of a dtype narrower than our state (of halves: float32) is widened; none is rounded. ``bias_weight`` is
        ``1 - alpha**step``, rounded once.

        Examples
        --------
        >>> import numpy as np
        >>> from rmsprop_gpu import RMSProp
        >>> group = {"lr": 0.1, "alpha": 0.99, "eps": 1e-8, "weight_decay": 0, "momentum": 0, "centered": False}
        >>> state = {0: {"step": 3.0, "square_avg": np.full(2, 0.25)}}
        >>> opt = RMSProp(np.ones(2))
        >>> opt.load_foreign("torch", {"state": state, "param_groups": [{**group, "params": [0]}]})
        >>> opt.steps, opt.lr, opt.state[0]["square_avg"]
        (3, 0.1, array([0.25, 0.25]))
        """
        self._refuse_capture("load_foreign")
        problems = Problems()
        mine = foreign.Mine(type(self).__name__, self._adagrad, self._groups.members, self._groups.hypers())
        state_dict = foreign.translated(framework, state, steps, mine, problems)
        self._groups.loaded(state_dict["param_groups"], problems)  # so that one error names what is wrong there too
        problems.raise_any()
        self.load_state_dict(state_dict)

    def to_foreign(self, framework: str) -> dict[str, Any]:
        """The state in the form in which a run continues in torch.

        Parameters
        ----------
        framework : {"torch"}
            torch, which has to be installed.

        Returns
        -------
        dict
            For ``load_state_dict`` of a ``torch.optim.RMSprop`` (`AdaGrad`: ``Adagrad``) over the same parameters in
            the same groups and order: copies as tensors, on a device where the state is, and the hyperparameters. torch
            casts the state of half parameters to their dtype when it loads, and computes in it.

        Raises
        ------
        ValueError
            Naming every switch and hyperparameter that torch does not have.
        """
        if framework != "torch":
            raise ValueError(f"framework is {framework!r}; wanted 'torch'")
        return foreign.to_torch(self.state_dict, self._groups.hypers())

    def __repr__(self) -> str:
        return summary(self, self._groups.members, self._state.nbytes)

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
