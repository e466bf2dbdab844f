"""State of fewer bytes is saved and loaded as codes, converts to and from float32, and mismatches are refused."""

import importlib
import re

import few_bytes as oracle
import ml_dtypes
import numpy as np
import pytest
from cuts import save
from devices import MODULES

from rmsprop_gpu import AdaGrad, RMSProp

BF, F4 = ml_dtypes.bfloat16, np.float32
either = pytest.mark.parametrize("module", MODULES)
CODES = pytest.mark.parametrize("moment", ["uint16", "uint8"])


def to_host(x):
    return x if isinstance(x, np.ndarray) else x.get()


def params(xp=np, dtype=F4):
    return {"v": xp.ones((30, 20), dtype), "w": xp.ones(129, dtype), "empty": xp.ones((0, 4), dtype)}


def grads(seed, xp=np, dtype=F4):
    rng = np.random.default_rng(seed)
    return {name: xp.asarray(rng.standard_normal(x.shape).astype(dtype)) for name, x in params(dtype=dtype).items()}


def assert_equal(x, y):
    assert x.tobytes() == y.tobytes()


def run(opt, steps, xp=np, dtype=F4, first=0):
    for step in range(first, first + steps):
        opt.step(grads(step, xp, dtype))
    return opt


def assert_same(opt, twin):
    for name, state in twin.state.items():
        assert list(opt.state[name]) == list(state)
        for kind, x in state.items():
            assert to_host(opt.state[name][kind]).tobytes() == to_host(x).tobytes(), (name, kind)


def ways(opt, later, path):
    """Each way to save and load a state."""
    yield "dict", lambda: later.load_state_dict(opt.state_dict())
    yield "flat", lambda: later.load_state_dict(opt.state_dict(flat=True))
    opt.save(path)
    yield "file", lambda: later.load(path)


@either
@CODES
@pytest.mark.parametrize("store", ["rest", "round"])
@pytest.mark.parametrize("way", ["dict", "flat", "file", "folder"])
def test_a_run_goes_on_on_the_same_bits(module, moment, store, way, tmp_path):
    """The seed comes from the saved run, whatever the new optimizer was built with."""
    xp = importlib.import_module(module)
    h = {
        "square_avg_dtype": moment,
        "store_param_remainders": store == "rest",
        "bf16_stochastic_round": store == "round",
        "momentum": 0.9,
    }
    one, two = params(xp, BF), params(xp, BF)
    whole, first = RMSProp(one, seed=7, **h), RMSProp(two, seed=7, **h)
    run(whole, 5, xp, BF)
    run(first, 3, xp, BF)
    later = RMSProp(two, seed=1, **h)
    if way == "folder":
        save(tmp_path / "run", first, 3)
        later.load(tmp_path / "run")
    else:
        dict(ways(first, later, tmp_path / "run.safetensors"))[way]()
    assert later.param_groups[0]["seed"] == 7
    run(later, 2, xp, BF, first=3)
    assert_same(later, whole)
    for name in one:
        assert to_host(one[name]).tobytes() == to_host(two[name]).tobytes()


@either
@CODES
def test_codes_load_into_float32_exactly_and_come_back(module, moment):
    xp = importlib.import_module(module)
    coded = run(RMSProp(params(xp), square_avg_dtype=moment), 3, xp)
    plain = RMSProp(params(xp))
    plain.load_state_dict(coded.state_dict())
    for name in params():
        found = plain.state[name]["square_avg"]
        assert found.dtype == F4
        assert found.tobytes() == coded.decoded_state(name)["square_avg"].tobytes()
    back = RMSProp(params(xp), square_avg_dtype=moment)
    back.load_state_dict(plain.state_dict())
    for name in params():  # the window may begin elsewhere, but the codes decode to the same values
        assert_equal(back.decoded_state(name)["square_avg"], coded.decoded_state(name)["square_avg"])


@either
@CODES
def test_a_parameter_without_dimensions_has_codes_like_any_other(module, moment):
    xp = importlib.import_module(module)
    p = xp.asarray(np.float32(2))
    opt, plain = RMSProp({"w": p}, square_avg_dtype=moment), RMSProp({"w": p})
    opt.step({"w": xp.asarray(np.float32(3))})
    decoded = opt.decoded_state("w")["square_avg"]
    assert isinstance(decoded, xp.ndarray)
    assert decoded.shape == ()
    plain.load_state_dict(opt.state_dict())
    assert plain.state["w"]["square_avg"] == decoded
    opt.load_state_dict(plain.state_dict())
    assert opt.decoded_state("w")["square_avg"] == decoded


@either
@CODES
def test_float32_states_are_coded_to_nearest(module, moment):
    xp = importlib.import_module(module)
    plain = run(RMSProp(params(xp)), 3, xp)
    coded = RMSProp(params(xp), square_avg_dtype=moment)
    coded.load_state_dict(plain.state_dict())
    for name, x in params().items():
        v, half = to_host(plain.state[name]["square_avg"]), np.full(x.size, 2**31)  # rounds to nearest
        codes = to_host(coded.state[name]["square_avg"]).reshape(-1)
        if moment == "uint16":
            assert np.array_equal(codes, oracle.encode16(v, half))
        else:
            wanted, bases = oracle.encode8(v, half)
            assert np.array_equal(codes, wanted)
            assert np.array_equal(to_host(coded.state[name]["square_avg_base"]), bases)


