"""The threads that will update a state are the first to write to it, so that its pages are on their NUMA nodes."""

import sys

import numpy as np
import pytest
from processes import run

from rmsprop_gpu import RMSProp
from rmsprop_gpu.kernels import cpu_drive, cpu_touch
from rmsprop_gpu.state import buffers

# Page faults per thread, with two threads, during some work with an optimizer over 4 Mi elements.
FAULTS = """
import glob
import numpy as np
from rmsprop_gpu import RMSProp
N = 4 << 20
PAGES = 4 * N // 4096
def faults():
    found = {}
    for path in glob.glob("/proc/self/task/*/stat"):
        with open(path) as file:
            found[path] = int(file.read().rsplit(")", 1)[1].split()[7])
    return found
def during(call):
    before = faults()
    result = call()
    after = faults()
    return result, sorted((after[path] - before.get(path, 0) for path in after), reverse=True)
param, grad = np.ones(N, np.float32), np.ones(N, np.float32)
small, one = np.ones(1 << 18, np.float32), np.ones(1 << 18, np.float32)
ready = RMSProp(small, initial_scale=1.0, use_ema=True)  # all that is compiled or loaded is there
ready.step(one)
ready.load_state_dict(ready.state_dict())
"""
PLAIN = """
opt, made = during(lambda: RMSProp(param))
_, (most, other, *_) = during(lambda: opt.step(grad))
print(sum(made) / PAGES, other / PAGES)
"""
FILLED = """
_, (most, other, *_) = during(lambda: RMSProp(param, **HYPER))
print(most / PAGES, other / PAGES)
"""
LOADED = """
saved = RMSProp(param).state_dict()
opt = RMSProp(param)
_, (most, other, *_) = during(lambda: opt.load_state_dict(saved))
print(other / PAGES)
"""

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts page faults per thread with /proc")


def shares_of(code, hyper="{}"):
    """What a program prints. Pages have 4 KiB, so that they can be counted."""
    printed = run(f"HYPER = {hyper}\n{FAULTS}{code}", NUMBA_NUM_THREADS="2", NUMPY_MADVISE_HUGEPAGE="0")
    return [float(word) for word in printed.split()]


@linux
def test_a_state_of_zeros_is_touched_by_its_steps():
    made, other = shares_of(PLAIN)
    assert made < 0.05  # nothing has touched them before
    assert other > 0.45  # each page is read and written, half of them by the other thread


@linux
@pytest.mark.parametrize("hyper", ["dict(initial_scale=1.0)", "dict(use_ema=True)"])
def test_a_state_that_is_filled_is_touched_by_both_before(hyper):
    for share in shares_of(FILLED, hyper):
        assert 0.45 < share < 0.6


@linux
def test_a_state_that_is_loaded_is_touched_by_both_before():
    (other,) = shares_of(LOADED)
    assert 0.45 < other < 0.6


@pytest.mark.parametrize("hyper", [{"initial_scale": 1.0}, {"use_ema": True}, {"initial_scale": 0.5, "momentum": 0.9}])
def test_it_is_touched_by_the_shares_of_a_step(hyper, monkeypatch):
    """In the order of the batches, which differs from that of the parameters."""
    asked, shares = [], cpu_drive.shares
    monkeypatch.setattr(cpu_drive, "shares", lambda sizes, *a: asked.append((sizes.tolist(), *a)) or shares(sizes, *a))
    monkeypatch.setattr(cpu_drive, "get_num_threads", lambda: 2)
    params = [np.ones(80_000, np.float32), np.ones(90_000), np.ones(0, np.float32), np.ones(11_111, np.float32)]
    opt = RMSProp(params, **hyper)
    touched = asked.pop()
    assert not asked
    opt.step([np.ones_like(p) for p in params])
    assert asked[-1] == touched == ([80_000, 0, 11_111, 90_000], 2, cpu_drive.UNIT)


@pytest.mark.parametrize("hyper", [{"initial_scale": 2.0}, {"initial_scale": 2.0, "momentum": 0.5, "centered": True}])
def test_a_touch_writes_nowhere_else(hyper, monkeypatch):
    params = [np.asfortranarray(np.full((400, 300), 3.0)), np.full(40_000, 3.0, np.float32), np.ones((), np.float32)]
    opt = RMSProp(params, **hyper)
    for i, param in enumerate(params):
        assert (param == param.flat[0]).all()
        state = opt.state[i]
        assert (state["square_avg"] == 2).all()
        assert all((state[name] == 0).all() for name in state if name != "square_avg")


@pytest.mark.parametrize("itemsize", [4, 8])
@pytest.mark.parametrize("offset", [0, 3, 700])
def test_every_page_is_written_to_once_and_no_byte_beyond(itemsize, offset, monkeypatch):
    monkeypatch.setattr(cpu_drive, "SERIAL_BELOW", 0)
    memory = np.full(100_000, 7, np.uint8)
    base = memory.ctypes.data
    start = offset * itemsize
    size = (90_000 - start) // itemsize
    cpu_touch.touch([5, size, 9], [(0, 0), (base + start, itemsize), (0, 0)])
    zeros = (memory == 0).nonzero()[0]
    assert (zeros >= start).all()
    assert (zeros < start + size * itemsize).all()
    assert set((base + zeros) // cpu_touch.PAGE) == set(
        range((base + start) // cpu_touch.PAGE, (base + start + size * itemsize - 1) // cpu_touch.PAGE + 1)
    )


def test_a_state_that_steps_have_made_is_loaded_without_a_touch(monkeypatch):
    """Its pages are already in place, and an interrupt must not find zeros in it."""
    param = np.ones(200_000, np.float32)
    opt = RMSProp(param)
    saved, touched = opt.state_dict(), []
    monkeypatch.setattr(buffers, "touch", lambda *_: touched.append(1))
    opt.load_state_dict(saved)
    assert touched == [1]
    opt.step(param.copy())
    opt.load_state_dict(opt.state_dict())
    assert touched == [1]
