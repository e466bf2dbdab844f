"""NCCL itself, through nccl4py: ``mpiexec -n N python -m mpi4py on_nccl.py`` on a machine with a card.

With one rank, buckets are made and sent as if there were several, which a sharded optimizer would not do. With several
ranks and a card each, whole steps are taken. NCCL may refuse ranks that share a card, and its message is printed.
"""

import signal
import sys
import time

import cupy
import ml_dtypes
import numpy as np
from mpi4py import MPI
from nccl_stand_in import is_held

from rmsprop_gpu.arrays.checks import Problems, make_tensor
from rmsprop_gpu.distributed import ShardedRMSProp
from rmsprop_gpu.distributed.memory import DeviceMemory
from rmsprop_gpu.distributed.nccl import NCCLEngine
from rmsprop_gpu.distributed.transport import Transport
from rmsprop_gpu.steps.order import Order

COMM = MPI.COMM_WORLD
DEVICE = COMM.rank % cupy.cuda.runtime.getDeviceCount()
cupy.cuda.Device(DEVICE).use()
SHAPES = [((1_000_003,), "f4"), ((5000,), "f2"), ((), "f8"), ((0, 4), "f4"), ((900, 300), ml_dtypes.bfloat16)]


def say(*words):
    print(f"rank {COMM.rank}:", *words, flush=True)


def draw(seed):
    rng = np.random.default_rng(seed)
    return [cupy.asarray(np.asarray(rng.standard_normal(shape)).astype(dtype)) for shape, dtype in SHAPES]


def made(order, engine, params, bucket_bytes):
    problems = Problems()
    named = {"grad_label": "", "state_label": ""}
    tensors = [make_tensor(x, problems, key=str(i), label=f"params[{i}]", **named) for i, x in enumerate(params)]
    problems.raise_any()
    return Transport(tensors, bucket_bytes, engine, DeviceMemory(DEVICE, order))


def same(a, b):
    return a.get().tobytes() == b.get().tobytes()


def alone():
    """One rank gets back what it sent, in every bucket, even on busy streams."""
    order = Order([DEVICE])
    engine = NCCLEngine(0, 1, DEVICE, order)
    engine.connect(COMM)
    say("NCCL has made a communicator:", engine._nccl)
    engine.error()
    params = draw(0)
    sent = made(order, engine, params, 100_000)
    say(len(sent._packed), "buckets")
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    begin = time.perf_counter()
    with stream:
        for t in range(1, 11):
            grads = draw(t)
            column = np.array([x.data.ptr for x in grads], np.int64)
            column[3] = 16  # has no elements
            if t == 5:
                column[1] = 0
            sent.reduce(column, zeros=t % 2 == 0)
            want = draw(t)
            for piece, own in sent.own:
                given = want[piece.tensor].reshape(-1)[piece.start : piece.stop]
                assert same(own, cupy.zeros_like(given) if t == 5 and piece.tensor == 1 else given), (t, piece)
            if t % 2 == 0:
                assert all((x.get() == 0).all() for x in grads)
            for x, y in zip(params, draw(100 + t), strict=True):
                x[...] = y
            sent.gather()
            assert all(map(same, params, draw(100 + t)))
        for found, on_any in (cupy.asarray(np.float32(np.nan)), True), (0.0, False), (cupy.asarray(False), False):
            assert bool(sent.any_of(found)) is on_any
        assert float(sent.times_ranks(cupy.asarray(np.float32(0.1)))) == float(np.float32(0.1))
        column = np.array([x.data.ptr for x in grads], np.int64)
        held = is_held(stream, lambda: (sent.reduce(column, zeros=False), sent.gather()))
        assert held, "the host waited for the device"
    engine.error()
    say(f"of one rank all bits are right, in {time.perf_counter() - begin:.1f} s, and the host waits for nothing")


def together():
    """On several ranks, steps are bit-identical, and norms match sums of small integers."""
    weights = {"w": cupy.zeros((300, 1001), "f4"), "h": cupy.zeros(7000, "f2")}
    try:
        opt = ShardedRMSProp(weights, COMM, lr=0.5, momentum=0.5, global_clipnorm=1e9, bucket_bytes=100_000)
    except RuntimeError as error:
        say("refused:", error)
        return
    for t in range(5):
        rng = np.random.default_rng([t, COMM.rank])
        opt.step({k: cupy.asarray(rng.integers(-9, 9, x.shape).astype(x.dtype)) for k, x in weights.items()})
    norms = COMM.allgather(opt.last_grad_norm)
    drawn = [np.random.default_rng([4, rank]) for rank in range(COMM.size)]
    sums = [sum(rng.integers(-9, 9, x.shape).astype("f8") for rng in drawn) for x in weights.values()]
    want = np.sqrt(sum((x**2).sum() for x in sums)) / COMM.size
    assert abs(norms[0] - want) < 1e-6 * want, (norms, want)
    assert len(set(norms)) == 1
    for x in weights.values():
        assert len(set(COMM.allgather(x.get().tobytes()))) == 1
    say("steps over NCCL are taken, and ranks agree to the bit")


if __name__ == "__main__":
    signal.alarm(75)  # ranks that wait for each other in NCCL cannot be interrupted otherwise
    alone() if COMM.size == 1 else together()
    sys.exit(0)
