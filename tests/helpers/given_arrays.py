"""One step with given arrays: compared with the oracle, or refused with everything unchanged."""

import numpy as np
import pytest

from rmsprop_gpu import RMSProp, reference


def everything(opt, params):
    """Every byte that a step may change, in memory order."""
    arrays = [*params, *(x for state in (opt.state[i] for i in range(len(opt.state))) for x in state.values())]
    return [np.asarray(a).tobytes("A") for a in arrays] + [opt.steps]


def refused(opt, params, grads, kind, *texts):
    """The step is refused with these words, and nothing changes. A valid step still works."""
    before = everything(opt, params)
    with pytest.raises(kind) as info:
        opt.step(grads)
    for text in texts:
        assert text in str(info.value)
    assert everything(opt, params) == before


def step_and_compare(param, grad):
    """Take one step from a known state, and compare with the oracle, whatever the layout. Returns the optimizer."""
    dtype, shape = param.dtype, param.shape
    opt = RMSProp(param, lr=0.5)
    opt.state[0]["square_avg"][...] = np.arange(param.size, dtype=dtype).reshape(shape)
    want, state = reference.rmsprop(param, grad, {"square_avg": opt.state[0]["square_avg"].astype(np.float64)}, lr=0.5)
    opt.step(grad)
    tol = 8 * np.finfo(dtype).eps  # 3 roundings of v, 3 of the step, 1 of the parameter, and the oracle's in float64
    np.testing.assert_allclose(param, want, rtol=tol, atol=tol)
    np.testing.assert_allclose(opt.state[0]["square_avg"], state["square_avg"], rtol=tol)
    return opt
