"""Groups and masks: which parameters decay, and the cost of groups."""

import numpy as np
import pytest

from rmsprop_gpu import AdaGrad, RMSProp
from rmsprop_gpu.profiling import profile

SHAPES = {"conv.weight": (4, 3), "conv.bias": (4,), "norm.scale": (4,), "head": (2, 4)}
GIVEN = {"lr": 0.1, "weight_decay": 0.5}


def weights(array=np.ones):
    return {name: array(shape) * (1 + i) for i, (name, shape) in enumerate(SHAPES.items())}


def gradients():
    return {name: np.full(shape, 0.1 * (1 + i)) for i, (name, shape) in enumerate(SHAPES.items())}


def stepped(make=RMSProp, params=None, *, grouped=False, **given):
    params = weights() if params is None else params
    opt = make(params, **{**GIVEN, **given})
    for _ in range(2):
        opt.step([gradients()] if grouped else gradients())
    return opt, params


BARE = ["conv.bias", "norm.scale"]
WAYS = {
    "names": lambda params: BARE,
    "a set of names": lambda params: set(BARE),
    "arrays": lambda params: [params[name] for name in BARE],
    "both": lambda params: [BARE[0], params[BARE[1]]],
    "a predicate": lambda params: lambda name, x: x.ndim < 2,
    "a predicate of the name": lambda params: lambda name, x: name in BARE,
}


@pytest.mark.parametrize("make", [RMSProp, AdaGrad])
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_no_decay_is_weight_decay_0_for_those(way, decoupled, make):
    params, given = weights(), {"decoupled_weight_decay": decoupled}
    opt, _ = stepped(make, params, no_decay=WAYS[way](params), **given)
    _, decayed = stepped(make, **given)
    _, bare = stepped(make, **given, weight_decay=0)
    for name in SHAPES:
        assert np.array_equal(params[name], (bare if name in BARE else decayed)[name])
        assert not np.array_equal(bare[name], decayed[name])
    assert [group["weight_decay"] for group in opt.param_groups] == [0.5, 0.0]
    assert [len(group["params"]) for group in opt.param_groups] == [2, 2]


def test_one_array_and_all_arrays():
    param = np.ones(3)
    opt = RMSProp(param, no_decay=param, **GIVEN)
    assert [group["weight_decay"] for group in opt.param_groups] == [0.0]
    opt.step(np.ones(3))
    want = np.ones(3)
    RMSProp(want, lr=0.1).step(np.ones(3))
    assert np.array_equal(param, want)


def test_groups_keep_their_own_hyperparameters_and_order():
    a, b, c = np.ones(3), np.ones((3, 1)), np.ones(2)
    groups = [{"params": {"a": a, "b": b}, "lr": 0.5}, {"params": [c], "alpha": 0.5}]
    opt = RMSProp(groups, weight_decay=0.1, no_decay=lambda name, x: x.ndim == 1)
    assert [(g["lr"], g["alpha"], g["weight_decay"]) for g in opt.param_groups] == [
        (0.5, 0.9, 0.1),
        (0.5, 0.9, 0.0),
        (0.01, 0.5, 0.0),
    ]
    assert [len(g["params"]) for g in opt.param_groups] == [1, 1, 1]
    opt.step([{"a": np.full(3, 1.0), "b": np.full((3, 1), 2.0)}, [np.full(2, 3.0)]])
    want = np.ones((3, 1))
    RMSProp(want, lr=0.5, weight_decay=0.1).step(np.full((3, 1), 2.0))
    assert np.array_equal(b, want)  # each parameter got its own gradient
    saved = opt.state_dict()
    assert [entry["params"] for entry in saved["param_groups"]] == [["b"], ["a"], ["2"]]
    opt.load_state_dict(saved)


def test_a_profile_gives_each_parameter_its_gradient():
    params = {"a": np.ones(40), "b": np.ones((50, 2)), "c": np.ones(60)}
    opt = RMSProp(params, weight_decay=0.1, no_decay=["a", "c"])
    report = profile(opt, {name: np.ones_like(x) for name, x in params.items()}, repeats=1)
    assert sorted(launch.elements for launch in report.launches) == [100, 100]
    assert {launch.tensors for launch in report.launches} == {1, 2}


