"""Steps: schedules, hyperparameters that change, several groups at once, and that a step is all or nothing."""

import copy
import math
import pickle

import numpy as np
import pytest
from on_host import assert_same, assert_same_bits, one, random, refused

from rmsprop_gpu import AdaGrad, RMSProp, reference
from rmsprop_gpu.steps.plan import Plan

# lr


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
    rates = iter([0.5, 0.25, 7.0, 7.0])  # a schedule may have a state of its own
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


# Hyperparameters that change, next to the oracle

CHANGES = [
    {},
    {"lr": 0.02},  # numbers alone: the kernels stay
    {"alpha": 0.8, "eps": 1e-6},
    {"momentum": 0.9},
    {"centered": True},
    {"bias_correction": True},
    {"eps_in_sqrt": True, "eps": 1e-4},
    {"eps": 0},
    {"weight_decay": 0.1, "momentum": 0.0},
    {"decoupled_weight_decay": True, "alpha": 0.5},
    {"momentum": 0.5, "lr_in_momentum": True, "lr": 3e-3},
    {"nesterov": True, "maximize": True},
    {"clipvalue": 0.75, "centered": False, "eps": 1e-8, "bias_correction": False},
    {"clipvalue": None, "lr_in_momentum": False, "nesterov": False, "eps_in_sqrt": False},
    {"centered": True, "bias_correction": True, "weight_decay": 0.0},
]


def run_beside(make, oracle, start, changes):
    """Three steps after each change, by the optimizer and by the oracle; both must have moved alike.

    A step has some 20 roundings, of 1.1e-16 relative each, and an error in v is remembered for 1 / (1 - alpha) = 10
    steps: 1e-13 of the way that an element went is three times the worst case. A wrong rule is off by 1e-6 and more.
    """
    param = one(1, np.float64)
    want, first, way, state, given = param.copy(), param.copy(), np.zeros_like(param), {}, {"lr": 0.01, **start}
    opt = make(param, **start)
    for i, change in enumerate(changes):
        opt.param_groups[0].update(change)
        given |= change
        for j in range(3):
            grad = np.random.default_rng([i, j]).standard_normal(param.shape)
            opt.step(grad)
            moved, state = oracle(want, grad, state, **given)
            way += np.abs(moved - want)
            want = moved
            error = np.abs((param - first) - (want - first))
            assert (error <= 1e-13 * way + 4e-16 * np.abs(want)).all(), f"after {change}, step {j}"
    for name in opt.state[0].keys() - {"step"}:
        np.testing.assert_allclose(opt.state[0][name], state[name], rtol=1e-13, atol=1e-14)


def test_any_hyperparameter_may_change_between_steps():
    run_beside(RMSProp, reference.rmsprop, {}, CHANGES)


def test_hyperparameters_of_adagrad_may_change_too():
    changes = [
        {},
        {"lr": 0.5},
        {"weight_decay": 0.2},
        {"decoupled_weight_decay": True, "eps_in_sqrt": True, "eps": 0.1},
    ]
    run_beside(AdaGrad, reference.adagrad, {"initial_scale": 0.1}, changes)


def test_state_starts_from_initial_scale():
    assert (RMSProp(one(1), initial_scale=0.5).state[0]["square_avg"] == 0.5).all()
    run_beside(RMSProp, reference.rmsprop, {"initial_scale": 0.5, "momentum": 0.9}, [{}])


def test_buffer_appears_when_it_is_needed_and_stays():
    opt = RMSProp({"a": one(1), "b": one(2, np.float64)})
    plain = {"step", "bias_weight", "square_avg"}
    assert opt.state["a"].keys() == plain
    for name, value, buffer in [("momentum", 0.9, "momentum_buffer"), ("centered", True, "grad_avg")]:
        opt.param_groups[0][name] = value
        opt.step({"a": one(3), "b": one(4, np.float64)})
        for key in "ab":
            kept = opt.state[key][buffer]
            assert kept.any()
            assert (kept.dtype, kept.shape) == (opt.state[key]["square_avg"].dtype, (33,))
        opt.param_groups[0][name] = type(value)(0)
        before = opt.state["a"][buffer].copy()
        opt.step({"a": one(3), "b": one(4, np.float64)})
        assert_same_bits(opt.state["a"][buffer], before)
    assert opt.state["a"].keys() == plain | {"momentum_buffer", "grad_avg"}


