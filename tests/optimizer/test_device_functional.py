"""Functions on arrays of a device, and the library that such arrays belong to."""

import numpy as np
import pytest
from variants import bits

from rmsprop_gpu import AdaGrad, adagrad_update, array_module, rmsprop_update

pytestmark = pytest.mark.gpu
cupy = pytest.importorskip("cupy", exc_type=ImportError)
F4 = np.float32


@pytest.mark.parametrize("dtype", [F4, np.float64, np.float16])
def test_functions_on_device_arrays(dtype, rng):
    host = [rng.standard_normal((40, 3)).astype(dtype) for _ in range(2)]
    compute = np.float64 if dtype is np.float64 else F4
    results = []
    for xp in (np, cupy):
        p, g = (xp.asarray(x.copy()) for x in host)
        v, m, b, s = (xp.zeros((40, 3), compute) for _ in range(4))
        for _ in range(2):
            rmsprop_update(p, g, v, lr=0.1, momentum=0.9, momentum_buffer=b, centered=True, grad_avg=m)
            adagrad_update(p, g, s, lr=0.1)
        results.append([bits(x) for x in (p, v, m, b, s)])
    assert results[0] == results[1]


def test_array_module_and_adagrad():
    assert array_module() is cupy
    assert array_module("cuda") is cupy
    assert array_module("cpu") is np
    opt = AdaGrad(cupy.ones(3))
    opt.step(cupy.ones(3))
    assert opt.state[0]["sum"].get().tolist() == [1, 1, 1]
