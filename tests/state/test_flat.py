"""The flat form of a state dict, which files keep without pickle."""

import io
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from on_host import assert_same_bits, everything, refused
from states import FULL, build, run, tensors

from rmsprop_gpu import AdaGrad, RMSProp


def through_npz(flat):
    file = io.BytesIO()
    np.savez(file, **flat)
    file.seek(0)
    return np.load(file, allow_pickle=False)


def through_safetensors(flat):
    safetensors = pytest.importorskip("safetensors")
    numpy = pytest.importorskip("safetensors.numpy")
    arrays = dict(flat)
    text = arrays.pop("rmsprop_gpu")
    path = "state.safetensors"
    numpy.save_file(arrays, path, metadata={"rmsprop_gpu": text})
    with safetensors.safe_open(path, "numpy") as file:
        return {**{name: file.get_tensor(name) for name in file.keys()}, **file.metadata()}  # noqa: SIM118  # no mapping


WAYS = {"as it is": lambda flat: flat, "npz": through_npz, "safetensors": through_safetensors}


def assert_same_dict(got, want):
    assert {name: x for name, x in got.items() if name != "state"} == {
        name: x for name, x in want.items() if name != "state"
    }
    assert got["state"].keys() == want["state"].keys()
    for key, buffers in want["state"].items():
        assert got["state"][key].keys() == buffers.keys()
        for name, x in buffers.items():
            assert_same_bits(got["state"][key][name], x)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("make", "arguments"), [(RMSProp, FULL), (RMSProp, {"use_ema": True}), (AdaGrad, {})])