# Several groups and dtypes at once


def test_groups_with_other_variants_and_dtypes_equal_an_optimizer_each():
    """They go through one launch whose order is not that of the parameters."""
    overrides = [{"lr": 0.1}, {"momentum": 0.9}, {"lr": 0.2, "momentum": 0.0}, {"eps": 0}]
    dtypes = [[np.float32, np.float64], [np.float64, np.float32, np.float32], [np.float32], [np.float32, np.float64]]
    params = [[one(i, dtype, 5 + i) for i, dtype in enumerate(row)] for row in dtypes]
    together = RMSProp([{"params": [p.copy() for p in row], **h} for row, h in zip(params, overrides, strict=True)])
    alone = [[RMSProp(p, **h) for p in row] for row, h in zip(params, overrides, strict=True)]
    for step in range(3):
        grads = [[one([step, i, j], p.dtype, p.size) for j, p in enumerate(row)] for i, row in enumerate(params)]
        grads[1][1] = grads[1][1][::-1]  # copied before it is used
        grads[2][0] = None if step == 1 else grads[2][0]
        together.step(grads)
        for row, row_grads in zip(alone, grads, strict=True):
            for opt, grad in zip(row, row_grads, strict=True):
                opt.step(grad)
    flat = [opt for row in alone for opt in row]
    for i, opt in enumerate(flat):
        for name, buffer in opt.state[0].items():
            assert_same_bits(together.state[i][name], buffer)
    got = [p for group in together.param_groups for p in group["params"]]
    for p, q in zip(got, [p for row in params for p in row], strict=True):
        assert_same_bits(p, q)
    assert together.steps == 3


def test_steps_counts_calls_and_state_counts_gradients():
    opt = RMSProp({"a": np.zeros(0, np.float32), "b": np.zeros((), np.float32), "c": one(1)})
    assert opt.steps == 0
    for grad in (one(2), None, one(3)):
        opt.step({"a": np.zeros(0, np.float32), "b": np.ones((), np.float32), "c": grad})
    opt.step({"a": None, "b": None, "c": None})
    assert opt.steps == 4
    assert [int(opt.state[key]["step"]) for key in "abc"] == [3, 3, 2]
    assert opt.state["c"]["step"].dtype == np.int64
    with pytest.raises(AttributeError):
        opt.steps = 0


# All or nothing


def three_groups():
    """Groups of two dtypes and two Variants, one step done; and an optimizer of each parameter's copy beside it."""

    def make():
        a, b, c, d = *random(1, 4, 5), one(2, np.float64, 6), one(3, np.float32, 7)
        opt = RMSProp([{"params": {"a": a, "b": b}}, {"params": c}, {"params": [d], "momentum": 0.5}])
        opt.step(right_grads())
        return opt

    return make(), make()


def right_grads():
    a, b, d = random(4, 4, 5, 7)
    return [{"a": a, "b": b}, one(5, np.float64, 6), [d]]


def last(value):
    """The right gradients, but for the last."""
    return lambda opt: [*right_grads()[:2], [value(opt) if callable(value) else value]]


