"""Ranks agree before anything is sent: equal arguments, and no fault on any rank; otherwise all raise one error."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..arrays.layout import NDArray

_DIGEST = 16  # bytes
_FAULT = 1  # in the first byte: this rank has found a fault


class RanksDisagree(ValueError):  # noqa: N818  # named after what the ranks do
    """Something that must be equal on all ranks differs, or a rank has found a fault: the same error on every rank.

    Examples
    --------
    A single rank has nothing to disagree with:

    >>> import numpy as np
    >>> from mpi4py import MPI
    >>> from rmsprop_gpu.distributed import RanksDisagree, ShardedRMSProp
    >>> try:
    ...     ShardedRMSProp(np.ones(2), MPI.COMM_SELF).step(np.ones(2))
    ... except RanksDisagree as error:  # the same text on every rank
    ...     print(error)
    """


def agree(comm: Any, said: Mapping[str, str], fault: Exception | None, bits: NDArray | None = None) -> NDArray:
    """Collective: the OR of the bits of all ranks, if all agree and none has found a fault.

    Parameters
    ----------
    comm
        The mpi4py communicator.
    said
        What must be equal on all ranks, under the names used in errors.
    fault
        What this rank has found, or None; a rank with a fault takes part all the same.
    bits
        An array of uint8, of the same length on every rank.

    Raises
    ------
    RanksDisagree
        Naming the rank and the argument, with the fault of this rank as its cause.
    RuntimeError
        The same text, if the fault of any rank was a RuntimeError: a device or NCCL has failed.
    Exception
        The fault itself, if all ranks have found the same.

    Notes
    -----
    This takes one OR reduction of 33 bytes and the bits, whatever the number of ranks. It contains a digest and its
    complement: a bit that ends up set in both differs somewhere.
    """
    digest = hashlib.blake2b(repr(sorted(said.items())).encode(), digest_size=_DIGEST).digest()
    word = np.frombuffer(digest, np.uint8)
    status = np.array([_FAULT * (fault is not None)], np.uint8)
    sent = np.concatenate([status, word, ~word, np.empty(0, np.uint8) if bits is None else bits])
    _reduce(comm, sent)
    if not sent[0] and not (sent[1 : 1 + _DIGEST] & sent[1 + _DIGEST : 1 + 2 * _DIGEST]).any():
        return sent[1 + 2 * _DIGEST :]
    raise _error(comm, said, fault)


def _reduce(comm: Any, sent: NDArray) -> None:
    from mpi4py import MPI

    comm.Allreduce(MPI.IN_PLACE, sent, MPI.BOR)


def _error(comm: Any, said: Mapping[str, str], fault: Exception | None) -> Exception:
    """Collective: the error that all ranks raise."""
    found = None if fault is None else (type(fault).__name__, str(fault), isinstance(fault, RuntimeError))
    told = comm.allgather((dict(said), found))
    faults = [(rank, x) for rank, (_, x) in enumerate(told) if x is not None]
    if fault is not None and len(faults) == len(told) and len({x for _, x in faults}) == 1:
        return fault
    if faults:
        text = "; ".join(f"rank {rank}: {name}: {text}" for rank, (name, text, _) in faults)
        others = "" if len(faults) == len(told) else "; the other ranks found nothing"
        # A failure on a device may be noticed after something has changed; its own text says so.
        failed = any(is_runtime for _, (*_, is_runtime) in faults)
        error = RuntimeError(f"{text}{others}") if failed else RanksDisagree(f"{text}{others}; {_NOTHING}")
        error.__cause__ = fault
        return error
    return RanksDisagree(f"{_difference([x for x, _ in told])}; {_NOTHING}")


_NOTHING = "nothing was changed on any rank"


def _difference(said: list[dict[str, str]]) -> str:
    """Describe where one of them differs from the first."""
    for rank, other in enumerate(said):
        for name in {**said[0], **other}:
            ours, theirs = said[0].get(name), other.get(name)
            if ours != theirs:
                return f"{name} is {_said(theirs)} on rank {rank} and {_said(ours)} on rank 0; wanted the same"
    return "ranks disagree"  # different digests of equal texts, which does not happen


def _said(text: str | None) -> str:
    return "missing" if text is None else text
