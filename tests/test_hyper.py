"""Hyperparameters: accepted values, refusals and their messages. A refused assignment changes nothing."""

import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from on_host import assert_same, one, refused

from rmsprop_gpu import AdaGrad, RMSProp, hyper
from rmsprop_gpu.kernels.rule import Variant

NUMBERS = ["lr", "alpha", "eps", "weight_decay", "momentum", "initial_scale", "clipvalue"]
FLAGS = [
    "centered",
    "nesterov",
    "eps_in_sqrt",
    "lr_in_momentum",
    "bias_correction",
    "decoupled_weight_decay",
    "maximize",
    "skip_nonfinite",
    "use_ema",
    "store_param_remainders",
    "bf16_stochastic_round",
]
CLIPS = ["clipvalue", "clipnorm", "global_clipnorm"]

NO_NUMBERS = [
    *("0.1", b"0.1", "", True, np.True_, 0.5j, np.complex64(0.5), np.array(0.5j)),
    *([0.5], (0.5,), np.array([0.5]), np.ones((2, 2)), {"lr": 0.5}, {0.5}, ...),
    *(np.array("0.5"), np.array(True), np.array(None), np.ma.masked, np.timedelta64(3, "ns")),
]
NO_FLAGS = [0, 1, 1.0, "yes", "", None, [], np.array(True), np.int64(1)]

NEVER = [-1e-9, -1, -math.inf, math.nan, np.float32("nan"), Fraction(-1, 3), np.float64(-1), -(10**400)]
NEVER += [np.array(-1.0), Decimal("-0.1"), Decimal("NaN"), Decimal("sNaN")]
INFINITE = [math.inf, np.float32("inf"), 10**400, Fraction(10**400, 3), np.array(math.inf), Decimal("1e999")]
OUT_OF_RANGE = {
    "lr": [*NEVER, *INFINITE],
    "alpha": [*NEVER, *INFINITE, 1, 1.0, np.float32(1), Fraction(10**30 - 1, 10**30), 1.1],
    "eps": [*NEVER, *INFINITE],
    "weight_decay": [*NEVER, *INFINITE],
    "momentum": [*NEVER, *INFINITE, np.nextafter(1, 2), 2],
    "initial_scale": [*NEVER, *INFINITE],
    "ema_momentum": [*NEVER, *INFINITE, np.nextafter(1, 2), 2],
    **dict.fromkeys(CLIPS, NEVER),
}


def each(names, values, kind):
    return [pytest.param(name, value, kind, id=f"{name}={value!r:.24}") for name in names for value in values]


WRONG = [
    *each(NUMBERS, NO_NUMBERS, TypeError),
    *each(sorted({*NUMBERS} - {"weight_decay", *CLIPS}), [None], TypeError),
    *each(FLAGS, NO_FLAGS, TypeError),
    *(case for name, values in OUT_OF_RANGE.items() for case in each([name], values, ValueError)),
    *each(["square_avg_dtype"], ["uint32", "float16", np.float16, 16, None, ""], ValueError),
    *each(["seed"], ["1", 0.0, True, None, [0]], TypeError),
    *each(["seed"], [-1, 2**64], ValueError),
]


@pytest.mark.parametrize(("name", "value", "kind"), WRONG)
def test_wrong_value_is_refused_everywhere(name, value, kind):
    """By the constructor, in a group, and by every kind of assignment. The error names argument, found and wanted."""
    param = one(1)
    texts = [f"{name} is {value!r}", "wanted"]
    with refused(kind, *texts, of=[param]):
        RMSProp(param, **{name: value})
    with refused(kind, *texts, of=[param]):
        RMSProp([{"params": one(2)}, {"params": param, name: value}])
    opt = RMSProp(param, centered=True, momentum=0.5)
    group = opt.param_groups[0]
    with refused(kind, *texts, of=[opt]):
        group[name] = value
    with refused(kind, *texts, of=[opt]):
        group.update({"alpha": 0.5, "lr": 0.5, name: value})
    if name == "lr":
        with refused(kind, *texts, of=[opt]):
            opt.lr = value


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("lr", "x", TypeError),
        ("alpha", 2, ValueError),
        ("eps", 1e-60, ValueError),
        ("clipnorm", -1.0, ValueError),
    ],
)
def test_wrong_value_in_a_group_names_the_group(name, value, kind):
    param = one(1)
    with refused(kind, "params[1]", name, of=[param]):
        RMSProp([{"params": one(2)}, {"params": param, name: value}])