F4 = np.dtype(np.float32)
WRONG_STEPS = {
    "shape": (last(np.zeros(8, F4)), ValueError, ["grads[2][0] has shape (8,)", "(7,)"]),
    "no shape": (last(np.zeros((), F4)), ValueError, ["grads[2][0] has shape ()"]),
    "column": (last(np.zeros((7, 1), F4)), ValueError, ["grads[2][0] has shape (7, 1)"]),
    "float64": (last(np.zeros(7)), TypeError, ["grads[2][0] has dtype float64", "float32"]),
    "float16": (last(np.zeros(7, np.float16)), TypeError, ["grads[2][0] has dtype float16"]),
    "int": (last(np.zeros(7, int)), TypeError, ["grads[2][0] has dtype int64"]),
    "object": (last(np.zeros(7, object)), TypeError, ["grads[2][0] has dtype object"]),
    "byte order": (last(np.zeros(7, F4.newbyteorder())), TypeError, ["grads[2][0] has dtype float32 of foreign byte"]),
    "list": (last([0.0] * 7), TypeError, ["grads[2][0] is a list"]),
    "number": (last(0.0), TypeError, ["grads[2][0] is a float"]),
    "text": (last("0" * 7), TypeError, ["grads[2][0] is a str"]),
    "masked": (last(np.ma.zeros(7, F4)), TypeError, ["grads[2][0] is a masked array"]),
    "parameter": (
        last(lambda opt: opt.param_groups[2]["params"][0]),
        ValueError,
        ["grads[2][0] overlaps params[2][0]"],
    ),
    "state": (
        last(lambda opt: opt.state[3]["momentum_buffer"][::-1]),
        ValueError,
        ["grads[2][0] overlaps", "momentum_buffer"],
    ),
    "state of a neighbour": (
        lambda opt: [{"a": np.zeros(4, F4), "b": opt.state["b"]["square_avg"]}, None, [None]],
        ValueError,
        ['grads[0]["b"] overlaps', "square_avg"],
    ),
    "first and last": (
        lambda opt: [{"a": np.zeros(9, F4), "b": None}, np.zeros(6, F4), [np.zeros(9, F4)]],
        TypeError,
        ["3 problems", 'grads[0]["a"] has shape', "grads[1] has dtype", "grads[2][0] has shape"],
    ),
    "missing name": (lambda opt: [{"a": None}, None, [None]], ValueError, ['grads[0]["b"] is missing']),
    "missing group": (lambda opt: right_grads()[:2], ValueError, ["grads has 2 entries; wanted 3"]),
    "extra": (lambda opt: [*right_grads()[:2], [None, None]], ValueError, ["grads[2] has 2 entries; wanted 1"]),
    "nothing": (lambda opt: None, TypeError, ["grads is"]),
}


@pytest.mark.parametrize("case", WRONG_STEPS)
def test_wrong_step_changes_nothing_and_the_next_is_right(case):
    make, kind, texts = WRONG_STEPS[case]
    opt, twin = three_groups()
    for _ in range(2):  # what the first refusal remembers must not let the second pass
        grads = make(opt)
        with refused(kind, *texts, of=[opt]):
            opt.step(grads)
    opt.step(right_grads())
    twin.step(right_grads())
    assert_same(opt, twin)


def test_parameter_that_became_read_only_stops_all_groups():
    opt, twin = three_groups()
    param = opt.param_groups[2]["params"][0]
    param.flags.writeable = False
    with refused(ValueError, "params[2][0] has become read-only", of=[opt]):
        opt.step(right_grads())
    param.flags.writeable = True
    opt.step(right_grads())
    twin.step(right_grads())
    assert_same(opt, twin)


def test_refused_step_after_a_change_of_hyperparameters():
    opt, twin = three_groups()
    for o in (opt, twin):
        o.param_groups[0]["momentum"] = 0.5
        o.param_groups[1]["lr"] = 0.3
    params = [p for group in opt.param_groups for p in group["params"]]
    with refused(ValueError, "grads[2][0] has shape (8,)", of=params):
        opt.step(last(np.zeros(8, F4))(opt))
    assert opt.steps == 1
    opt.step(right_grads())
    twin.step(right_grads())
    assert_same(opt, twin)


def test_refused_construction_leaves_the_parameters():
    params = [one(1), one(2)]
    with refused(ValueError, "lr is -1", of=params):
        RMSProp(params, lr=-1, initial_scale=3)
    with refused(TypeError, "params[2] has dtype int64", of=params):
        RMSProp([*params, np.zeros(3, int)])


# What must come out the same


def follow(steps, *pairs):
    """Step each (optimizer, change of the gradient) with the same gradients."""
    for step in range(steps):
        for opt, change in pairs:
            opt.step(change(one(step)))


def same(grad):
    return grad


def test_adagrad_takes_the_sign_of_a_single_gradient():
    """sqrt(g * g) is |g| to the last bit, where g * g neither overflows nor underflows."""
    param, grad = np.ones(33, np.float32), one(1)
    AdaGrad(param, lr=0.25, eps=0).step(grad)
    assert_same_bits(param, 1 - np.float32(0.25) * np.sign(grad))


