"""Scaled and clipped gradients: they act like gradients multiplied beforehand in a plain optimizer.

Each test runs on the CPU and, through the fixture `xp`, on a device. Expected values come from NumPy and Python alone.
"""

import math
from fractions import Fraction

import numpy as np
import pytest
from norms_by_hand import norm_of
from on_either import ALL, CLIPPED, F2, F4, F8, assert_same, copies, draw, host, params_of, refusing

from rmsprop_gpu import AdaGrad, RMSProp
from rmsprop_gpu.arrays.dtypes import compute_dtype


def times(factor, grads):
    """Multiply as the rule does: the factor is rounded once to the compute dtype, and so is the product."""
    return [g if g is None else (compute_dtype(g.dtype).type(factor) * g).astype(g.dtype) for g in grads]


def shortened(most, norm):
    return 1.0 if norm <= most else most / norm


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_global_clipnorm_multiplies_every_gradient_by_one_factor(xp, scale):
    shapes = [300, 5000, 0, 1]
    clipped, plain = (RMSProp(copies(xp, draw(0, *shapes)), **h) for h in (CLIPPED, {}))
    most = float(F4(0.7))
    for step in range(3):
        grads = [g * F4((1e-5, 1.0, 1e3)[step]) for g in draw(step, *shapes)]
        norm = norm_of(grads) * (1 / scale)
        assert (norm > most) == (step > 0)
        clipped.step(copies(xp, grads), grad_scale=None if scale == 1 else scale)
        plain.step(copies(xp, times((1 / scale) * shortened(most, norm), grads)))
        assert clipped.last_grad_norm == norm
        assert_same(clipped, plain)


def test_clipnorm_shortens_each_tensor_by_itself(xp):
    shapes = [300, 5000, 0, 1]
    clipped, plain = RMSProp(copies(xp, draw(0, *shapes)), clipnorm=0.7), RMSProp(copies(xp, draw(0, *shapes)))
    most = float(F4(0.7))
    for step in range(3):
        grads = draw(step, *shapes)
        grads[0] = grads[0] * F4(1e-4)
        if step == 1:
            grads[1] = None
        clipped.step(copies(xp, grads))
        scaled = [None if g is None else times(shortened(most, norm_of([g])), [g])[0] for g in grads]
        assert (scaled[0] == grads[0]).all()
        plain.step(copies(xp, scaled))
        assert_same(clipped, plain)
        assert clipped.last_grad_norm == norm_of(grads)


def test_grad_scale_comes_before_clipvalue_and_the_sign(xp):
    given = {"clipvalue": 0.5, "maximize": True}
    scaled, plain = RMSProp(xp.array(draw(0, 300)[0]), **given), RMSProp(xp.array(draw(0, 300)[0]), clipvalue=0.5)
    for step in range(2):
        (grad,) = draw(step, 300)
        scaled.step(xp.array(grad), grad_scale=3.0)
        plain.step(xp.array(times(-(1 / 3.0), [grad])[0]))
        assert_same(scaled, plain)


@pytest.mark.parametrize("dtype", [F4, F8])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_grad_scale_may_be_an_array_and_is_read_when_the_step_runs(xp, dtype, shape):
    one, other = RMSProp(xp.array(draw(0, 300)[0])), RMSProp(xp.array(draw(0, 300)[0]))
    scale = xp.zeros(shape, dtype)
    for number in (3.0, 1.7, 1024.0):
        scale[...] = number
        (grad,) = draw(3, 300)
        one.step(xp.array(grad), grad_scale=scale)
        other.step(xp.array(grad), grad_scale=float(dtype(number)))
        assert_same(one, other)
    assert (one.skipped_steps, one.last_grad_norm) == (0, 0.0)  # no norm was taken


@pytest.mark.parametrize("number", [3, F4(3), F2(3), Fraction(3), np.int64(3)], ids=lambda x: type(x).__name__)
def test_any_number_is_a_grad_scale(number):
    one, other = RMSProp(draw(0, 30)[0]), RMSProp(draw(0, 30)[0])
    one.step(draw(1, 30)[0], grad_scale=number)
    other.step(draw(1, 30)[0], grad_scale=3.0)
    assert_same(one, other)


SCALED = {
    "plain": {},
    "clipnorm": {"clipnorm": 0.7},
    "global": CLIPPED,
    "all": ALL,
}


@pytest.mark.parametrize("k", [-9, 1, 9])
@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("dtype", [F4, F2])
def test_gradients_and_grad_scale_by_a_power_of_two_change_no_bit(xp, dtype, name, k):
    if dtype is not F4 and name != "all":
        pytest.skip("covered by the case with all of them")
    shapes = [300, 4100, 1]
    one, other = (RMSProp(copies(xp, draw(0, *shapes, dtype=dtype)), **SCALED[name]) for _ in range(2))
    scale = xp.full((), 2.0**k, F4)
    for step in range(2):
        grads = [np.round(g * dtype(1024)) / dtype(1024) for g in draw(step, *shapes, dtype=dtype)]  # no subnormals
        one.step(copies(xp, grads), found_inf=False)
        other.step(copies(xp, [(g * dtype(2.0**k)).astype(dtype) for g in grads]), grad_scale=(2.0**k, scale)[step])
        assert_same(one, other)
        assert one.last_grad_norm == other.last_grad_norm


