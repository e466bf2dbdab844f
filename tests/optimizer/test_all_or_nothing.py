"""A step is all or nothing: an error names what is wrong with one array, and no group moves."""

import numpy as np
import pytest
from on_host import assert_same, one, random, refused

from rmsprop_gpu import RMSProp


def three_groups():
    """Two equal optimizers after one step, over groups with two dtypes and two Variants."""

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
    """Valid gradients except for the last."""
    return lambda opt: [*right_grads()[:2], [value(opt) if callable(value) else value]]


F4 = np.dtype(np.float32)
WRONG_STEPS = {
    "shape": (last(np.zeros(8, F4)), ValueError, ["grads[2][0] has shape (8,)", "(7,)"]),
    "no shape": (last(np.zeros((), F4)), ValueError, ["grads[2][0] has shape ()"]),
    "column": (last(np.zeros((7, 1), F4)), ValueError, ["grads[2][0] has shape (7, 1)"]),
    "float64": (last(np.zeros(7)), TypeError, ["grads[2][0] has dtype float64", "float32"]),
    "float16": (
        lambda opt: [right_grads()[0], np.zeros(6, np.float16), right_grads()[2]],
        TypeError,
        ["grads[1] has dtype float16", "float64; wanted float64"],
    ),
    "shape beside a half": (
        lambda opt: [{"a": np.zeros(4, np.float16), "b": None}, None, [np.zeros(8, F4)]],
        ValueError,
        ["grads[2][0] has shape (8,)"],
    ),
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
    for _ in range(2):  # state left by the first refusal must not let the second one pass
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
