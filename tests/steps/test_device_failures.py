"""Steps on a device that fail or are interrupted: done, not done, or said to be half done."""

import ctypes
import functools
import signal
import time

import numpy as np
import pytest
from on_device import arrays, everything

from rmsprop_gpu import RMSProp
from rmsprop_gpu.kernels import cuda

pytestmark = pytest.mark.gpu
cupy = pytest.importorskip("cupy", exc_type=ImportError)
F4 = np.float32


@pytest.fixture
def ctrl_c():
    """Python's own answer to it, which a process in the background does not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield functools.partial(getattr(ctypes.CDLL(None), "raise"), signal.SIGINT)
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_cannot_leave_a_step_half_done(ctrl_c):
    """It comes between two launches, and is heard after the last."""
    params = [cupy.ones(5, F4), cupy.ones(5, np.float64)]
    grads = [x.copy() for x in params]
    opt, want = RMSProp(params), RMSProp([x.copy() for x in params])
    opt.step(grads)
    opt._planner._plan.steps._calls.insert(2, ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        _step_and_wait(opt, grads)
    opt._planner._plan.steps._calls.remove(ctrl_c)
    for _ in range(2):
        want.step(grads)
    assert opt.steps == 2
    assert everything(opt) == everything(want)


def _step_and_wait(opt, grads):
    opt.step(grads)
    time.sleep(1)  # for a signal that is late


def test_a_launch_that_fails_is_one_error_and_nothing_happened(monkeypatch):
    opt, grads = RMSProp({"w": arrays(0)[0]}), {"w": arrays(1)[0]}
    opt.step(grads)
    before = everything(opt)
    with monkeypatch.context() as patch:
        patch.setattr(cuda, "THREADS", 4096)  # a block so large that no device takes it
        other = cupy.cuda.Stream()
        with other, pytest.raises(RuntimeError) as info:
            opt.step(grads)
    text = str(info.value)
    assert text.startswith('CUDA did not launch update_kernel[float32, plain] over 1 arrays (params["w"])')
    assert text.endswith("nothing was updated, the optimizer is usable as it was before the step")
    assert everything(opt) == before
    with other:
        opt._planner._plan.steps._streams = {}  # the calls with the impossible block are kept for this stream
        opt.step(grads)
    assert opt.steps == 2


def test_a_step_that_ends_between_two_launches_says_so_until_the_state_is_loaded():
    params = [cupy.ones(5, F4), cupy.ones(5, np.float64)]
    grads = [x.copy() for x in params]
    opt = RMSProp(params)
    opt.step(grads)
    saved, calls = opt.state_dict(), opt._planner._plan.steps._calls

    class Failing:
        kernel = calls[2].kernel

        def __call__(self):
            raise RuntimeError("CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES")

    working, calls[2] = calls[2], Failing()
    with pytest.raises(RuntimeError, match="1 of the step's 2 launches were made, the optimizer is between two steps"):
        opt.step(grads)
    calls[2] = working
    with pytest.raises(RuntimeError, match=r"float64.*between two steps; restore the parameters"):
        opt.step(grads)
    assert opt.steps == 1
    opt.load_state_dict(saved)
    opt.step(grads)
    assert opt.steps == 2
