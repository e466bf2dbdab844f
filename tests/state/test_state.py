"""The state of an optimizer: what `state` shows, and how state_dict saves and loads it."""

import io
import json

import numpy as np
import pytest
from on_host import assert_same, assert_same_bits, everything, refused
from states import DTYPES, FULL, SHAPES, build, params_of, run

from rmsprop_gpu import AdaGrad, RMSProp

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
    assert state["a"]["square_avg"].strides == params_of(opt)[0].strides  # each has its parameter's layout
    assert not any(np.shares_memory(x, y) for x in state["a"].values() for y in state["b"].values())
    assert f"{sum(x.nbytes for key in state for x in state[key].values()):,} bytes" in repr(state)


def test_what_is_done_to_the_arrays_handed_out_does_not_reach_the_state():
    opt = run(build(), 1)
    saved = run(build(), 1, 2).state_dict()
    mine = opt.state["b"]["square_avg"]
    mine.flags.writeable = False
    with pytest.raises(ValueError, match="cannot resize"):  # it must not move while kernels use it
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


# Saving and loading


def through_npz_and_json(state_dict):
    """Save arrays with np.savez without pickle, and all else as text. State names never contain "|"."""
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
    """Counters as plain numbers, as JSON would store them."""
    text = json.dumps({k: {n: x.item() for n, x in e.items() if not x.ndim} for k, e in state_dict["state"].items()})
    state = {k: {**e, **json.loads(text)[k]} for k, e in state_dict["state"].items()}
    state["c"] = state_dict["state"]["c"]  # its buffers are numbers too
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
    """If entries were loaded one by one, swapped buffers or a reversed view would be overwritten before being read."""
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
    """An optimizer with momentum loads a state without. When momentum returns, its buffer starts at 0."""
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


ORDERS = {
    "F": lambda x: x.copy(order="F"),
    "transposed": lambda x: x.transpose(1, 2, 0).copy(order="C").transpose(2, 0, 1),
}


def by_its_bytes(x):
    """What is read back if an array's memory was written in its own order, without its strides."""
    return x.ravel(order="K").reshape(x.shape)


@pytest.mark.parametrize("order", ORDERS)
def test_state_dict_survives_who_writes_memory_as_it_lies(order, xp):
    given = {"centered": True, "momentum": 0.9, "use_ema": True}
    params = [ORDERS[order](xp.arange(24.0).reshape(2, 3, 4)) for _ in range(2)]
    grads = [xp.arange(24.0)[::-1].reshape(2, 3, 4) * k for k in (1, 2)]
    opt, copy = (RMSProp({"w": param}, **given) for param in params)
    opt.step({"w": grads[0]})
    saved = opt.state_dict()
    copy.load_state_dict({**saved, "state": {"w": {n: by_its_bytes(x) for n, x in saved["state"]["w"].items()}}})
    params[1][...] = params[0]
    for name, x in opt.state["w"].items():
        assert copy.state["w"][name].strides == x.strides
        assert bool((copy.state["w"][name] == x).all())
    for o in (opt, copy):
        o.step({"w": grads[1]})
    assert bool((params[0] == params[1]).all())


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
