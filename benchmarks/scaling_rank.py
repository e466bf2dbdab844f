"""A rank of ``python -m benchmarks.scaling``: mpiexec -n N python -m mpi4py -m benchmarks.scaling_rank ELEMENTS STEPS.

Rank 0 prints what was found as JSON. With ``one`` before them a single rank is timed beside plain RMSProp.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numba
import numpy as np
from mpi4py import MPI

from benchmarks.workloads import WORKLOADS
from rmsprop_gpu import RMSProp
from rmsprop_gpu.distributed import ShardedRMSProp
from rmsprop_gpu.distributed.transport import bucket_bytes_of

COMM = MPI.COMM_WORLD
TENSORS = 8
WARM = 1  # calls that are not timed
AGREEMENT = 33 + 2  # bytes that ranks tell each other before a step of so few tensors


def main() -> None:
    """Measure, print."""
    alone = sys.argv[1] == "one"
    elements, steps = map(int, sys.argv[1 + alone : 3 + alone])
    found = beside_plain(elements, steps) if alone else together(elements, steps)
    if COMM.rank == 0:
        print(json.dumps(found))


def together(elements: int, steps: int) -> dict[str, Any]:
    """Seconds of steps, sharded and with an all-reduce, of what they are made of, and the bytes that are sent."""
    rng = np.random.default_rng(COMM.rank)
    params = [np.ones(elements // TENSORS, np.float32) for _ in range(TENSORS)]
    grads = [rng.standard_normal(x.size, np.float32) for x in params]
    opt = ShardedRMSProp(params, COMM)
    opt.step(grads)
    before = sent_over_loopback()
    seconds = timed(lambda: opt.step(grads), steps)
    sent = sent_over_loopback() - before

    copies = [x.copy() for x in params]
    same = RMSProp(copies)

    def all_reduce() -> None:
        for grad in grads:
            COMM.Allreduce(MPI.IN_PLACE, grad)
        same.step(grads, grad_scale=COMM.size)

    for grad in grads:
        grad[:] = 1  # each call multiplies it by the number of ranks, far from any bound
    held = sum(x.nbytes for state in opt.state.values() for x in state.values())
    held += 2 * sum(x.nbytes for x in params) + (opt._transport.nbytes if COMM.size > 1 else 0)
    return {
        "ranks": COMM.size,
        "threads": numba.get_num_threads(),
        "elements": elements,
        "sharded": seconds,
        "all_reduce": timed(all_reduce, steps),
        "sent": sent / COMM.size / (steps + WARM),
        "held": COMM.allreduce(held, MPI.MAX),
        **(bare(elements, steps) if COMM.size > 1 else {}),
    }


def bare(elements: int, steps: int) -> dict[str, Any]:
    """Seconds of the collectives alone: of all elements in the buckets of a step, and of as few bytes as can be."""
    size = 4 * elements
    count = max(1, -(-size // bucket_bytes_of(COMM.size)))
    whole, got = (np.zeros((COMM.size, size // count // COMM.size), np.uint8) for _ in range(2))
    few, others = (np.zeros((COMM.size, 8), np.uint8) for _ in range(2))
    bits = np.zeros(AGREEMENT, np.uint8)

    def exchange() -> None:
        for _ in range(count):
            COMM.Alltoall([whole, MPI.BYTE], [got, MPI.BYTE])
        for _ in range(count):
            COMM.Allgather(MPI.IN_PLACE, [whole, MPI.BYTE])

    small = timed(lambda: COMM.Alltoall([few, MPI.BYTE], [others, MPI.BYTE]), 20 * steps)
    agreement = timed(lambda: COMM.Allreduce(MPI.IN_PLACE, bits, MPI.BOR), 20 * steps)
    return {"exchange": timed(exchange, steps), "small": float(np.median(small)), "agree": float(np.median(agreement))}


def timed(call: Callable[[], None], count: int) -> list[float]:
    """Seconds of each call, on the rank that took longest; they start together."""
    for _ in range(WARM):
        call()
    found = np.empty(count)
    for i in range(count):
        COMM.Barrier()
        start = time.perf_counter()
        call()
        found[i] = time.perf_counter() - start
    COMM.Allreduce(MPI.IN_PLACE, found, MPI.MAX)
    seconds: list[float] = found.tolist()
    return seconds


def sent_over_loopback() -> int:
    """Bytes that this machine has sent to itself; all ranks ask at the same time, when nothing is under way."""
    COMM.Barrier()
    found = loopback(Path("/proc/net/dev").read_text())
    COMM.Barrier()
    return found


def loopback(text: str) -> int:
    """What /proc/net/dev says has been sent over it."""
    line = next(line for line in text.splitlines() if line.strip().startswith("lo:"))
    return int(line.split()[9])


def beside_plain(elements: int, rounds: int) -> dict[str, Any]:
    """By workload the seconds of a step of one rank, of plain RMSProp, and of plain RMSProp again, by round."""
    return {name: in_turns(shapes, rounds) for name, shapes in workloads(elements).items()}


def workloads(elements: int) -> dict[str, Sequence[tuple[int, ...]]]:
    """Shapes by a name for them."""
    return {
        "1 tensor of 1,000": [(1000,)],
        "161 tensors of one element": [(1,)] * 161,
        "ResNet-50, 161 tensors": WORKLOADS["resnet50"].shapes,
        f"{TENSORS} tensors, {elements:,} elements": [(elements // TENSORS,)] * TENSORS,
    }


def in_turns(shapes: Sequence[tuple[int, ...]], rounds: int) -> dict[str, list[float]]:
    """Mean seconds of the steps of a burst, by who takes them and round; all have the same arrays."""
    params, grads = ([np.ones(shape, np.float32) for shape in shapes] for _ in range(2))
    made: dict[str, Any] = {
        "one rank": ShardedRMSProp(params, COMM),
        "RMSProp": RMSProp(params),
        "RMSProp, again": RMSProp(params),
    }
    # Some 20 to 200 ms; what a step takes goes by its elements, and for small ones by its tensors.
    burst = max(1, 200_000_000 // (sum(x.size for x in params) + 10_000 * len(params) + 10_000))
    found: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(rounds):
        for name, opt in made.items():
            opt.step(grads)
            start = time.perf_counter()
            for _ in range(burst):
                opt.step(grads)
            found[name].append((time.perf_counter() - start) / burst)
    return found


if __name__ == "__main__":
    main()
