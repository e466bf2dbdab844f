"""Skipped steps and averages in a state dict: saving, loading, and what is refused."""

import importlib

import numpy as np
import pytest
from on_either import AVERAGED, F4, assert_same, host, mixed, mixed_grads, on, params_of, refusing
from variants import bits

from rmsprop_gpu import RMSProp


def trained(xp, **given):
    opt = mixed(xp, 0, **given)
    for step, found in enumerate((False, True, False, True)):
        opt.step(on(xp, mixed_grads(step)), found_inf=found)
    return opt


def fresh_like(opt, xp):
    twin = mixed(xp, 9, lr=7.0)
    for p, q in zip(params_of(twin), params_of(opt), strict=True):
        p[...] = xp.asarray(host(q))
    return twin


def test_skipped_steps_and_averages_go_out_and_come_in(xp):
    opt = trained(xp)
    saved = opt.state_dict()
    assert int(saved["skipped_steps"]) == opt.skipped_steps == 2
    twin = fresh_like(opt, xp)
    assert twin.load_state_dict(saved) == ([], [])
    assert (twin.skipped_steps, twin.steps) == (2, 4)
    for x in (opt, twin):
        x.step(on(xp, mixed_grads(5)), found_inf=False)
        x.step(on(xp, mixed_grads(6)), found_inf=True)
    assert_same(opt, twin)
    assert (twin.skipped_steps, int(saved["skipped_steps"])) == (3, 2)  # the saved dict is a snapshot
    assert [bits(twin.ema[key]) for key in twin.ema] == [bits(opt.ema[key]) for key in opt.ema]


def as_numpy(saved):
    state = {key: {name: host(x) for name, x in entry.items()} for key, entry in saved["state"].items()}
    return {**saved, "skipped_steps": int(saved["skipped_steps"]), "state": state}


@pytest.mark.gpu
@pytest.mark.parametrize("way", [("numpy", "cupy"), ("cupy", "numpy")])
@pytest.mark.parametrize("form", [lambda saved: saved, as_numpy], ids=["as it is", "on the host"])
def test_they_go_from_host_to_device_and_back(way, form):
    there, here = map(importlib.import_module, way)
    opt = trained(there)
    twin = fresh_like(opt, here)
    twin.load_state_dict(form(opt.state_dict()))
    opt.step(on(there, mixed_grads(5)), found_inf=True)
    twin.step(on(here, mixed_grads(5)), found_inf=True)
    opt.step(on(there, mixed_grads(6)), found_inf=False)
    twin.step(on(here, mixed_grads(6)), found_inf=False)
    assert_same(opt, twin)
    assert twin.skipped_steps == opt.skipped_steps == 3


@pytest.mark.parametrize(
    "count", [-1, 1.0, "2", None, True, 2**62, [1], np.ones(1, np.int64), np.ones((), F4)], ids=repr
)
def test_a_count_of_skipped_steps_that_is_none_is_refused(count):
    opt = trained(np)
    with refusing(opt, TypeError, 'state_dict["skipped_steps"] is ', "wanted a count >= 0"):
        opt.load_state_dict({**opt.state_dict(), "skipped_steps": count})
    opt.load_state_dict({**opt.state_dict(), "skipped_steps": np.array(5)})
    assert opt.skipped_steps == 5


def test_a_state_from_before_there_was_any_of_this_is_loaded():
    opt, twin = RMSProp(np.ones(5, F4)), RMSProp(np.ones(5, F4), skip_nonfinite=True)
    opt.step(np.ones(5, F4))
    saved = opt.state_dict()
    del saved["skipped_steps"]
    twin.step(np.full(5, np.nan, F4))
    twin.load_state_dict(saved)
    assert (twin.skipped_steps, twin.steps) == (0, 1)


def test_loading_without_strict_takes_averages_and_leaves_hyperparameters():
    def make(names, **given):
        return RMSProp({name: np.full(3, 2, F4) for name in names}, **AVERAGED, **given)

    opt = make("ab", ema_momentum=0.5)
    for found in (False, True, False):
        opt.step({name: np.ones(3, F4) for name in "ab"}, found_inf=found)
    twin = make("bc", ema_momentum=0.25)
    assert twin.load_state_dict(opt.state_dict(), strict=False) == (["c"], ["a"])
    assert bits(twin.ema["b"]) == bits(opt.ema["b"])
    assert (twin.ema["c"] == 2).all()
    assert (twin.param_groups[0]["ema_momentum"], twin.skipped_steps) == (0.25, 1)


def test_an_average_that_a_state_lacks_starts_from_the_parameter():
    opt, twin = (RMSProp({"w": np.full(3, 2, F4)}, **h) for h in ({"bias_correction": True}, AVERAGED))
    for x in (opt, twin):
        x.step({"w": np.ones(3, F4)})
    saved = opt.state_dict()
    with refusing(twin, ValueError, "state[\"w\"] lacks 'ema', which its hyperparameters need"):
        twin.load_state_dict(saved, strict=False)
    params_of(twin)[0][...] = 5
    twin.load_state_dict(saved)
    assert twin.param_groups[0]["use_ema"] is False  # as it was saved
    assert (twin.ema["w"] == 5).all()


WRONG_AVERAGES = {
    "shape": (np.zeros(4, F4), ValueError, ['state["w"]["ema"] has shape (4,); wanted (3,)']),
    "dtype": (np.zeros(3), TypeError, ['state["w"]["ema"] has dtype float64; wanted float32']),
    "list": ([0.0] * 3, TypeError, ['state["w"]["ema"] is a list']),
}


@pytest.mark.parametrize("case", WRONG_AVERAGES)
def test_a_wrong_average_is_refused(case):
    value, kind, texts = WRONG_AVERAGES[case]
    opt = RMSProp({"w": np.ones(3, F4)}, **AVERAGED)
    opt.step({"w": np.ones(3, F4)})
    saved = opt.state_dict()
    saved["state"]["w"]["ema"] = value
    with refusing(opt, kind, *texts):
        opt.load_state_dict(saved)


def test_a_state_dict_from_before_there_were_averages_loads():
    opt = RMSProp(np.ones(3), lr=0.5)
    opt.step(np.ones(3))
    saved = opt.state_dict()
    for name in ("use_ema", "ema_momentum"):
        del saved["param_groups"][0][name]
    del saved["skipped_steps"]
    twin = RMSProp(np.ones(3))
    twin.load_state_dict(saved)
    assert twin.lr == 0.5
    assert not twin.param_groups[0]["use_ema"]
