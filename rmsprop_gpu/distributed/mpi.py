"""The engine for NumPy arrays: MPI through mpi4py, and the communicator through which ranks agree."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from ..arrays.dtypes import compute_dtype
from ..arrays.layout import NDArray

try:
    from mpi4py import MPI
except RuntimeError as error:  # mpi4py is installed, but no MPI
    raise ImportError(f"mpi4py does not work: {error}") from None

__all__ = ["MPI", "MPIEngine", "kept_with", "own_communicator"]


def own_communicator(comm: Any) -> Any:
    """A duplicate of a communicator, so that our messages cannot meet the user's; collective at the first call.

    It is kept with the communicator, and freed with it.
    """
    if not isinstance(comm, MPI.Intracomm) or comm == MPI.COMM_NULL:
        raise TypeError(f"comm is {comm!r} (a {type(comm).__name__}); wanted an intracommunicator of mpi4py")
    found = comm.Get_attr(_keyval(_free))
    if found is None:
        found = comm.Dup()
        comm.Set_attr(_keyval(_free), found)
    return found


def kept_with(comm: Any) -> dict[Any, Any]:
    """A dict that lives as long as this communicator, and is destroyed with it."""
    found = comm.Get_attr(_keyval(_destroy))
    if found is None:
        found = {}
        comm.Set_attr(_keyval(_destroy), found)
    return found  # type: ignore[no-any-return]  # mpi4py says object


@cache
def _keyval(delete: Any) -> int:
    return int(MPI.Comm.Create_keyval(delete_fn=delete))


def _free(comm: Any, keyval: int, duplicate: Any) -> None:
    duplicate.Free()


def _destroy(comm: Any, keyval: int, kept: dict[Any, Any]) -> None:
    for x in kept.values():
        x.destroy()


class MPIEngine:
    """Blocking collectives: MPI moves data only inside its calls, so one bucket at a time is enough.

    Every rank receives all contributions to its slice and adds them in rank order, halves in float32 and rounded once.
    The number of bytes is that of a reduce-scatter, and the order of the sum does not depend on the MPI.
    """

    turns, receives = 1, True

    def __init__(self, comm: Any) -> None:
        self._comm, self.rank, self.ranks = comm, comm.rank, comm.size

    def reduce(self, whole: NDArray, received: NDArray | None, own: NDArray) -> None:
        """Sum our slice, ``whole[rank]``, over the ranks; `received` has room for as much as `whole`."""
        assert received is not None
        self._comm.Alltoall([_bytes(whole), MPI.BYTE], [_bytes(received), MPI.BYTE])
        compute = compute_dtype(own.dtype)
        total = own if own.dtype == compute else np.empty(own.shape, compute)
        with np.errstate(all="ignore"):
            np.copyto(total, received[0])
            for other in received[1:]:
                np.add(total, other, out=total)
            if total is not own:
                own[...] = total

    def gather(self, whole: NDArray) -> None:
        """Gather the slice of every rank, each into its row of `whole`, in which ours already is."""
        self._comm.Allgather(MPI.IN_PLACE, [_bytes(whole), MPI.BYTE])

    def wait(self, started: None) -> None:
        """Do nothing: it is already done."""

    def error(self) -> None:
        """Do nothing: a failing MPI call raises at once."""


def _bytes(array: NDArray) -> Any:
    return array.reshape(-1).view(np.uint8)