@either
@CODES
def test_it_starts_from_the_code_nearest_to_initial_scale(module, moment):
    xp = importlib.import_module(module)
    for opt in (RMSProp(params(xp), initial_scale=1.0, square_avg_dtype=moment),):
        for name in params():
            assert (to_host(opt.decoded_state(name)["square_avg"]) == 1).all()


def test_a_folder_is_read_by_another_format(tmp_path):
    coded = run(RMSProp(params(), square_avg_dtype="uint8"), 2)
    save(tmp_path / "run", coded, 2)
    plain = RMSProp(params())
    plain.load(tmp_path / "run")
    for name in params():
        assert plain.state[name]["square_avg"].tobytes() == coded.decoded_state(name)["square_avg"].tobytes()


def refused(message, act):
    with pytest.raises(ValueError, match=message):
        act()


def test_what_a_format_is_not_for_is_refused():
    half, double, bf = np.ones(3, np.float16), np.ones(3), np.ones(3, BF)
    turned = np.ones((3, 4), F4).T
    refused(
        r"square_avg_dtype is 'uint16' and params is float64; wanted 'float32'",
        lambda: RMSProp(double, square_avg_dtype="uint16"),
    )
    refused(r"sum_dtype is 'uint8' and params is float64", lambda: AdaGrad(double, sum_dtype="uint8"))
    refused(
        r"store_param_remainders is True and params is float16; wanted bfloat16",
        lambda: RMSProp(half, store_param_remainders=True),
    )
    refused(r"bf16_stochastic_round is True and params is float16", lambda: RMSProp(half, bf16_stochastic_round=True))
    refused(
        r"square_avg_dtype is 'uint16' and centered is True",
        lambda: RMSProp(np.ones(3, F4), centered=True, square_avg_dtype="uint16"),
    )
    refused(r"wanted one of them", lambda: RMSProp(bf, store_param_remainders=True, bf16_stochastic_round=True))
    refused(r"params is not C-contiguous; wanted C order", lambda: RMSProp(turned, square_avg_dtype="uint8"))
    refused(
        r"square_avg_dtype is 'uint4'; wanted one of 'float32', 'uint16', 'uint8'",
        lambda: RMSProp(half, square_avg_dtype="uint4"),
    )
    for given in ({"w": "uint16"}, np.array(["uint16", "uint8"]), 10**5000):
        refused(r"^square_avg_dtype is .*; wanted one of", lambda x=given: RMSProp({"w": bf}, square_avg_dtype=x))
    with pytest.raises(TypeError, match="sum_dtype"):
        RMSProp(bf, sum_dtype="uint16")
    opt = RMSProp(np.ones(3, F4), square_avg_dtype=np.uint16)
    assert opt.param_groups[0]["square_avg_dtype"] == "uint16"
    refused("it cannot change once the state exists", lambda: opt.param_groups[0].update(square_avg_dtype="uint8"))
    refused("square_avg_dtype is 'uint16' and centered", lambda: opt.param_groups[0].update(centered=True))


def test_a_float32_parameter_is_left_alone_in_a_mixed_model():
    mixed = {"a": np.ones(5, F4), "b": np.ones(5, BF)}
    for h in ({"store_param_remainders": True}, {"bf16_stochastic_round": True}):
        opt, plain = RMSProp(mixed, **h), RMSProp(mixed["a"].copy())
        opt.step({"a": np.ones(5, F4), "b": np.ones(5, BF)})
        plain.step(np.ones(5, F4))
        assert opt.state["a"]["square_avg"].tobytes() == plain.state[0]["square_avg"].tobytes()
        assert "param_remainder" not in opt.state["a"]


