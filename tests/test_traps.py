"""Traps that other libraries have fallen into, numbered as in the list of them (T1 to T9).

Each test runs on the CPU and, through the fixture `xp`, on a device.
"""

import math

import ml_dtypes
import numpy as np
import pytest
from on_either import AVERAGED, draw, everything, host, params_of
from variants import bits

from rmsprop_gpu import AdaGrad, RMSProp, reference

F4, F8, F2, BF = np.float32, np.float64, np.float16, ml_dtypes.bfloat16


# T1. Centered: on a constant gradient, rounding takes v - m^2 below 0, and its root is NaN. (On the CPU over 10,000
# steps in test_rule.py.)


def test_t1_centered_on_a_constant_gradient_never_yields_nan(xp):
    """Starts from the state that rounding leads to. torch, optax and Keras get there after some 250 steps."""
    grad = xp.asarray(np.linspace(0.5, 2, 257, dtype=F4))
    param = xp.zeros(257, F4)
    opt = RMSProp(param, lr=1e-3, alpha=0.85, centered=True)
    opt.state[0]["grad_avg"][...] = grad
    opt.state[0]["square_avg"][...] = grad * grad * F4(1 - 2.0**-20)
    for _ in range(3):
        opt.step(grad)
        state = opt.state[0]
        assert (host(state["square_avg"]).astype(F8) < host(state["grad_avg"]).astype(F8) ** 2).any()
        assert np.isfinite(host(param)).all()


# T2. Centered with bias correction: at the first step v / w = g^2 and m / w = g, and the variance is 0.


@pytest.mark.parametrize("eps_in_sqrt", [False, True])
def test_t2_the_first_step_of_centered_with_bias_correction_is_bounded(xp, eps_in_sqrt):
    """By lr / sqrt(alpha), apart from some eight roundings. Other libraries take steps of up to 1e8 lr."""
    param = xp.zeros(7, F4)
    given = {"centered": True, "bias_correction": True, "eps_in_sqrt": eps_in_sqrt, "eps": 1e-12}
    RMSProp(param, lr=0.1, alpha=0.9, **given).step(xp.asarray(F4([1e-3, 1, -1e3, 0.7, -0.3, 12, 1e-2])))
    went = np.abs(host(param))
    assert went.max() <= 0.1 / math.sqrt(0.9) * (1 + 8 * 2.0**-24)
    assert went.min() > 0.09


# T3. Half parameters: state in their dtype loses g^2 and eps, and 0 / 0 is NaN.


@pytest.mark.parametrize("dtype", [F2, BF])
def test_t3_a_half_without_a_gradient_stays_and_a_small_gradient_moves_it_by_its_step(xp, dtype):
    grad = np.array([0, -0.0, 1e-4, -1e-4, 3e-7], dtype)
    param = xp.asarray(np.ones(5, dtype))
    opt = RMSProp(param, lr=0.01, eps=1e-8)
    opt.step(xp.asarray(grad))
    got = host(param).astype(F8)
    want, _ = reference.rmsprop(np.ones(5), grad.astype(F8), lr=0.01, eps=1e-8)
    assert (got[:2] == 1).all()
    assert (np.abs(got - want) <= float(ml_dtypes.finfo(dtype).eps)).all()
    assert (got[2] < 1) & (got[3] > 1)
    assert host(opt.state[0]["square_avg"]).dtype == F4
    assert (host(opt.state[0]["square_avg"])[2:] > 0).all()


# T4. Weight decay that reaches the average of squares but not the weights.


HEAVY = {"momentum": 0.9, "centered": True}
MODES = [{}, {"clipvalue": 0.5}, {"clipnorm": 0.5}, {"global_clipnorm": 0.5}, HEAVY, {**HEAVY, "global_clipnorm": 0.5}]


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("dtype", [F4, F2])
@pytest.mark.parametrize("decoupled", [False, True], ids=["coupled", "decoupled"])
def test_t4_weight_decay_reaches_the_weights(xp, dtype, decoupled, mode):
    """Without a gradient only decay remains: towards 0, and in decoupled form further for larger weights.

    If only the averages saw it, no weight would move. In coupled form, each moves by at most lr / sqrt(1 - alpha).
    """
    if mode and (dtype is F2 or xp is not np):
        pytest.skip("halves compute like float32, and devices like the CPU (test_device_bits.py)")
    start = np.array([1, -1, 4, -4, 0], dtype)
    param = xp.array(start)
    given = {"lr": 0.1, "weight_decay": 0.5, "decoupled_weight_decay": decoupled, **mode}
    RMSProp(param, **given).step(xp.zeros(5, dtype))
    went = (host(param).astype(F8) - start.astype(F8)) * -np.sign(start).astype(F8)
    assert (went[:4] > 0.04).all()
    assert went[4] == 0
    oracle = {k: v for k, v in given.items() if not k.endswith("norm")}  # a norm of 0 is not clipped
    want, _ = reference.rmsprop(start.astype(F8), np.zeros(5), **oracle)
    ulp = float(np.finfo(dtype).eps)
    assert (np.abs(host(param) - want) <= 16 * ulp * (np.abs(start) + 1)).all()  # fewer than 16 roundings


