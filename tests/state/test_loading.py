"""What load_state_dict refuses, naming every problem, and what it accepts with strict=False."""

import math

import numpy as np
import pytest
from on_host import assert_same, assert_same_bits, everything, refused
from states import build, run, tensors

from rmsprop_gpu import AdaGrad, RMSProp


def put(*path):
    """A change to a state dict: set the last item of `path` at the place that the others name."""
    *places, key, value = path

    def change(saved):
        at = saved
        for place in places:
            at = at[place]
        if value is ABSENT:
            del at[key]
        else:
            at[key] = value

    return change


def both(*changes):
    return lambda saved: [change(saved) for change in changes]


ABSENT = object()
F4 = np.zeros((3, 4), np.float32)
AVERAGE = ("state", "a", "square_avg")
WRONG = {
    "no optimizer": (put("optimizer", ABSENT), ValueError, ['["optimizer"] is None', "'RMSProp'"]),
    "another optimizer": (put("optimizer", "AdaGrad"), ValueError, ["'AdaGrad'", "'RMSProp'"]),
    "array as optimizer": (put("optimizer", np.zeros(2)), ValueError, ['["optimizer"] is', "'RMSProp'"]),
    "another version": (put("version", 2), ValueError, ['["version"] is 2; wanted 1']),
    "no version": (put("version", ABSENT), ValueError, ['["version"] is None; wanted 1']),
    "array as version": (put("version", np.ones(2)), ValueError, ['["version"] is', "wanted 1"]),
    "no steps": (put("steps", ABSENT), TypeError, ['["steps"] is None', "count"]),
    "negative steps": (put("steps", -1), None, ['["steps"] is -1', "count"]),
    "steps as text": (put("steps", "1"), TypeError, ["[\"steps\"] is '1'"]),
    "steps True": (put("steps", True), TypeError, ['["steps"] is True']),
    "steps 1.5": (put("steps", 1.5), TypeError, ['["steps"] is 1.5']),
    "steps beyond 64 bits": (put("steps", 2**63), None, ['["steps"] is 9223372036854775808']),
    "no state": (put("state", ABSENT), TypeError, ['["state"] is None']),
    "state a list": (put("state", []), TypeError, ['["state"] is a list']),
    "groups a mapping": (put("param_groups", {}), TypeError, ['["param_groups"] is a dict']),
    "fewer groups": (lambda saved: saved["param_groups"].pop(), ValueError, ["param_groups has 1 group", "wanted 2"]),
    "group None": (put("param_groups", 0, None), None, ["param_groups[0]", "wanted"]),
    "params None": (put("param_groups", 0, "params", None), None, ["param_groups[0]", "['a', 'b']"]),
    "params a number": (put("param_groups", 0, "params", 5), None, ["param_groups[0]", "['a', 'b']"]),
    "params a text": (put("param_groups", 0, "params", "ab"), None, ["param_groups[0]", "['a', 'b']"]),
    "other params": (put("param_groups", 0, "params", ["a"]), ValueError, ["param_groups[0]", "['a', 'b']"]),
    "other order": (put("param_groups", 0, "params", ["b", "a"]), ValueError, ["param_groups[0]", "['a', 'b']"]),
    "moved": (
        both(put("param_groups", 0, "params", ["a"]), put("param_groups", 1, "params", ["b", "c"])),
        ValueError,
        ["param_groups[0]", "param_groups[1]"],
    ),
    "hyperparameter lacking": (put("param_groups", 1, "eps", ABSENT), ValueError, ["param_groups[1] lacks 'eps'"]),
    "lr lacking": (put("param_groups", 1, "lr", ABSENT), ValueError, ["param_groups[1] lacks 'lr'"]),
    "unknown": (put("param_groups", 1, "rho", 1), ValueError, ["param_groups[1] has 'rho'"]),
    "wrong alpha": (put("param_groups", 1, "alpha", 2), ValueError, ["param_groups[1]", "alpha is 2"]),
    "alpha as text": (put("param_groups", 1, "alpha", "x"), None, ["param_groups[1]", "alpha is 'x'"]),
    "eps that is 0": (put("param_groups", 0, "eps", 1e-60), ValueError, ["param_groups[0]", "eps is 1e-60"]),
    "two clips": (
        lambda sd: (put("param_groups", 0, "clipnorm", 1.0)(sd), put("param_groups", 0, "clipvalue", 1.0)(sd)),
        None,
        ["param_groups[0]", "clipvalue=1.0 and clipnorm=1.0 are given"],
    ),
    "missing": (put("state", "a", ABSENT), ValueError, ['"a" is missing']),
    "unexpected": (put("state", "z", {}), ValueError, ['"z" has no parameter here']),
    "entry None": (put("state", "a", None), TypeError, ['state["a"] is a NoneType']),
    "no average": (put(*AVERAGE, ABSENT), ValueError, ["state[\"a\"] lacks 'square_avg'"]),
    "no buffer": (put("state", "a", "momentum_buffer", ABSENT), ValueError, ["state[\"a\"] lacks 'momentum_buffer'"]),
    "no step": (put("state", "c", "step", ABSENT), ValueError, ["state[\"c\"] lacks 'step'"]),
    "unknown buffer": (put("state", "a", "exp_avg", F4), ValueError, ["state[\"a\"] has 'exp_avg'", "square_avg"]),
    "AdaGrad's buffer": (put("state", "a", "sum", F4), ValueError, ["state[\"a\"] has 'sum'"]),
    "None": (put(*AVERAGE, None), TypeError, ['state["a"]["square_avg"] is']),
    "list": (put(*AVERAGE, F4.tolist()), TypeError, ['state["a"]["square_avg"] is a list']),
    "number": (put(*AVERAGE, 0.0), TypeError, ['state["a"]["square_avg"] is a float']),
    "shape": (put(*AVERAGE, F4.T), ValueError, ["has shape (4, 3); wanted (3, 4)"]),
    "flat": (put(*AVERAGE, F4.ravel()), ValueError, ["has shape (12,); wanted (3, 4)"]),
    "row": (put(*AVERAGE, F4[:1]), ValueError, ["has shape (1, 4); wanted (3, 4)"]),
    "dtype": (put(*AVERAGE, F4.astype(float)), TypeError, ["has dtype float64; wanted float32"]),
    "byte order": (put(*AVERAGE, F4.astype(">f4")), TypeError, ["has dtype >f4; wanted float32"]),
    "objects": (put(*AVERAGE, F4.astype(object)), TypeError, ["has dtype object; wanted float32"]),
    "masked": (put(*AVERAGE, np.ma.masked_array(F4)), TypeError, ['state["a"]["square_avg"]', "asked"]),
    "step negative": (put("state", "b", "step", -1), ValueError, ['state["b"]["step"] is -1']),
    "step negative array": (put("state", "b", "step", np.array(-1)), ValueError, ['state["b"]["step"] is -1']),
    "step 1.5": (put("state", "b", "step", 1.5), None, ['state["b"]["step"]']),
    "step huge": (put("state", "b", "step", 1e300), None, ['state["b"]["step"]']),
    "step NaN": (put("state", "b", "step", math.nan), None, ['state["b"]["step"]']),
    "step beyond 64 bits": (put("state", "b", "step", 2**70), None, ['state["b"]["step"]']),
    "step complex": (put("state", "b", "step", np.complex64(1)), None, ['state["b"]["step"]']),
    "average below 0": (put(*AVERAGE, F4 - 1), ValueError, ['["square_avg"] has elements below 0']),
    "weight below 0": (put("state", "b", "bias_weight", -0.5), ValueError, ['["bias_weight"] has elements below 0']),
    "step that would overflow": (put("state", "b", "step", np.array(2**63 - 1)), ValueError, ["wanted a count"]),
    "step True": (put("state", "b", "step", True), TypeError, ['state["b"]["step"] is']),
    "step an array of one": (put("state", "b", "step", np.array([1])), ValueError, ["has shape (1,); wanted ()"]),
    "weight huge": (put("state", "b", "bias_weight", 1e300), None, ['state["b"]["bias_weight"]']),
    "weight that float32 rounds": (put("state", "b", "bias_weight", 0.1), None, ['state["b"]["bias_weight"]']),
    "weight beyond floats": (put("state", "b", "bias_weight", 10**400), None, ['state["b"]["bias_weight"]']),
}


