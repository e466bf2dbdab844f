"""Hyperparameters that change between steps, compared with the oracle."""

import numpy as np
import pytest
from on_host import assert_same_bits, one

from rmsprop_gpu import AdaGrad, RMSProp, reference
from rmsprop_gpu.steps.plan import Plan

CHANGES = [
    {},
    {"lr": 0.02},  # only numbers change: the kernels stay
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
    """Take three steps after each change, with the optimizer and with the oracle. Both must move alike.

    A step has some 20 roundings of 1.1e-16 each, and an error in v lasts for 1 / (1 - alpha) = 10 steps. A bound of
    1e-13 of an element's total movement is three times the worst case. A wrong rule is off by 1e-6 or more.
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


@pytest.mark.parametrize(
    ("write", "values"), [("write_scalars", {"lr": 0.0, "eps": 1e-3}), ("write_rates", {"lr": 0.0})]
)
def test_assignment_survives_a_step_that_was_cut_off(write, values, monkeypatch):
    param = one(1)
    opt = RMSProp(param, lr=0.5)
    opt.step(one(2))
    before = param.copy()
    for name, value in values.items():
        opt.param_groups[0][name] = value
    with monkeypatch.context() as patch:
        patch.setattr(Plan, write, raise_interrupt)
        with pytest.raises(KeyboardInterrupt):
            opt.step(one(2))
    opt.step(one(2))
    assert_same_bits(param, before)


def raise_interrupt(*_):
    raise KeyboardInterrupt