@pytest.mark.parametrize("decoupled", [False, True])
def test_t4_weight_decay_reaches_the_weights_of_adagrad(xp, decoupled):
    param = xp.asarray(F4([1, -4]))
    AdaGrad(param, lr=0.1, weight_decay=0.5, decoupled_weight_decay=decoupled).step(xp.zeros(2, F4))
    want = [0.95, -3.8] if decoupled else [0.9, -3.9]
    np.testing.assert_allclose(host(param), want, rtol=1e-6)


def test_t4_a_clip_by_norm_is_of_the_gradient_and_not_of_the_decay(xp):
    """As in Keras and torch: coupled decay is added after clipping."""
    grad = F4([3, 4])
    param = xp.asarray(F4([100, 100]))
    opt = RMSProp(param, weight_decay=0.5, global_clipnorm=1.0)
    opt.step(xp.asarray(grad))
    assert opt.last_grad_norm == 5
    g = F4([0.6, 0.8]) + F4(50)
    np.testing.assert_allclose(host(opt.state[0]["square_avg"]), 0.1 * g.astype(F8) ** 2, rtol=1e-6)


# T5. A gradient dtype that one mode accepts and another refuses. (Bit-identity for every dtype: test_device_bits.py.)


@pytest.mark.parametrize("dtype", [F2, BF])
def test_t5_halves_take_all_at_once(xp, dtype):
    opt = RMSProp(xp.ones(5, dtype), global_clipnorm=1.0, skip_nonfinite=True, weight_decay=0.1, **AVERAGED)
    for _ in range(2):
        opt.step(xp.ones(5, dtype), grad_scale=2.0, zero_grads=True)
    assert int(opt.state[0]["step"]) == 2
    assert host(opt.ema[0]).dtype == F4


# T6. Switches that change, states that do not fit, and NaN that stays.


def test_t6_momentum_and_centered_may_be_switched_on_and_off(xp):
    opt = RMSProp(xp.array(draw(0, 30, dtype=F8)[0]), bias_correction=True)
    want, state = draw(0, 30, dtype=F8)[0], None
    switches = [{}, {"momentum": 0.9}, {"centered": True}, {"momentum": 0.0}, {"momentum": 0.5}, {"centered": False}]
    given = {"bias_correction": True}
    for step, change in enumerate(switches):
        opt.param_groups[0].update(change)
        given |= change
        (grad,) = draw(step, 30, dtype=F8)
        opt.step(xp.array(grad))
        want, state = reference.rmsprop(want, grad, state, lr=0.01, **given)
        np.testing.assert_allclose(host(params_of(opt)[0]), want, rtol=1e-12)


@pytest.mark.parametrize("name", ["square_avg", "grad_avg", "momentum_buffer", "ema", "bias_weight", "step"])
@pytest.mark.parametrize("wrong", ["shape", "dtype"])
def test_t6_a_state_of_the_wrong_shape_or_dtype_is_refused_when_it_is_loaded(xp, name, wrong):
    """Not at the next step, and without a cast: torch casts float32 state to halves."""
    opt = RMSProp({"w": xp.ones(3, F2)}, momentum=0.9, centered=True, **AVERAGED)
    saved, before = opt.state_dict(), everything(opt)
    x = saved["state"]["w"][name]
    saved["state"]["w"][name] = x.astype(F2) if wrong == "dtype" else xp.zeros((4, 1), x.dtype)
    with pytest.raises((TypeError, ValueError), match=rf'state\["w"\]\["{name}"\] has {wrong}'):
        opt.load_state_dict(saved)
    assert everything(opt) == before


@pytest.mark.parametrize("alpha", [1.5, 1, -0.1, math.nan])
def test_t6_an_alpha_that_is_no_average_is_refused(alpha):
    with pytest.raises(ValueError, match="wanted a number with 0 <= alpha < 1"):
        RMSProp(np.ones(3), alpha=alpha)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_t6_a_gradient_that_is_not_finite_cannot_poison_the_state(xp, value):
    opt, twin = (RMSProp(xp.ones(3, F4), skip_nonfinite=True) for _ in range(2))
    good, bad = xp.ones(3, F4), xp.asarray(F4([1, value, 1]))
    for grad in (good, bad, good):
        opt.step(grad)
    for grad in (good, good):
        twin.step(grad)
    assert everything(opt) == everything(twin)
    assert np.isfinite(host(opt.state[0]["square_avg"])).all()
    free = RMSProp(xp.ones(3, F4))
    free.step(bad)
    free.step(good)
    assert not np.isfinite(host(free.state[0]["square_avg"])[1])  # the bad gradient did poison the state