def wrong_dict(case):
    change, kind, texts = WRONG[case]
    saved = run(build(momentum=0.9), 1, 2).state_dict()
    change(saved)
    return saved, kind, texts


@pytest.mark.parametrize("case", WRONG)
def test_dict_that_does_not_fit_changes_nothing(case):
    """A kind of None accepts TypeError or ValueError: only the text matters."""
    saved, kind, texts = wrong_dict(case)
    opt, twin = run(build(momentum=0.5), 3), run(build(momentum=0.5), 3)
    before = everything(opt)
    with pytest.raises((TypeError, ValueError)) as error:
        opt.load_state_dict(saved)
    assert error.type in ([kind] if kind else [TypeError, ValueError])
    for text in texts:
        assert text in str(error.value)
    assert everything(opt) == before
    if case in ("shape", "wrong alpha"):
        run(opt, 4), run(twin, 4)
        assert_same(opt, twin)


@pytest.mark.parametrize("saved", [None, [], "state.npz", 5, RMSProp(np.ones(3))], ids=lambda x: type(x).__name__)
def test_what_is_no_mapping_is_no_state_dict(saved):
    opt = run(build(), 1)
    with refused(TypeError, "state_dict is a", type(saved).__name__, "wanted a mapping", of=[opt]):
        opt.load_state_dict(saved)


