"""The learning rate: a number or a schedule, for one group or several."""

import math

import numpy as np
import pytest
from on_host import assert_same, assert_same_bits, one, random, refused

from rmsprop_gpu import RMSProp


def test_schedule_is_asked_once_a_step_and_not_before():
    asked = []

    def schedule(step):
        asked.append(step)
        return 0.1

    opt = RMSProp(one(1), lr=schedule)
    repr(opt), opt.state_dict(), opt.lr
    assert asked == []
    for _ in range(3):
        opt.step(one(2))
        repr(opt), opt.state_dict()
    assert asked == [0, 1, 2]


def test_groups_that_share_a_schedule_ask_it_once_a_step_together():
    rates = iter([0.5, 0.25, 7.0, 7.0])  # a schedule may be stateful
    opt = RMSProp([{"params": one(1)}, {"params": one(1)}], lr=lambda step: next(rates))
    for _ in range(2):
        opt.step([one(2), one(2)])
    assert next(rates) == 7.0
    assert_same_bits(opt.param_groups[0]["params"][0], opt.param_groups[1]["params"][0])


def test_schedule_equals_assigning_its_values():
    opt, twin = RMSProp(one(1), lr=lambda step: 0.1 / (1 + step), momentum=0.5), RMSProp(one(1), momentum=0.5)
    for step in range(4):
        twin.lr = 0.1 / (1 + step)
        opt.step(one(step))
        twin.step(one(step))
        assert_same(opt, twin)


def by_optimizer(opt, rate):
    opt.lr = rate


def by_group(opt, rate):
    for group in opt.param_groups:
        group["lr"] = rate


def by_schedule(opt, rate):
    opt.lr = lambda step: rate


@pytest.mark.parametrize("assign", [by_optimizer, by_group, by_schedule])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize(
    "also", [{}, {"weight_decay": 0.3, "decoupled_weight_decay": True}], ids=["plain", "decoupled"]
)
def test_rate_that_changes_alone_is_the_number_that_a_change_of_all_would_write(assign, dtype, also):
    """It is rounded once, even if NumPy is set to raise on underflow: float32 halfway cases, subnormals, 0."""
    halfway = 1 + 2.0**-24
    rates = [0.1, np.float64(0.3), halfway, np.nextafter(halfway, 2), 1e-40, 1e-60, 5e-324, 0.0, -0.0, 1, 1e30]

    def groups():
        return [{"params": one(1, dtype)}, {"params": one(2, dtype), "weight_decay": 0.7}]

    opt, twin = RMSProp(groups(), **also), RMSProp(groups(), **also)
    for step, rate in enumerate(rates):
        grads = [one(step, dtype), one(step + 50, dtype)]
        with np.errstate(all="raise"):
            assign(opt, rate)
            for group in twin.param_groups:
                group.update(lr=rate, eps=1e-8)
            for x in (opt, opt, twin, twin):
                x.step(grads)
        for group, other in zip(opt.param_groups, twin.param_groups, strict=True):
            assert_same_bits(group["params"][0], other["params"][0])


INFINITE = pytest.mark.parametrize(
    ("rate", "decay", "said"),
    [(1e39, 0.0, "lr is 1e+39, which is infinite in float32"), (1e30, 1e20, "lr * weight_decay is 1e+50")],
)


@INFINITE
@pytest.mark.parametrize("assign", [by_optimizer, by_group])
def test_rate_that_is_infinite_in_the_arithmetic_is_refused_where_it_is_assigned(assign, rate, decay, said):
    opt = RMSProp(one(1), weight_decay=decay, decoupled_weight_decay=True, lr=0.0)
    opt.step(one(2))
    with refused(ValueError, said, of=[opt]):
        assign(opt, rate)


@INFINITE
def test_rate_of_a_schedule_that_is_infinite_in_the_arithmetic_is_refused(rate, decay, said):
    opt = RMSProp(one(1), weight_decay=decay, decoupled_weight_decay=True, lr=lambda step: rate if step else 0.0)
    opt.step(one(2))
    with refused(ValueError, said, of=[opt]):
        opt.step(one(2))


