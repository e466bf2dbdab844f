"""The bytes that ranks send over TCP in a step, as counted by the system on the loopback interface."""

import os
import time
from pathlib import Path

import numpy as np
from on_ranks import WORLD

from rmsprop_gpu.distributed import ShardedRMSProp

STEPS, TRIES = 3, 6


def sent():
    """The bytes sent on this interface. On loopback, each byte also arrives once."""
    (line,) = [x for x in Path("/proc/net/dev").read_text().splitlines() if x.strip().startswith("lo:")]
    return int(line.partition(":")[2].split()[8])


def counted(call):
    """The bytes sent while all ranks make this call."""
    WORLD.barrier()
    time.sleep(0.05)
    before = sent()
    WORLD.barrier()
    call()
    WORLD.barrier()
    time.sleep(0.05)
    return sent() - before


def main():
    size = int(os.environ["ELEMENTS"])
    params, grads = {"w": np.ones(size, np.float32), "v": np.ones((40, 1000))}, None
    grads = {k: np.full_like(x, 0.5) for k, x in params.items()}
    model = sum(x.nbytes for x in params.values())
    opt = ShardedRMSProp(params, WORLD, bucket_bytes=1 << 21, momentum=0.9, **eval(os.environ["HYPERS"]))
    opt.step(grads)  # opens the connections

    def steps():
        for _ in range(STEPS):
            opt.step(grads)

    # Others may use the interface, so the minimum is ours.
    found = min(counted(steps) for _ in range(TRIES)) / STEPS
    probe = np.ones(1 << 18)
    arrives = min(counted(lambda: WORLD.Bcast(probe)) for _ in range(TRIES))
    if WORLD.rank == 0:
        print(WORLD.size, model, int(found / WORLD.size), arrives / probe.nbytes)


if __name__ == "__main__":
    main()