WRONG = {
    "an unknown name": (
        ["conv.bias", "bias"],
        ValueError,
        ['no_decay[1] is "bias"', "there are conv.weight,"],
    ),
    "another array": ([np.ones(4)], ValueError, ["no_decay[0] is a numpy.ndarray, which is not a parameter here"]),
    "one string": ("conv.bias", TypeError, ["no_decay is a str; wanted a list of names"]),
    "a mapping": ({"conv.bias": True}, TypeError, ["no_decay is a dict"]),
    "a number": (3, TypeError, ["no_decay is an int"]),
    "a vague predicate": (lambda name, x: 0, TypeError, ["no_decay('conv.weight', ...) is 0 (a int)"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_no_decay_is_refused(case):
    given, kind, texts = WRONG[case]
    with pytest.raises(kind) as error:
        RMSProp(weights(), no_decay=given)
    assert all(text in str(error.value) for text in texts)


@pytest.mark.parametrize("array", [np.ones, pytest.param("cupy", marks=pytest.mark.gpu)], ids=["cpu", "cuda"])
def test_launches_grow_with_switches_and_not_with_groups(array):
    if array == "cupy":
        import cupy

        array = cupy.ones
    many = [{"params": [array(5)], "lr": 0.1 * i, "weight_decay": 0.1} for i in range(10)]
    opt = RMSProp(many, no_decay=[f"{i}" for i in range(5)])
    opt.step([[array(5)]] * 10)
    assert len(opt.param_groups) == 10
    assert len(opt._planner.plan().batches) == len(opt.kernels()) == 2


def test_presets_take_it():
    params = weights()
    opt = RMSProp.from_preset("keras", params, weight_decay=0.1, no_decay=BARE)
    assert [len(group["params"]) for group in opt.param_groups] == [2, 2]


OTHERS = {"name": "head", "initial_lr": 0.5, "lr_scale": [1, 2], "swa_lr": 0.1, "max_momentum": 0.9, "layer_id": 3}


@pytest.mark.parametrize("make", [RMSProp, AdaGrad])
def test_keys_of_others_are_kept_and_change_no_step(make):
    (opt, params), (plain, bare) = (
        stepped(make, [{"params": weights(), "lr": 0.2, **own}], no_decay=BARE, weight_decay=0.5, grouped=True)
        for own in (OTHERS, {})
    )
    for group, want in zip(opt.param_groups, plain.param_groups, strict=True):
        assert dict(group) == {**dict(want), **OTHERS, "params": group["params"]}
        assert group.hyper() == want.hyper()
    for name in SHAPES:
        assert np.array_equal(params[0]["params"][name], bare[0]["params"][name])


def test_keys_of_others_come_with_a_load_and_stay_without_one():
    there = RMSProp([{"params": weights(), **OTHERS}])
    saved = there.state_dict()
    assert {name: saved["param_groups"][0][name] for name in OTHERS} == OTHERS
    opt = RMSProp([{"params": weights(), "name": "mine", "tag": 1}])
    opt.load_state_dict(saved, strict=False)
    assert (opt.param_groups[0]["name"], len(opt.param_groups[0])) == ("mine", len(there.param_groups[0]) - 4)
    opt.load_state_dict(saved)
    assert {name: opt.param_groups[0][name] for name in (*OTHERS, "tag")} == {**OTHERS, "tag": 1}
    opt.lr = 0.5
    opt.param_groups[0].update(initial_lr=0.25, alpha=0.5)
    assert [opt.param_groups[0][name] for name in ("initial_lr", "alpha", "name")] == [0.25, 0.5, "head"]


REFUSED = {
    **dict.fromkeys(["betas", "rho", "dampening", "beta_1", "b1", "foreach"], "is a hyperparameter, but not here"),
    "momentun": "close to 'momentum'",
    "weightdecay": "close to 'weight_decay'",
    "alfa": "close to 'alpha'",
    "esp": "close to 'eps'",
    "LR": "close to 'lr'",
    "learning-rate": "close to 'learning_rate'",
    "lr_in_momentun": "close to 'lr_in_momentum'",
}


@pytest.mark.parametrize("make", [RMSProp, AdaGrad])
@pytest.mark.parametrize("name", REFUSED)
def test_hyperparameters_of_others_and_misspelt_ones_say_what_they_are(name, make):
    with pytest.raises(TypeError, match=f"params.0. has '{name}', .*{REFUSED[name]}"):
        make([{"params": weights(), name: 0.5}])
    opt = make(weights())
    saved = opt.state_dict()
    saved["param_groups"][0][name] = 0.5
    with pytest.raises(ValueError, match=f"param_groups.0. has '{name}', .*{REFUSED[name]}"):
        opt.load_state_dict(saved)
    assert len(opt.param_groups[0]) == 1 + len(opt.param_groups[0].hyper())