def test_rate_of_float64_may_be_beyond_float32():
    opt, twin = RMSProp(one(1, np.float64)), RMSProp(one(1, np.float64), lr=1e39)
    for _ in range(3):
        opt.lr = 1e39
        opt.step(one(2, np.float64))
        twin.step(one(2, np.float64))
    assert_same(opt, twin)


def test_schedule_that_assigns_other_numbers_leaves_its_own_step_alone():
    def schedule(step):
        opt.param_groups[0]["weight_decay"] = 0.25 * (step + 1)
        opt.param_groups[1]["lr"] = 0.5 * (step + 1)
        return 0.125

    given = {"weight_decay": 0.5, "decoupled_weight_decay": True}
    opt, twin = (RMSProp([{"params": one(1)}, {"params": one(2), "lr": 0.5}], **given) for _ in range(2))
    opt.param_groups[0]["lr"] = schedule
    for step in range(4):
        twin.param_groups[0].update(lr=0.125, weight_decay=0.25 * step if step else 0.5)
        twin.param_groups[1].update(lr=0.5 * step if step else 0.5)
        for x in (opt, twin):
            x.step([one(3), one(4)])
        for group, other in zip(opt.param_groups, twin.param_groups, strict=True):
            assert_same_bits(group["params"][0], other["params"][0])


@pytest.mark.parametrize(
    ("rate", "kind", "text"),
    [
        (math.nan, ValueError, "lr(1): lr is nan"),
        (math.inf, ValueError, "lr(1): lr is inf"),
        (-0.1, ValueError, "lr(1): lr is -0.1"),
        (1e300, ValueError, "lr is 1e+300, which is infinite in float32"),
        ("0.1", TypeError, "lr(1): lr is '0.1' (a str)"),
        (None, TypeError, "lr(1): lr is None"),
        (True, TypeError, "lr(1): lr is True"),
        (1j, TypeError, "lr(1): lr is 1j"),
        (np.array([0.1]), TypeError, "lr(1): lr is array([0.1])"),
        (np.array(-0.5), ValueError, "lr(1): lr is array(-0.5)"),
        (ZeroDivisionError("mine"), ZeroDivisionError, "mine"),
    ],
    ids=repr,
)
def test_schedule_that_goes_wrong_is_refused_and_asked_again(rate, kind, text):
    answers = {1: rate}

    def schedule(step):
        answer = answers.get(step, 0.1)
        if isinstance(answer, Exception):
            raise answer
        return answer

    params = [*random(1, 5, 6), one(1, np.float64, 7)]
    opt, twin = (RMSProp([p.copy() for p in params], lr=lr) for lr in (schedule, lambda step: 0.1))
    grads = [*random(2, 5, 6), one(2, np.float64, 7)]
    opt.step(grads)
    with refused(kind, text, of=[opt]):
        opt.step(grads)
    answers.clear()
    opt.step(grads)
    twin.step(grads)
    twin.step(grads)
    assert opt.steps == 2
    assert_same(opt, twin)


def test_number_and_schedule_replace_each_other():
    opt, twin = RMSProp(one(1), lr=0.1), RMSProp(one(1), lr=0.1)
    for step, rate in enumerate([0.1, lambda step: 0.2, 0.3, lambda step: 0.4 + step]):
        opt.lr = rate
        twin.lr = rate(step) if callable(rate) else rate
        assert opt.lr is rate
        opt.step(one(step))
        twin.step(one(step))
    assert_same(opt, twin)


def test_lr_that_the_schedule_itself_assigns_counts_at_the_next_step():
    def last(step):
        opt.lr = 0.25
        return 0.5

    opt, twin = RMSProp(one(1), lr=last), RMSProp(one(1), lr=0.5)
    for rate in (0.5, 0.25, 0.25):
        twin.lr = rate
        opt.step(one(2))
        twin.step(one(2))
    assert_same(opt, twin)


def test_lr_of_groups_that_differ():
    opt = RMSProp([{"params": one(1), "lr": 0.5}, {"params": one(2)}], lr=0.25)
    with refused(ValueError, "[0.5, 0.25]", 'param_groups[i]["lr"]', of=[opt]):
        opt.lr  # noqa: B018  # a property that raises
    opt.lr = 0.125
    assert [group["lr"] for group in opt.param_groups] == [0.125, 0.125]
    assert opt.lr == 0.125
