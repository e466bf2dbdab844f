"""RMSProp and AdaGrad with state sharded over processes, each of which updates its part of the parameters."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np

from .. import hyper
from ..arrays.checks import Problems, Tensor, a, make_tensor
from ..arrays.interop import cupy_array
from ..arrays.layout import Array, NDArray
from ..arrays.real import whole
from ..conventions.presets import preset_of
from ..hyper import Asked
from ..kernels.norms import BLOCK
from ..optimizer.rmsprop import AdaGrad, RMSProp
from ..optimizer.turn import Torn
from ..steps.batch import Parts, Written
from ..steps.signals import signals
from .agreement import agree
from .cuts import Piece
from .gradients import WholeGradients
from .kept import Kept, hypers_said
from .memory import DeviceMemory, HostMemory
from .mpi import MPIEngine, own_communicator
from .nccl import NCCLEngine
from .transport import Engine, Memory, Transport, bucket_bytes_of

_GIVEN, _FOUND, _ON_DEVICE = 1, 2, 4  # bits by which a rank describes its found_inf


class Sharded(Kept):
    """What `ShardedRMSProp` and `ShardedAdaGrad` add to the optimizer of a single process."""

    def _join(self, build: Callable[[], None], comm: Any, nccl: Any, average: bool, bucket_bytes: int | None) -> None:
        """Collective: build the optimizer of this rank, once all ranks agree on it."""
        self._comm, self._nccl, self._average = own_communicator(comm), nccl, average
        self._broken: str | None = None  # why no step can be taken
        fault = None
        try:
            if not isinstance(average, (bool, np.bool_)):
                raise TypeError(f"average is {average!r} ({a(type(average))}); wanted True or False")
            if bucket_bytes is not None and (whole(bucket_bytes) is None or not 1 <= bucket_bytes < 2**62):
                raise ValueError(f"bucket_bytes is {bucket_bytes!r}; wanted a number of bytes, or None")
            self._bucket_bytes = bucket_bytes or bucket_bytes_of(self._comm.size)
            build()
        except Exception as error:
            fault = error
        agree(self._comm, self._described() if fault is None else {}, fault)
        if isinstance(self._engine, NCCLEngine):
            self._engine.connect(self._comm)

    def _own(self) -> tuple[Sequence[Tensor], Sequence[int], Parts | None]:
        """The parts of this rank, and an empty part for each group and dtype of which it has none."""
        problems, tensors = Problems(), self._whole
        for tensor in tensors:
            if not tensor.view.flags.c_contiguous:
                problems.add(ValueError, f"{tensor.label} is not C-contiguous; wanted an array in C order")
        if len(self._devices) > 1:
            problems.add(ValueError, f"the parameters are on devices {self._devices}; wanted one device per process")
        problems.raise_any()
        self._checks: dict[bool, tuple[int, WholeGradients]] = {}
        self._mask: NDArray | None = None  # which parameters had a gradient on any rank in the last step
        self._engine: Any = None
        rank, ranks = self._comm.rank, self._comm.size
        if ranks == 1:
            self._pieces = [Piece(i, 0, tensor.layout.size, 0) for i, tensor in enumerate(tensors)]
            self._count = len(tensors)
            return super()._own()
        engine: Engine
        memory: Memory
        if self._order is None:
            engine, memory = MPIEngine(self._comm), HostMemory()
        else:
            (device,) = self._devices
            engine = NCCLEngine(rank, ranks, device, self._order, self._nccl)
            memory = DeviceMemory(device, self._order)
        self._engine = engine
        self._transport = Transport(tensors, self._bucket_bytes, engine, memory)
        self._own_grads = [own.grad for own in self._transport.own]
        self._pieces = [own.piece for own in self._transport.own]
        if rank == 0:  # parameters without elements have counters all the same
            self._pieces += [Piece(i, 0, 0, 0) for i, tensor in enumerate(tensors) if not tensor.layout.size]
        self._count = len(self._pieces)
        return self._parts_of(tensors)

    def _parts_of(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[int], Parts]:
        groups = self._groups.of_tensor
        kinds = [(group, tensor.layout.dtype) for group, tensor in zip(groups, tensors, strict=True)]
        here: dict[Any, int] = {}
        for number, piece in enumerate(self._pieces):
            here.setdefault(kinds[piece.tensor], number)
        for i, kind in enumerate(kinds):
            if kind not in here:
                here[kind] = len(self._pieces)
                self._pieces.append(Piece(i, 0, 0, 0))
        parts = Parts(
            [tensor.layout.size for tensor in tensors],
            [piece.tensor for piece in self._pieces],
            [piece.start // BLOCK for piece in self._pieces],
            [here[kind] for kind in kinds],
            self._transport.completing,
        )
        made = [_part(tensors[piece.tensor], piece) for piece in self._pieces]
        return made, [groups[piece.tensor] for piece in self._pieces], parts

    def _described(self) -> dict[str, str]:
        """What must be equal on all ranks when an optimizer is built."""
        from .. import __version__  # the package's __init__ imports only what is asked for

        place = "on CUDA devices" if self._devices else "in host memory"
        said = {"the version of rmsprop_gpu": __version__, "the optimizer": type(self).__name__}
        said |= {"the place of the parameters": place, "the number of parameters": str(len(self._whole))}
        if self._devices:  # making a communicator waits for the others
            said["nccl"] = "None" if self._nccl is None else "a communicator"
        said |= {"bucket_bytes": str(self._bucket_bytes), "average": str(self._average)}
        for i, (tensor, group) in enumerate(zip(self._whole, self._groups.of_tensor, strict=True)):
            what = f"{tensor.key!r}, {tensor.layout.dtype} of shape {tensor.layout.shape}"
            said[tensor.label] = f"number {i}, {what}, group {group}"  # their order is the order in buckets
        return said | hypers_said(self._groups.look())

    # Steps

    def step(self, grads: Any, *, grad_scale: Any = None, found_inf: Any = None, zero_grads: bool = False) -> None:
        """Collective: update every parameter with the average (or sum) of the gradients of all ranks.

        Parameters
        ----------
        grads
            This rank's own gradients, for all parameters, as in `RMSProp.step`. ``None`` counts as zeros if another
            rank has a gradient; if no rank has one, the parameter and its state are left alone. A rank that has run out
            of data steps with ``None`` everywhere; the average still divides by the number of ranks.
        grad_scale : float or array of one element, optional
            As in `RMSProp.step`, equal on all ranks; an array on a device is not compared.
        found_inf : bool, number or array of one element, optional
            Anything but 0 on any rank skips the step on all.
        zero_grads : bool
            Write zeros into the gradients in the pass that packs them.

        Raises
        ------
        RanksDisagree
            On every rank, if something differs that must be equal, or one of them refuses its gradients; no byte was
            changed on any.
        TypeError, ValueError
            On every rank, if all of them refuse theirs for the same reason.
        RuntimeError
            If a device or NCCL has failed, at the latest in the next step; and while a CUDA graph is being captured.

        Examples
        --------
        >>> import numpy as np
        >>> from mpi4py import MPI
        >>> from rmsprop_gpu.distributed import ShardedRMSProp
        >>> weights = {"w": np.ones(2)}
        >>> opt = ShardedRMSProp(weights, MPI.COMM_SELF, lr=0.1)
        >>> opt.step({"w": np.full(2, 0.5)})
        >>> weights["w"].round(4)
        array([0.6838, 0.6838])
        """
        if self._comm.size == 1:
            super().step(grads, grad_scale=grad_scale, found_inf=found_inf, zero_grads=zero_grads)
            return
        turn, token = self._groups.changes.turn, object()
        try:
            # A signal handler's step is refused here, since the other ranks know nothing of it; after a torn load, all
            # ranks refuse.
            if turn.setdefault(0, token) is not token and not isinstance(turn.get(0), Torn):
                turn.take_over(token, "a step")
            self._take_step(grads, grad_scale, found_inf, zero_grads)
        finally:
            if turn.get(0) is token:
                del turn[0]

    def _take_step(self, grads: Any, grad_scale: Any, found_inf: Any, zero_grads: Any) -> None:
        fault, said = None, {"opt.steps": str(self.steps)}
        bits = np.zeros(1 + -(-len(self._whole) // 8), np.uint8)
        scale = checks = None
        with ExitStack() as stack:
            try:
                self._refuse_step()
                if self._order is not None:
                    stack.enter_context(self._order.on(self._devices[0]))
                hypers, rates = stack.enter_context(self._planner.ahead())
                checks = self._taken(grads, grad_scale, found_inf, zero_grads, hypers)
                scale = self._scaled(grad_scale)
                bits[0] = self._said_of(found_inf)
                bits[1:] = np.packbits(checks.column != 0)
                said |= hypers_said(hypers) | {f"the learning rate of group {i}": repr(x) for i, x in enumerate(rates)}
                said |= {"grad_scale": self._named_scale(grad_scale), "zero_grads": repr(bool(zero_grads))}
            except Exception as error:
                fault = error
            agreed = agree(self._comm, said, fault, bits)
            assert checks is not None
            try:
                self._transport.reduce(checks.column, zeros=bool(zero_grads))
                checks.release()
                told = signals(scale, self._skips(int(agreed[0]), found_inf), False, self._devices, self._computes)
                self._planner.bound(self._grads_of(agreed[1:]), told).launch()
                self._transport.gather()
            except BaseException as error:
                self._broken = (
                    f"a step was cut off ({type(error).__name__}: {error}): the optimizer is between two steps, and "
                    "its parameters differ among the ranks; load parameters and a checkpoint"
                )
                if isinstance(error, Exception):  # errors of NCCL and cuda.core have no common base class
                    raise RuntimeError(self._broken) from error
                raise

    def _refuse_step(self) -> None:
        self._refuse_capture("step of a sharded optimizer")
        self._refuse_broken()
        if self._order is not None:
            self._order.refuse_broken()
        self._engine.error()

    def _taken(
        self, grads: Any, grad_scale: Any, found_inf: Any, zero_grads: Any, hypers: Sequence[Mapping[str, Any]]
    ) -> WholeGradients:
        """The check of a step's arguments, with the gradients bound; one error names everything that is wrong."""
        problems, arrays = Problems(), None
        with problems.taking():
            arrays = self._flatten(grads)
        if self._entries.moved():
            with problems.taking():
                self._entries.check()
        told = signals(grad_scale, found_inf, zero_grads, self._devices, self._computes)
        if told.problems:
            with problems.taking():
                told.problems.raise_any()
        with problems.taking():
            hyper.check_shared(hypers, self._devices)
        checks = self._checks_of(zero_grads is True or zero_grads is np.True_)
        if arrays is not None:
            with problems.taking():
                checks.take(arrays)
        problems.raise_any()
        return checks

    def _checks_of(self, zeros: bool) -> WholeGradients:
        """The check of gradients, made with everything that a step writes here."""
        buffers = sum(map(len, self._state.buffers))
        known, checks = self._checks.get(zeros, (-1, None))
        if checks is None or known != buffers:
            mine: list[dict[str, Array]] = [{} for _ in self._whole]
            for piece, state in zip(self._pieces, self._state.buffers, strict=True):
                mine[piece.tensor] |= {f"{kind}[{piece.start}:{piece.stop}]": x for kind, x in state.items()}
            checks = WholeGradients(self._whole, Written(self._whole, mine), self._order, zeros=zeros)
            self._checks[zeros] = buffers, checks
        return checks

    def _scaled(self, grad_scale: Any) -> Any:
        """The divisor of the sum of the gradients."""
        if not self._average:
            return grad_scale
        if grad_scale is None:
            return self._comm.size
        if self._on_device(grad_scale):
            return self._transport.times_ranks(cupy_array(grad_scale))
        scale = _number(grad_scale) * self._comm.size
        if not isinstance(grad_scale, numbers.Real):
            return np.array(scale)  # a step reads it unchanged
        problems = signals(scale, None, False, self._devices, self._computes).problems
        if problems:
            problems.raise_any()
        return scale

    def _named_scale(self, grad_scale: Any) -> str:
        """The text by which ranks compare it."""
        if grad_scale is None:
            return "None"
        return "an array on the device" if self._on_device(grad_scale) else repr(_number(grad_scale))

    def _on_device(self, signal: Any) -> bool:
        return self._order is not None and not isinstance(signal, (numbers.Real, np.bool_))

    def _said_of(self, found_inf: Any) -> int:
        if found_inf is None:
            return 0
        if self._on_device(found_inf):
            return _ON_DEVICE
        return _GIVEN | _FOUND * bool(np.asarray(found_inf).reshape(()) != 0)

    def _skips(self, said: int, found_inf: Any) -> Any:
        """The step's `found_inf`, combined over all ranks."""
        if said & _FOUND:
            return True
        if said & _ON_DEVICE:
            on_device = found_inf is not None and self._said_of(found_inf) == _ON_DEVICE
            return self._transport.any_of(cupy_array(found_inf).reshape(()) if on_device else 0.0)
        return False if said else None

    def _grads_of(self, bits: NDArray) -> list[Array | None]:
        """The gradients of our parts, at addresses that never change."""
        if self._mask is None or not np.array_equal(bits, self._mask):
            self._mask = bits.copy()
            given = np.unpackbits(bits)
            real = zip(self._pieces, self._own_grads, strict=False)
            self._given = [grad if given[piece.tensor] else None for piece, grad in real]
            # Then come tensors without elements, for which any empty gradient will do, and the stand-ins for others.
            for number in range(len(self._given), len(self._pieces)):
                mine = number < self._count and given[self._pieces[number].tensor]
                self._given.append(self._tensors[number].view[:0].copy() if mine else None)
        return self._given

    def compile(
        self, *, grad_scale: bool = False, found_inf: bool = False, zero_grads: bool = False, grad_dtype: Any = None
    ) -> None:
        """As in `RMSProp`; here a `grad_scale` averages gradients, packing zeroes them, and they are never narrow.

        Examples
        --------
        >>> import numpy as np
        >>> from mpi4py import MPI
        >>> from rmsprop_gpu.distributed import ShardedRMSProp
        >>> ShardedRMSProp(np.ones(2), MPI.COMM_SELF).compile(zero_grads=True)
        """
        if self._comm.size == 1:
            super().compile(grad_scale=grad_scale, found_inf=found_inf, zero_grads=zero_grads, grad_dtype=grad_dtype)
            return
        self._refuse_capture("compilation")
        self._groups.changes.turn.refuse("compilation")
        asked = self._asked(grad_scale, found_inf, zero_grads)
        if grad_dtype is not None:
            self._grad_dtype(grad_dtype)  # refuses invalid ones; a narrow one is widened
        scaled = bool(self._average) or asked.scaled
        self._planner.compile(Asked(told=scaled or asked.told, scaled=scaled))

    def refresh(self, step: int | None = None) -> None:
        """Refused: steps of a sharded optimizer cannot be captured in a CUDA graph.

        Examples
        --------
        >>> import numpy as np
        >>> from mpi4py import MPI
        >>> from rmsprop_gpu.distributed import ShardedRMSProp
        >>> ShardedRMSProp(np.ones(2), MPI.COMM_SELF).refresh()
        Traceback (most recent call last):
        RuntimeError: refresh is for replays of CUDA graphs, and no graph captures a step of a sharded optimizer
        """
        raise RuntimeError("refresh is for replays of CUDA graphs, and no graph captures a step of a sharded optimizer")


