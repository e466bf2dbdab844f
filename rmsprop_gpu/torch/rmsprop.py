"""``torch.optim.RMSprop`` with a new step only: one pass over the memory of tensors that torch owns."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from operator import methodcaller
from typing import Any

import torch

from .. import hyper
from ..conventions.presets import preset_of
from . import formats, theirs
from .arguments import FIXED, NEUTRAL, checked, names_of
from .bound import Bound, Examined, check_formats
from .gradients import Changed
from .rows import HALVES, KEPT, keeps_rest

# torch's check whether a step may be captured in a graph. In torch 2.10 it has the older of these names.
_CHECKS = "_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"
_check_capture = methodcaller(next(name for name in _CHECKS if hasattr(torch.optim.Optimizer, name)))


class RMSprop(torch.optim.RMSprop):  # type: ignore[misc]  # torch's types are its own affair
    """``torch.optim.RMSprop`` in one pass over memory. To use it, replace the import.

    It is a subclass in which only `step` is new. Arguments and their checks, groups, names, ``state_dict``, hooks,
    pickles and old checkpoints are torch's own. Parameters, gradients and state are torch's tensors and stay where they
    are. ``state[p]`` holds ``step``, ``square_avg``, ``momentum_buffer`` and ``grad_avg`` as torch makes them, and
    ``bias_weight`` with `bias_correction`.

    Parameters
    ----------
    params, lr, alpha, eps, weight_decay, momentum, centered, capturable, foreach, maximize, differentiable
        torch's, with its defaults. `foreach` has no effect here.
    fused : bool, optional
        None: our kernels where possible, torch's own step elsewhere (see `why_not_fused`). True: our kernels, or a
        RuntimeError that names every parameter they cannot handle; and ``torch.amp.GradScaler.step`` passes on its
        scale and found_inf, which are applied in the same pass, so that the host need not wait. False: torch's step.
    nesterov, eps_in_sqrt, lr_in_momentum, initial_scale, bias_correction, decoupled_weight_decay
        As in :class:`rmsprop_gpu.RMSProp`; by default the rule is torch's.
    clipvalue, clipnorm, global_clipnorm, skip_nonfinite
        As in :class:`rmsprop_gpu.RMSProp`, in the same pass. `global_clipnorm` and `skip_nonfinite` have to be the same
        in all groups. A skipped step changes no byte, counters included.
    square_avg_dtype, store_param_remainders, bf16_stochastic_round, seed
        As in :class:`rmsprop_gpu.RMSProp`, and bit-identical if the parameters have the same names: a seed is combined
        with the parameters' names in torch, or else with their numbers. Then ``square_avg`` is uint16, or uint8 with
        ``square_avg_base``, and ``param_remainder`` int16, also in `state_dict`. torch's own class cannot use these and
        would read codes as numbers; `decoded_state` returns what it can read. `load_state_dict` keeps the format of
        this optimizer: float32 becomes the nearest codes, and codes the values they stand for. Complex parameters
        cannot use codes.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        torch's own errors and messages where torch refuses. Otherwise ours, before anything is written: for an argument
        out of range; a format that a parameter cannot have; and in a step, for `fused=True` or a switch that torch does
        not have, on a parameter that only torch's step could handle.

    Notes
    -----
    It differs from torch in three ways. With ``eps=0`` an element that never saw a gradient stays unchanged; torch
    computes 0/0. `centered` keeps the variance from falling below 0; torch gives NaN for a constant gradient. And the
    state of halves is float32, like the arithmetic, also after `load_state_dict`.

    Tensors on CUDA devices need numba-cuda (the extra ``cuda13`` or ``cuda12``), not CuPy; without it torch's step
    updates them. Memory is torch's, kernels are launched on torch's current stream, and no order between streams is
    added. With `capturable`, `fused=True`, `skip_nonfinite` or stochastic rounding, the counters are on the device. A
    step with the same gradients has to precede the capture of a graph, and a learning rate that will change in replays
    has to be a tensor there.

    A step with several threads uses ``torch.get_num_threads()``. Gradients in float16 and bfloat16 for float32
    parameters are widened when they are read.

    Examples
    --------
    >>> import torch
    >>> from rmsprop_gpu.torch import RMSprop
    >>> model = torch.nn.Linear(3, 1)
    >>> opt = RMSprop(model.parameters(), lr=1e-3, momentum=0.9)
    >>> loss = model(torch.ones(2, 3)).square().mean()
    >>> loss.backward()
    >>> opt.step()
    >>> opt.why_not_fused()
    {}
    """

    _bound: Bound | None = None  # to the tensors of the last step; made again if anything has changed
    _broken: str | None = None  # why it cannot go on after a step that failed halfway
    _captured: tuple[Bound, ...] = ()  # those held by CUDA graphs: their tables live as long as this object

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
        fused: bool | None = None,
        nesterov: bool = False,
        eps_in_sqrt: bool = False,
        lr_in_momentum: bool = False,
        initial_scale: float = 0.0,
        bias_correction: bool = False,
        decoupled_weight_decay: bool = False,
        clipvalue: float | None = None,
        clipnorm: float | None = None,
        global_clipnorm: float | None = None,
        skip_nonfinite: bool = False,
        square_avg_dtype: Any = "float32",
        store_param_remainders: bool = False,
        bf16_stochastic_round: bool = False,
        seed: int = 0,
    ) -> None:
        given = dict(locals())
        self._ours = checked({name: given[name] for name in NEUTRAL})  # for the groups, which torch's __init__ adds
        if fused and differentiable:
            raise RuntimeError("`fused` does not support `differentiable`")
        if fused and foreach:
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
        super().__init__(
            params, lr, alpha, eps, weight_decay, momentum, centered, capturable, foreach, maximize, differentiable
        )

    @classmethod
    def from_preset(cls, name: str, params: Any, /, **arguments: Any) -> RMSprop:
        """RMSprop as another framework implements it: its names, its defaults, its trajectory, on torch's tensors.

        Parameters
        ----------
        name, **arguments
            As in :meth:`rmsprop_gpu.RMSProp.from_preset`. timm's ``RMSpropTF`` is ``"timm"``; Stable-Baselines3's
            ``RMSpropTFLike`` is ``"timm"`` with ``lr_in_momentum=False, alpha=0.99, eps=1e-8``.
        params
            As in torch; a group in it uses this class's names of hyperparameters.

        Raises
        ------
        TypeError, ValueError
            As there, and for what torch provides elsewhere: a callable learning rate (its schedulers assign it),
            averages of the parameters (``torch.optim.swa_utils.AveragedModel``).

        Examples
        --------
        >>> import torch
        >>> from rmsprop_gpu.torch import RMSprop
        >>> opt = RMSprop.from_preset("timm", torch.nn.Linear(3, 1).parameters(), momentum=0.9)
        >>> opt.param_groups[0]["eps_in_sqrt"], opt.param_groups[0]["initial_scale"]
        (True, 1.0)
        """

        def make(**ours: Any) -> RMSprop:
            if callable(ours.get("lr")):
                raise TypeError(
                    f"lr is {hyper.shown(ours['lr'])}, a callable; wanted a number: torch's schedulers assign it"
                )
            if ours.pop("use_ema", False):
                raise ValueError("use_ema is True; wanted False: torch has torch.optim.swa_utils.AveragedModel")
            ours.pop("ema_momentum", None)
            ours["weight_decay"] = ours.get("weight_decay") or 0.0  # None in Keras
            return cls(params, **ours)

        return preset_of(name).built(name, arguments, make)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Does ``GradScaler.step`` pass us the scale and found_inf, as it does to torch's fused optimizers?

        Only if all groups have ``fused=True``: for optimizers that say yes, Lightning refuses to clip gradients, and
        accelerate counts skipped steps as taken.
        """
        return all(group.get("fused") is True for group in self.param_groups)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Like torch's; the group may also have our hyperparameters.

        Examples
        --------
        >>> import torch
        >>> from rmsprop_gpu.torch import RMSprop
        >>> body, head = torch.nn.Linear(3, 3), torch.nn.Linear(3, 1)
        >>> opt = RMSprop(body.parameters())
        >>> opt.add_param_group({"params": head.parameters(), "lr": 0.1, "clipnorm": 1.0})
        >>> [group["lr"] for group in opt.param_groups]
        [0.01, 0.1]
        """
        for name, value in self.__dict__.pop("_ours", NEUTRAL).items():
            self.defaults.setdefault(name, value)
        if isinstance(param_group, dict):  # torch refuses others
            param_group.update(checked({name: param_group.get(name, self.defaults[name]) for name in NEUTRAL}))
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_formats(group["params"], group, names_of(self.param_groups), {})
        except ValueError:
            self.param_groups.pop()
            raise

    def __getstate__(self) -> dict[str, Any]:
        given: dict[str, Any] = super().__getstate__()
        return {**given, "state": formats.pickled(given["state"])}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "state": formats.unpickled(state["state"])} if "state" in state else state)
        for group in self.param_groups:
            for name, value in NEUTRAL.items():  # torch's state has none of ours: torch's rule continues
                group.setdefault(name, value)
        self._unbind()
        self._broken = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Like torch's, except that the state of halves stays float32; torch would cast it to the parameter's dtype.

        `square_avg_dtype` and `store_param_remainders` of this optimizer stay, and the state is converted to them.

        Raises
        ------
        ValueError
            torch's own; codes in a different format from this optimizer's, or bases that do not fit them. Nothing is
            changed.

        Examples
        --------
        >>> import torch
        >>> from rmsprop_gpu.torch import RMSprop
        >>> model = torch.nn.Linear(3, 1)
        >>> opt = RMSprop(model.parameters())
        >>> opt.load_state_dict(torch.optim.RMSprop(model.parameters(), momentum=0.9).state_dict())
        >>> opt.param_groups[0]["momentum"]
        0.9
        """
        loaded: list[tuple[dict[str, Any], list[dict[str, Any]]]] = []

        def take(_: Any, given: dict[str, Any]) -> None:
            fixed = [{name: group[name] for name in FIXED} for group in self.param_groups]
            self._check_formats(given)
            loaded.append((given, fixed))

        # The last hook before torch reads the dict, and the first after: users' hooks act on, and see, what counts.
        before = self.register_load_state_dict_pre_hook(take)
        behind = self.register_load_state_dict_post_hook(lambda _: self._keep_formats(*loaded[-1]), prepend=True)
        kept = {name: getattr(self, name) for name in ("state", "param_groups", "_broken")}
        try:
            super().load_state_dict(state_dict)
        except BaseException:  # torch replaces state and groups before it has read all of them
            self.__dict__.update(kept)
            raise
        finally:
            before.remove()
            behind.remove()

    def _check_formats(self, given: dict[str, Any]) -> None:
        """Refuse codes of another format before anything is changed."""
        names = names_of(self.param_groups)
        for theirs_, group in zip(given["param_groups"], self.param_groups, strict=False):  # torch refuses other counts
            merged = {name: theirs_.get(name, neutral) for name, neutral in NEUTRAL.items()}
            h = {**merged, "centered": theirs_.get("centered", False), **{name: group[name] for name in FIXED}}
            try:
                check_formats(group["params"], h, names, {})
            except ValueError as error:
                raise ValueError(f"the loaded state dict does not fit this optimizer: {error}") from None
            for key, p in zip(theirs_["params"], group["params"], strict=False):
                entry = given["state"].get(key)
                why = formats.problem(p, entry, group["square_avg_dtype"]) if isinstance(entry, dict) else None
                if why is not None:
                    raise ValueError(f"the loaded state of {names[id(p)]} does not fit this optimizer: its {why}")

    def _keep_formats(self, loaded: dict[str, Any], fixed: list[dict[str, Any]]) -> None:
        for theirs_, group, own in zip(loaded["param_groups"], self.param_groups, fixed, strict=True):
            group.update(own)
            for key, p in zip(theirs_["params"], group["params"], strict=True):
                if isinstance(loaded["state"].get(key), dict):
                    self._keep_format(p, loaded["state"][key], group)

    def _keep_format(self, p: Any, entry: dict[str, Any], group: dict[str, Any]) -> None:
        state = self.state[p]
        if p.dtype in HALVES:
            for name in (*KEPT, "bias_weight"):
                x = entry.get(name)
                if isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype != p.dtype:
                    state[name] = x.detach().to(p.device, torch.float32, copy=True)
        found = formats.converted(p, entry, group["square_avg_dtype"], rests=keeps_rest(group, p))
        for name, x in found.items():
            if x is None:
                state.pop(name, None)
            else:
                state[name] = x

    def decoded_state(self, param: Any) -> dict[str, Any]:
        """The state of a parameter, with codes of fewer bits decoded to float32: copies, in the same place.

        Parameters
        ----------
        param : torch.Tensor
            One of this optimizer's; the state is empty before its first step.

        Returns
        -------
        dict
            Like ``opt.state[param]``, without bases, and with ``square_avg`` as the exact number that each code stands
            for.

        Examples
        --------
        >>> import torch
        >>> from rmsprop_gpu.torch import RMSprop
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> opt = RMSprop([p], square_avg_dtype="uint16")
        >>> p.grad = torch.ones(2)
        >>> opt.step()
        >>> opt.state[p]["square_avg"].dtype, opt.decoded_state(p)["square_avg"].dtype
        (torch.uint16, torch.float32)
        """
        if id(param) not in names_of(self.param_groups):
            raise KeyError(f"a {type(param).__name__} that is not a parameter of this optimizer")
        found = dict(self.state.get(param, {}))
        codes, bases = found.get("square_avg"), found.pop(formats.BASE, None)
        if isinstance(codes, torch.Tensor) and formats.format_of(codes) != "float32":
            found["square_avg"] = formats.decoded(codes, bases)
        return {name: x.detach().clone() if isinstance(x, torch.Tensor) else x for name, x in found.items()}

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform a single optimization step.

        Parameters
        ----------
        closure : callable, optional
            Reevaluates the model and returns the loss.

        Examples
        --------
        >>> import torch
        >>> from rmsprop_gpu.torch import RMSprop
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> opt = RMSprop([weight], lr=0.1, alpha=0.75)
        >>> weight.grad = torch.full((3,), 0.5)
        >>> opt.step()
        >>> opt.state[weight]["square_avg"]
        tensor([0.0625, 0.0625, 0.0625])
        """
        _check_capture(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if is_traced():
            theirs.step(self, lambda p: True, lambda p: "the step is traced")
            return loss
        self._step()
        return loss

    def _step(self) -> None:
        if self._broken:
            raise RuntimeError(self._broken)
        for _ in range(3):  # if another thread changes something meanwhile, it may have to be bound again
            if self._bound is None or not self._bound.fits(self):
                self._unbind()
                with torch.no_grad():
                    self._bound = Bound(self)
            with suppress(Changed):
                try:
                    self._bound.run(self)
                finally:
                    self._broken = self._bound.broken
                return
            self._unbind()
        raise RuntimeError("the optimizer's tensors change during a step")

    def _unbind(self) -> None:
        if self._bound is not None and self._bound.captured:
            self._captured = (*self._captured, self._bound)
        self._bound = None

    def why_not_fused(self) -> dict[str, str]:
        """The parameters, by name, that torch's own step would currently update, with the reason; empty if none.

        Examples
        --------
        >>> import torch
        >>> from rmsprop_gpu.torch import RMSprop
        >>> list(RMSprop([("odd", torch.nn.Parameter(torch.zeros(4, 6)[:, ::2]))]).why_not_fused())
        ['odd']
        """
        found = Examined(self)
        return {name: found.theirs[key] for key, name in names_of(self.param_groups).items() if key in found.theirs}


def is_traced() -> bool:
    """Are operations being traced into a graph, or sent to a mode, so that a pass over raw addresses would be lost?"""
    return bool(torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack())