@pytest.mark.parametrize("name", hyper.ADAGRAD)
def test_adagrad_refuses_the_same(name):
    same = "square_avg_dtype" if name == "sum_dtype" else name
    value, kind = next((value, kind) for n, value, kind in (case.values for case in WRONG) if n == same)
    param = one(1)
    with refused(kind, name, of=[param]):
        AdaGrad(param, **{name: value})


@pytest.mark.parametrize("value", [10**5000, -(10**5000)], ids=["positive", "negative"])
def test_integer_too_long_to_be_written_is_refused_in_words(value):
    with refused(ValueError, "lr is", "wanted a finite number >= 0", of=[]):
        RMSProp(one(1), lr=value)


@pytest.mark.parametrize("name", ["alpha", "momentum", "centered", "nesterov", "lr_in_momentum", "bias_correction"])
def test_adagrad_has_no_averages(name):
    with pytest.raises(TypeError, match=name):
        AdaGrad(one(1), **{name: 0})
    with pytest.raises(TypeError, match=rf"params\[0\] has '{name}', which .* wanted hyperparameters among lr, eps"):
        AdaGrad([{"params": one(1), name: 0}])


@pytest.mark.parametrize(
    ("name", "value", "want"),
    [
        ("lr", 0, 0.0),
        ("lr", 2**70, 2.0**70),
        ("lr", np.float32(0.1), float(np.float32(0.1))),
        ("lr", np.float16(0.5), 0.5),
        ("lr", np.longdouble("0.25"), 0.25),
        ("lr", np.int8(3), 3.0),
        ("lr", Fraction(1, 4), 0.25),
        ("lr", Decimal("0.1"), 0.1),
        ("lr", np.array(0.25), 0.25),
        ("lr", np.array(3, np.uint8), 3.0),
        ("lr", np.array(0.5, np.float16), 0.5),
        ("lr", np.array(Decimal("0.1")), 0.1),
        ("alpha", np.array(0.5, np.float32), 0.5),
        ("momentum", Decimal(1), 1.0),
        ("clipvalue", Decimal("1e400"), math.inf),
        ("alpha", 0, 0.0),
        ("alpha", np.float64(0.99), 0.99),
        ("eps", 0, 0.0),
        ("momentum", 1, 1.0),
        ("momentum", np.float64(1), 1.0),
        ("weight_decay", None, 0.0),
        ("weight_decay", -0.0, 0.0),
        ("initial_scale", np.int64(2), 2.0),
        ("clipvalue", None, None),
        ("clipvalue", 0, 0.0),
        ("clipvalue", math.inf, math.inf),
        ("clipvalue", 10**400, math.inf),
        ("centered", np.True_, True),
        ("skip_nonfinite", np.True_, True),
        ("clipnorm", None, None),
        ("clipnorm", math.inf, math.inf),
        ("global_clipnorm", 0, 0.0),
        ("ema_momentum", 1, 1.0),
    ],
)
def test_accepted_value_becomes_a_plain_number(name, value, want):
    built = RMSProp(one(1), **{name: value}).param_groups[0]
    assigned = RMSProp(one(1)).param_groups[0]
    if name != "initial_scale":
        assigned[name] = value
        assert assigned[name] == want
        assert type(assigned[name]) is type(want)
    assert built[name] == want
    assert type(built[name]) is type(want)


# Numbers that change their meaning when rounded

ROUNDED = [
    ("eps", 1e-46, "eps is 1e-46, which is 0 in float32"),
    ("alpha", 1 - 1e-9, "alpha is 0.999999999, which is 1 in float32"),
    ("lr", 1e39, "lr is 1e+39, which is infinite in float32"),
    ("weight_decay", 1e39, "weight_decay is 1e+39, which is infinite in float32"),
    ("initial_scale", 1e39, "initial_scale is 1e+39, which is infinite in float32"),
]


@pytest.mark.parametrize(("name", "value", "text"), ROUNDED)
def test_number_that_float32_cannot_hold_is_for_float64_alone(name, value, text):
    param, other = one(1), one(1, np.float64)
    RMSProp(other, **{name: value})
    with refused(ValueError, text, "wanted", of=[param, other]):
        RMSProp([other, param], **{name: value})
    if name == "initial_scale":
        return
    opt = RMSProp([{"params": other}, {"params": param}])
    opt.param_groups[0][name] = value
    with refused(ValueError, text, of=[opt]):
        opt.param_groups[1][name] = value