def test_empty_dict_names_all_that_is_missing():
    opt = run(build(), 1)
    with refused(TypeError, *('"state"', '"param_groups"', '"steps"', '"optimizer"', '"version"'), of=[opt]):
        opt.load_state_dict({})


def test_other_optimizer_is_refused_both_ways():
    for make, other in ((RMSProp, AdaGrad), (AdaGrad, RMSProp)):
        opt = build(make)
        with refused(ValueError, f"is '{other.__name__}'; wanted '{make.__name__}'", of=[opt]):
            opt.load_state_dict(build(other).state_dict())


def test_all_problems_are_named_at_once():
    saved = run(build(momentum=0.9), 1).state_dict()
    both(
        put("state", "z", {}),
        put("state", "a", ABSENT),
        put("state", "b", "square_avg", np.zeros(6, np.float32)),
        put("state", "c", "momentum_buffer", ABSENT),
        put("param_groups", 0, "alpha", 2),
        put("param_groups", 0, "eps", -1),
        put("param_groups", 1, "rho", 1),
    )(saved)
    texts = ['"z"', '"a"', 'state["b"]["square_avg"]', "'momentum_buffer'", "alpha is 2", "eps is -1", "'rho'"]
    opt = run(build(), 1)
    with refused(ValueError, *texts, of=[opt]):
        opt.load_state_dict(saved)


# strict=False


def test_not_strict_loads_what_both_have():
    other = RMSProp({"b": tensors(3)["b"], "c": tensors(3)["c"], "d": np.ones(2)}, lr=9.0, momentum=0.5)
    for _ in range(3):
        other.step({"b": tensors(4)["b"], "c": tensors(4)["c"], "d": np.ones(2)})
    opt = run(build(), 1)
    steps, hyper, params, state = everything(opt)
    assert opt.load_state_dict(other.state_dict(), strict=False) == (["a"], ["d"])
    assert opt.steps == 3 != steps
    assert everything(opt)[1:3] == (hyper, params)
    assert everything(opt)[3]["a"] == state["a"]
    for key in "bc":
        for name, x in other.state[key].items():
            assert_same_bits(opt.state[key][name], x)
    opt.param_groups[0]["momentum"] = 0.5  # the buffer of a is new, that of b was loaded
    run(opt, 5)
    assert opt.state["a"]["momentum_buffer"].any()


def test_not_strict_keeps_our_hyperparameters():
    saved, opt = build(lr=9.0, alpha=0.5).state_dict(), run(build(), 1)
    before = [group.hyper() for group in opt.param_groups]
    assert opt.load_state_dict(saved, strict=False) == ([], [])
    assert [group.hyper() for group in opt.param_groups] == before
    assert not opt.state["a"]["square_avg"].any()


def test_report_of_not_strict_has_names():
    report = build().load_state_dict(RMSProp({"a": tensors(1)["a"]}).state_dict(), strict=False)
    assert report.missing == ["b", "c"]
    assert report.unexpected == []


@pytest.mark.parametrize(
    "case", ["shape", "dtype", "no average", "unknown buffer", "another optimizer", "another version", "negative steps"]
)
def test_not_strict_refuses_what_is_wrong_in_the_part_it_loads(case):
    saved, kind, texts = wrong_dict(case)
    del saved["state"]["c"]
    opt = run(build(), 3)
    with refused(kind or TypeError, *texts, of=[opt]):
        opt.load_state_dict(saved, strict=False)


def test_not_strict_lacks_a_buffer_that_our_momentum_needs():
    opt = run(build(momentum=0.5), 1)
    with refused(ValueError, "lacks 'momentum_buffer'", of=[opt]):
        opt.load_state_dict(build().state_dict(), strict=False)