def test_codes_of_another_format_are_named():
    saved = run(RMSProp(params(), square_avg_dtype="uint16"), 1).state_dict()
    opt = run(RMSProp(params(), square_avg_dtype="uint8"), 1)
    before = {name: {k: x.copy() for k, x in state.items()} for name, state in opt.state.items()}
    with pytest.raises(ValueError, match=r"has codes of uint16; wanted uint8, as this optimizer has them, or float32"):
        opt.load_state_dict(saved)
    for name, state in before.items():
        assert all(opt.state[name][k].tobytes() == x.tobytes() for k, x in state.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entry: entry.update(square_avg_base=entry["square_avg_base"][:-1]), r"has shape \(4,\); wanted \(5,\)"),
        (lambda entry: entry.pop("square_avg_base"), "lacks 'square_avg_base'"),
        (lambda entry: entry["square_avg_base"].fill(1786), "has elements above 1785; wanted bases of codes"),
        (lambda entry: entry.update(square_avg_base=entry["square_avg_base"].astype(np.int16)), "wanted uint16"),
    ],
)
def test_bases_that_do_not_fit_their_codes_are_refused(change, message):
    opt = run(RMSProp(params(), square_avg_dtype="uint8"), 2)
    saved = opt.state_dict()
    change(saved["state"]["v"])
    before = opt.state_dict()
    with pytest.raises((ValueError, TypeError), match=message):
        opt.load_state_dict(saved)
    assert_same(opt, type("Was", (), {"state": before["state"]}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entry: entry.update(square_avg_base=entry["square_avg_base"][:-1]), r"has shape \(4,\); wanted \(5,\)"),
        (lambda entry: entry.pop("square_avg_base"), "without the bases that belong to them"),
        (lambda entry: entry["square_avg_base"].fill(65535), "has elements above 1785; wanted bases of codes"),
        (lambda entry: entry.update(square_avg_base=entry["square_avg_base"].astype(F4)), "float32; wanted uint16"),
        (lambda entry: entry.update(square_avg_base=[1] * 5), "is a list; wanted a NumPy or CuPy array"),
    ],
)
def test_bases_that_do_not_fit_are_refused_where_their_codes_become_float32(change, message):
    saved = run(RMSProp(params(), square_avg_dtype="uint8"), 2).state_dict()
    change(saved["state"]["v"])
    opt = run(RMSProp(params()), 1)
    before = opt.state_dict()
    with pytest.raises((ValueError, TypeError), match=message) as error:
        opt.load_state_dict(saved)
    assert "lacks" not in str(error.value)
    assert_same(opt, type("Was", (), {"state": before["state"]}))


def test_bases_beside_codes_of_16_bits_are_refused():
    """Even if another group has 8-bit codes, and if the codes load into float32."""
    formats = {"a": "uint16", "b": "uint8"}
    groups = [{"params": {name: np.ones(200, F4)}, "square_avg_dtype": x} for name, x in formats.items()]
    opt, plain = RMSProp(groups), RMSProp([{**group, "square_avg_dtype": "float32"} for group in groups])
    saved = opt.state_dict()
    saved["state"]["a"]["square_avg_base"] = np.zeros(2, np.uint16)
    for later in (opt, plain):
        with pytest.raises(ValueError, match=r"state\[\"a\"\] has 'square_avg_base'; wanted only"):
            later.load_state_dict(saved)
        assert "square_avg_base" not in later.state["a"]


def test_a_state_without_remainders_goes_on_with_them_and_one_with_them_without():
    """Remainders start at 0, as for new parameters. Those that are no longer kept are dropped."""
    p = params(dtype=BF)
    opt, plain = RMSProp(p, store_param_remainders=True), RMSProp(p)
    run(opt, 2, dtype=BF), run(plain, 1, dtype=BF)
    opt.load_state_dict(plain.state_dict())
    assert all((entry["param_remainder"] == 0).all() for entry in opt.state.values())
    run(opt, 1, dtype=BF)
    plain.load_state_dict(opt.state_dict())
    assert not any("param_remainder" in entry for entry in plain.state.values())
    assert_equal(plain.state["w"]["square_avg"], opt.state["w"]["square_avg"])


def test_a_state_of_torch_goes_on_with_remainders():
    opt = RMSProp({"w": np.ones(2, BF)}, store_param_remainders=True)
    group = {"lr": 0.1, "alpha": 0.99, "eps": 1e-8, "weight_decay": 0, "momentum": 0, "centered": False}
    state = {0: {"step": 3.0, "square_avg": np.full(2, 0.25, F4)}}
    opt.load_foreign("torch", {"state": state, "param_groups": [{**group, "params": [0]}]})
    assert opt.state["w"]["param_remainder"].tolist() == [0, 0]


@CODES
def test_float32_states_below_zero_are_refused_before_they_are_codes(moment):
    """A code has no sign, so a negative value would become NaN. -0.0 loads as 0."""
    opt = run(RMSProp(params(), square_avg_dtype=moment), 1)
    saved, before = run(RMSProp(params()), 1).state_dict(), opt.state_dict()
    saved["state"]["w"]["square_avg"][3] = -1.0
    with pytest.raises(ValueError, match=r"square_avg\"\] has elements below 0; wanted averages"):
        opt.load_state_dict(saved)
    assert_same(opt, type("Was", (), {"state": before["state"]}))
    saved["state"]["w"]["square_avg"][:] = -0.0
    opt.load_state_dict(saved)
    assert (opt.decoded_state("w")["square_avg"] == 0).all()


def test_older_states_load():
    """States saved before there were formats."""
    opt = run(RMSProp(params()), 2)
    saved = opt.state_dict()
    for name in ("square_avg_dtype", "store_param_remainders", "bf16_stochastic_round", "seed"):
        del saved["param_groups"][0][name]
    later = RMSProp(params())
    later.load_state_dict(saved)
    assert_same(later, opt)


def test_what_explain_and_repr_say():
    opt = RMSProp(np.ones(4, F4), square_avg_dtype="uint16")
    assert "v is stored in 16 bits, rounded stochastically" in opt.explain()
    assert re.search(r"square_avg_dtype='uint16' \('float32'\): v takes 2 bytes instead of 4", opt.explain())
    assert "square_avg_dtype='uint16'" in repr(opt)
