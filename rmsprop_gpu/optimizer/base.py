"""What every optimizer here does: groups, hyperparameters that may change, steps, state that is saved and loaded."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from .. import hyper
from ..arrays.checks import Problems, Tensor, check_disjoint, check_one_place, make_tensor, problems_of
from ..arrays.dtypes import compute_dtype, grad_dtypes
from ..conventions.explain import Explanation, explain
from ..hyper import Schedule
from ..state.buffers import State
from ..state.outcome import Outcome
from ..steps.batch import Parts
from ..steps.signals import Signals, signals
from . import attributes
from .entries import Entries
from .groups import Groups, ParamGroup
from .mirror import Mirror
from .planner import CAPTURED, Planner
from .stateful import Stateful
from .structure import Leaf, parse
from .summary import summary

if TYPE_CHECKING:
    from ..steps.order import Order


class Optimizer(Stateful):
    """The common base of RMSProp and AdaGrad, which add their hyperparameters and one line of the rule."""

    def __init__(self, params: Any, defaults: dict[str, Any], no_decay: Any = None) -> None:
        for name, value in defaults.items():
            defaults[name] = hyper.checked(name, value)
        structure = parse(params)
        self._flatten, self._entries = Mirror(structure.tree), Entries(structure.tree)
        problems = Problems()
        members = [[_tensor(leaf, problems) for leaf in leaves] for _, leaves in structure.groups]
        usable = [[tensor for tensor in tensors if tensor] for tensors in members]
        self._whole = [tensor for tensors in usable for tensor in tensors]
        check_one_place(self._whole, problems)
        check_disjoint([(t.label, t.address, t.layout.nbytes) for t in self._whole], problems)
        problems.raise_any()
        self._groups = Groups([overrides for overrides, _ in structure.groups], usable, defaults, no_decay)
        self._devices = sorted({t.device for t in self._whole if t.device is not None})
        self._computes = {compute_dtype(t.layout.dtype) for t in self._whole}
        hyper.check_shared(self._groups.hypers(), self._devices)
        self._steps = np.zeros(1, np.int64)
        self._order = self._make_order()
        self._tensors, self._group_of, parts = self._own()
        hypers = self._groups.hypers()
        moments = [hyper.moment_dtype(hypers[i]) for i in self._group_of]
        self._state = State(self._tensors, self._order, moments)
        self._outcome = Outcome(self._devices, self._order)
        self._planner = Planner(
            self._tensors,
            self._groups,
            self._group_of,
            self._state,
            self._steps,
            self._order,
            self._outcome,
            adagrad=self._adagrad,
            parts=parts,
        )
        self._planner.allocate()

    def _own(self) -> tuple[Sequence[Tensor], Sequence[int], Parts | None]:
        """The tensors updated here, the group of each, and the parts' data: here all of every parameter, no parts."""
        return self._whole, self._groups.of_tensor, None

    def _make_order(self) -> Order | None:
        """The order of streams, if the arrays are on devices."""
        if not self._devices:
            return None
        from ..steps.order import Order  # it imports CuPy

        order = Order(self._devices)
        if order.capturing():
            raise RuntimeError(f"{CAPTURED}; build the optimizer before")
        weakref.finalize(self, order.release).atexit = False
        return order

    # Hyperparameters

    @property
    def param_groups(self) -> tuple[ParamGroup, ...]:
        """The groups, each a mapping of its hyperparameters and ``"params"``; assignments apply from the next step.

        Examples
        --------
        >>> import numpy as np
        >>> from rmsprop_gpu import RMSProp
        >>> opt = RMSProp([{"params": np.ones(2), "lr": 0.1}, {"params": np.ones(3)}])
        >>> opt.param_groups[1]["momentum"] = 0.9
        >>> [(group["lr"], group["momentum"]) for group in opt.param_groups]
        [(0.1, 0.0), (0.01, 0.9)]
        """
        return self._groups.all

    @property
    def lr(self) -> float | Schedule:
        """The learning rate that all groups share; assigning it sets it in every group.

        Examples
        --------
        >>> import numpy as np
        >>> from rmsprop_gpu import RMSProp
        >>> opt = RMSProp(np.ones(3), lr=1e-3)
        >>> opt.lr = 1e-4
        >>> opt.lr
        0.0001
        """
        return self._groups.lr

    @lr.setter
    def lr(self, value: float | Schedule) -> None:
        self._groups.lr = value
        self._planner.send()

    @property
    def skipped_steps(self) -> int:
        """The number of steps skipped because of `found_inf` or `skip_nonfinite`. On a device the host waits for it.

        They are counted in `steps`, but not in the ``step`` of any parameter's state.

        Examples
        --------
        >>> import numpy as np
        >>> from rmsprop_gpu import RMSProp
        >>> opt = RMSProp(np.ones(3), skip_nonfinite=True)
        >>> opt.step(np.array([1.0, np.nan, 1.0]))
        >>> opt.skipped_steps, opt.steps
        (1, 1)
        """
        self._refuse_capture("answer")
        return self._outcome.skipped

    @property
    def last_grad_norm(self) -> float:
        """The norm of the gradients, over all tensors and before any clip, in the last step that computed norms.

        A step computes norms with `clipnorm` or `global_clipnorm`, over the tensors of the groups that have one; set to
        infinity, these clip nothing. A skipped step counts too. Before the first such step it is 0. The norm is that of
        the gradients after division by ``grad_scale``. On a device the host waits for it.

        Examples
        --------
        >>> import numpy as np
        >>> from rmsprop_gpu import RMSProp
        >>> opt = RMSProp(np.ones(2), global_clipnorm=np.inf)
        >>> opt.step(np.array([3.0, 4.0]))
        >>> opt.last_grad_norm
        5.0
        """
        self._refuse_capture("answer")
        return self._outcome.norm

    # Steps

    def step(self, grads: Any, *, grad_scale: Any = None, found_inf: Any = None, zero_grads: bool = False) -> None:
        """Update every parameter in place.

        Parameters
        ----------
        grads : array, sequence, mapping or list of these
            In the structure of the parameters, nested like them; mappings may have any order. For groups it is a list
            with one entry per group. If every parameter has a name, it may also be one mapping from these names (those
            of `state`) to gradients.

            Each gradient has its parameter's shape and dtype and is in the same place, host or device. A float32
            parameter also accepts a float16 or bfloat16 gradient, as from autocast, which is widened when read. If
            its memory layout differs from its parameter's, it is copied into a buffer first. Gradients are only read,
            and on a device held until the step is enqueued. ``None`` instead of a gradient leaves its parameter and
            state alone.
        grad_scale : float or array of one element, optional
            The factor by which the gradients have been multiplied (a loss scale). They are divided by it first. An
            array of float32 or float64 must be where the parameters are, and is read there when the step runs.
        found_inf : bool, number or array of one element, optional
            Anything but 0 skips the step, as torch's ``GradScaler`` expects: no byte of parameters, state or counters
            changes, and `skipped_steps` grows by 1. An array may also hold bool or integers. It is read where it is.
        zero_grads : bool
            Write zeros into the gradients in the same pass, even if the step is skipped. A gradient that is read-only
            or overlaps another is then refused. It costs 4 more bytes per float32 element.

        Raises
        ------
        TypeError, ValueError
            Naming everything that is wrong with any gradient or other argument, or with a NumPy parameter whose memory
            was moved or reshaped in place; also if a mapping or list of parameters now holds a different array.
            In that case nothing has been written: a step is all or nothing.
        RuntimeError
            If CUDA fails, naming the kernel and its arrays and whether the optimizer can go on. If a CUDA graph
            captures the step and something that it needs is not on the device yet. And inside another step of the same
            optimizer: from another thread, a signal handler, or its own `lr`. (These may assign hyperparameters for the
            next step; and a signal handler that reads, for example with `state_dict`, sees a complete step.)

        Examples
        --------
        >>> import numpy as np
        >>> from rmsprop_gpu import RMSProp
        >>> weights = {"w": np.ones(3), "b": np.zeros(1)}
        >>> opt = RMSProp(weights, lr=0.1)
        >>> opt.step({"w": np.full(3, 0.5), "b": None})
        >>> weights["w"].round(4), weights["b"]
        (array([0.6838, 0.6838, 0.6838]), array([0.]))
        >>> opt.step({"w": np.full(3, 512.0), "b": np.ones(1)}, grad_scale=1024.0, found_inf=True)
        >>> opt.skipped_steps
        1
        """
        turn, token = self._groups.changes.turn, object()
        try:
            if turn.setdefault(0, token) is not token:
                turn.take_over(token, "a step")
            arrays, told = None, signals(grad_scale, found_inf, zero_grads, self._devices, self._computes)
            try:
                arrays = self._flatten(grads)
                if self._entries.moved():
                    self._entries.check()
                if told.problems:
                    told.problems.raise_any()
                plan = self._planner.bound(arrays, told)
            except (TypeError, ValueError) as error:
                self._refuse_more(error, arrays, told)
                raise
            plan.launch()
        finally:
            if turn.get(0) is token:
                del turn[0]

    def _refuse_more(self, error: Exception, arrays: list[Any] | None, told: Signals) -> None:
        """Raise an error that names all problems of a step, if there are more than this one names."""
        problems = Problems()
        with problems.taking():
            self._entries.check()
        if told.problems:
            with problems.taking():
                told.problems.raise_any()
        if arrays is not None:
            with problems.taking(), suppress(RuntimeError, MemoryError):  # raised when no step is possible at all
                self._planner.look(arrays, told)
        problems.take(error)
        if len(problems) > len(problems_of(error)):
            raise problems.error() from None

    def refresh(self, step: int | None = None) -> None:
        """Send the current hyperparameters to the device, for the next replay of a captured CUDA graph.

        A replay runs no Python. ``opt.lr = ...`` sends the new rate at once. Call this after an assignment to
        `param_groups`, and with a callable `lr` before each replay, under the stream on which the graph is replayed.

        Parameters
        ----------
        step : int, optional
            The argument for a callable `lr`; `steps` by default. With a callable `lr` this counts as the replay's step:
            `steps` is one higher afterwards. (The counters in `state` are on the device and count every replay.)

        Raises
        ------
        RuntimeError
            For arrays in host memory; while a stream is being captured; and after a switch has changed (momentum that
            was 0, for example), which a captured graph cannot follow: capture it again.

        Examples
        --------
        In host memory there is nothing to send. For its use with a graph see :doc:`/howto/cuda_graphs`.

        >>> import numpy as np
        >>> from rmsprop_gpu import RMSProp
        >>> RMSProp(np.ones(3)).refresh()
        Traceback (most recent call last):
        RuntimeError: refresh is for replays of CUDA graphs, but the parameters are in host memory
        """
        self._refuse_capture("refresh")
        self._groups.changes.turn.refuse("a refresh")
        self._planner.refresh(step)

    def compile(
        self, *, grad_scale: bool = False, found_inf: bool = False, zero_grads: bool = False, grad_dtype: Any = None
    ) -> None:
        """Compile what a step needs, or load it from disk, without taking a step. The first one is then as fast as any.

        It compiles for the hyperparameters as they are. A switch that changes later, such as momentum that was 0, needs
        another kernel.

        Parameters
        ----------
        grad_scale, found_inf, zero_grads : bool
            Whether the steps to come are given these.
        grad_dtype : dtype, optional
            The dtype of the coming gradients, for the parameters that accept it: float16 or bfloat16 for float32 ones.
            By default the dtypes of the last step's gradients, and before the first step those of the parameters.

        Raises
        ------
        TypeError
            For anything else; and if no parameter accepts gradients of that dtype.

        Examples
        --------
        >>> import numpy as np
        >>> from rmsprop_gpu import RMSProp
        >>> opt = RMSProp(np.ones(3), momentum=0.9)
        >>> opt.compile(zero_grads=True)
        >>> opt.steps
        0
        """
        self._refuse_capture("compilation")
        self._groups.changes.turn.refuse("compilation")
        asked = self._asked(grad_scale, found_inf, zero_grads)
        self._planner.compile(asked, None if grad_dtype is None else self._grad_dtype(grad_dtype))

    def _asked(self, grad_scale: bool, found_inf: bool, zero_grads: bool) -> hyper.Asked:
        """What `compile` was told about the coming steps."""
        given = {"grad_scale": grad_scale, "found_inf": found_inf, "zero_grads": zero_grads}
        for name, value in given.items():
            if not isinstance(value, (bool, np.bool_)):
                raise TypeError(f"{name} is {value!r} (a {type(value).__name__}); wanted True or False")
        told = bool(grad_scale or found_inf)
        return hyper.Asked(told=told, scaled=bool(grad_scale), zero_grads=bool(zero_grads))

    def _grad_dtype(self, x: Any) -> np.dtype[Any]:
        """The gradient dtype that was passed to `compile`."""
        wanted = list(dict.fromkeys(name for t in self._tensors for name in grad_dtypes(t.layout.dtype)))
        with suppress(TypeError, ValueError):
            dtype: np.dtype[Any] = np.dtype(x)
            if dtype.name in wanted and dtype.isnative:
                return dtype
        raise TypeError(f"grad_dtype is {x!r}; wanted {' or '.join(wanted)}")

    def kernels(self) -> dict[str, Any]:
        """The compiled Numba functions that a step launches, for gradients like the last step's, to be inspected.

        Returns
        -------
        dict
            From a name, such as ``"update_kernel[float32, momentum]"`` or
            ``"update_kernel[float32 with float16 gradients, plain]"``, to the ``@cuda.jit`` function, or the ``@njit``
            one that the CPU calls for each chunk. Each has ``inspect_llvm()`` and ``inspect_asm()``, and on a device
            also ``inspect_sass()`` (with nvdisasm on the PATH); they return a dict from signature to text.

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

    def explain(self) -> Explanation:
        """The update in words: what a step computes now, line by line, and how it differs from the default.

        The lines are Python: ``g`` is the gradient, ``p`` the parameter, and the other names are the state, as the
        comments say. A callable `lr` is evaluated at `steps`.

        Returns
        -------
        Explanation
            A str; a notebook shows it as mathematics.

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
          - momentum=0.5 (0.0): a constant gradient takes steps up to 2 times as long
          - eps_in_sqrt=True (False): eps stands inside the root, so that the floor is sqrt(eps) = 0.000316
          - lr_in_momentum=True (False): the buffer holds steps, so that a new lr applies to new gradients only
          - decoupled_weight_decay=True (False): without effect, since weight_decay is 0.0
        """
        return explain(type(self), self._groups.hypers(), self.steps, adagrad=self._adagrad)

    def __repr__(self) -> str:
        return summary(type(self).__name__, self.steps, self._groups.hypers(), self._groups.members, self._state.nbytes)

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "lr" and not name.startswith("_") and (why := attributes.refusal(type(self), name, value)):
            raise AttributeError(why)
        super().__setattr__(name, value)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__} holds addresses of its parameters and cannot be copied or pickled; "
            "save its state_dict(), and load that into an optimizer built for the new parameters"
        )


def _tensor(leaf: Leaf, problems: Problems) -> Tensor | None:
    return make_tensor(
        leaf.given,
        problems,
        key=leaf.key,
        label=f"params{leaf.place}",
        grad_label=f"grads{leaf.place}",
        state_label=f"state{leaf.place}.",
    )