def test_t6_the_first_gradient_of_a_parameter_may_come_late(xp):
    """Its counter and bias correction start then: its first step equals a fresh optimizer's."""
    (late,) = draw(5, 30)
    opt, fresh = RMSProp([xp.ones(30, F4), xp.ones(30, F4)], **AVERAGED), RMSProp([xp.ones(30, F4)], **AVERAGED)
    for _ in range(4):
        opt.step([xp.ones(30, F4), None])
    assert int(opt.state[1]["step"]) == 0
    for step in range(2):
        opt.step([None, xp.array(late)])
        fresh.step([xp.array(late)])
        assert bits(params_of(opt)[1]) == bits(params_of(fresh)[0])
        assert int(opt.state[1]["step"]) == step + 1
    assert int(opt.state[0]["step"]) == 4


# T7. An average of the weights that continues while they stand still.


@pytest.mark.parametrize("how", ["found_inf", "skip_nonfinite", "None"])
def test_t7_the_average_stands_still_with_its_parameter(xp, how):
    opt = RMSProp(xp.ones(3, F4), lr=0.1, skip_nonfinite=True, ema_momentum=0.9, **AVERAGED)
    for _ in range(3):
        opt.step(xp.ones(3, F4), found_inf=False)
    before = bits(opt.ema[0])
    assert before != bits(params_of(opt)[0])
    for _ in range(3):
        opt.step(
            {"found_inf": xp.ones(3, F4), "skip_nonfinite": xp.full(3, math.nan, F4)}.get(how),
            found_inf=how == "found_inf",
        )
    assert bits(opt.ema[0]) == before
    assert opt.skipped_steps == (0 if how == "None" else 3)
    opt.step(xp.ones(3, F4), found_inf=False)
    assert bits(opt.ema[0]) != before


# T8. Buffers that nobody uses.


BUFFERS = {"momentum": (0.9, "momentum_buffer"), "centered": (True, "grad_avg"), "use_ema": (True, "ema")}


def test_t8_no_buffer_is_allocated_that_is_not_used(xp):
    counters = {"step", "bias_weight"}
    plain = RMSProp(xp.ones(1000, F4), nesterov=True, lr_in_momentum=True, clipnorm=1.0, ema_momentum=0.5)
    assert plain.state[0].keys() == counters | {"square_avg"}
    assert plain.state.nbytes == 4 * 1000 + 8 + 4
    for name, (value, buffer) in BUFFERS.items():
        opt = RMSProp(xp.ones(1000, F4), **{name: value})
        assert opt.state[0].keys() == counters | {"square_avg", buffer}
        assert opt.state.nbytes == plain.state.nbytes + 4000
    assert AdaGrad(xp.ones(3, F4)).state[0].keys() == {"step", "sum"}


# T9. Documentation that is wrong.


def test_t9_nesterov_is_nesterov(xp):
    """u = g / (sqrt(v) + eps), b = mu b + u. The step is mu b + u (optax's trace), not b."""
    params = [xp.array(draw(0, 30, dtype=F8)[0]) for _ in range(2)]
    opt, heavy = (RMSProp(p, lr=0.1, momentum=0.8, nesterov=n) for p, n in zip(params, (True, False), strict=True))
    p, v, b = draw(0, 30, dtype=F8)[0], 0.0, 0.0
    for step in range(4):
        (g,) = draw(step, 30, dtype=F8)
        v = 0.9 * v + 0.1 * g**2
        u = g / (np.sqrt(v) + 1e-8)
        b = 0.8 * b + u
        p = p - 0.1 * (0.8 * b + u)
        opt.step(xp.array(g))
        heavy.step(xp.array(g))
        np.testing.assert_allclose(host(params[0]), p, rtol=1e-12)
    assert np.abs(host(params[0]) - host(params[1])).min() > 1e-3


@pytest.mark.parametrize("make", [RMSProp, AdaGrad])
def test_t9_a_default_is_what_the_docstring_and_the_group_say(make):
    h = make(np.ones(1)).param_groups[0].hyper()
    assert (h["use_ema"], h["ema_momentum"], h["skip_nonfinite"]) == (False, 0.99, False)
    assert (h["clipvalue"], h["clipnorm"], h["global_clipnorm"]) == (None, None, None)
    assert h["lr"] == 0.01
    for name in h:
        assert name in make.__doc__
