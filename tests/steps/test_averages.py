"""Averages of the parameters: when they start, their values after each step, and how to reach them."""

import math

import numpy as np
import pytest
from on_either import AVERAGED, DTYPES, F2, F4, F8, copies, draw, host, params_of
from variants import bits

from rmsprop_gpu import RMSProp


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_average_with_momentum_0_is_the_parameter(xp, dtype):
    if xp is not np and dtype is not F4:
        pytest.skip("a device is bit-identical to the CPU (test_device_bits.py)")
    params = copies(xp, draw(0, 300, 4100, 0, dtype=dtype))
    opt = RMSProp(params, **AVERAGED, ema_momentum=0.0)
    for step in range(3):
        opt.step(copies(xp, draw(step, 300, 4100, 0, dtype=dtype)))
        for i, p in enumerate(params):
            assert bits(host(opt.ema[i]).astype(dtype)) == bits(p)  # for halves, it averages the rounded values


@pytest.mark.parametrize("dtype", [F4, F8])
def test_the_average_is_that_of_the_parameters_and_the_first_step_sets_it(xp, dtype):
    """Each step rounds a product and an fma by half an ulp each, of terms no larger than the largest |p| so far."""
    param = xp.array(draw(0, 300, dtype=dtype)[0])
    opt = RMSProp(param, **AVERAGED, ema_momentum=0.87, lr=0.3)
    assert bits(opt.ema[0]) == bits(param)
    mu, rest = (float(dtype(x)) for x in (0.87, 1 - 0.87))
    u, want, largest = float(np.finfo(dtype).eps), None, np.zeros(300)
    for step in range(6):
        opt.step(xp.array(draw(step, 300, dtype=dtype)[0]))
        p = host(param).astype(F8)
        want = p if want is None else mu * want + rest * p
        largest = np.maximum(largest, np.abs(p))
        assert (np.abs(host(opt.ema[0]) - want) <= (step + 1) * 2 * u * largest).all()
        assert step or bits(opt.ema[0]) == bits(param)
    assert np.abs(want - p).max() > 0.1


def test_the_first_step_sets_the_average_whatever_stood_there(xp):
    """Parameters may get their values after the optimizer is built, and memory that was never written may hold NaNs."""
    param = xp.full(300, np.nan, F4)
    opt = RMSProp(param, **AVERAGED, ema_momentum=0.87)
    param[...] = xp.array(draw(0, 300)[0])
    opt.step(xp.array(draw(1, 300)[0]))
    assert bits(opt.ema[0]) == bits(param)
    opt.step(xp.array(draw(2, 300)[0]))
    assert np.isfinite(host(opt.ema[0])).all()


def test_an_average_begins_with_the_first_gradient_of_its_parameter(xp):
    params = copies(xp, draw(0, 30, 40))
    opt = RMSProp(params, **AVERAGED, ema_momentum=0.87)
    first, late = copies(xp, draw(1, 30, 40))
    for _ in range(3):
        opt.step([first, None])
    assert bits(opt.ema[1]) == bits(params[1])
    opt.step([None, late])
    assert bits(opt.ema[1]) == bits(params[1])
    before = bits(opt.ema[0])
    opt.step([None, late])
    assert bits(opt.ema[1]) != bits(params[1])
    assert bits(opt.ema[0]) == before


def test_an_average_that_is_switched_on_later_starts_from_the_parameter(xp):
    opt, twin = (RMSProp({"w": xp.array(draw(0, 300)[0])}, lr=0.3, bias_correction=True) for _ in range(2))
    (w,) = params_of(opt)
    for step in range(2):
        opt.step({"w": xp.array(draw(step, 300)[0])})
        twin.step({"w": xp.array(draw(step, 300)[0])})
    assert (list(opt.ema), len(opt.ema)) == ([], 0)
    opt.param_groups[0].update(use_ema=True, ema_momentum=0.5)
    before = host(w).copy()
    opt.step({"w": xp.array(draw(7, 300)[0])})
    twin.step({"w": xp.array(draw(7, 300)[0])})
    assert bits(w) == bits(params_of(twin)[0])
    assert bits(opt.ema["w"]) == bits(F4(0.5) * before + F4(0.5) * host(w))  # exact products, so one rounding each
    kept = bits(opt.ema["w"])
    opt.param_groups[0]["use_ema"] = False
    opt.step({"w": xp.array(draw(8, 300)[0])})
    assert bits(opt.ema["w"]) == kept


def test_averages_go_by_name_and_are_the_state_itself(xp):
    groups = [{"params": {"a": xp.zeros((2, 3), F2)}, "use_ema": True}, {"params": {"b": xp.zeros(3, F4)}}]
    opt = RMSProp(groups)
    assert (list(opt.ema), len(opt.ema), repr(opt.ema)) == (["a"], 1, "<averages of 1 parameters>")
    average = opt.ema["a"]
    assert (average.shape, average.dtype) == ((2, 3), F4)
    average[...] = 7
    assert (host(opt.state[0]["ema"]) == 7).all()
    with pytest.raises(KeyError, match="'b' has no average; wanted a parameter of a group with use_ema=True"):
        opt.ema["b"]
    with pytest.raises(KeyError, match="2 parameters"):
        opt.ema["c"]
    assert "ema" not in opt.state["b"]


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, None, "1", False])
def test_wrong_momentum_of_the_average_is_refused(value):
    with pytest.raises((TypeError, ValueError), match=r"ema_momentum is .*wanted a number with 0 <= ema_momentum <= 1"):
        RMSProp(np.ones(3), use_ema=True, ema_momentum=value)
    for name in ("use_ema", "skip_nonfinite"):
        with pytest.raises(TypeError, match=f"{name} is 1 .*wanted True or False"):
            RMSProp(np.ones(3), **{name: 1})
