"""What a sharded optimizer keeps: the parts of the state on this rank, whole arrays, checkpoints in folders."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, NoReturn

import numpy as np

from ..arrays.checks import Problems, Tensor, plain_array, quoted
from ..arrays.layout import Array
from ..arrays.selector import kind_of
from ..hyper import ALL
from ..kernels.codes import BLOCK
from ..kernels.table import BUFFERS, COUNTERS
from ..optimizer.base import Optimizer
from ..optimizer.stateful import Loaded
from ..optimizer.turn import Torn
from ..state import checkpoint, folder
from ..state.container import Progress
from ..state.formats import decoded
from ..state.kinds import BASES, MOMENTS, dtype_of, elements_of
from ..state.pieces import Stored
from ..state.saved import LoadReport
from .agreement import agree
from .cuts import Piece
from .transport import Transport


class OwnState(Mapping[str, Mapping[str, Array]]):
    """The state on this rank, ``opt.state`` of a sharded optimizer: a mapping from each part's name to its buffers.

    A part is named ``"<parameter>[<start>:<stop>]"``, by elements of the parameter in C order. Its buffers are those in
    :class:`~rmsprop_gpu.state.buffers.State`, with the same dtypes, where the parameter is; all have one axis, except
    ``step`` and ``bias_weight``, which are 0-d. All mappings are read-only.

    Raises
    ------
    KeyError
        For a part that this rank does not have, with the names of those that it has.
    TypeError
        For an assignment to an entry: write into its array.

    Notes
    -----
    Nothing here is collective, so one rank may read it alone; whole arrays come from `ShardedRMSProp.gather`. The
    arrays are the state itself, not copies: the next step reads what you write into them.

    Examples
    --------
    >>> import numpy as np
    >>> from mpi4py import MPI
    >>> from rmsprop_gpu.distributed import ShardedRMSProp
    >>> opt = ShardedRMSProp({"w": np.ones((2, 4)), "b": np.ones(4)}, MPI.COMM_SELF)
    >>> opt.state
    <state of 2 parts of parameters>
    >>> {name: buffers["square_avg"].shape for name, buffers in opt.state.items()}  # a single rank has all of both
    {'w[0:8]': (8,), 'b[0:4]': (4,)}
    >>> opt.state["w"]
    Traceback (most recent call last):
    KeyError: "'w'; this rank has 2 parts: w[0:8], b[0:4]"
    """

    def __init__(self, state: Mapping[Any, Mapping[str, Array]], names: Mapping[str, str]) -> None:
        self._state, self._names = state, names

    def __getitem__(self, name: str) -> Mapping[str, Array]:
        if name not in self._names:
            some = ", ".join([*list(self._names)[:8], *["..."] * (len(self) > 8)])
            raise KeyError(f"{name!r}; this rank has {len(self)} parts: {some}")
        found = self._state[self._names[name]]
        return MappingProxyType({kind: x if kind in COUNTERS else x.reshape(-1) for kind, x in found.items()})

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        return f"<state of {len(self)} parts of parameters>"


class Kept(Optimizer):
    """The part of a sharded optimizer that deals with what is saved."""

    _comm: Any
    _pieces: list[Piece]  # the pieces updated here
    _count: int  # how many of these are this rank's own; the others stand for groups of which it has no part
    _transport: Transport
    _broken: str | None

    @property
    def _saved_as(self) -> str:
        """The same as in a single process, which can load it too."""
        return "AdaGrad" if self._adagrad else "RMSProp"

    def _named(self) -> dict[str, tuple[int, Piece]]:
        """The pieces that this rank owns, by name, with the number of each."""
        own = enumerate(self._pieces[: self._count])
        return {f"{self._whole[p.tensor].key}[{p.start}:{p.stop}]": (i, p) for i, p in own}

    @property
    def state(self) -> OwnState:  # type: ignore[override]  # keyed by parts
        """``opt.state["w[4096:40960]"]["square_avg"]``: the state itself, for the elements that this rank owns.

        Examples
        --------
        >>> import numpy as np
        >>> from mpi4py import MPI
        >>> from rmsprop_gpu.distributed import ShardedRMSProp
        >>> list(ShardedRMSProp({"w": np.ones(8)}, MPI.COMM_SELF).state)
        ['w[0:8]']
        """
        return OwnState(self._state, {name: self._tensors[i].key for name, (i, _) in self._named().items()})

    @property
    def ema(self) -> Mapping[str, Array]:  # type: ignore[override]
        """``opt.ema["w[4096:40960]"]``: the moving averages of the parts that this rank owns; for all use `gather`.

        Examples
        --------
        >>> import numpy as np
        >>> from mpi4py import MPI
        >>> from rmsprop_gpu.distributed import ShardedRMSProp
        >>> ShardedRMSProp({"w": np.ones(2)}, MPI.COMM_SELF, use_ema=True).ema["w[0:2]"]
        array([1., 1.])
        """
        return MappingProxyType({name: state["ema"] for name, state in self.state.items() if "ema" in state})

    def gather(self, kind: str) -> dict[str, Array]:
        """Collective: whole arrays of one kind of state, on every rank.

        Parameters
        ----------
        kind : str
            ``"square_avg"``, ``"ema"``, ``"step"``, ...

        Returns
        -------
        dict
            A copy for each parameter, by name, with its shape and in its place; parameters without such state are left
            out. Codes are gathered as the float32 values that they stand for, without bases.

        Raises
        ------
        ValueError
            If no parameter has it.

        Examples
        --------
        >>> import numpy as np
        >>> from mpi4py import MPI
        >>> from rmsprop_gpu.distributed import ShardedRMSProp
        >>> opt = ShardedRMSProp({"w": np.ones(2)}, MPI.COMM_SELF, alpha=0.75)
        >>> opt.step({"w": np.ones(2)})
        >>> opt.gather("square_avg")
        {'w': array([0.25, 0.25])}
        """
        self._refuse_capture("gather")
        self._groups.changes.turn.refuse("a gather")  # the other ranks' steps do not expect it
        with ExitStack() as stack:
            if self._order is not None:
                stack.enter_context(self._order.on(self._devices[0]))
            return self._gathered(kind)

    def _gathered(self, kind: str) -> dict[str, Array]:
        fault = None
        kinds = [name for name in (*BUFFERS, *COUNTERS) if name not in BASES]
        if not isinstance(kind, str) or kind not in kinds:
            fault = ValueError(f"kind is {kind!r}; wanted one of {', '.join(kinds)}")
        agree(self._comm, {"kind": repr(kind)}, fault)
        mine = {p: self._values(i, kind) for i, p in self._named().values() if kind in self._state.buffers[i]}
        counts = {p.tensor: x.item() if kind in COUNTERS else 0 for p, x in mine.items() if p.start == 0}
        found: dict[int, Any] = {}
        for some in self._comm.allgather(counts):
            found |= some
        if not found:
            raise ValueError(f"no parameter has {kind!r}; there are {', '.join(self._kinds())}")
        if kind in COUNTERS:
            made = {
                i: self._number(x, dtype_of(self._whole[i].layout.dtype, kind, "float32")) for i, x in found.items()
            }
        elif self._comm.size == 1:
            made = {p.tensor: x.copy() for p, x in mine.items()}
        else:
            made = self._transport.whole(mine, sorted(found))
        if kind == "param_remainder":
            made = {i: x.astype(np.int16) for i, x in made.items()}
        return {self._whole[i].key: made[i] for i in sorted(made)}

    def _values(self, i: int, kind: str) -> Array:
        """One kind of state of a piece, with codes decoded to float32."""
        found = self._state[i]
        codes = kind in MOMENTS and found[kind].dtype.kind == "u"
        return decoded(found[kind], found.get(MOMENTS[kind])) if codes else found[kind]

    def _number(self, x: float, dtype: np.dtype[Any]) -> Array:
        """A number as a 0-d array in the place of the parameters, whose device is the current one."""
        if self._order is None:
            return np.array(x, dtype)
        import cupy

        return cupy.array(x, dtype)

    def _kinds(self) -> list[str]:
        return list(dict.fromkeys(name for buffers in self._state.buffers for name in buffers))

    def state_dict(self, *, flat: bool = False) -> NoReturn:
        """Refused: no rank has the whole state. `save` writes it, and `gather` collects one kind of it.

        Examples
        --------
        >>> import numpy as np
        >>> from mpi4py import MPI
        >>> from rmsprop_gpu.distributed import ShardedRMSProp
        >>> ShardedRMSProp({"w": np.ones(2)}, MPI.COMM_SELF).state_dict()
        Traceback (most recent call last):
        TypeError: a rank has parts of the state; wanted opt.save(folder), or opt.gather(kind)
        """
        raise TypeError("a rank has parts of the state; wanted opt.save(folder), or opt.gather(kind)")

    def to_foreign(self, framework: str) -> NoReturn:
        """Refused: no rank has the whole state. A plain `RMSProp` can load what `save` wrote, and has this method.

        Examples
        --------
        >>> import numpy as np
        >>> from mpi4py import MPI
        >>> from rmsprop_gpu.distributed import ShardedRMSProp
        >>> ShardedRMSProp({"w": np.ones(2)}, MPI.COMM_SELF).to_foreign("torch")
        Traceback (most recent call last):
        TypeError: a rank has parts of the state; wanted that of a plain optimizer, after its load(folder)
        """
        raise TypeError("a rank has parts of the state; wanted that of a plain optimizer, after its load(folder)")

    # Checkpoints

    def save(self, path: str | bytes | os.PathLike[Any], progress: Progress | None = None) -> None:
        """Collective: write a checkpoint, a folder with one file per rank and an index, which is written last.

        Until the new index replaces the old one, the old checkpoint stays complete; afterwards its files are removed.

        Parameters
        ----------
        path : path-like
            The folder, on a file system that all ranks share; its parent must exist.
        progress : callable, optional
            As in `RMSProp.save`, for this rank's own file.

        Raises
        ------
        RanksDisagree
            On every rank, if one of them cannot write its file; the old checkpoint stays.

        Notes
        -----
        Parts are named by elements of the whole arrays, ``w/square_avg[4096:40960]``, so any number of ranks can load
        the checkpoint, and so can a plain `RMSProp`. Parameters are not included: let rank 0 save them.

        Examples
        --------
        >>> import os, tempfile
        >>> import numpy as np
        >>> from mpi4py import MPI
        >>> from rmsprop_gpu import RMSProp
        >>> from rmsprop_gpu.distributed import ShardedRMSProp
        >>> folder = os.path.join(tempfile.mkdtemp(), "checkpoint")
        >>> ShardedRMSProp({"w": np.ones(2)}, MPI.COMM_SELF).save(folder)
        >>> RMSProp({"w": np.ones(2)}).load(folder)
        LoadReport(missing=[], unexpected=[])
        """
        self._refuse_capture("checkpoint")
        turn, token = self._groups.changes.turn, object()
        try:
            if turn.setdefault(0, token) is not token and not isinstance(turn.get(0), Torn):
                if self._comm.size == 1:
                    turn.share(token, "a save")
                else:  # in a signal handler, of which the other ranks know nothing
                    turn.take_over(token, "a save")
            self._save(path, progress)
        finally:
            if turn.get(0) is token:
                del turn[0]

    def _refuse_broken(self) -> None:
        if self._broken:
            raise RuntimeError(self._broken)
        self._groups.changes.turn.refuse_torn()

    def _save(self, path: str | bytes | os.PathLike[Any], progress: Progress | None) -> None:
        fault, said = None, {"opt.steps": str(self.steps), **hypers_said(self._groups.look())}
        frame, parts = {}, []
        try:
            said["path"] = repr(os.fspath(path))
            self._refuse_broken()
            frame, parts = self._frame(self._outcome.skipped), self._file_parts()
        except Exception as error:
            fault = error
        agree(self._comm, said, fault)
        series = self._comm.bcast(folder.new_token())  # from rank 0
        name, names = folder.file_name(self.steps, series, self._comm.rank), []
        try:
            names = folder.write_file(path, name, parts, progress)
        except Exception as error:
            fault = error
        stands = False
        try:
            agree(self._comm, {}, fault)
            files = self._comm.gather((name, names))
            if self._comm.rank == 0:
                try:
                    tensors = {t.key: (t.layout.dtype, t.layout.shape) for t in self._whole}
                    folder.write_index(path, frame, tensors, dict(files))
                except Exception as error:
                    fault = error
                    stands = folder.names(path, name)  # the failure may have come after the rename
            stands = self._comm.bcast(stands)
            agree(self._comm, {}, fault)
        except Exception:
            if not stands:
                folder.remove(path, lambda found: found.startswith(name))
            raise

    def _file_parts(self) -> list[folder.Part]:
        """The state of the pieces that this rank owns; counters, which all owners have, come from the first owner."""
        names, made = self._names(self._groups.hypers()), []
        for i, piece in self._named().values():
            key, at = self._whole[piece.tensor].key, partial(self._state.at, i)
            for kind, array in self._state.kept(i, names[i]).items():
                if kind not in COUNTERS:
                    made.append(folder.Part(key, kind, *_span(piece, kind), array.reshape(-1), at))
                elif piece.start == 0:
                    made.append(folder.Part(key, kind, None, None, array, at))
        return made

    def load(self, path: str | bytes | os.PathLike[Any], strict: bool = True) -> LoadReport:
        """Collective: continue from a checkpoint by any number of ranks, or from the file of a single process.

        Each rank reads its own parts. Nothing changes on any rank unless all of them have validated theirs.

        Parameters
        ----------
        path : path-like
            The folder, or file.
        strict : bool
            As in `RMSProp.load_state_dict`.

        Returns
        -------
        LoadReport
            As from `RMSProp.load_state_dict`.

        Raises
        ------
        RanksDisagree, TypeError, ValueError
            On every rank, naming everything that does not fit; nothing was changed.
        RuntimeError
            On every rank, if a file became unreadable after it had been validated: then the state is partly loaded, and
            no step can be taken until a load succeeds.

        Examples
        --------
        >>> import os, tempfile
        >>> import numpy as np
        >>> from mpi4py import MPI
        >>> from rmsprop_gpu import RMSProp
        >>> from rmsprop_gpu.distributed import ShardedRMSProp
        >>> path = os.path.join(tempfile.mkdtemp(), "run.safetensors")
        >>> RMSProp({"w": np.ones(2)}).save(path)
        >>> ShardedRMSProp({"w": np.ones(2)}, MPI.COMM_SELF).load(path)
        LoadReport(missing=[], unexpected=[])
        """
        self._refuse_capture("load")
        with ExitStack() as stack:
            saved, fault = None, None
            try:
                saved = stack.enter_context(checkpoint.opened(path))
            except Exception as error:
                fault = error
            return self._load_together(saved, strict, (), fault)

    def _load(self, state_dict: Mapping[str, Any], strict: bool, anew: tuple[str, ...] = ()) -> LoadReport:
        return self._load_together(state_dict, strict, anew, None)

    def load_foreign(
        self, framework: str, state: Any, *, steps: int | None = None, match: Literal["name", "order"] = "name"
    ) -> None:
        """Collective: as in `RMSProp`, from the whole state, which every rank passes.

        Examples
        --------
        >>> import numpy as np
        >>> from mpi4py import MPI
        >>> from rmsprop_gpu.distributed import ShardedRMSProp
        >>> group = {"lr": 0.1, "alpha": 0.99, "eps": 1e-8, "weight_decay": 0, "momentum": 0, "centered": False}
        >>> state = {0: {"step": 3.0, "square_avg": np.full(2, 0.25)}}
        >>> opt = ShardedRMSProp(np.ones(2), MPI.COMM_SELF)
        >>> opt.load_foreign("torch", {"state": state, "param_groups": [{**group, "params": [0]}]})
        >>> opt.steps, opt.lr
        (3, 0.1)
        """
        self._refuse_capture("load_foreign")
        fault, translated = None, {}
        try:
            translated = self._translated(framework, state, steps, match)
        except Exception as error:
            fault = error
        self._load_together(translated, True, ("ema",), fault)

    def _load_together(self, saved: Any, strict: bool, anew: tuple[str, ...], fault: Exception | None) -> LoadReport:
        loaded, said = None, {"strict": repr(strict)}
        if fault is None:
            try:
                loaded = self._checked(saved, strict, anew)
                said |= _loaded_said(saved, loaded)
            except Exception as error:
                fault = error
        agree(self._comm, said, fault)
        assert loaded is not None
        turn, report = self._groups.changes.turn, LoadReport([], [])
        try:
            report = self._put(loaded)
        except Exception as error:
            fault = error
            if isinstance(turn.get(0), Torn) and not isinstance(error, RuntimeError):
                fault = RuntimeError(f"the state is loaded in part ({type(error).__name__}: {error})")
                fault.__cause__ = error
        try:
            agree(self._comm, {}, fault)
        except Exception as error:
            if any(self._comm.allgather(fault is None or isinstance(turn.get(0), Torn))):
                self._broken = f"a load was cut off ({error}): load the state again before anything else"
            raise
        self._broken = None
        return report

    def _own_state(self, state: Mapping[str, Any], problems: Problems) -> Mapping[str, Any]:
        if self._comm.size == 1:
            return super()._own_state(state, problems)
        made: dict[str, Any] = {}
        for tensor, piece in zip(self._tensors, self._pieces, strict=True):
            parameter = self._whole[piece.tensor]
            entry = state.get(parameter.key)
            if isinstance(entry, Mapping):
                label = f"state[{quoted(parameter.key)}]"
                cut = {
                    kind: _cut(x, kind, parameter, piece, f'{label}["{kind}"]', problems) for kind, x in entry.items()
                }
                if all(x is not None for x in cut.values()):
                    made[tensor.key] = cut
            elif entry is not None:
                made[tensor.key] = entry  # it will be refused unchanged
        return made


def hypers_said(hypers: Sequence[Mapping[str, Any]], where: str = "param_groups") -> dict[str, str]:
    """The hyperparameters that are compared; other keys in a group are not."""
    return {
        f"{where}[{i}][{quoted(name)}]": "a callable" if callable(h[name]) else repr(h[name])
        for i, h in enumerate(hypers)
        for name in ALL
        if name in h
    }


def _loaded_said(saved: Mapping[str, Any], loaded: Loaded) -> dict[str, str]:
    """What is compared before a load, so that all ranks load the same checkpoint."""
    said = {"the steps of what is loaded": str(loaded.steps), "its skipped steps": str(loaded.skipped)}
    said["its files"] = ", ".join(saved.get("files", ()))
    return said | hypers_said(loaded.groups, "its param_groups")


def _cut(x: Any, kind: str, parameter: Tensor, piece: Piece, label: str, problems: Problems) -> Any:
    """The elements of a piece, from a saved array of the whole parameter; None, and a problem, if it is not one."""
    if kind in COUNTERS:
        return x
    if isinstance(x, Stored):
        array: Any = x
    elif kind_of(x) is not None:
        array = plain_array(x, label, problems)
    else:
        problems.add(TypeError, f"{label} is a {type(x).__name__}; wanted a NumPy or CuPy array")
        return None
    shape = (elements_of(parameter.layout.shape, kind),) if kind in BASES else parameter.layout.shape
    if array is not None and array.shape != shape:
        problems.add(ValueError, f"{label} has shape {array.shape}; wanted {shape}")
        return None
    start, stop = _span(piece, kind)
    if isinstance(array, Stored):
        return array.part(start, stop)
    return None if array is None else array.reshape(-1)[start:stop]


def _span(piece: Piece, kind: str) -> tuple[int, int]:
    """The range of a piece in this state of the whole parameter; pieces begin with a block of codes."""
    return (piece.start // BLOCK, -(-piece.stop // BLOCK)) if kind in BASES else (piece.start, piece.stop)
