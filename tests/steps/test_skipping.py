"""Steps skipped by found_inf or skip_nonfinite: no byte changes, and the next step is right."""

import math

import numpy as np
import pytest
from on_either import (
    BF,
    F4,
    F8,
    assert_same,
    copies,
    draw,
    everything,
    flat,
    mixed,
    mixed_grads,
    on,
    params_of,
    refusing,
)
from variants import bits

from rmsprop_gpu import RMSProp


def skipped_and_then_right(opt, twin, grads, again, **told):
    """A skipped step changes no byte, and the next one is right."""
    before, count, steps = everything(opt), opt.skipped_steps, opt.steps
    opt.step(grads, **told)
    assert everything(opt) == before
    assert (opt.skipped_steps, opt.steps) == (count + 1, steps + 1)
    for x in (opt, twin):
        x.step(again, found_inf=False)  # with the same kernels for both
    assert_same(opt, twin)
    assert opt.skipped_steps == count + 1
    assert everything(opt) != before


FOUND = [True, 1, 2.5, -1, np.True_, math.nan, math.inf, 1e-300, F4(1), 10**400]


def test_found_inf_skips_as_any_number_but_0(xp):
    opt, twin = (mixed(xp, 0) for _ in range(2))
    grads = on(xp, mixed_grads(1))
    for found in FOUND:
        skipped_and_then_right(opt, twin, grads, grads, found_inf=found)
    for found in (False, 0, 0.0, -0.0, np.False_):
        opt.step(grads, found_inf=found)
        twin.step(grads, found_inf=False)
    assert_same(opt, twin)
    assert (opt.skipped_steps, twin.skipped_steps) == (len(FOUND), 0)


KINDS = ["float32", "float64", "bool", "uint8", "int8", "int32", "int64"]


@pytest.mark.parametrize("kind", KINDS)
def test_found_inf_may_be_an_array_of_any_of_these(xp, kind):
    opt, twin = (RMSProp(copies(xp, draw(0, 300, 1))) for _ in range(2))
    grads, found = copies(xp, draw(1, 300, 1)), xp.zeros((1,), kind)
    values = {"float32": [1, np.nan, -np.inf, 1e-45], "float64": [1, np.nan, 1e-320], "bool": [True]}
    wide = {"int32": [1, -1, 256, 2**31 - 1], "int64": [1, 2**32, 2**62, -(2**63)]}
    for value in {**values, **wide}.get(kind, [1, 127]):
        found[...] = value
        skipped_and_then_right(opt, twin, grads, grads, found_inf=found)
    found[...] = 0
    opt.step(grads, found_inf=found)
    twin.step(grads)
    assert_same(opt, twin)


