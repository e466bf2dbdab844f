"""The state of an optimizer: what `state` shows, and how it goes out and comes in by state_dict."""

import io
import json
import math

import numpy as np
import pytest
from on_host import assert_same, assert_same_bits, everything, random, refused

from rmsprop_gpu import AdaGrad, RMSProp

SHAPES = {"a": (3, 4), "b": (5,), "c": ()}
DTYPES = {"a": np.float32, "b": np.float32, "c": np.float64}
FULL = {"momentum": 0.9, "centered": True, "bias_correction": True, "weight_decay": 0.01}


def tensors(seed):
    arrays = random(seed, *(math.prod(shape) for shape in SHAPES.values()), dtype=np.float64)
    return {
        name: a.reshape(shape).astype(DTYPES[name]) for a, (name, shape) in zip(arrays, SHAPES.items(), strict=True)
    }


def grads(seed):
    t = tensors(100 + seed)
    return [{"a": t["a"], "b": t["b"]}, {"c": t["c"]}]


def build(make=RMSProp, seed=1, **given):
    """Two groups of two dtypes; the first parameter lies in Fortran's order."""
    p = tensors(seed)
    groups = [{"params": {"a": np.asfortranarray(p["a"]), "b": p["b"]}}, {"params": {"c": p["c"]}, "lr": 0.5}]
    return make(groups, **given)


def run(opt, *seeds):
    for seed in seeds:
        opt.step(grads(seed))
    return opt


def params_of(opt):
    return [p for group in opt.param_groups for p in group["params"]]


# The state as a mapping


def test_state_goes_by_name_and_by_index():
    opt = run(build(**FULL), 1)
    state = opt.state
    assert (list(state), len(state)) == (["a", "b", "c"], 3)
    for i, key in enumerate("abc"):
        assert [x.ctypes.data for x in state[i].values()] == [x.ctypes.data for x in state[key].values()]
        assert key in state
        for name in ("square_avg", "grad_avg", "momentum_buffer"):
            buffer = state[key][name]
            assert (buffer.shape, buffer.dtype) == (SHAPES[key], DTYPES[key])
        assert state[key]["bias_weight"].dtype == DTYPES[key]
    assert state["a"]["square_avg"].strides == params_of(opt)[0].strides  # each lies as its parameter does
    assert not any(np.shares_memory(x, y) for x in state["a"].values() for y in state["b"].values())
    assert f"{sum(x.nbytes for key in state for x in state[key].values()):,} bytes" in repr(state)


def test_what_is_done_to_the_arrays_handed_out_does_not_reach_the_state():
    opt = run(build(), 1)
    saved = run(build(), 1, 2).state_dict()
    mine = opt.state["b"]["square_avg"]
    mine.flags.writeable = False
    with pytest.raises(ValueError, match="cannot resize"):  # not under the kernels
        mine.base.resize(0, refcheck=False)
    opt.load_state_dict(saved)
    for key in "abc":
        for name, x in saved["state"][key].items():
            assert_same_bits(opt.state[key][name], x)
    assert_same_bits(mine, saved["state"]["b"]["square_avg"])


@pytest.mark.parametrize("key", ["d", 3, -1, True, None, 1.0])
def test_what_is_no_parameter_has_no_state(key):
    with pytest.raises(KeyError, match="3 parameters"):
        build().state[key]


def test_state_is_written_through_its_arrays_alone():
    opt = build()
    with pytest.raises(TypeError):
        opt.state["a"]["square_avg"] = np.zeros((3, 4), np.float32)
    with pytest.raises(TypeError):
        opt.state["a"] = {}
    opt.state["b"]["square_avg"][:] = 4
    twin = build(initial_scale=4.0)
    run(opt, 1), run(twin, 1)
    assert_same_bits(opt.state["b"]["square_avg"], twin.state["b"]["square_avg"])


# Out and in again


def through_npz_and_json(state_dict):
    """Arrays by np.savez without pickle, all else as text; the names of a state hold no "|"."""
    arrays = {f"{key}|{name}": x for key, entry in state_dict["state"].items() for name, x in entry.items()}
    file = io.BytesIO()
    np.savez(file, **arrays)
    text = json.dumps({name: x for name, x in state_dict.items() if name != "state"})
    file.seek(0)
    loaded, state = json.loads(text), {}
    with np.load(file, allow_pickle=False) as npz:
        for name in npz.files:
            key, buffer = name.split("|")
            state.setdefault(key, {})[buffer] = npz[name]
    return {**loaded, "state": state}


