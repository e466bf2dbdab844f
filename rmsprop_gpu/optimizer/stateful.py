"""An optimizer's state, by name: shown, saved and loaded; what is loaded is validated before anything changes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from .. import hyper
from ..arrays.checks import Problems, Tensor, check_unchanged, quoted
from ..arrays.layout import Array, NDArray
from ..state import checkpoint, foreign
from ..state.buffers import Averages, State
from ..state.container import Progress
from ..state.flat import flattened
from ..state.formats import decoded
from ..state.kinds import MOMENTS, needed
from ..state.outcome import Outcome
from ..state.saved import VERSION, LoadReport, check_skipped, check_state_dict
from .groups import Groups
from .planner import CAPTURED, Planner
from .turn import Torn

if TYPE_CHECKING:
    from ..steps.order import Order


class Loaded(NamedTuple):
    """What a load will put in place, validated."""

    report: LoadReport
    groups: list[dict[str, Any]]
    found: dict[int, Any]
    steps: int
    skipped: int


class Stateful:
    """The part of an optimizer that deals with what is saved."""

    _adagrad: ClassVar[bool]
    _whole: Sequence[Tensor]  # the parameters
    _tensors: Sequence[Tensor]  # those, or their parts, that are updated here and have state
    _group_of: Sequence[int]
    _groups: Groups
    _devices: list[int]
    _state: State
    _steps: NDArray
    _outcome: Outcome
    _order: Order | None
    _planner: Planner

    @property
    def steps(self) -> int:
        """The number of calls of `step` so far, which a callable `lr` receives; it gets 0 in the first call.

        Examples
        --------
        >>> import numpy as np
        >>> from rmsprop_gpu import RMSProp
        >>> opt = RMSProp(np.ones(3))
        >>> opt.step(np.ones(3))
        >>> opt.steps
        1
        """
        return int(self._steps[0])

    @property
    def _saved_as(self) -> str:
        """The name of the optimizer in a saved state, which has to match when it is loaded."""
        return type(self).__name__

    def _refuse_capture(self, what: str) -> None:
        if self._order and self._order.capturing():
            raise RuntimeError(f"{CAPTURED}, which can hold no {what}; end the capture first")

    @property
    def state(self) -> State:
        """``opt.state[name_or_index]["square_avg"]``: the state itself, arrays with the parameter's shape and place.

        What it contains: :class:`~rmsprop_gpu.state.buffers.State`.

        Examples
        --------
        >>> import numpy as np
        >>> from rmsprop_gpu import RMSProp
        >>> opt = RMSProp({"w": np.ones(3)}, alpha=0.75)
        >>> opt.step({"w": np.ones(3)})
        >>> opt.state["w"]["square_avg"]
        array([0.25, 0.25, 0.25])
        """
        return self._state

    @property
    def ema(self) -> Averages:
        """``opt.ema[name_or_index]``: the moving average of a parameter if `use_ema` is on; the state itself.

        Before the first step it is the parameter. The first step sets it to the new parameter, each later one computes
        ``ema_momentum * ema + (1 - ema_momentum) * param``; a skipped step leaves it unchanged. While `use_ema` is off
        it is frozen, and it continues from there.

        Examples
        --------
        >>> import numpy as np
        >>> from rmsprop_gpu import RMSProp
        >>> weights = {"w": np.ones(3)}
        >>> opt = RMSProp(weights, use_ema=True, ema_momentum=0.5)
        >>> opt.step({"w": np.ones(3)})
        >>> np.array_equal(opt.ema["w"], weights["w"])
        True
        """
        return Averages(self._state)

    def decoded_state(self, key: str | int) -> dict[str, Array]:
        """The state of a parameter, with codes of fewer bits decoded to float32: copies, in the same place.

        Parameters
        ----------
        key : str or int
            As in `state`.

        Returns
        -------
        dict
            Like ``opt.state[key]``, without bases, and with ``square_avg`` (``sum``) as the exact number that each code
            stands for.

        Examples
        --------
        >>> import numpy as np
        >>> from rmsprop_gpu import RMSProp
        >>> opt = RMSProp(np.ones(2, np.float32), square_avg_dtype="uint16")
        >>> opt.step(np.ones(2, np.float32))
        >>> opt.state[0]["square_avg"].dtype, opt.decoded_state(0)["square_avg"].dtype
        (dtype('uint16'), dtype('float32'))
        """
        self._refuse_capture("copy of the state")
        found = self.state[key]
        with self._state.at(self._state.number(key)):
            made = {name: x.copy(order="C") for name, x in found.items()}
            for kind, base in MOMENTS.items():
                if kind in made and made[kind].dtype.kind == "u":
                    made[kind] = decoded(made[kind], made.pop(base, None))
        return made

    def state_dict(self, *, flat: bool = False) -> dict[str, Any]:
        """A snapshot of state, hyperparameters and steps, made of plain dicts, lists, numbers and arrays.

        Unlike torch's it is a copy, which later steps do not change, and is keyed by name. A callable ``lr`` is code,
        not a number: it is saved as None, and you pass it again to the optimizer that loads.

        Parameters
        ----------
        flat : bool
            Return what files can store without pickle: NumPy arrays under ``"<parameter>/<buffer>"``, and all else as
            one JSON text under ``"rmsprop_gpu"``, which is never the name of an array. For arrays on a device the host
            waits.

        Returns
        -------
        dict
            ``"optimizer"``, ``"version"``, ``"steps"``, ``"skipped_steps"`` (with one device, an array there, so that
            the host need not wait); ``"state"``, by name the arrays of each parameter, on its device (not copied to
            the host), in C order whatever the parameter's layout; ``"param_groups"``, a list of dicts of
            hyperparameters, with names as ``"params"``. For `flat` see there.

        Raises
        ------
        TypeError
            With `flat`, if other code has put something into a group that JSON cannot represent.

        Notes
        -----
        The text has every number to the last bit; infinity is written as in Python's json (``Infinity``). In keys that
        other code has put into a group, tuples become lists and keys of mappings become strings, as in JSON.

        ``numpy.savez`` accepts the flat form directly. For safetensors use `save` and `load`, which need no copy.

        Examples
        --------
        >>> import io
        >>> import numpy as np
        >>> from rmsprop_gpu import RMSProp
        >>> opt, file = RMSProp({"w": np.ones(2)}), io.BytesIO()  # or a path
        >>> opt.step({"w": np.ones(2)})
        >>> np.savez(file, **opt.state_dict(flat=True))
        >>> _ = file.seek(0)
        >>> later = RMSProp({"w": np.ones(2)})
        >>> with np.load(file) as saved:
        ...     print(list(saved))
        ...     later.load_state_dict(saved)
        ['rmsprop_gpu', 'w/step', 'w/bias_weight', 'w/square_avg']
        LoadReport(missing=[], unexpected=[])
        >>> later.steps, later.state["w"]["square_avg"]
        (1, array([0.1, 0.1]))
        """
        self._refuse_capture("state_dict")
        self._groups.changes.turn.refuse_torn()
        if not self._groups.changes.turn:
            self._planner.allocate()  # what was assigned since the last step
        skipped = self._outcome.skipped if flat else self._outcome.snapshot()
        state = self._state.snapshot(self._names(self._groups.hypers()), on_host=flat)
        state_dict = {**self._frame(skipped), "state": state}
        return flattened(state_dict) if flat else state_dict

    def _names(self, groups: Sequence[Mapping[str, Any]]) -> list[list[str]]:
        """The buffers of each parameter that these hyperparameters need."""
        pairs = zip(self._tensors, self._group_of, strict=True)
        return [needed(groups[i], self._adagrad, tensor.layout.dtype) for tensor, i in pairs]

    def _frame(self, skipped: Any) -> dict[str, Any]:
        """A state dict without its arrays."""
        return {
            "optimizer": self._saved_as,
            "version": VERSION,
            "steps": self.steps,
            "skipped_steps": skipped,
            "param_groups": [
                {"params": names, **h, "lr": None if callable(h["lr"]) else h["lr"], **group.kept}
                for names, group, h in zip(self._groups.keys, self._groups.all, self._groups.hypers(), strict=True)
            ],
        }

    def save(self, path: str | bytes | os.PathLike[Any], progress: Progress | None = None) -> None:
        """Write a checkpoint: everything of `state_dict`, in one safetensors file, without a copy of the state.

        The new file is written beside the old one, synced, and then replaces it: a reader, also after a crash, finds
        one or the other. Symbolic links are followed and permissions kept; the owner and hard links are not.

        Parameters
        ----------
        path : path-like
            The file. While it is being written, ``<path>.saving`` is beside it; if a killed save leaves that behind,
            the next save reuses it.
        progress : callable, optional
            Called with the bytes done and the bytes in total, after each piece of at most 16 MiB.

        Raises
        ------
        RuntimeError
            If another process or thread is saving to the same file, or another thread is stepping this optimizer.
        TypeError, ValueError
            If other code has put something into a group that JSON cannot represent, or a name is not valid Unicode.
        OSError
            If the file cannot be written, or is not a regular file; what was there stays.

        Notes
        -----
        Arrays are named ``<parameter>/<buffer>``, and the rest is in the metadata. Any safetensors reader can open the
        file, and nothing in it is executed. A callable ``lr`` is saved as None, as in `state_dict`. Arrays on a device
        are copied through one pinned buffer of 16 MiB, for which the host waits. A signal handler always saves a
        complete step.

        Parameters are not included: save them yourself.

        Examples
        --------
        >>> import os, tempfile
        >>> import numpy as np
        >>> from rmsprop_gpu import RMSProp
        >>> opt = RMSProp({"w": np.ones(2)})
        >>> opt.step({"w": np.ones(2)})
        >>> path = os.path.join(tempfile.mkdtemp(), "run.safetensors")
        >>> opt.save(path)
        >>> later = RMSProp({"w": np.ones(2)})
        >>> later.load(path)
        LoadReport(missing=[], unexpected=[])
        >>> later.steps, later.state["w"]["square_avg"]
        (1, array([0.1, 0.1]))
        """
        self._refuse_capture("checkpoint")
        turn, token = self._groups.changes.turn, object()
        try:
            if turn.setdefault(0, token) is not token:
                turn.share(token, "a save")
            if turn.get(0) is token:
                self._planner.allocate()  # what was assigned since the last step
            entries = self._state.entries(self._names(self._groups.hypers()))
            checkpoint.save(path, self._frame(self._outcome.skipped), entries, progress)
        finally:
            if turn.get(0) is token:
                del turn[0]

    def load(self, path: str | bytes | os.PathLike[Any], strict: bool = True) -> LoadReport:
        """Continue from a checkpoint that `save` wrote, bit for bit, also with another array library or device.

        Parameters
        ----------
        path : path-like
            The file; or a folder, saved by any number of processes. Its arrays are read in pieces of 16 MiB into the
            existing state.
        strict : bool
            As in `load_state_dict`.

        Returns
        -------
        LoadReport
            As from `load_state_dict`.

        Raises
        ------
        TypeError, ValueError
            Naming everything that does not fit, or saying that the file is not a checkpoint, is damaged or is newer
            (in a folder also parts that are missing or overlap); nothing was changed.
        MissingExtraError
            If safetensors is not installed (the extra ``safetensors``).

        Examples
        --------
        >>> import os, tempfile
        >>> import numpy as np
        >>> from rmsprop_gpu import RMSProp
        >>> path = os.path.join(tempfile.mkdtemp(), "run.safetensors")
        >>> RMSProp({"w": np.ones(2)}, momentum=0.9).save(path)
        >>> opt = RMSProp({"w": np.ones(2)})
        >>> opt.load(path)
        LoadReport(missing=[], unexpected=[])
        >>> opt.param_groups[0]["momentum"]
        0.9
        """
        self._refuse_capture("load")
        with checkpoint.opened(path) as saved:
            return self._load(saved, strict)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> LoadReport:
        """Continue from a `state_dict`. Everything is validated before anything changes.

        Parameters
        ----------
        state_dict : mapping
            As returned by `state_dict`, flat or not, or read back from storage: an open npz file is one.
        strict : bool
            True: the same parameters in the same groups; the hyperparameters are loaded too (a callable ``lr`` stays,
            and is required if one was saved). False: parameters that both have are loaded, while the others and all
            hyperparameters stay unchanged; `steps` and `skipped_steps` are loaded.

        Returns
        -------
        LoadReport
            The names ``missing`` from the dict, and the ``unexpected`` ones in it; both are empty with `strict`.

        Raises
        ------
        TypeError, ValueError
            Naming everything that does not fit; nothing was changed then. torch notices a wrong shape only at the next
            step, and casts float32 state to the parameter's dtype.

        Examples
        --------
        >>> import numpy as np
        >>> from rmsprop_gpu import RMSProp
        >>> saved = RMSProp({"w": np.ones(2), "b": np.ones(1)}).state_dict()
        >>> RMSProp({"w": np.ones(2)}).load_state_dict(saved, strict=False)
        LoadReport(missing=[], unexpected=['b'])
        """
        self._refuse_capture("load_state_dict")
        return self._load(state_dict, strict)

    def _load(self, state_dict: Mapping[str, Any], strict: bool, anew: tuple[str, ...] = ()) -> LoadReport:
        """Load a state dict; buffers named in `anew` may be missing from it, and then get their initial values."""
        return self._put(self._checked(state_dict, strict, anew))

    def _checked(self, state_dict: Mapping[str, Any], strict: bool, anew: tuple[str, ...] = ()) -> Loaded:
        """What will be loaded from a state dict; everything is validated, nothing changes."""
        problems = Problems()
        loaded = check_state_dict(state_dict, self._saved_as, problems)
        if not loaded:
            problems.raise_any()
        keys = [tensor.key for tensor in self._whole]
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
            try:
                hyper.check_shared(groups, self._devices)
            except ValueError as error:
                problems.add(ValueError, f"param_groups: {error}")
        names = [[name for name in wanted if name not in anew] for wanted in self._names(groups)]
        found = self._state.check(self._own_state(loaded["state"], problems), names, problems)
        skipped = check_skipped(loaded, problems)
        for tensor in self._whole:
            if tensor.device is None:  # new averages start from the parameter
                check_unchanged(tensor, problems, written=False)
        problems.raise_any()
        return Loaded(report, groups, found, int(loaded["steps"]), skipped)

    def _own_state(self, state: Mapping[str, Any], problems: Problems) -> Mapping[str, Any]:
        """The part of the parameters' state, by name, that belongs to what is updated here: here all of it."""
        return state

    def _put(self, loaded: Loaded) -> LoadReport:
        """Replace the current state by what was validated."""
        turn, token = self._groups.changes.turn, object()
        try:
            if turn.setdefault(0, token) is not token:
                turn.take_for_load(token)
            self._state.make_room(loaded.found)
            try:
                self._state.load(loaded.found, fresh=self.steps == 0)
                self._steps[0] = loaded.steps
                self._outcome.load(loaded.skipped)
                self._groups.replace(loaded.groups)
            except BaseException as error:  # Ctrl-C, a file that became shorter, no memory
                torn = Torn(f"the state is loaded in part ({type(error).__name__}: {error})")
                turn[0] = torn
                if isinstance(error, OSError):
                    torn.refuse()
                raise
            if self._order:
                self._order.broken = None  # if it was between two steps, it no longer is
        finally:
            if turn.get(0) is token:
                del turn[0]
        if self._order:
            self._planner.send()
        return loaded.report

    def load_foreign(
        self, framework: str, state: Any, *, steps: int | None = None, match: Literal["name", "order"] = "name"
    ) -> None:
        """Continue a run that was started in another framework, on the same trajectory.

        Parameters are matched by name, group by group, if both sides have names, and by order if one side has none.
        Load the parameters yourself: they are not part of an optimizer's state.

        Parameters
        ----------
        framework : {"torch", "keras", "tf_keras_legacy", "tf1", "optax", "timm", "chainer", "bitsandbytes"}
            The framework of the state, as in `RMSProp.from_preset`; for ``"graves"`` use chainer's state.
        state : object
            torch: ``state_dict()`` of ``torch.optim.RMSprop`` (`AdaGrad`: of ``Adagrad``), of tensors or NumPy arrays.
            Its hyperparameters are loaded too, with eps outside the root and lr outside the momentum; what torch does
            not have (such as clipping) stays. A parameter without state starts from the beginning. Names are those of
            named parameters, ``param_names``.

            timm, bitsandbytes: the same for ``timm.optim.RMSpropTF`` and ``bitsandbytes.optim.RMSprop`` (`AdaGrad`:
            ``bitsandbytes.optim.Adagrad``), with eps and lr in the place they have there; 8-bit state is refused.

            Keras: ``optimizer.variables`` of ``keras.optimizers.RMSprop`` (``Adagrad``), or a mapping from their paths
            to arrays; names have underscores for slashes. The learning rate is loaded unless `lr` is a callable here.
            The state does not contain the other hyperparameters: build with the same ones,
            ``RMSProp.from_preset("keras", params, ...)``. Its averages of the parameters become `ema`. For a
            ``LossScaleOptimizer`` the wrapped optimizer is read; the scale is up to your loop (`grad_scale` of `step`).

            optax: the state of ``optax.rmsprop`` (``adagrad``), also inside ``chain``, ``inject_hyperparams``,
            ``MultiSteps`` (between two steps; you add up the gradients of mini-steps yourself) or ``partition``, whose
            parts are merged, with a group here for each that differs. A nested tree matches parameters that are nested
            alike, names joined by slashes or dots, or the order of ``jax.tree.leaves``. Only the learning rate of
            ``inject_hyperparams`` is loaded; build with the same hyperparameters,
            ``RMSProp.from_preset("optax", params, ...)``.

            tf_keras_legacy: ``optimizer.variables()`` of tf.keras up to 2.10, or a mapping from names to arrays, with
            the names of the variables or those in a checkpoint. The learning rate is loaded as from Keras; a ``decay``
            that differs from the one here is refused.

            tf1: a mapping from the names in a checkpoint to arrays, ``{n: reader.get_tensor(n) for n in
            reader.get_variable_to_shape_map()}``, with the slots of ``RMSPropOptimizer``, whatever its name is
            (``AdagradOptimizer`` under its own). The model's variables are ignored. So is the momentum buffer, which
            TensorFlow always has, if there is no momentum here. Build with the same hyperparameters.

            chainer: a mapping as in the file of ``save_npz(optimizer)``, or of a trainer with one optimizer:
            ``RMSprop``, ``RMSpropGraves`` or ``AdaGrad``. Build with the same hyperparameters.
        steps : int, optional
            The count of steps if the state has none: TensorFlow 1 without ``global_step``, optax without
            ``bias_correction`` or schedule (0 if not given; required if `bias_correction` or a callable `lr` here uses
            it). For torch, timm and bitsandbytes, the count that a callable `lr` receives later; by default the largest
            step of any parameter.
        match : {"name", "order"}
            ``"name"``: names that differ are refused, showing both lists; the prefixes ``_orig_mod.`` and ``module.``
            from ``torch.compile`` and ``DataParallel`` are ignored. ``"order"``: the first parameter there is the first
            here, whatever their names.

        Raises
        ------
        TypeError, ValueError
            Naming every entry that cannot be mapped; nothing was changed then.

        Notes
        -----
        An array with a narrower dtype than our state (float32 for halves) is widened; none is rounded. ``bias_weight``
        is ``1 - alpha**step``, rounded once. Only Keras has averages of the parameters. From other frameworks, with
        `use_ema`, they start from the parameters at the time the state is loaded.

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
        self._load(self._translated(framework, state, steps, match), True, anew=("ema",))

    def _translated(self, framework: str, state: Any, steps: int | None, match: str) -> dict[str, Any]:
        """Another framework's state as one of our state dicts."""
        problems = Problems()
        if match not in ("name", "order"):
            raise ValueError(f"match is {match!r}; wanted 'name' or 'order'")
        groups = self._groups
        mine = foreign.Mine(self._saved_as, self._adagrad, groups.members, groups.hypers(), by_order=match == "order")
        state_dict = foreign.translated(framework, state, steps, mine, problems)
        self._groups.loaded(state_dict["param_groups"], problems)  # so that one error names what is wrong there too
        problems.raise_any()
        return state_dict

    def to_foreign(self, framework: str) -> dict[str, Any]:
        """The state in the form that torch needs to continue the run.

        Parameters
        ----------
        framework : {"torch"}
            Only torch, which has to be installed.

        Returns
        -------
        dict
            For ``load_state_dict`` of a ``torch.optim.RMSprop`` (`AdaGrad`: ``Adagrad``) over the same parameters in
            the same groups and order: copies as tensors, on the device of the state, and the hyperparameters. torch
            casts the state of half parameters to their dtype when it loads, and computes in that. With ``eps=0`` an
            element that never saw a gradient stays unchanged here, and becomes NaN there (0/0).

        Raises
        ------
        ValueError
            Naming every switch and hyperparameter that torch does not have.

        Examples
        --------
        What torch does not have is refused. For a whole run there and back see :doc:`/howto/other_frameworks`.

        >>> import numpy as np
        >>> from rmsprop_gpu import RMSProp
        >>> RMSProp(np.ones(3), momentum=0.9, nesterov=True).to_foreign("torch")
        Traceback (most recent call last):
        ValueError: torch has no param_groups[0]["nesterov"] = True; wanted these off, or at the values that torch has
        """
        if framework != "torch":
            raise ValueError(f"framework is {framework!r}; wanted 'torch'")
        return foreign.to_torch(self.state_dict, self._groups.hypers())