@pytest.mark.parametrize(
    ("name", "value"), [("eps", 1e-45), ("alpha", 1 - 2**-24), ("lr", 3.4e38), ("clipvalue", 1e39), ("lr", 1e-60)]
)
def test_number_that_float32_can_just_hold(name, value):
    assert RMSProp(one(1), **{name: value}).param_groups[0][name] == value


def test_eps_too_small_for_float64_is_not_0():
    with refused(ValueError, "eps is", of=[]):
        RMSProp(one(1, np.float64), eps=Fraction(1, 10**400))


def test_lr_times_decay_that_overflows_names_an_argument():
    with refused(ValueError, "weight_decay", "float32", of=[]):
        RMSProp(one(1), lr=1e20, weight_decay=1e20, decoupled_weight_decay=True)


# Assignments


def two_groups():
    """Only the second group cannot hold all float64 values."""
    opt = RMSProp([{"params": one(1, np.float64)}, {"params": one(2), "momentum": 0.5}])
    opt.step([one(3, np.float64), one(4)])
    return opt


@pytest.mark.parametrize(
    "assign",
    [
        lambda opt: setattr(opt, "lr", 1e39),
        lambda opt: setattr(opt, "lr", -1),
        lambda opt: opt.param_groups[1].update(lr=0.5, alpha=2),
        lambda opt: opt.param_groups[1].update({"lr": 0.5, "nonsense": 2}),
        lambda opt: opt.param_groups[1].update([("momentum", 0.0), ("centered", 1)]),
        lambda opt: opt.param_groups[1].update(lr=0.5, eps=1e-60),
        lambda opt: opt.param_groups[1].update(lr=0.5, clipnorm=1.0, clipvalue=1.0),
        lambda opt: opt.param_groups[1].update(lr=0.5, initial_scale=1.0),
        lambda opt: opt.param_groups[1].update(lr=0.5, params=[one(1)]),
        lambda opt: opt.param_groups[1].update({1: 2}),
        lambda opt: opt.param_groups[1].pop("momentum"),
        lambda opt: opt.param_groups[1].popitem(),
        lambda opt: opt.param_groups[1].clear(),
    ],
)
def test_refused_assignment_leaves_the_optimizer_as_it_was(assign):
    opt, twin = two_groups(), two_groups()
    grads = [one(5, np.float64), one(6)]
    before = [group.hyper() for group in opt.param_groups]
    with pytest.raises((ValueError, TypeError, KeyError)):
        assign(opt)
    assert [group.hyper() for group in opt.param_groups] == before
    opt.step(grads)
    twin.step(grads)
    assert_same(opt, twin)


def test_update_takes_all_forms_and_all_values():
    opt = RMSProp(one(1))
    group = opt.param_groups[0]
    group.update({"lr": 1}, momentum=0.5)
    group.update([("alpha", 0.5), ("lr", 2)])
    group.update(initial_scale=0.0)  # its current value
    assert (group["lr"], group["momentum"], group["alpha"], opt.lr) == (2.0, 0.5, 0.5, 2.0)


def test_group_reads_as_a_mapping():
    param = one(1)
    group = RMSProp(param, lr=0.5).param_groups[0]
    assert list(group) == ["params", *hyper.RMSPROP]
    assert len(group) == len(hyper.RMSPROP) + 1
    assert dict(group)["params"][0] is param
    assert group.get("nonsense", 3) == 3
    assert "lr" in group
    assert "'lr': 0.5" in repr(group)
    with pytest.raises(KeyError, match="nonsense"):
        group["nonsense"]


@pytest.mark.parametrize("name", ["nonsense", "params", 7])
def test_key_that_cannot_be_assigned_names_those_that_can(name):
    opt = RMSProp(one(1))
    with refused(KeyError, repr(name), "lr, alpha, eps", of=[opt]):
        opt.param_groups[0][name] = 1


def test_what_has_no_effect_is_off_so_that_it_shares_its_kernel():
    def variant(**given):
        return hyper.variant(RMSProp(np.zeros(1), **given).param_groups[0].hyper(), adagrad=False)

    assert variant(nesterov=True, lr_in_momentum=True, decoupled_weight_decay=True, clipvalue=0) == Variant()
    assert variant(weight_decay=None, clipvalue=None, alpha=0, lr=0) == Variant()
    assert variant(eps=0, eps_in_sqrt=True) == Variant(eps=False)
    assert variant(weight_decay=1, decoupled_weight_decay=True) == Variant(decoupled_weight_decay=True)
