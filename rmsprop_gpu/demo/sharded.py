"""The demo over MPI ranks: each handles its part of every batch, and keeps its part of the state.

The gradients that are added up are those of the mean over the whole batch, so any number of ranks trains like a single
process, up to the order in which floats are added.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numba
import numpy as np

from .. import AdaGrad, RMSProp, array_module, available_backends
from ..extras import extra
from .train import LR, Params, Run, Settings, to_host


class Ranks:
    """The ranks of an MPI job.

    Raises
    ------
    MissingExtraError
        If mpi4py is not installed, or finds no MPI.
    """

    def __init__(self) -> None:
        from ..distributed.mpi import MPI  # its error names the extra if there is no MPI

        self.comm: Any = MPI.COMM_WORLD
        self.rank, self.count = int(self.comm.rank), int(self.comm.size)
        self._node: Any = self.comm.Split_type(MPI.COMM_TYPE_SHARED)  # the ranks on this machine

    def share_cores(self) -> None:
        """Give Numba and NumPy's BLAS this rank's share of the cores; NUMBA_NUM_THREADS takes precedence.

        With one thread per core in each rank, the spinning threads of one rank would keep another's from running.
        """
        with extra("demo"):
            from threadpoolctl import ThreadpoolController  # comes with scikit-learn
        threads = share(self._node.allgather(_cores()), self._node.rank)
        if "NUMBA_NUM_THREADS" not in os.environ:
            numba.set_num_threads(min(threads, numba.get_num_threads()))
        blas = ThreadpoolController().select(user_api="blas")
        blas.limit(limits=min([threads, *(found["num_threads"] for found in blas.info())]))

    def device(self, wanted: str) -> str:
        """Where this rank trains, according to the demo's option; a GPU of its own becomes the current one.

        NCCL does not allow two ranks on one GPU: without one for each, "auto" is the CPU, and "cuda" a RuntimeError.
        """
        number, place = (None, None) if wanted == "cpu" else _gpu(self._node.rank)
        places = self._node.allgather(place)
        alone = None not in places and len(set(places)) == len(places)
        everywhere = self.comm.allreduce(alone) == self.count
        if wanted == "cpu" or (wanted == "auto" and not everywhere):
            return "cpu"
        array_module("cuda")  # raises with the reason if it does not work
        if not everywhere:
            raise RuntimeError(f"{len(places)} ranks on this machine have {len(set(places))} GPUs; wanted one for each")
        import cupy

        cupy.cuda.Device(number).use()
        return "cuda"


def share(cores: list[frozenset[int]], number: int) -> int:
    """How many threads one of these processes should have, given the cores on which each may run."""
    users = {core: sum(core in some for some in cores) for core in cores[number]}
    return max(1, int(sum(Fraction(1, n) for n in users.values())))


def _cores() -> frozenset[int]:
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def _gpu(rank: int) -> tuple[int, str] | tuple[None, None]:
    """The GPU of a rank of this machine, in turn, and where it is plugged in; None if none works."""
    if available_backends()["cuda"].startswith("not available"):
        return None, None
    import cupy

    number = rank % int(cupy.cuda.runtime.getDeviceCount())
    return number, str(cupy.cuda.Device(number).pci_bus_id)


class ShardedRun(Run):
    """One training on all ranks; errors are raised on all of them, except for a device that only one rank lacks."""

    def __init__(self, settings: Settings, ranks: Ranks) -> None:
        self._ranks = ranks
        super().__init__(replace(settings, device=ranks.device(settings.device)))
        # NCCL chooses its own order of adding up, so the gradients that were used are unknown.
        if self.oracle and (ranks.rank or (self.xp is not np and ranks.count > 1)):
            self.oracle = None

    def _make_optimizer(self, params: Params) -> RMSProp | AdaGrad:
        from ..distributed import ShardedAdaGrad, ShardedRMSProp  # they need mpi4py

        made = ShardedAdaGrad if self.settings.optimizer == "adagrad" else ShardedRMSProp
        given = {"lr": LR[self.settings.optimizer], **self.settings.hyper}
        return made(params, self._ranks.comm, average=False, **given)

    def _part(self, batch: slice) -> slice:
        """The rows of this rank; for a small batch some ranks have none, and gradients of zeros."""
        rank, count, rows = self._ranks.rank, self._ranks.count, batch.stop - batch.start
        return slice(batch.start + rank * rows // count, batch.start + (rank + 1) * rows // count)

    def _total(self, loss: float) -> float:
        return float(self._ranks.comm.allreduce(loss))

    def _seen(self, grads: Params) -> Params:
        """The sum of the ranks' gradients, in rank order, on rank 0: the input of the oracle."""
        if not self.settings.check or (self.xp is not np and self._ranks.count > 1):
            return grads
        everyone = self._ranks.comm.gather({name: to_host(grad) for name, grad in grads.items()}) or [{}]
        total: Params = everyone[0]
        for other in everyone[1:]:
            for name in total:
                total[name] += other[name]
        return total

    def _time_three_lines(self, grads: Params, step: int) -> None:
        """Do nothing: a step here is mostly communication, so the comparison means nothing."""

    def summary(self) -> dict[str, Any]:
        """Collective: as in a single process, with this rank's times, and whether all ranks ended bit-identical."""
        digest = hashlib.blake2b(b"".join(to_host(param).tobytes() for param in self.params.values())).digest()
        own = sum(x.nbytes for state in self.opt.state.values() for x in state.values())
        everyone = self._ranks.comm.allgather((digest, own))
        same = len({found for found, _ in everyone}) == 1
        states = [nbytes for _, nbytes in everyone]
        # Bytes per element times the elements of the whole model do not describe a rank that updates a part of it.
        apart = {"bytes_a_step": None, "bytes_moved": None, "gb_per_second": None}
        return {**super().summary(), **apart, "ranks": self._ranks.count, "same": same, "state_bytes": states}
