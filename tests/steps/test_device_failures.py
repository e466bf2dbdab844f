"""Steps on a device that fail or are interrupted: they are done, not done, or reported as half done."""

import ctypes
import functools
import signal
import time

import numpy as np
import pytest
from on_device import arrays, everything
from processes import start

from rmsprop_gpu import RMSProp
from rmsprop_gpu.kernels import cuda

pytestmark = pytest.mark.gpu
cupy = pytest.importorskip("cupy", exc_type=ImportError)
F4 = np.float32


@pytest.fixture
def ctrl_c(answers_ctrl_c):
    """A function that sends the signal of Ctrl-C."""
    return functools.partial(getattr(ctypes.CDLL(None), "raise"), signal.SIGINT)


def test_ctrl_c_cannot_leave_a_step_half_done(ctrl_c):
    """The signal comes between two launches and takes effect after the last."""
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
    time.sleep(1)  # the signal may arrive late


def test_a_launch_that_fails_is_one_error_and_nothing_happened(monkeypatch):
    opt, grads = RMSProp({"w": arrays(0)[0]}), {"w": arrays(1)[0]}
    opt.step(grads)
    before = everything(opt)
    with monkeypatch.context() as patch:
        patch.setattr(cuda, "THREADS", 4096)  # too many threads for any device
        other = cupy.cuda.Stream()
        with other, pytest.raises(RuntimeError) as info:
            opt.step(grads)
    text = str(info.value)
    assert text.startswith('CUDA did not launch update_kernel[float32, plain] over 1 arrays (params["w"])')
    assert text.endswith("nothing was updated, and the optimizer can still be used")
    assert everything(opt) == before
    with other:
        # drop the calls with the impossible block, which are kept for this stream
        opt._planner._plan.steps._streams = {}
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


CLOSED = """
import cupy, numba.cuda, numpy as np, os, sys
from rmsprop_gpu import RMSProp
def says(opt, grad):
    try:
        opt.step(grad)
        cupy.cuda.get_current_stream().synchronize()
    except Exception as error:
        print(str(error).replace("\\n", " "))
arrays = cupy.ones((2, 5000), np.float32)
opt = RMSProp(arrays[0])
opt.step(arrays[1])
numba.cuda.close()
{then}
sys.stdout.flush()
os._exit(0)  # whatever is unloaded at the end is gone
"""
SAME = "for _ in range(2): says(opt, arrays[1])"
ANEW = """
try:
    cupy.get_default_memory_pool().free_all_blocks()
    arrays = cupy.asarray(np.ones((2, 5000), np.float32))  # without a kernel of CuPy's, which is gone too
    opt = RMSProp(arrays[0])
except RuntimeError as error:
    print(error)  # CuPy cannot go on either, and says so in its own words
else:
    says(opt, arrays[1])
"""


@pytest.mark.parametrize("then", [SAME, ANEW], ids=["same", "anew"])
def test_after_a_reset_no_error_promises_that_the_optimizer_is_usable(then):
    """The launch may fail because of the kernel, the memory or later launches."""
    process = start(CLOSED.format(then=then))
    out, complaints = process.communicate(timeout=120)  # includes those of the device
    assert process.returncode == 0, complaints
    said = out.splitlines()
    assert not [line for line in said if "usable" in line]
    if then is SAME:
        assert len(said) == 2
        assert "the device was reset (numba.cuda.close() does that)" in said[0] or "illegal" in said[0].lower()