def test_a_file_has_all_of_a_state_dict(make, arguments, way, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    opt = run(build(make, **arguments), 1, 2)
    flat = opt.state_dict(flat=True)
    copy = run(build(make, lr=7.0, initial_scale=3.0), 9)
    assert copy.load_state_dict(WAYS[way](flat)) == ([], [])
    assert_same_dict(copy.state_dict(), opt.state_dict())
    assert [type(x) for x in flat.values()] == [str] + [np.ndarray] * (len(flat) - 1)


HALVES = ["float16", "bfloat16"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", HALVES)
def test_state_of_halves_is_float32_and_keeps_its_bits(dtype, way, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    T = np.dtype(getattr(pytest.importorskip("ml_dtypes"), dtype, None) or dtype)
    opt, copy = (RMSProp({"w": np.linspace(-1, 1, 9).astype(T)}, use_ema=True, momentum=0.5) for _ in range(2))
    opt.step({"w": np.linspace(1, 2, 9).astype(T)})
    copy.load_state_dict(WAYS[way](opt.state_dict(flat=True)))
    assert_same_dict(copy.state_dict(), opt.state_dict())


PARAMS = {
    "one array": lambda x: x[0],
    "list": list,
    "groups": lambda x: [{"params": x[0]}, {"params": {"w": x[1]}}, {"params": [x[2]]}],
    "nested": lambda x: {"params": {"Dense_0": {"kernel": x[0]}, "layers": [x[1], {"b": x[2]}]}},
    "names with slashes": lambda x: {"a/b": x[0], "a": x[1], "a/b/": x[2]},
    "names like those of buffers": lambda x: {"step": x[0], "step/step": x[1], "": x[2]},
    "names like the text's": lambda x: {"rmsprop_gpu": x[0], "/rmsprop_gpu": x[1], "state": x[2]},
    "names of files": lambda x: {"arr_0.npy": x[0], "file": x[1], "../w": x[2]},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", PARAMS)
def test_parameters_may_be_called_anything(case, way, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    opt, copy = (RMSProp(PARAMS[case](list(tensors(1).values()))) for _ in range(2))
    for i, key in enumerate(opt.state):
        opt.state[key]["square_avg"][...] = i + 0.1
        opt.state[key]["step"][...] = 2**61 + i
    copy.load_state_dict(WAYS[way](opt.state_dict(flat=True)))
    assert_same_dict(copy.state_dict(), opt.state_dict())


names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)  # zip files end there
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3),
    max_leaves=5,
)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(names, st.floats(0, width=32, allow_infinity=True), min_size=1, max_size=4),
    st.fixed_dictionaries(
        {"lr": st.floats(0, 1e30), "alpha": st.floats(0, 0.99), "weight_decay": st.floats(0, 1e30)},
        optional={
            "clipnorm": st.floats(1e-30) | st.none(),
            "momentum": st.floats(0, 1),
            "initial_scale": st.floats(0, 1e30),
        },
    ),
    st.dictionaries(st.sampled_from(["name", "initial_lr", "layer_id", "tag"]), JSON),
    st.integers(0, 2**62 - 1),
)
def test_every_number_comes_back_to_the_bit(averages, hyper, others, steps):
    def made():
        return RMSProp([{"params": {name: np.ones(1, np.float32) for name in averages}, **others, **hyper}])

    opt, copy = made(), RMSProp([{"params": {name: np.ones(1, np.float32) for name in averages}}])
    saved = opt.state_dict()
    for name, x in averages.items():
        saved["state"][name].update(square_avg=np.full(1, x, np.float32), step=np.array(steps))
    opt.load_state_dict({**saved, "steps": steps, "skipped_steps": steps})
    copy.load_state_dict(through_npz(opt.state_dict(flat=True)))
    assert_same_dict(copy.state_dict(), opt.state_dict())


def test_numbers_of_numpy_in_a_group_are_python_s_afterwards():
    own = {
        "name": np.str_("head"),
        "initial_lr": np.float32(0.1),
        "layer_id": np.int64(3),
        "tag": (np.bool_(True), {"x": 1}),
    }
    opt, copy = (RMSProp([{"params": [np.ones(2)], **kept}]) for kept in (own, {}))
    copy.load_state_dict(opt.state_dict(flat=True))
    found = {name: copy.param_groups[0][name] for name in own}
    assert found == {"name": "head", "initial_lr": float(np.float32(0.1)), "layer_id": 3, "tag": [True, {"x": 1}]}
    assert [type(x) for x in found.values()] == [str, float, int, list]


def test_a_callable_lr_is_none_in_the_text_and_infinity_is_python_s():
    opt = RMSProp(np.ones(2), lr=lambda step: 0.1, clipnorm=float("inf"))
    text = opt.state_dict(flat=True)["rmsprop_gpu"]
    assert '"lr": null' in text
    assert '"clipnorm": Infinity' in text
    other = RMSProp(np.ones(2), lr=abs)
    other.load_state_dict(opt.state_dict(flat=True))
    assert (other.lr, other.param_groups[0]["clipnorm"]) == (abs, float("inf"))


def circular():
    x = []
    x.append(x)
    return x


NO_JSON = {
    "array": (np.ones(2), "is a numpy.ndarray, which is not JSON"),
    "function": ([abs], "is a list, which is not JSON (it contains a builtin_function_or_method)"),
    "circular": (circular(), "is a list, which is not JSON"),
    "keys": ({(1, 2): 3}, "is a dict, which is not JSON"),
}


@pytest.mark.parametrize("case", NO_JSON)
def test_what_json_cannot_hold_is_named(case):
    value, text = NO_JSON[case]
    opt = RMSProp([{"params": [np.ones(2)]}, {"params": [np.ones(2)], "tag": value}])
    with refused(TypeError, f'param_groups[1]["tag"] {text}', of=[opt]):
        opt.state_dict(flat=True)
    assert opt.state_dict()["param_groups"][1]["tag"] is value


WRONG = {
    "no text": (
        lambda flat: flat.pop("rmsprop_gpu"),
        ValueError,
        ['["rmsprop_gpu"] is missing', "safetensors stores it"],
    ),
    "array as text": (
        lambda flat: flat.update(rmsprop_gpu=np.ones(2)),
        TypeError,
        ['["rmsprop_gpu"] is a numpy.ndarray'],
    ),
    "two texts": (lambda flat: flat.update(rmsprop_gpu=np.array(["{}", "{}"])), TypeError, ['["rmsprop_gpu"] is a']),
    "other text": (lambda flat: flat.update(rmsprop_gpu="{"), ValueError, ['["rmsprop_gpu"] is not JSON', "wanted"]),
    "a list": (lambda flat: flat.update(rmsprop_gpu="[]"), ValueError, ['["rmsprop_gpu"] is the JSON of a list']),
    "other JSON": (lambda flat: flat.update(rmsprop_gpu="{}"), TypeError, ['["steps"] is None', '["param_groups"] is']),
    "no slash": (
        lambda flat: flat.update(format="np"),
        ValueError,
        ['state_dict["format"] is not a "<parameter>/<buffer>"'],
    ),
    "no name": (lambda flat: flat.update({1: 2}), ValueError, ["state_dict[1] is no"]),
    "unknown parameter": (lambda flat: flat.update({"z/step": 1}), ValueError, ['"z" has no parameter here']),
    "unknown buffer": (lambda flat: flat.update({"a/exp_avg": 1}), ValueError, ["state[\"a\"] has 'exp_avg'"]),
    "a buffer less": (lambda flat: flat.pop("a/square_avg"), ValueError, ["state[\"a\"] lacks 'square_avg'"]),
    "another optimizer": (
        lambda flat: flat.update(rmsprop_gpu=json.dumps({**json.loads(flat["rmsprop_gpu"]), "optimizer": "AdaGrad"})),
        ValueError,
        ["[\"optimizer\"] is 'AdaGrad'"],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_flat_form_that_does_not_fit_changes_nothing(case):
    change, kind, texts = WRONG[case]
    flat = run(build(), 1).state_dict(flat=True)
    change(flat)
    opt = run(build(), 3)
    with refused(kind, *texts, of=[opt]):
        opt.load_state_dict(flat)


def test_a_flat_form_is_a_snapshot():
    opt = run(build(), 1)
    flat, want = opt.state_dict(flat=True), opt.state_dict()
    run(opt, 2)
    copy = build()
    copy.load_state_dict(flat)
    assert_same_dict(copy.state_dict(), want)
    before = everything(copy)
    flat["a/square_avg"][...] = 17
    assert everything(copy) == before


def test_strict_and_not_so_are_the_same_for_a_flat_form():
    opt = RMSProp({"a": np.ones(2), "b": np.ones(3)})
    other = RMSProp({"b": np.ones(3), "c": np.ones(4)}, lr=0.5)
    assert other.load_state_dict(through_npz(opt.state_dict(flat=True)), strict=False) == (["c"], ["a"])
    assert other.lr == 0.5


def test_it_lies_in_host_memory_in_c_order_whatever_the_parameters_do(xp):
    params = [xp.arange(6.0).reshape(2, 3).T for _ in range(2)]
    opt, copy = (RMSProp({"w": param}, skip_nonfinite=True) for param in params)
    opt.step({"w": xp.arange(6.0).reshape(3, 2)})
    opt.step({"w": xp.full((3, 2), xp.nan)})
    flat = opt.state_dict(flat=True)
    assert all(type(x) is np.ndarray and x.flags.c_contiguous for name, x in flat.items() if "/" in name)
    assert json.loads(flat["rmsprop_gpu"])["skipped_steps"] == 1
    copy.load_state_dict(through_npz(flat))
    assert copy.skipped_steps == 1
    assert bool((copy.state["w"]["square_avg"] == opt.state["w"]["square_avg"]).all())