def test_first_step_with_bias_correction_takes_the_sign_too():
    """v / w is g^2: the products (1 - alpha) g^2, g, and 1 / w, w, one multiplication, a root, a quotient, one fma."""
    param, grad = np.zeros(33), one(1, np.float64)
    RMSProp(param, lr=1.0, eps=0, alpha=0.99, bias_correction=True).step(grad)
    np.testing.assert_allclose(param, -np.sign(grad), rtol=8 * 2**-53, atol=0)


def test_constant_gradient_with_bias_correction_moves_by_lr():
    """All averages of a constant are that constant; 20 steps add up no more than 20 times that error."""
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


# What it says and what it refuses to be


def test_repr():
    def warm_up(step):
        return 0.1

    opt = RMSProp(
        [
            {"params": {"w": np.zeros((1000, 2), np.float32), "b": np.zeros(2)}, "momentum": 0.9},
            {"params": np.zeros(1), "lr": warm_up, "eps": 0, "centered": True},
        ]
    )
    opt.step([{"w": None, "b": None}, None])
    state = 2 * 8000 + 12 + 2 * 16 + 16 + 2 * 8 + 16  # buffers, then step and bias_weight
    assert repr(opt).splitlines() == [
        f"RMSProp(3 tensors, 2,003 parameters of float32, float64 on the cpu, {state:,} bytes of state, 1 step)",
        "  group 0: 2 tensors, 2,002 parameters: lr=0.01, alpha=0.9, eps=1e-08, momentum=0.9",
        f"  group 1: 1 tensor, 1 parameter: lr={warm_up.__qualname__}, alpha=0.9, eps=0.0, centered=True",
    ]
    assert repr(AdaGrad(np.zeros(3), clipvalue=2)).splitlines() == [
        "AdaGrad(1 tensor, 3 parameters of float64 on the cpu, 32 bytes of state, 0 steps)",
        "  group 0: 1 tensor, 3 parameters: lr=0.01, eps=1e-10, clipvalue=2.0",
    ]


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
@pytest.mark.parametrize("make", [RMSProp, AdaGrad])
def test_copies_and_pickles_are_refused(make, duplicate):
    opt = make(one(1))
    with refused(TypeError, make.__name__, "state_dict()", of=[opt]):
        duplicate(opt)


def test_hyperparameters_are_not_attributes_but_lr():
    opt = RMSProp(one(1))
    with refused(AttributeError, "'momentum'", "param_groups[i]['momentum']", of=[opt]):
        opt.momentum = 0.9
    opt.lr = 0.5
    assert opt.param_groups[0]["lr"] == 0.5


def test_assignment_survives_a_step_that_was_cut_off(monkeypatch):
    param = one(1)
    opt = RMSProp(param, lr=0.5)
    opt.step(one(2))
    before = param.copy()
    opt.lr = 0.0
    write = Plan.write_scalars
    monkeypatch.setattr(Plan, "write_scalars", raise_interrupt)
    with pytest.raises(KeyboardInterrupt):
        opt.step(one(2))
    monkeypatch.setattr(Plan, "write_scalars", write)
    opt.step(one(2))
    assert_same_bits(param, before)


def raise_interrupt(*_):
    raise KeyboardInterrupt


def test_groups_compare_by_identity():
    groups = RMSProp([{"params": one(1)}, {"params": one(1)}]).param_groups
    assert groups[0] != groups[1]
    assert groups.index(groups[1]) == 1


def test_clipvalue_that_rounds_to_nothing_is_refused():
    with refused(ValueError, "clipvalue is 1e-60, which is 0 in float32", of=[]):
        RMSProp(one(1), clipvalue=1e-60)


def test_kernels_are_what_a_step_launches():
    params = [np.ones(3, np.float32), np.ones(3)]
    groups = [{"params": params[:1], "momentum": 0.9}, {"params": params[1:], "bias_correction": True}]
    opt = RMSProp(groups)
    kernels = opt.kernels()
    assert list(kernels) == [
        "update_kernel[float32, momentum]",
        "prepare_kernel[float64, bias_correction]",
        "update_kernel[float64, bias_correction]",
    ]
    assert all("ret" in asm for kernel in kernels.values() for asm in kernel.inspect_asm().values())
    assert opt.steps == 0
    assert all((x == 1).all() for x in params)
    opt.param_groups[0]["momentum"] = 0.0
    assert "update_kernel[float32, plain]" in opt.kernels()