def test_neighbours_of_an_array_of_one_byte_are_not_read(xp):
    opt = RMSProp(xp.zeros(3, F4))
    flags = xp.array([1, 0, 1], np.uint8)
    opt.step(xp.ones(3, F4), found_inf=flags[1:2])
    assert opt.skipped_steps == 0
    opt.step(xp.ones(3, F4), found_inf=flags[2:])
    assert opt.skipped_steps == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_skip_nonfinite_finds_one_element_anywhere(xp, value):
    opt, twin = (mixed(xp, 0) for _ in range(2))
    right = mixed_grads(1)
    for k, grad in enumerate(flat(right)):
        for at in {0, grad.size // 2, grad.size - 1} if grad.size else ():
            wrong = flat(mixed_grads(1))
            wrong[k][at] = value
            groups = [wrong[:4], wrong[4:7], wrong[7:]]
            before, count = everything(opt), opt.skipped_steps
            opt.step(on(xp, groups), found_inf=False)
            assert everything(opt) == before
            assert opt.skipped_steps == count + 1
    for x in (opt, twin):
        x.step(on(xp, right), found_inf=False)
    assert_same(opt, twin)


def test_the_first_step_may_be_skipped(xp):
    """Counters, bias correction and averages start with the first step that is not skipped."""
    opt, twin = (mixed(xp, 0) for _ in range(2))
    grads = on(xp, mixed_grads(1))
    skipped_and_then_right(opt, twin, grads, grads, found_inf=True)
    assert int(opt.state[0]["step"]) == 1
    assert bits(opt.ema[2]) == bits(params_of(opt)[2])


def test_a_gradient_that_is_not_there_cannot_stop_a_step(xp):
    opt = RMSProp(copies(xp, draw(0, 30, 40)), skip_nonfinite=True)
    bad, good = xp.full(30, math.nan, F4), xp.ones(40, F4)
    opt.step([bad, good])
    opt.step([None, good])
    opt.step([None, None])
    assert (opt.skipped_steps, opt.steps) == (1, 3)
    assert [int(opt.state[i]["step"]) for i in (0, 1)] == [0, 1]


@pytest.mark.parametrize("scale", [0.0, -0.0, -2.0, math.nan, math.inf, -math.inf])
def test_a_scale_that_is_no_scale_is_as_a_gradient_that_is_not_finite(xp, scale):
    """As a number it is refused. In an array, skip_nonfinite sees it when the step runs."""
    opt = RMSProp(xp.array(draw(0, 30)[0]), skip_nonfinite=True)
    before = everything(opt)
    opt.step(xp.ones(30, F4), grad_scale=xp.full((), scale, F4))
    assert everything(opt) == before
    assert opt.skipped_steps == 1
    opt.step(xp.ones(30, F4), grad_scale=xp.full((), 2.0, F4))
    assert opt.skipped_steps == 1


@pytest.mark.parametrize("scale", [1e-40, 1e46, 1e-310])
@pytest.mark.parametrize("order", [1, -1])
def test_a_scale_that_one_dtype_cannot_hold_skips_the_step_for_all(xp, scale, order):
    """In float32 the reciprocal is infinite or 0, in float64 only for one of these scales. No step is half skipped."""
    dtypes = [F4, F8][::order]
    opt = RMSProp([xp.ones(30, T) for T in dtypes], skip_nonfinite=True)
    before, grads = everything(opt), [xp.full(30, 1e-9, T) for T in dtypes]
    opt.step(grads, grad_scale=xp.full((), scale, F8))
    assert everything(opt) == before
    assert opt.skipped_steps == 1
    alone = RMSProp(xp.ones(30, F8), skip_nonfinite=True)
    alone.step(xp.full(30, 1e-9, F8), grad_scale=xp.full((), scale, F8))
    assert alone.skipped_steps == (scale == 1e-310)


LARGE = {F4: 1e20, F8: 1e160}  # finite, but their squares are not


@pytest.mark.parametrize("dtype", [F4, F8])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_gradient_whose_square_is_too_large_skips_the_step_for_all(xp, dtype, sign):
    """Its square would stay infinite in the average, and the element would never move again."""
    opt = RMSProp([xp.ones(n, T) for n, T in ((30, F4), (9000, dtype), (30, F8))], skip_nonfinite=True)
    grads = [xp.ones(n, T) for n, T in ((30, F4), (9000, dtype), (30, F8))]
    before = everything(opt)
    for at in (0, 4095, 4096, 8999):
        grads[1][at] = sign * LARGE[dtype]
        opt.step(grads)
        assert everything(opt) == before
        grads[1][at] = 1
    assert opt.skipped_steps == 4
    opt.step(grads)
    assert opt.skipped_steps == 4


@pytest.mark.parametrize("dtype", [F4, F8])
def test_the_largest_gradient_that_is_taken(xp, dtype):
    """It is a few roundings below the square root of the largest number. From that root on, all are refused."""
    root = 2.0 ** (np.finfo(dtype).maxexp // 2)
    opt = RMSProp(xp.ones(300, dtype), skip_nonfinite=True)
    for below, skipped in ((1e-5 if dtype is F4 else 1e-13, 0), (0, 1)):
        opt.step(xp.full(300, root * (1 - below), dtype))
        assert opt.skipped_steps == skipped
        assert np.isfinite(np.frombuffer(everything(opt)[1][0]["square_avg"], dtype)).all()


HARMLESS = {
    "clipvalue": ({"clipvalue": 0.5}, {}),
    "clipnorm": ({"clipnorm": 0.5}, {}),
    "global_clipnorm": ({"global_clipnorm": 0.5}, {}),
    "grad_scale": ({}, {"grad_scale": 1e10}),
}


@pytest.mark.parametrize("dtype", [F4, BF])
@pytest.mark.parametrize("name", HARMLESS)
def test_what_clip_or_scale_make_harmless_is_no_reason_to_skip(xp, name, dtype):
    given, told = HARMLESS[name]
    opt = RMSProp([xp.ones(30, dtype), xp.ones(3, F8)], skip_nonfinite=True, **given)
    grads = [xp.full(30, 1e20, dtype), xp.ones(3, F8)]
    opt.step(grads, **told)
    assert opt.skipped_steps == 0
    assert np.isfinite(np.frombuffer(everything(opt)[1][0]["square_avg"], F4)).all()
    grads[0][3] = math.inf  # no clip makes this harmless
    opt.step(grads, **told)
    assert opt.skipped_steps == 1


@pytest.mark.parametrize("clip", ["clipvalue", "clipnorm"])
def test_only_the_clip_of_its_own_group_makes_a_gradient_harmless(xp, clip):
    """Each group is its own batch, and one takes no norm. They still decide alike."""
    groups = [{"params": [xp.ones(30, F4)]}, {"params": [xp.ones(30, F4)], clip: 0.5}]
    opt, good, large = RMSProp(groups, skip_nonfinite=True), xp.ones(30, F4), xp.full(30, 1e20, F4)

    def after(grads):
        opt.step(grads)
        return opt.skipped_steps, *(int(opt.state[i]["step"]) for i in range(2))

    assert after([[good], [large]]) == (0, 1, 1)
    assert after([[large], [good]]) == (1, 1, 1)
    opt.param_groups[1][clip] = 1e25
    assert after([[good], [large]]) == (2, 1, 1)


def test_a_grad_scale_may_make_a_square_too_large(xp):
    opt = RMSProp(xp.ones(30, F4), skip_nonfinite=True)
    opt.step(xp.full(30, 1e15, F4), grad_scale=xp.full((), 1e-6, F4))
    opt.step(xp.full(30, 1e15, F4))
    assert opt.skipped_steps == 1


def test_a_schedule_is_given_the_count_of_calls_skipped_ones_too(xp):
    asked = []
    opt = RMSProp(xp.zeros(3, F4), lr=lambda step: asked.append(step) or 0.1, skip_nonfinite=True)
    good, bad = xp.ones(3, F4), xp.full(3, math.inf, F4)
    for grad, found in ((good, False), (bad, False), (good, True), (good, False)):
        opt.step(grad, found_inf=found)
    assert asked == [0, 1, 2, 3]
    assert (opt.steps, opt.skipped_steps, int(opt.state[0]["step"])) == (4, 2, 2)


SHARED = {"global_clipnorm": (0.5, 1.5), "skip_nonfinite": (True, False)}


@pytest.mark.parametrize("name", SHARED)
def test_groups_cannot_differ_in_what_is_decided_for_the_step(xp, name):
    own = SHARED[name]
    arrays = copies(xp, [np.ones(3, F4), np.ones(4, F4)])
    groups = [{"params": [x], name: value} for x, value in zip(arrays, own, strict=True)]
    with pytest.raises(ValueError, match=f"the groups differ in {name}: .*wanted the same in all"):
        RMSProp(groups)
    opt = RMSProp([{"params": [x]} for x in arrays], **{name: own[0]})
    grads = [[xp.ones(3, F4)], [xp.ones(4, F4)]]
    opt.step(grads)
    opt.param_groups[0][name] = own[1]
    for _ in range(2):
        with refusing(opt, ValueError, f"the groups differ in {name}"):
            opt.step(grads)
    opt.lr = 0.5  # unrelated, so accepted
    assert opt.lr == 0.5
    opt.param_groups[1][name] = own[1]
    opt.step(grads)
    assert opt.steps == 2


def test_a_state_whose_groups_differ_in_it_is_not_loaded(xp):
    def make():
        return RMSProp([{"params": [xp.ones(3, F4)]}, {"params": [xp.ones(4, F4)]}], skip_nonfinite=True)

    opt, grads = make(), [[xp.ones(3, F4)], [xp.ones(4, F4)]]
    opt.step(grads)
    saved = opt.state_dict()
    saved["param_groups"][1]["skip_nonfinite"] = False
    twin = make()
    with refusing(twin, ValueError, "the groups differ in skip_nonfinite: [True, None]"):
        twin.load_state_dict(saved)
    twin.step(grads)
    assert_same(opt, twin)
