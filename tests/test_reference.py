"""The oracle, compared with trajectories recorded from torch, optax and Keras (record_trajectories.py)."""

import ast
import inspect
from pathlib import Path

import numpy as np
import pytest
from recorded import CASES, RELATIVE, ROWS, STATE_NAMES, ULPS

from rmsprop_gpu import reference


def excess(name):
    """The largest |got - want| / bound over a case's updates and its final state: above 1, or NaN, is a failure."""
    case, row = CASES[name], ROWS[name]
    state, worst = None, 0.0
    for before, after, grad, lr in zip(row["params"], row["params"][1:], row["grads"], row["lrs"], strict=False):
        new, state = getattr(reference, case["function"])(before, grad, state, lr=lr, **case["keywords"])
        got, want = new - before, after - before
        bound = RELATIVE * np.abs(want).max() + ULPS * np.spacing(np.maximum(np.abs(before), np.abs(after)))
        worst = np.maximum(worst, np.max(np.abs(got - want) / bound))  # np.maximum keeps NaN
    return np.maximum(worst, state_excess(state, row))


def state_excess(state, row):
    """The same for the final state. The oracle must not have state that the framework lacks (NaN in the record)."""
    keys = [key for key in STATE_NAMES if key in state or not np.isnan(row[key]).any()]
    return np.max(  # unlike max(), this keeps NaN
        [np.abs(state.get(key, np.nan) - row[key]) / (RELATIVE * np.abs(row[key]).max()) for key in keys]
    )


def failures():
    """The names of the cases that fail with the oracle as it stands."""
    return {name for name in CASES if not excess(name) <= 1}


@pytest.mark.parametrize("name", CASES)
def test_recorded_trajectory(name):
    assert excess(name) <= 1


# What the tests above can detect. A plant replaces one small function of the oracle. `matters` decides from a case's
# function and keywords whether it must then fail. Exactly those cases must fail.
PLANTS = {
    "eps on the other side of the root": (
        "denominator",
        lambda right, d, eps, inside: right(d, eps, not inside),
        lambda function, k: k["eps"] != 0,
    ),
    "alpha and one_minus_alpha swapped": (
        "moving_average",
        lambda right, average, value, alpha, beta: right(average, value, beta, alpha),
        lambda function, k: function == "rmsprop",
    ),
    "sign of coupled decay flipped": (
        "effective_gradient",
        lambda right, grad, param, maximize, clip, decay: right(grad, param, maximize, clip, -decay),
        lambda function, k: "weight_decay" in k and "decoupled_weight_decay" not in k,
    ),
    "maximize turns the decay too": (
        "effective_gradient",
        lambda right, grad, param, maximize, *rest: right(grad, param, False, *rest) * (-1 if maximize else 1),
        lambda function, k: {"weight_decay", "maximize"} <= set(k) and "decoupled_weight_decay" not in k,
    ),
    "decay before the clip": (
        "effective_gradient",
        lambda right, grad, param, maximize, clip, decay: right(
            right(grad, param, maximize, None, decay), param, False, clip, 0.0
        ),
        lambda function, k: {"weight_decay", "clipvalue"} <= set(k) and "decoupled_weight_decay" not in k,
    ),
    "mean not squared": (
        "second_moment",
        lambda right, v, m, w: right(v, None if m is None else np.sqrt(np.abs(m)), w),
        lambda function, k: "centered" in k,
    ),
    "bias correction under a root of its own": (
        "second_moment",
        lambda right, v, m, w: right(v, m, np.sqrt(w)),
        lambda function, k: "bias_correction" in k,
    ),
    "update not signed": (
        "ratio",
        lambda right, g, r: right(np.abs(g), r),
        lambda function, k: True,
    ),
}


def must_fail(matters):
    """The names of the cases in which a plant matters. There must be at least one."""
    names = {name for name, case in CASES.items() if matters(case["function"], case["keywords"])}
    assert names
    return names


@pytest.mark.parametrize("plant", PLANTS)
def test_planted_bug_is_seen(plant, monkeypatch):
    target, wrong, matters = PLANTS[plant]
    right = getattr(reference, target)
    signature = inspect.signature(right)

    def planted(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return wrong(right, *bound.arguments.values())

    monkeypatch.setattr(reference, target, planted)
    assert failures() == must_fail(matters)


NOT_HYPERPARAMETERS = ("param", "grad", "state", "lr", "one_minus_alpha")
NEEDS = {"nesterov": "momentum", "lr_in_momentum": "momentum", "decoupled_weight_decay": "weight_decay"}
FORGETTABLE = [
    (function, parameter.name, parameter.default)
    for function in ("rmsprop", "adagrad")
    for parameter in inspect.signature(getattr(reference, function)).parameters.values()
    if parameter.name not in NOT_HYPERPARAMETERS
]


@pytest.mark.parametrize(("function", "keyword", "default"), FORGETTABLE)
def test_forgotten_keyword_is_seen(function, keyword, default, monkeypatch):
    """Every keyword is in some case, and every case with it depends on it."""
    right = getattr(reference, function)

    def forgetful(*args, **kwargs):
        return right(*args, **{name: value for name, value in kwargs.items() if name != keyword})

    def matters(used, k):
        return used == function and k.get(keyword, default) != default and NEEDS.get(keyword, keyword) in k

    monkeypatch.setattr(reference, function, forgetful)
    assert failures() == must_fail(matters)


@pytest.mark.parametrize("function", ["rmsprop", "adagrad"])
def test_flipped_sign_of_decoupled_decay_is_seen(function, monkeypatch):
    right = getattr(reference, function)

    def flipped(*args, weight_decay=0.0, decoupled_weight_decay=False, **kwargs):
        sign = -1.0 if decoupled_weight_decay else 1.0
        switches = {"weight_decay": sign * weight_decay, "decoupled_weight_decay": decoupled_weight_decay}
        return right(*args, **switches, **kwargs)

    def matters(used, k):
        return used == function and {"weight_decay", "decoupled_weight_decay"} <= set(k)

    monkeypatch.setattr(reference, function, flipped)
    assert failures() == must_fail(matters)


def test_one_minus_alpha_is_taken_as_given():
    """float32 kernels round alpha and 1 - alpha separately, so every average must use the pair as given."""
    alpha, beta = float(np.float32(0.9)), float(np.float32(0.1))
    assert beta != 1.0 - alpha
    grads = np.array([[0.5, -3.0], [2.0, 0.25]])
    state, want = None, {"square_avg": 0.0, "grad_avg": 0.0, "bias_weight": 0.0}
    for grad in grads:
        values = {"square_avg": grad**2, "grad_avg": grad, "bias_weight": 1.0}
        want = {key: alpha * want[key] + beta * values[key] for key in want}
        _, state = reference.rmsprop([1.0, 2.0], grad, state, lr=0.1, alpha=alpha, one_minus_alpha=beta, centered=True)
    for key in want:
        np.testing.assert_array_equal(state[key], want[key])

    _, by_itself = reference.rmsprop([1.0, 2.0], grads[0], lr=0.1, alpha=alpha)
    np.testing.assert_array_equal(by_itself["square_avg"], (1.0 - alpha) * grads[0] ** 2)


def test_imports_only_numpy_and_typing():
    """The oracle shares no code with what it judges."""
    nodes = list(ast.walk(ast.parse(Path(reference.__file__).read_text())))
    got = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    got |= {"." * node.level + (node.module or "") for node in nodes if isinstance(node, ast.ImportFrom)}
    assert got <= {"__future__", "collections.abc", "typing", "numpy", "numpy.typing"}
