"""The engine of CuPy arrays: NCCL through nccl4py, on a stream of its own; the host waits for nothing."""

from __future__ import annotations

from typing import Any

from ..arrays.layout import Array
from ..extras import extra

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
        from cupy.cuda import Device, Stream

        self.rank, self.ranks, self._device, self._order, self._nccl = rank, ranks, device, order, nccl
        if nccl is None:
            _library()
        elif (nccl.rank, nccl.nranks) != (rank, ranks):
            raise ValueError(
                f"nccl has rank {nccl.rank} of {nccl.nranks}, and comm has rank {rank} of {ranks}; wanted the same"
            )
        with Device(device):
            self._stream = Stream(non_blocking=True)

    def connect(self, comm: Any) -> None:
        """Collective: make the communicator, unless there is one."""
        if self._nccl is not None:
            return
        from cupy.cuda import Device

        core = _library()
        made = comm.bcast(bytes(core.get_unique_id()) if self.rank == 0 else None)
        with Device(self._device):
            self._nccl = core.Communicator.init(self.ranks, self.rank, core.UniqueId.from_bytes(made))

    def reduce(self, whole: Array, received: Array | None, own: Array) -> Any:
        """Start adding up our line of `whole` over all ranks, into `own`."""
        return self._started(lambda stream: self._nccl.reduce_scatter(whole.reshape(-1), own, _SUM, stream=stream), own)

    def gather(self, whole: Array) -> Any:
        """Start filling in the lines of the others."""
        lines = whole.view("uint8") if whole.size else whole
        own = lines[self.rank]
        return self._started(lambda stream: self._nccl.allgather(own, lines.reshape(-1), stream=stream), own)

    def _started(self, call: Any, own: Array) -> Any:
        """Behind the work that is enqueued, on our stream; what marks its end."""
        if not own.size:
            return None
        with self._order.on(self._device) as stream:
            self._stream.wait_event(stream.record())
            call(self._stream.ptr)
            return self._stream.record()

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


def _library() -> Any:
    with extra("nccl"):
        from nccl import core

    return core
