"""Steps and saves until a rank is killed, or kills itself in the middle of a step."""

import os
import signal

import numpy as np
from on_ranks import WORLD

from rmsprop_gpu.distributed import ShardedRMSProp


def main():
    params = {"w": np.ones(200_000, np.float32), "v": np.ones(70_000)}
    opt = ShardedRMSProp(params, WORLD, momentum=0.9, bucket_bytes=1 << 18)
    grads = {k: np.ones_like(x) for k, x in params.items()}
    opt.step(grads)
    if os.environ.get("DIES") == str(WORLD.rank):
        opt._transport._engine.gather = lambda whole: os.kill(os.getpid(), signal.SIGKILL)
    WORLD.barrier()
    if WORLD.rank == 0:
        print("ready", flush=True)
    while True:
        opt.step(grads)
        if "FOLDER" in os.environ:
            opt.save(os.environ["FOLDER"])


if __name__ == "__main__":
    main()