def counters_as_numbers(state_dict):
    """Counters as plain numbers, as JSON would keep them."""
    text = json.dumps({k: {n: x.item() for n, x in e.items() if not x.ndim} for k, e in state_dict["state"].items()})
    state = {k: {**e, **json.loads(text)[k]} for k, e in state_dict["state"].items()}
    state["c"] = state_dict["state"]["c"]  # whose buffers are numbers too
    return {**state_dict, "state": state}


@pytest.mark.parametrize("way", [lambda sd: sd, through_npz_and_json, counters_as_numbers])
@pytest.mark.parametrize(("make", "given"), [(RMSProp, FULL), (RMSProp, {}), (AdaGrad, {"eps": 1e-3})])
def test_round_trip_continues_to_the_bit(make, given, way):
    opt = run(build(make, **given), 1, 2)
    saved = way(opt.state_dict())
    copy = build(make, lr=7.0, initial_scale=3.0)  # everything of its own is replaced
    run(copy, 9)
    for p, q in zip(params_of(copy), params_of(opt), strict=True):
        p[...] = q
    assert copy.load_state_dict(saved) == ([], [])
    assert [g.hyper() for g in copy.param_groups] == [g.hyper() for g in opt.param_groups]
    assert copy.steps == 2
    assert everything(copy)[0] == everything(opt)[0]
    run(opt, 3, 4), run(copy, 3, 4)
    assert_same(copy, opt)
    assert copy.steps == opt.steps == 4


def test_state_dict_is_plain():
    opt = run(build(**FULL), 1)
    state_dict = opt.state_dict()
    assert state_dict["optimizer"] == "RMSProp"
    assert (state_dict["version"], state_dict["steps"]) == (1, 1)
    assert [g["params"] for g in state_dict["param_groups"]] == [["a", "b"], ["c"]]
    assert [g["lr"] for g in state_dict["param_groups"]] == [0.01, 0.5]
    arrays = [x for entry in state_dict["state"].values() for x in entry.values()]
    assert all(type(x) is np.ndarray and x.flags.owndata for x in arrays)
    json.dumps({**state_dict, "state": None})  # nothing else is an array


def test_state_dict_is_a_snapshot():
    opt = run(build(**FULL), 1)
    saved, at_once = opt.state_dict(), through_npz_and_json(opt.state_dict())
    run(opt, 2)
    opt.lr = 3
    after = everything(opt)
    assert saved["param_groups"] == at_once["param_groups"]
    for key, entry in saved["state"].items():
        for name, x in entry.items():
            assert_same_bits(x, at_once["state"][key][name])
            x[...] = 17
    saved["param_groups"][0]["lr"] = 17
    assert everything(opt) == after


def test_loaded_arrays_are_copied():
    opt, copy = run(build(), 1), build()
    saved = opt.state_dict()
    copy.load_state_dict(saved)
    before = everything(copy)
    saved["state"]["a"]["square_avg"][...] = 17
    saved["param_groups"][0]["params"].append("d")
    assert everything(copy) == before


def test_back_to_an_earlier_state_of_the_same_optimizer():
    opt = run(build(**FULL), 1)
    saved, earlier = opt.state_dict(), everything(opt)
    params = [p.copy() for p in params_of(opt)]
    opt.param_groups[0].update(lr=9, momentum=0.0, eps=0)
    run(opt, 2, 3)
    opt.load_state_dict(saved)
    for p, q in zip(params_of(opt), params, strict=True):
        p[...] = q
    assert everything(opt) == earlier
    twin = run(build(**FULL), 1)
    run(opt, 5), run(twin, 5)
    assert_same(opt, twin)


def test_entries_that_are_views_of_the_very_state():
    """Loaded in place one by one, exchanged buffers or a reversed view would be overwritten before they are read."""
    params = {"a": np.ones(6), "b": np.ones(6)}
    opt = RMSProp(params)
    opt.step({"a": np.arange(1.0, 7), "b": np.arange(7.0, 13)})
    saved = opt.state_dict()
    want = {"a": saved["state"]["b"]["square_avg"].copy(), "b": saved["state"]["a"]["square_avg"][::-1].copy()}
    saved["state"]["a"]["square_avg"] = opt.state["b"]["square_avg"]
    saved["state"]["b"]["square_avg"] = opt.state["a"]["square_avg"][::-1]
    opt.load_state_dict(saved)
    for key in "ab":
        assert_same_bits(opt.state[key]["square_avg"], want[key])


