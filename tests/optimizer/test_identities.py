"""Identities: signs, scales and switches that leave the result bit-identical."""

import math

import numpy as np
import pytest
from on_host import assert_same, assert_same_bits, one

from rmsprop_gpu import AdaGrad, RMSProp


def follow(steps, *pairs):
    """Step each optimizer with the same gradients, changed by its function."""
    for step in range(steps):
        for opt, change in pairs:
            opt.step(change(one(step)))


def same(grad):
    return grad


def test_adagrad_takes_the_sign_of_a_single_gradient():
    """sqrt(g * g) is exactly |g|, as long as g * g neither overflows nor underflows."""
    param, grad = np.ones(33, np.float32), one(1)
    AdaGrad(param, lr=0.25, eps=0).step(grad)
    assert_same_bits(param, 1 - np.float32(0.25) * np.sign(grad))


def test_first_step_with_bias_correction_takes_the_sign_too():
    """v / w is g^2. Roundings: (1 - alpha) g^2, g, 1 / w, w, one multiplication, a root, a quotient, one fma."""
    param, grad = np.zeros(33), one(1, np.float64)
    RMSProp(param, lr=1.0, eps=0, alpha=0.99, bias_correction=True).step(grad)
    np.testing.assert_allclose(param, -np.sign(grad), rtol=8 * 2**-53, atol=0)


def test_constant_gradient_with_bias_correction_moves_by_lr():
    """All averages of a constant are that constant. 20 steps add up at most 20 times that error."""
    param, grad = np.zeros(33), one(1, np.float64)
    opt = RMSProp(param, lr=0.25, eps=0, bias_correction=True)
    for _ in range(20):
        opt.step(grad)
    np.testing.assert_allclose(param, -5 * np.sign(grad), rtol=20 * 8 * 2**-53, atol=0)


def test_momentum_of_0_is_no_momentum_whatever_goes_with_it():
    plain, twin = RMSProp(one(9)), RMSProp(one(9), momentum=0, nesterov=True, lr_in_momentum=True)
    follow(3, (plain, same), (twin, same))
    assert_same(plain, twin)
    assert "momentum_buffer" not in twin.state[0]


@pytest.mark.parametrize("given", [{}, {"momentum": 0.9, "centered": True, "weight_decay": 0.1}], ids=str)
def test_maximize_is_the_negated_gradient(given):
    up, down = RMSProp(one(9), maximize=True, **given), RMSProp(one(9), **given)
    follow(3, (up, same), (down, np.negative))
    assert_same(up, down)


def test_clip_at_infinity_changes_no_bit():
    odd = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, -3e38], np.float32)
    clipped, free = RMSProp(one(9, size=40), clipvalue=math.inf), RMSProp(one(9, size=40))
    follow(2, *((opt, lambda grad: np.concatenate([grad, odd])) for opt in (clipped, free)))
    assert np.isnan(free.param_groups[0]["params"][0]).any()
    assert_same(clipped, free)


def test_clip_is_that_of_the_gradient():
    inside, before = RMSProp(one(9), clipvalue=0.5, momentum=0.5), RMSProp(one(9), momentum=0.5)
    follow(3, (inside, same), (before, lambda grad: np.clip(grad, np.float32(-0.5), np.float32(0.5))))
    assert_same(inside, before)


@pytest.mark.parametrize("k", [-10, 3, 12])
@pytest.mark.parametrize(
    "given", [{"eps": 0}, {"eps": 2.0**-10}, {"eps": 2.0**-10, "momentum": 0.9, "centered": True}], ids=str
)
def test_gradient_and_eps_scaled_by_a_power_of_two(given, k):
    scale = np.float32(2**k)
    plain, scaled = RMSProp(one(9), **given), RMSProp(one(9), **{**given, "eps": given["eps"] * 2.0**k})
    follow(3, (plain, same), (scaled, lambda grad: grad * scale))
    assert_same_bits(plain.param_groups[0]["params"][0], scaled.param_groups[0]["params"][0])
    assert_same_bits(plain.state[0]["square_avg"] * scale**2, scaled.state[0]["square_avg"])


@pytest.mark.parametrize("k", [-10, 3])
def test_parameter_and_lr_scaled_by_a_power_of_two(k):
    scale = np.float32(2**k)
    plain = RMSProp(one(9), lr=0.3, momentum=0.9, weight_decay=0.25)
    scaled = RMSProp(one(9) * scale, lr=0.3 * 2.0**k, momentum=0.9, weight_decay=0.25 / 2.0**k)
    follow(3, (plain, same), (scaled, same))
    assert_same_bits(plain.param_groups[0]["params"][0] * scale, scaled.param_groups[0]["params"][0])


def test_lr_of_0_moves_the_state_alone():
    opt, twin = RMSProp(one(9), lr=0, momentum=0.5), RMSProp(one(9), lr=1, momentum=0.5)
    follow(2, (opt, same), (twin, same))
    assert_same_bits(opt.param_groups[0]["params"][0], one(9))
    assert_same_bits(opt.state[0]["momentum_buffer"], twin.state[0]["momentum_buffer"])