def _part(tensor: Tensor, piece: Piece) -> Tensor:
    """A piece of a parameter as a parameter."""
    span, problems = f"[{piece.start}:{piece.stop}]", Problems()
    made = make_tensor(
        tensor.view.reshape(-1)[piece.start : piece.stop],
        problems,
        key=tensor.key + span,
        label=tensor.label + span,
        grad_label=tensor.grad_label + span,
        state_label=f"{tensor.state_label[:-1]}{span}.",
    )
    problems.raise_any()
    assert made is not None
    made.of, made.start = tensor.key, piece.start
    return made


def _number(grad_scale: Any) -> float:
    """A number, possibly out of an array in host memory."""
    return float(grad_scale if isinstance(grad_scale, numbers.Real) else np.asarray(grad_scale).reshape(()))


class ShardedRMSProp(Sharded, RMSProp):
    """RMSProp whose state is sharded over processes: each keeps and updates a part of the elements (ZeRO stage 1).

    Gradients go through a reduce-scatter, each rank updates its part, and an all-gather collects the parameters.
    Communication is that of an all-reduce, and the update is divided by the number of ranks N. So is memory: besides
    its parameters and gradients, a rank holds ``(state + one gradient) / N`` and two buckets.

    The constructor, `step`, `save`, `load`, `load_state_dict`, `load_foreign` and `gather` are collective: every rank
    has to call them in the same order.

    Parameters
    ----------
    params
        As in :class:`RMSProp`, the same on all ranks, with the same values; in host memory, or on one CUDA device. Each
        is C-contiguous. Parameters and gradients stay whole on every rank.
    comm : mpi4py.MPI.Intracomm
        The ranks. It is duplicated once, so that messages cannot meet yours, and the duplicate is freed with it.
    nccl : optional
        For parameters on devices, a communicator for the same ranks with the methods of nccl4py's
        ``nccl.core.Communicator``; one is made by default.
    average : bool
        Divide the sum of the gradients by the number of ranks.
    bucket_bytes : int, optional
        How much is in transit at one time: 32 MiB by default, or 1 MiB per rank if that is more.
    **hyperparameters
        As in :class:`RMSProp`, `no_decay` too.

    Raises
    ------
    RanksDisagree
        On every rank, if names, shapes, dtypes, groups, hyperparameters, the size of buckets or the version differ, or
        some of them refuse their arguments.
    TypeError, ValueError
        On every rank, if all of them refuse theirs for the same reason.
    MissingExtraError
        If mpi4py is not installed (the extra ``mpi``), or, for CuPy arrays, nccl4py (``nccl``).

    Notes
    -----
    Rajbhandari et al., "ZeRO", SC 2020, stage 1. torch's ``ZeroRedundancyOptimizer`` keeps whole tensors on a rank, so
    the largest of them limits the savings, and its state is collected on one rank to be saved.

    NumPy arrays are sent with MPI and added up in rank order, halves in float32 and rounded once: parameters, state and
    norms are bit-identical to those of a single process that steps with ``g0 + g1 + ...`` and ``grad_scale=N``. CuPy
    arrays are sent with NCCL, which chooses its own order.

    Start with ``python -m mpi4py``: otherwise an exception on one rank leaves the others waiting.

    Examples
    --------
    With one process; under ``mpiexec -n 4 python -m mpi4py`` the program is the same:

    >>> import numpy as np
    >>> from mpi4py import MPI
    >>> from rmsprop_gpu.distributed import ShardedRMSProp
    >>> weights = {"w": np.ones(8, np.float32)}
    >>> opt = ShardedRMSProp(weights, MPI.COMM_WORLD, lr=1e-3, momentum=0.9)
    >>> opt.step({"w": np.full(8, 0.5, np.float32)})
    >>> list(opt.state), opt.gather("square_avg")["w"].shape
    (['w[0:8]'], (8,))
    """

    def __init__(
        self,
        params: Any,
        comm: Any,
        *,
        nccl: Any = None,
        average: bool = True,
        bucket_bytes: int | None = None,
        **hyperparameters: Any,
    ) -> None:
        build = partial(RMSProp.__init__, self, params, **hyperparameters)
        self._join(build, comm, nccl, average, bucket_bytes)

    @classmethod
    def from_preset(  # type: ignore[override]  # the ranks follow the parameters
        cls,
        name: str,
        params: Any,
        comm: Any,
        /,
        *,
        nccl: Any = None,
        average: bool = True,
        bucket_bytes: int | None = None,
        no_decay: Any = None,
        **arguments: Any,
    ) -> ShardedRMSProp:
        """RMSProp as another framework implements it, sharded: `RMSProp.from_preset` with ranks after the parameters.

        Examples
        --------
        >>> import numpy as np
        >>> from mpi4py import MPI
        >>> from rmsprop_gpu.distributed import ShardedRMSProp
        >>> opt = ShardedRMSProp.from_preset("keras", np.ones(2), MPI.COMM_SELF, rho=0.95)
        >>> opt.param_groups[0]["alpha"]
        0.95
        """
        try:
            preset = preset_of(name)
            preset.rmsprop(name, arguments)
        except Exception as error:
            agree(own_communicator(comm), {}, error)  # raises on all ranks
            raise
        given = {"nccl": nccl, "average": average, "bucket_bytes": bucket_bytes, "no_decay": no_decay}
        return preset.built(name, arguments, partial(cls, params, comm, **given))


class ShardedAdaGrad(Sharded, AdaGrad):
    """AdaGrad whose state is sharded over processes, like that of :class:`ShardedRMSProp`.

    Parameters
    ----------
    params, comm, nccl, average, bucket_bytes
        As in :class:`ShardedRMSProp`.
    **hyperparameters
        As in :class:`AdaGrad`, `no_decay` too.

    Examples
    --------
    >>> import numpy as np
    >>> from mpi4py import MPI
    >>> from rmsprop_gpu.distributed import ShardedAdaGrad
    >>> weight = np.ones(3)
    >>> opt = ShardedAdaGrad(weight, MPI.COMM_WORLD, lr=0.1)
    >>> opt.step(np.full(3, 0.5))
    >>> weight.round(6)
    array([0.9, 0.9, 0.9])
    """

    def __init__(
        self,
        params: Any,
        comm: Any,
        *,
        nccl: Any = None,
        average: bool = True,
        bucket_bytes: int | None = None,
        **hyperparameters: Any,
    ) -> None:
        build = partial(AdaGrad.__init__, self, params, **hyperparameters)
        self._join(build, comm, nccl, average, bucket_bytes)