def test_saved_between_an_assignment_and_the_next_step():
    opt, twin = run(build(), 1), run(build(), 1)
    for o in (opt, twin):
        o.param_groups[0].update(momentum=0.5, centered=True)
    saved = opt.state_dict()
    assert not saved["state"]["a"]["momentum_buffer"].any()
    assert "momentum_buffer" not in saved["state"]["c"]
    copy = build()
    for p, q in zip(params_of(copy), params_of(opt), strict=True):
        p[...] = q
    copy.load_state_dict(saved)
    for o in (opt, copy, twin):
        run(o, 2)
    assert_same(opt, twin)
    assert_same(copy, twin)


def test_buffer_that_the_dict_lacks_starts_anew():
    """An optimizer that had momentum loads one that had none; momentum again begins at 0, not at what was left."""
    had, plain = run(build(momentum=0.9), 7, 8), run(build(), 1)
    had.load_state_dict(plain.state_dict())
    for p, q in zip(params_of(had), params_of(plain), strict=True):
        p[...] = q
    for opt in (had, plain):
        run(opt, 2)
        opt.param_groups[0]["momentum"] = 0.5
        opt.param_groups[1]["momentum"] = 0.5
        run(opt, 3)
    assert_same(had, plain)


def test_buffer_that_is_not_needed_any_more_is_kept():
    opt = run(build(momentum=0.9), 1)
    for group in opt.param_groups:
        group["momentum"] = 0.0
    copy = build()
    copy.load_state_dict(opt.state_dict())
    for key in "abc":
        assert_same_bits(copy.state[key]["momentum_buffer"], opt.state[key]["momentum_buffer"])


LAYOUTS = {
    "C": np.ascontiguousarray,
    "F": np.asfortranarray,
    "strided": lambda x: np.repeat(x, 2, axis=-1)[..., ::2],
    "reversed": lambda x: x[::-1].copy()[::-1],
    "misaligned": lambda x: np.frombuffer(b"\0" + x.tobytes(), np.uint8)[1:].view(x.dtype).reshape(x.shape),
    "subclass": lambda x: x.copy().view(np.memmap),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_saved_arrays_may_lie_in_any_order(layout):
    opt, copy = run(build(), 1), build()
    saved = opt.state_dict()
    for key in "ab":
        saved["state"][key]["square_avg"] = LAYOUTS[layout](saved["state"][key]["square_avg"])
    copy.load_state_dict(saved)
    for key in "ab":
        assert_same_bits(copy.state[key]["square_avg"], opt.state[key]["square_avg"])


def test_counters_of_numpy_are_counters():
    opt = run(build(), 1)
    saved = opt.state_dict()
    saved["steps"] = np.int64(3)
    saved["state"]["a"]["step"] = np.int32(2)
    opt.load_state_dict(saved)
    assert (opt.steps, opt.state["a"]["step"]) == (3, 2)
    assert type(opt.state_dict()["steps"]) is int


# A callable lr


def rate(step):
    return 0.1 / (1 + step)


def test_callable_lr_is_saved_as_none_and_given_again():
    opt, copy = (RMSProp(np.ones(5), lr=rate) for _ in range(2))
    for _ in range(2):
        opt.step(np.ones(5))
    saved = opt.state_dict()
    assert saved["param_groups"][0]["lr"] is None
    copy.load_state_dict(saved)
    copy.param_groups[0]["params"][0][:] = opt.param_groups[0]["params"][0]
    assert copy.lr is rate
    opt.step(np.ones(5)), copy.step(np.ones(5))  # both ask for step 2
    assert_same(copy, opt)


@pytest.mark.parametrize(
    ("theirs", "ours", "text"), [(rate, 0.5, "wanted a callable lr"), (0.5, rate, "wanted a number as lr")]
)
def test_callable_lr_meets_a_number(theirs, ours, text):
    saved = RMSProp(np.ones(5), lr=theirs).state_dict()
    opt = RMSProp(np.ones(5), lr=ours)
    with refused(ValueError, 'param_groups[0]["lr"] is', text, of=[opt]):
        opt.load_state_dict(saved)
    opt.lr = theirs
    opt.load_state_dict(saved)


# What does not fit


def put(*path):
    """A change of a state dict: the last of `path` is put at the place that the others name."""
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
    """A kind of None says: TypeError or ValueError, the text is what counts."""
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
    opt.param_groups[0]["momentum"] = 0.5  # of a, whose buffer is new, and b, whose buffer was loaded
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
