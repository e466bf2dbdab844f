"""The engine of CuPy arrays: NCCL through nccl4py, on a stream of its own; the host waits for nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..arrays.layout import Array
from ..extras import extra
from .agreement import agree
from .mpi import kept_with

_SUM = 0  # ncclSum: what nccl.core.SUM is, without an import where the communicator is somebody else's


class NCCLEngine:
    """NCCL's reduce-scatter and all-gather, two buckets under way.

    NCCL adds up in an order of its own, which depends on its version and the machine: ranks agree to the bit, and that
    is all that is known.

    Parameters
    ----------
    rank, ranks : int
        As the MPI communicator has them.
    device : int
        CUDA's number of the device where the parameters lie.
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
        """Collective: take the communicator that was made for these ranks and devices, or make it.

        It lives as long as that of MPI: an optimizer may go at another time on each rank, and NCCL destroys together.
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
        """Start adding up our line of `whole` over all ranks, into `own`."""
        return self._started(lambda stream: self._nccl.reduce_scatter(whole.reshape(-1), own, _SUM, stream=stream), own)

    def gather(self, whole: Array) -> Any:
        """Start filling in the lines of the others."""
        lines = whole.view("uint8") if whole.size else whole
        own = lines[self.rank]
        return self._started(lambda stream: self._nccl.allgather(own, lines.reshape(-1), stream=stream), own)

    def _started(self, call: Any, own: Array) -> Any:
        """Behind the work that is enqueued, on our stream; what marks its end.

        Who waits for an event waits for what was before it then: it may be recorded anew, in turn.
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
        """Let the current stream wait for it, not the host."""
        if started is not None:
            with self._order.on(self._device) as stream:
                stream.wait_event(started)

    def error(self) -> None:
        """Raise a RuntimeError where NCCL has failed since."""
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
    """Collective: what fails here on one rank is said on all."""
    fault = None
    try:
        yield
    except Exception as error:  # NCCL's have no base of their own
        fault = RuntimeError(f"NCCL made no communicator ({type(error).__name__}: {error})")
        fault.__cause__ = error
    agree(comm, {}, fault)


def _library() -> Any:
    with extra("nccl"):
        from nccl import core

    return core
