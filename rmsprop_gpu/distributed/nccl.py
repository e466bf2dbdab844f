"""The engine for CuPy arrays: NCCL through nccl4py, on its own stream; the host never waits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..arrays.layout import Array
from ..extras import extra
from .agreement import agree
from .mpi import kept_with

_SUM = 0  # ncclSum, the value of nccl.core.SUM, without an import if the caller gave the communicator


class NCCLEngine:
    """NCCL's reduce-scatter and all-gather, with two buckets in transit.

    NCCL chooses the order of its sums, which depends on its version and the machine: results are bit-identical on all
    ranks, and nothing more is guaranteed.

    Parameters
    ----------
    rank, ranks : int
        As in the MPI communicator.
    device : int
        CUDA's number of the device that holds the parameters.
    order
        The order of streams of the optimizer.
    nccl
        A communicator with the methods of ``nccl.core.Communicator``, or None: then `connect` makes one.
    """

    turns, receives = 2, False

    def __init__(self, rank: int, ranks: int, device: int, order: Any, nccl: Any = None) -> None:
        from cupy.cuda import Device, Event, Stream

        self.rank, self.ranks, self._device, self._order, self._nccl = rank, ranks, device, order, nccl
        if nccl is None:
            _library()
        elif (nccl.rank, nccl.nranks) != (rank, ranks):
            raise ValueError(
                f"nccl has rank {nccl.rank} of {nccl.nranks}, and comm has rank {rank} of {ranks}; wanted the same"
            )
        with Device(device):
            self._stream = Stream(non_blocking=True)
            self._packed, *self._done = (Event(disable_timing=True) for _ in range(1 + self.turns))

    def connect(self, comm: Any) -> None:
        """Collective: use the communicator that was made for these ranks and devices, or make one.

        It lives as long as the MPI communicator: each rank may delete its optimizer at a different time, but destroying
        an NCCL communicator is collective.
        """
        if self._nccl is None:
            kept = kept_with(comm)
            if not all(comm.allgather(self._device in kept)):
                kept[self._device] = self._made(comm)
            self._nccl = kept[self._device]

    def _made(self, comm: Any) -> Any:
        from cupy.cuda import Device

        core, name = _library(), b""
        with _agreed(comm):
            if self.rank == 0:
                name = bytes(core.get_unique_id())
        name = comm.bcast(name)
        with _agreed(comm), Device(self._device):
            return core.Communicator.init(self.ranks, self.rank, core.UniqueId.from_bytes(name))

    def reduce(self, whole: Array, received: Array | None, own: Array) -> Any:
        """Start adding up our row of `whole` over all ranks, into `own`."""
        return self._started(lambda stream: self._nccl.reduce_scatter(whole.reshape(-1), own, _SUM, stream=stream), own)

    def gather(self, whole: Array) -> Any:
        """Start filling in the other ranks' rows."""
        lines = whole.view("uint8") if whole.size else whole
        own = lines[self.rank]
        return self._started(lambda stream: self._nccl.allgather(own, lines.reshape(-1), stream=stream), own)

    def _started(self, call: Any, own: Array) -> Any:
        """Start this on our stream, after the work enqueued so far; return the event that marks its end.

        Waiting for an event means waiting for its latest record at that time, so events can be reused in turn.
        """
        if not own.size:
            return None
        with self._order.on(self._device) as stream:
            self._packed.record(stream)
            self._stream.wait_event(self._packed)
            call(self._stream.ptr)
            done = self._done.pop(0)
            self._done.append(done)
            done.record(self._stream)
            return done

    def wait(self, started: Any) -> None:
        """Make the current stream wait for it, not the host."""
        if started is not None:
            with self._order.on(self._device) as stream:
                stream.wait_event(started)

    def error(self) -> None:
        """Raise RuntimeError if NCCL has failed in the meantime."""
        ask = getattr(self._nccl, "get_async_error", None)
        if ask is None:
            return
        found = ask()
        if int(found) != 0:
            raise RuntimeError(
                f"NCCL has failed ({getattr(found, 'name', found)}): the optimizer is between two steps, and its "
                "parameters differ among the ranks; load a checkpoint in new processes"
            )


@contextmanager
def _agreed(comm: Any) -> Iterator[None]:
    """Collective: a failure here on one rank is reported on all."""
    fault = None
    try:
        yield
    except Exception as error:  # NCCL's errors have no common base class
        fault = RuntimeError(f"NCCL made no communicator ({type(error).__name__}: {error})")
        fault.__cause__ = error
    agree(comm, {}, fault)


def _library() -> Any:
    with extra("nccl"):
        from nccl import core

    return core
