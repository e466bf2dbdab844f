"""opt.compile(): it compiles everything that a step needs, and does nothing else."""

import importlib

import ml_dtypes
import numpy as np
import pytest
from devices import MODULES
from on_either import assert_same, mixed, mixed_grads, on

from rmsprop_gpu import RMSProp
from rmsprop_gpu.kernels import compiling

ASKED = [{}, {"found_inf": False}, {"grad_scale": 2.0, "zero_grads": True}]

# In addition to what mixed() has: nothing, or all that examines gradients beforehand turned off.
GIVEN = {"all": {}, "plain": {"global_clipnorm": None, "skip_nonfinite": False, "use_ema": False}}


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("asked", ASKED, ids=lambda asked: "+".join(asked) or "plain")
@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
def test_a_step_after_it_compiles_nothing_and_is_the_same(module, asked, given, monkeypatch):
    xp = importlib.import_module(module)
    opt, twin = mixed(xp, 0, **given), mixed(xp, 0, **given)
    monkeypatch.setattr(compiling, "_compiled", {})
    opt.compile(**dict.fromkeys(asked, True))
    made = set(compiling._compiled)
    assert made
    assert_same(opt, twin)
    opt.step(on(xp, mixed_grads(1)), **asked)
    assert set(compiling._compiled) == made
    twin.step(on(xp, mixed_grads(1)), **asked)
    assert_same(opt, twin)


def test_it_asks_no_schedule_and_is_no_step():
    asked = []
    opt = RMSProp(np.ones(3), lr=lambda step: asked.append(step) or 0.1)
    opt.compile()
    opt.compile()
    assert (asked, opt.steps) == ([], 0)
    opt.step(np.ones(3))
    assert (asked, opt.steps) == ([0], 1)


def test_it_follows_what_was_assigned():
    opt, twin = RMSProp(np.ones(3)), RMSProp(np.ones(3))
    for x in (opt, twin):
        x.step(np.ones(3))
        x.param_groups[0]["momentum"] = 0.5
    opt.compile()
    for x in (opt, twin):
        x.step(np.ones(3))
    assert opt.state[0]["momentum_buffer"].tobytes() == twin.state[0]["momentum_buffer"].tobytes()


@pytest.mark.parametrize("name", ["grad_scale", "found_inf", "zero_grads"])
def test_what_is_no_switch_is_refused(name):
    with pytest.raises(TypeError, match=f"{name} is 2.0 \\(a float\\); wanted True or False"):
        RMSProp(np.ones(3)).compile(**{name: 2.0})


@pytest.mark.parametrize("module", MODULES)
def test_gradients_to_come_may_be_halves(module, monkeypatch):
    """For those parameters that may have them. Together with float32, any mixture is compiled."""
    xp = importlib.import_module(module)
    opt = RMSProp([xp.ones(3, dtype) for dtype in (np.float32, np.float32, np.float64, np.float16)])
    monkeypatch.setattr(compiling, "_compiled", {})
    opt.compile(grad_dtype="float16")
    one = set(compiling._compiled)
    opt.step([xp.ones(3, dtype) for dtype in (np.float16, np.float16, np.float64, np.float16)])
    assert set(compiling._compiled) == one
    opt.compile(grad_dtype=np.float32)
    both = set(compiling._compiled)
    assert both > one
    opt.compile(grad_dtype=np.float64)  # one parameter has float64, and the float32 ones cannot have such gradients
    assert set(compiling._compiled) == both
    opt.step([xp.ones(3, dtype) for dtype in (np.float16, np.float32, np.float64, np.float16)])
    assert set(compiling._compiled) == both


@pytest.mark.parametrize(
    "given", ["float", "int32", 3, np.dtype(">f2"), "nothing", {"w": "float16"}, ml_dtypes.bfloat16]
)
def test_what_is_no_dtype_of_its_gradients_is_refused(given):
    with pytest.raises(TypeError) as error:
        RMSProp([np.ones(3, np.float16)]).compile(grad_dtype=given)
    assert str(error.value) == f"grad_dtype is {given!r}; wanted float16"
    with pytest.raises(TypeError, match="wanted float32 or float16 or bfloat16 or float64"):
        RMSProp([np.ones(3, np.float32), np.ones(3)]).compile(grad_dtype="int32")