def assert_multiplied(opt, grad, factor):
    """The gradient that the rule saw is the given one times this exact factor. With alpha 0, it is `grad_avg`.

    The factor and the product are rounded once each, by at most half an ulp or half the smallest subnormal.
    """
    got, f = host(opt.state[0]["grad_avg"]), np.finfo(grad.dtype)
    for x, y in zip(got.tolist(), grad.tolist(), strict=True):
        want = Fraction(y) * factor
        error = abs(Fraction(x) - want)
        assert error <= abs(want) * Fraction(1.01 * float(f.eps)) + Fraction(float(f.smallest_subnormal)) * Fraction(
            0.51
        )


TINY = {F4: [1e-3, 1e-20, 1e-30, 1e-38, 1e-42], F8: [1e-160, 1e-300, 1e-320]}


@pytest.mark.parametrize(("dtype", "clip"), [(T, clip) for T, clips in TINY.items() for clip in clips])
@pytest.mark.parametrize("name", ["clipnorm", "global_clipnorm"])
def test_a_factor_below_the_normal_numbers_is_as_exact_as_another(xp, dtype, clip, name):
    """Gradients with a norm of 1e40 or 1e153, most of them large, some far smaller."""
    grad = np.concatenate([draw(0, 300)[0], draw(1, 20)[0] * 1e-20]).astype(dtype)
    grad *= dtype(1e37 if dtype is F4 else 1e151)
    norm = norm_of([grad])
    opt = RMSProp(xp.zeros(grad.size, dtype), alpha=0.0, centered=True, **{name: clip})
    opt.step(xp.array(grad))
    assert opt.last_grad_norm == norm
    assert_multiplied(opt, grad, Fraction(float(dtype(clip))) / Fraction(norm))


@pytest.mark.parametrize("scale", [1e42, 1e44])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_grad_scale_with_a_reciprocal_below_the_normal_numbers(xp, scale, sign):
    grad = draw(0, 300)[0] * F4(1e36)
    opt = RMSProp(xp.zeros(300, F4), alpha=0.0, centered=True, maximize=sign < 0)
    opt.step(xp.array(grad), grad_scale=scale)
    assert_multiplied(opt, grad, sign / Fraction(scale))


@pytest.mark.parametrize("name", ["clipnorm", "global_clipnorm"])
def test_what_is_shortened_is_as_exact_whatever_it_was_scaled_by(xp, name):
    """Scaled alone, neither the norm nor the gradients would fit into float64."""
    grad = draw(0, 300, dtype=F8)[0] * 1e9
    opt = RMSProp(xp.zeros(300, F8), alpha=0.0, centered=True, **{name: 0.3})
    opt.step(xp.array(grad), grad_scale=3e-301)
    assert opt.last_grad_norm == math.inf
    assert_multiplied(opt, grad, Fraction(0.3) / Fraction(norm_of([grad])))


NOT_NUMBERS = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, -3e38], F4)


@pytest.mark.parametrize("clip", ["clipvalue", "clipnorm", "global_clipnorm"])
@pytest.mark.parametrize("odd", [NOT_NUMBERS[1:], NOT_NUMBERS], ids=["infinite", "nan"])
def test_clip_at_infinity_changes_no_bit(xp, clip, odd):
    clipped, free = (RMSProp(copies(xp, draw(0, 307, 20)), **h) for h in ({clip: math.inf}, {}))
    for step in range(2):
        grads = draw(step, 300, 20)
        grads[0] = np.concatenate([grads[0], odd, F4([1] * (7 - len(odd)))])
        clipped.step(copies(xp, grads))
        free.step(copies(xp, grads))
        assert_same(clipped, free)


@pytest.mark.parametrize("clip", ["clipnorm", "global_clipnorm"])
def test_a_gradient_without_a_norm_becomes_nan_where_it_is_clipped(xp, clip):
    grads = [F4([1, np.nan, 2]), F4([3, 4])]
    opt = RMSProp(copies(xp, [np.ones(3, F4), np.ones(2, F4)]), **{clip: 0.7})
    opt.step(copies(xp, grads))
    assert math.isnan(opt.last_grad_norm)
    assert np.isnan(host(params_of(opt)[0])).all()
    assert np.isnan(host(params_of(opt)[1])).all() == (clip == "global_clipnorm")


CLIPS = ["clipvalue", "clipnorm", "global_clipnorm"]


@pytest.mark.parametrize(("one", "other"), [(a, b) for a in CLIPS for b in CLIPS if a < b])
@pytest.mark.parametrize("make", [RMSProp, AdaGrad])
def test_two_clips_are_refused(make, one, other):
    with pytest.raises(ValueError, match=f"{one}=.* and {other}=|{other}=.* and {one}=") as error:
        make(np.ones(3), **{one: 1.0, other: math.inf})
    assert "wanted at most one of clipvalue, clipnorm, global_clipnorm" in str(error.value)
    opt = make(np.ones(3), **{one: 1.0})
    with refusing(opt, ValueError, "wanted at most one of"):
        opt.param_groups[0][other] = 1.0
    opt.param_groups[0].update({one: None, other: 1.0})


@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize("value", [-1, math.nan, "1", True, 1j, np.ones(1)], ids=repr)
def test_wrong_clips_are_refused(name, value):
    with pytest.raises((TypeError, ValueError), match=f"{name} is .*wanted None or a number >= 0"):
        RMSProp(np.ones(3), **{name: value})
    if isinstance(value, int):
        with pytest.raises(ValueError, match="which is 0 in float32"):
            RMSProp(np.ones(3, F4), **{name: 1e-60})
