"""Arrays and optimizers on a device, and steps that are captured and replayed."""

import math

import numpy as np
import on_either
import pytest
from variants import bits

cupy = pytest.importorskip("cupy", exc_type=ImportError)

SIZES = (9000, 5, 0, 257)


def arrays(seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return [cupy.asarray(rng.standard_normal(n).astype(dtype)) for n in SIZES]


def capture(opt, grads, stream):
    with stream:
        stream.begin_capture()
        try:
            opt.step(grads)
        finally:
            graph = stream.end_capture()
    return graph


def replay(graph, stream, times=1):
    for _ in range(times):
        graph.launch(stream)
    stream.synchronize()


def everything(opt):
    cupy.cuda.get_current_stream().synchronize()
    params = [bits(p) for group in opt.param_groups for p in group["params"]]
    return params + [bits(x) for i in range(len(opt.state)) for x in opt.state[i].values()]


def refused(call, text, stream):
    with stream:
        stream.begin_capture()
        try:
            with pytest.raises(RuntimeError, match=text):
                call()
        finally:
            stream.end_capture()


def scalar(x, dtype=np.float32):
    return cupy.full((), x, dtype)


def same(opt, twin):
    """Two optimizers, on the host or on the device, are bit-identical and have the same skips and norms."""
    cupy.cuda.get_current_stream().synchronize()
    assert on_either.everything(opt) == on_either.everything(twin)
    assert opt.skipped_steps == twin.skipped_steps
    norms = opt.last_grad_norm, twin.last_grad_norm
    assert norms[0] == norms[1] or all(map(math.isnan, norms))


class Interface:
    """An array of another library, with only the CUDA array interface."""

    def __init__(self, array, **changes):
        self.held = array
        self.__cuda_array_interface__ = {**array.__cuda_array_interface__, "stream": None, **changes}
