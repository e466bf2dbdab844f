"""What a rank keeps: its share of the state, a slice of gradients, two buckets. Counted, and as Python allocates it."""

import tracemalloc

import numpy as np
from on_ranks import BF16, F16, F32, F64, WORLD, drawn, main

from rmsprop_gpu import RMSProp
from rmsprop_gpu.distributed import ShardedRMSProp
from rmsprop_gpu.kernels.norms import BLOCK

RANK, N = WORLD.rank, WORLD.size
FULL = {"momentum": 0.9, "centered": True, "use_ema": True}
SHAPES = {"big": (1000, 1001), "small": (7,), "b": (300_000,), "c": (123_457,), "d": (50_001,), "odd": (8191,)}


def state_bytes(opt):
    return sum(x.nbytes for kinds in opt.state.values() for x in kinds.values() if x.ndim)


def check_the_share_of_the_state():
    for dtypes in (dict.fromkeys(SHAPES, F32), dict(zip(SHAPES, [F32, F32, F64, BF16, F16, F16], strict=True))):
        for bucket_bytes in (1 << 30, 1 << 20, 200_000):
            params = drawn(1, SHAPES, dtypes)
            opt = ShardedRMSProp(params, WORLD, bucket_bytes=bucket_bytes, **FULL)
            whole = state_bytes(RMSProp({k: x.copy() for k, x in params.items()}, **FULL))
            buckets = sum(
                max(1, -(-sum(params[k].nbytes for k in SHAPES if dtypes[k] == dtype) // bucket_bytes))
                for dtype in set(dtypes.values())
            )
            kinds = 4  # kinds of state, of at most 8 bytes
            assert state_bytes(opt) <= whole / N + buckets * BLOCK * kinds * 8
            if dtypes["b"] == F32:
                assert state_bytes(opt) <= whole / N + buckets * BLOCK * kinds * 4
            assert WORLD.allreduce(state_bytes(opt)) == whole
            # The gradients of a slice, and two buckets. Each has one block per rank to spare.
            model, largest = sum(x.nbytes for x in params.values()), max(x.itemsize for x in params.values())
            two = 2 * (min(bucket_bytes, model) + N * BLOCK * largest)
            assert opt._transport.nbytes <= model / N + buckets * BLOCK * largest + two


def check_what_python_allocates():
    """In building the optimizer and in steps, beyond parameters and gradients: what is kept, and the peak."""
    shapes = {"w": (1000, 2000), "v": (500_000,)}
    dtypes = dict.fromkeys(shapes, F32)
    small = drawn(1, {"w": (9,), "v": (9000,)}, dtypes)
    warm = ShardedRMSProp(small, WORLD, bucket_bytes=9000, clipnorm=1.0, momentum=0.9)  # fills all caches
    for _ in range(2):
        warm.step({k: x.copy() for k, x in small.items()})
    params, grads = drawn(1, shapes, dtypes), drawn(2, shapes, dtypes)
    model = sum(x.nbytes for x in params.values())
    bucket_bytes = 1 << 20
    tracemalloc.start()
    opt = ShardedRMSProp(params, WORLD, bucket_bytes=bucket_bytes, clipnorm=1.0, momentum=0.9)
    for _ in range(3):
        opt.step(grads)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    own = state_bytes(opt) + opt._transport.nbytes
    assert own <= (2 + 1) * model / N + 2 * bucket_bytes + (10 * 3 + 2 * N) * BLOCK * 4
    assert own <= peak <= own + 400_000  # partial sums, tables, names
    assert np.isfinite(opt.last_grad_norm)


if __name__ == "__main__":
    main(globals())
