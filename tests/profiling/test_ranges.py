"""NVTX ranges around what is measured and around the steps of a training loop."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from rmsprop_gpu import RMSProp
from rmsprop_gpu.extras import MissingExtraError
from rmsprop_gpu.profiling import annotate, profile

F4 = np.float32


@pytest.fixture
def ranges(monkeypatch):
    """The names of the NVTX ranges, in the order in which they are entered."""
    entered = []

    class Range:
        def __init__(self, name):
            self.name = name

        def __enter__(self):
            entered.append(self.name)

        def __exit__(self, *_):
            entered.append("end")

    monkeypatch.setitem(sys.modules, "nvtx", SimpleNamespace(annotate=Range))
    return entered


def test_measured_steps_and_launches_are_ranges(ranges):
    profile(RMSProp(np.ones(3, F4)), np.ones(3, F4), repeats=2)
    assert ranges.count("RMSProp.step") >= 2
    assert "update_kernel[float32, plain]" in ranges


def test_steps_of_a_training_loop_are_ranges(ranges):
    opt, grad = RMSProp(np.ones(3)), np.ones(3)
    with annotate(opt):
        opt.step(grad)
        with annotate(opt):
            opt.step(grads=grad)
        opt.step(grad)
    assert ranges == ["RMSProp.step", "end", *["RMSProp.step"] * 2, *["end"] * 2, "RMSProp.step", "end"]
    opt.step(grad)
    assert (len(ranges), opt.steps) == (8, 4)
    with pytest.raises(ZeroDivisionError), annotate(opt):
        raise ZeroDivisionError
    assert "step" not in vars(opt)


def test_without_nvtx_a_profile_is_as_good(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvtx", None)
    assert profile(RMSProp(np.ones(3)), np.ones(3), repeats=1).launches
    with (
        pytest.raises(MissingExtraError, match=r'the extra profile: .*pip install .*\[profile\]"$'),
        annotate(RMSProp(np.ones(3))),
    ):
        pass
