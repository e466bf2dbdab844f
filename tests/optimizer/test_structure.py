"""The structures of parameters and gradients."""

from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import pytest
from on_host import assert_same, assert_same_bits, everything, one, random, refused

from rmsprop_gpu import RMSProp

SIZES = 4, 5, 6


def arrays(seed):
    return random(seed, *SIZES)


def named(seed):
    return dict(zip("abc", arrays(seed), strict=True))


# How to build a structure from three arrays, and the keys of its state.
STRUCTURES = {
    "list": (list, "012"),
    "tuple": (tuple, "012"),
    "generator": (lambda x: (a for a in x), "012"),
    "dict": (lambda x: dict(zip("abc", x, strict=True)), "abc"),
    "other mapping": (lambda x: MappingProxyType(OrderedDict(zip("abc", x, strict=True))), "abc"),
    "values of a dict": (lambda x: dict(zip("abc", x, strict=True)).values(), "012"),
    "groups of arrays": (lambda x: [{"params": a} for a in x], "012"),
    "group of a list": (lambda x: [{"params": list(x)}], "012"),
    "group of a tuple": (lambda x: ({"params": tuple(x)},), "012"),
    "generator of groups": (lambda x: ({"params": (a for a in [b])} for b in x), "012"),
    "group of a dict": (lambda x: [{"params": dict(zip("abc", x, strict=True))}], "abc"),
    "groups of each": (lambda x: [{"params": {"w": x[0]}}, {"params": [x[1]]}, {"params": x[2]}], "w12"),
    "groups with an empty one": (lambda x: [{"params": []}, {"params": {}}, {"params": list(x)}], "012"),
}


def mirrored(structure):
    """The gradients for a structure: for groups, a list of what is under "params"."""
    entries = structure if isinstance(structure, (list, tuple)) else None
    if entries and isinstance(entries[0], dict) and "params" in entries[0]:
        return type(entries)(group["params"] for group in entries)
    return structure


@pytest.mark.parametrize("name", STRUCTURES)
def test_every_structure_gives_the_same_steps(name):
    build, keys = STRUCTURES[name]
    params, plain_params = arrays(1), arrays(1)
    opt, plain = RMSProp(build(params), lr=0.1), RMSProp(plain_params, lr=0.1)
    for seed in (2, 3):
        grads = build(arrays(seed))
        opt.step([group["params"] for group in grads] if name == "generator of groups" else mirrored(grads))
        plain.step(arrays(seed))
    for p, q in zip(params, plain_params, strict=True):
        assert_same_bits(p, q)
    assert "".join(opt.state) == keys
    assert opt.state[keys[1]]["step"].ctypes.data == opt.state[1]["step"].ctypes.data
    for key, i in zip(keys, range(3), strict=True):
        assert_same_bits(opt.state[key]["square_avg"], plain.state[i]["square_avg"])


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 3), (2, 0, 3)])
def test_one_array(shape):
    param, grad = np.ones(shape), np.full(shape, 0.5)
    opt = RMSProp(param, lr=0.1, eps=0)
    opt.step(grad)
    np.testing.assert_allclose(param, 1 - 0.1 / np.sqrt(0.1), rtol=1e-15)
    assert list(opt.state) == ["0"]
    assert opt.state[0]["step"] == 1


def test_gradients_go_by_name_whatever_their_order():
    opt, twin = RMSProp(named(1)), RMSProp(named(1))
    opt.step(dict(reversed(named(2).items())))
    twin.step(named(2))
    assert_same(opt, twin)


def test_names_may_be_any_strings():
    names = ["", "a.b", 'a"b', "a\\b", "ä", "params", "0"]
    opt = RMSProp({name: one(1) for name in names})
    opt.step({name: one(2) for name in names})
    assert list(opt.state) == names
    with refused(ValueError, r'grads["a\"b"] has shape (2,)', of=[opt]):
        opt.step({**dict.fromkeys(names), 'a"b': np.zeros(2, np.float32)})
    with refused(ValueError, r'grads["a\\b"] is missing', of=[opt]):
        opt.step({name: None for name in names if name != "a\\b"})


class Frozen(Mapping):
    """Makes its inner mappings anew on each access, as flax's FrozenDict does."""

    def __init__(self, entries):
        self._entries = entries

    def __getitem__(self, key):
        entry = self._entries[key]
        return Frozen(entry) if isinstance(entry, dict) else entry

    def __iter__(self):
        return iter(self._entries)

    def __len__(self):
        return len(self._entries)


def flax_tree(a, b, c):
    return {"params": {"Dense_0": {"kernel": a, "bias": b}, "Dense_1": {"kernel": c}}}


FLAX = ["params.Dense_0.kernel", "params.Dense_0.bias", "params.Dense_1.kernel"]
NESTED = {
    "flax": (flax_tree, FLAX),
    "frozen": (lambda *x: Frozen(flax_tree(*x)), FLAX),
    "lists in a mapping": (lambda a, b, c: {"layers": [a, [b]], "head": (c,)}, ["layers.0", "layers.1.0", "head.0"]),
    "list of mappings": (lambda a, b, c: [{"w": a, "b": b}, {"w": c}], ["0.w", "0.b", "1.w"]),
    "parameters that are called like hyperparameters": (
        lambda a, b, c: {"alpha": a, "params": [b, c]},
        ["alpha", "params.0", "params.1"],
    ),
    "integers": (lambda a, b, c: {"at": {0: {"w": a}, 1: {"w": b}}, 2: c}, ["at.0.w", "at.1.w", "2"]),
    "empty ones": (lambda a, b, c: {"x": {}, "y": [[], a, {"w": b, "n": ()}], "z": c}, ["y.1", "y.2.w", "z"]),
    "dots in names": (lambda a, b, c: {"a.b": a, "a": {"c": b, "": c}}, ["a.b", "a.c", "a."]),
}
UNNAMED = {
    "lists": (lambda a, b, c: [[a, b], (c,)], ["0.0", "0.1", "1.0"]),
    "list of an array and a mapping": (lambda a, b, c: (a, {"w": b, "b": c}), ["0", "1.w", "1.b"]),
}


@pytest.mark.parametrize("name", NESTED | UNNAMED)
def test_nested_parameters_step_as_flat_ones(name):
    build, keys = (NESTED | UNNAMED)[name]
    params, plain_params = arrays(1), arrays(1)
    opt, plain = RMSProp(build(*params), lr=0.1), RMSProp(plain_params, lr=0.1)
    assert list(opt.state) == keys
    assert opt.state_dict()["param_groups"][0]["params"] == keys
    for seed in (2, 3, 4):
        a, b, c = arrays(seed)
        opt.step(build(a, None, c) if seed == 3 else build(a, b, c))
        plain.step([a, None, c] if seed == 3 else [a, b, c])
    for p, q, key, i in zip(params, plain_params, keys, range(3), strict=True):
        assert_same_bits(p, q)
        assert_same_bits(opt.state[key]["square_avg"], plain.state[i]["square_avg"])
    assert [int(opt.state[key]["step"]) for key in keys] == [3, 2, 3]


GROUPED = {
    "groups of mappings": (lambda a, b, c: [{"params": {"x": a}}, {"params": {"y": b, "z": c}}], ["x", "y", "z"]),
    "groups of trees": (
        lambda a, b, c: [{"params": {"x": {"w": a}, "y": [b]}}, {"params": [[], {"w": c}]}],
        ["x.w", "y.0", "3.w"],
    ),
    "a group of a list of mappings": (
        lambda a, b, c: [{"params": [{"w": a}, {"w": b}, {"w": c}]}],
        ["0.w", "1.w", "2.w"],
    ),
}


@pytest.mark.parametrize("name", NESTED | GROUPED)
def test_gradients_of_named_parameters_may_come_by_name(name):
    build, keys = (NESTED | GROUPED)[name]
    params, twins = arrays(1), arrays(1)
    opt, twin = RMSProp(build(*params)), RMSProp(build(*twins))
    opt.step(dict(zip(keys, arrays(2), strict=True)))
    opt.step(MappingProxyType(dict(zip(reversed(keys), reversed(arrays(3)), strict=True))))
    twin.step(mirrored(build(*arrays(2))))
    twin.step(mirrored(build(*arrays(3))))
    assert_same(opt, twin)
    assert list(opt.state) == keys


def test_nested_parameters_lie_on_either_side(xp):
    params, plain_params = ([xp.arange(n, dtype=xp.float32) for n in SIZES] for _ in range(2))
    opt, plain = RMSProp(flax_tree(*params), momentum=0.9), RMSProp(plain_params, momentum=0.9)
    for k in (1, 2):
        grads = [x * k + 1 for x in plain_params]
        opt.step(flax_tree(*grads) if k == 1 else dict(zip(FLAX, grads, strict=True)))
        plain.step(grads)
    assert all(bool((p == q).all()) for p, q in zip(params, plain_params, strict=True))


def test_names_of_lists_in_groups_go_on_behind_empty_entries():
    opt = RMSProp([{"params": [[], (), one(1)]}, {"params": [one(2), {"w": one(3)}]}])
    assert list(opt.state) == ["2", "3", "4.w"]


def test_gradients_of_mappings_without_parameters_may_be_missing():
    """flax's unflatten_dict(flatten_dict(...)) drops them."""
    opt, twin = RMSProp({"x": {}, "y": {"w": one(1), "n": []}}), RMSProp({"y": {"w": one(1)}})
    opt.step({"y": {"w": one(2)}})
    twin.step({"y": {"w": one(2)}})
    assert_same_bits(opt.param_groups[0]["params"][0], twin.param_groups[0]["params"][0])


def test_no_decay_takes_names_of_nested_parameters():
    opt = RMSProp(flax_tree(*arrays(1)), weight_decay=0.1, no_decay=["params.Dense_0.bias"])
    assert opt.state_dict()["param_groups"][1]["params"] == ["params.Dense_0.bias"]
    seen = []
    RMSProp(flax_tree(*arrays(1)), no_decay=lambda name, x: bool(seen.append(name)))
    assert seen == FLAX


def test_overrides_of_a_group_apply_to_it_alone():
    overrides = [
        {},
        {"lr": 0.3, "alpha": 0.5, "eps": 1e-3},
        {"weight_decay": 0.1, "momentum": 0.9, "centered": True, "initial_scale": 0.5},
        {"lr": lambda step: 0.1 * step},
    ]
    params, separate = random(1, 3, 4, 5, 6), random(1, 3, 4, 5, 6)
    opt = RMSProp([{"params": p, **h} for p, h in zip(params, overrides, strict=True)], lr=0.2, alpha=0.8)
    twins = [RMSProp(p, **{"lr": 0.2, "alpha": 0.8, **h}) for p, h in zip(separate, overrides, strict=True)]
    for seed in (2, 3):
        grads = random(seed, 3, 4, 5, 6)
        opt.step(grads)
        for twin, grad in zip(twins, grads, strict=True):
            twin.step(grad)
    for group, p, twin in zip(opt.param_groups, separate, twins, strict=True):
        assert_same_bits(group["params"][0], p)
        assert group.hyper() == twin.param_groups[0].hyper()
    assert "grad_avg" in opt.state[2]
    assert "grad_avg" not in opt.state[1]


# Parameters that are refused


class Layer(NamedTuple):
    kernel: np.ndarray
    bias: np.ndarray


@dataclass
class Cell:
    kernel: np.ndarray


A, B = one(1), one(2)
LONE = 'a mapping from name to array, these nested, or a list of groups (mappings with "params")'
WRONG_PARAMS = {
    "None": (None, TypeError, ["params is a NoneType", LONE]),
    "str": ("weights.npy", TypeError, ["params is a str", LONE]),
    "bytes": (b"", TypeError, ["params is a bytes", LONE]),
    "set": ({1, 2}, TypeError, ["params is a set", LONE]),
    "number": (1.0, TypeError, ["params is a float"]),
    "scalar": (np.float32(1), TypeError, ["params is a numpy.float32"]),
    "empty list": ([], ValueError, ["params is empty"]),
    "empty mapping": ({}, ValueError, ["params is empty"]),
    "empty generator": (iter(()), ValueError, ["params is empty"]),
    "empty groups": ([{"params": []}, {"params": {}}], ValueError, ["no array in any of them"]),
    "None inside": ([A, None], TypeError, ["params[1] is a NoneType"]),
    "None in a list in a list": ([[A], [None]], TypeError, ["params[1][0] is a NoneType"]),
    "pairs": ([("a", A)], TypeError, ["params[0][0] is a str"]),
    "empty ones alone": ({"a": {}, "b": [[], ()]}, ValueError, ["params is empty"]),
    "name of another kind": ({1.0: A}, TypeError, ["the name 1.0 (a float)", "strings or integers"]),
    "True as a name": ({"a": {True: A}}, TypeError, ['params["a"] has the name True (a bool)']),
    "name of another kind in a group": ([{"params": {None: A}}], TypeError, ["params[0] has the name None"]),
    "one group that is no list": ({"params": [A], "lr": 0.1}, TypeError, ["one group", "wanted a list of groups"]),
    "group and array": ([{"params": A}, B], TypeError, ["params[1] is a", "group"]),
    "array and group": ([A, {"params": B}], TypeError, ["params[0] is a", "group"]),
    "group without params": ([{"lr": 0.1}], TypeError, ["params[0] is a mapping with keys ['lr']", '"params"']),
    "params of a group None": ([{"params": A}, {"params": None}], TypeError, ["params[1] is a NoneType"]),
    "params of a group a set": ([{"params": {1}}], TypeError, ["params[0] is a set"]),
    "groups in a group": (
        [{"params": [{"params": [A], "lr": 1.0}]}],
        TypeError,
        ["params[0][0] is one group", "wanted a list of groups"],
    ),
    "a group in a mapping": ({"a": {"params": {"w": A}, "lr": 1.0}}, TypeError, ['params["a"] is one group']),
    "a group with a schedule in a mapping": ({"a": {"params": [A], "lr": abs}}, TypeError, ['params["a"] is one']),
    "group with a misspelt key": ([{"param": [A], "lr": 1.0}], TypeError, ["keys ['param', 'lr']", "wanted a group"]),
    "list of layers, one of which has parameters": ([{"params": A}, {"w": B}], TypeError, ["params[1] is a mapping"]),
    "named tuple": (Layer(A, B), TypeError, ["params is a ", "Layer, a named tuple", "_asdict()"]),
    "named tuple inside": ({"a": [Layer(A, B)]}, TypeError, ['params["a"][0] is a ', "Layer, a named"]),
    "dataclass": ({"a": Cell(A)}, TypeError, ['params["a"] is a ', "Cell, a dataclass", "vars(...)"]),
    "set inside": ({"a": {1, 2}}, TypeError, ['params["a"] is a set']),
    "generator inside": ({"a": iter([A])}, TypeError, ['params["a"] is a list_iterator']),
    "dotted name and nested one": (
        {"a.b": A, "a": {"b": B}},
        ValueError,
        ['params["a"]["b"] and params["a.b"] share the name \'a.b\'; wanted two'],
    ),
    "integer and its text": ({0: A, "0": B}, ValueError, ['params["0"] and params[0] share the name']),
    "nested ones of two groups": (
        [{"params": {"a": {"b": A}}}, {"params": {"a": [], "a.b": B}}],
        ValueError,
        ['params[1]["a.b"] and params[0]["a"]["b"] share the name'],
    ),
    "tied": ({"a": (tied := {"w": A}), "b": tied}, ValueError, ['params["b"]["w"] overlaps params["a"]["w"]']),
    "unknown hyperparameter": (
        [{"params": A}, {"params": B, "rho": 1}],
        TypeError,
        ["params[1] has 'rho'", "lr, alpha"],
    ),
    "hyperparameter that is no name": ([{"params": A, 1: 1}], TypeError, ["params[0] has 1"]),
    "one name twice": ([{"params": {"w": A}}, {"params": {"w": B}}], ValueError, ['params[1]["w"]', "'w'"]),
    "number as a name": ([{"params": [A]}, {"params": {"0": B}}], ValueError, ['params[1]["0"] and params[0][0]']),
    "one array twice": ([A, B, A], ValueError, ["params[2]", "params[0]", "overlap"]),
    "one array in two groups": ([{"params": A}, {"params": {"w": A}}], ValueError, ["params[0]", 'params[1]["w"]']),
    "all at once": (
        {"a": A[::2], "b": "text", "c": np.zeros(3, int), "d": B, "e": B[1:]},
        TypeError,
        ["4 problems", 'params["a"] is not dense', 'params["b"] is a str', 'params["c"] has dtype', 'params["e"] over'],
    ),
}


@pytest.mark.parametrize("case", WRONG_PARAMS)
def test_wrong_parameters_get_one_clear_error(case):
    params, kind, texts = WRONG_PARAMS[case]
    with refused(kind, *texts, of=[A, B]):
        RMSProp(params, initial_scale=1.0)


# Gradients that are refused

GROUPS = "groups of each"
X, Y, Z = arrays(7)
WRONG_GRADS = [
    ("list", None, TypeError, ["grads is a NoneType", "sequence"]),
    ("list", X, TypeError, ["grads is a ndarray", "sequence"]),
    ("list", {"0": X, "1": Y, "2": Z}, TypeError, ["grads is a dict", "sequence"]),
    ("list", {1, 2, 3}, TypeError, ["grads is a set"]),
    ("list", "abc", TypeError, ["grads is a str"]),
    ("list", [X, Y], ValueError, ["grads has 2 entries; wanted 3"]),
    ("list", [X, Y, Z, None], ValueError, ["grads has 4 entries; wanted 3"]),
    ("list", [], ValueError, ["grads has 0 entries; wanted 3"]),
    ("list", [X, [Y], Z], TypeError, ["grads[1] is a list"]),
    ("list", [Y, X, Z], ValueError, ["grads[0] has shape (5,)", "grads[1] has shape (4,)"]),
    ("generator", iter([X, Y]), ValueError, ["grads has 2 entries; wanted 3"]),
    ("dict", None, TypeError, ["grads is a NoneType", "mapping"]),
    ("dict", [X, Y, Z], TypeError, ["grads is a list", "mapping"]),
    ("dict", {"a": X, "b": Y}, ValueError, ['grads["c"] is missing', "None"]),
    ("dict", {}, ValueError, ['grads["a"]', 'grads["b"]', 'grads["c"] is missing']),
    ("dict", {"a": X, "b": Y, "c": Z, "d": Z}, ValueError, ['grads["d"] belongs to no parameter']),
    ("dict", {"a": X, "b": Y, "C": Z}, ValueError, ['grads["c"] is missing', 'grads["C"] belongs']),
    ("dict", {"a": X, "b": Y, "c": 0.0}, TypeError, ['grads["c"] is a float']),
    ("dict", {"a": X, "b": Y, "c": Z, 1: Z}, ValueError, ["grads[1] belongs to no parameter"]),
    (GROUPS, {"w": X}, TypeError, ["grads is a dict", "group"]),
    (GROUPS, [{"w": X}, [Y]], ValueError, ["grads has 2 entries; wanted 3", "group"]),
    (GROUPS, [{"w": X}, [Y], Z, None], ValueError, ["grads has 4 entries; wanted 3", "group"]),
    (GROUPS, [{"w": X}, Y, Z], TypeError, ["grads[1] is a ndarray"]),
    (GROUPS, [[X], [Y], Z], TypeError, ["grads[0] is a list", "mapping"]),
    (GROUPS, [{"w": X}, [Y], [Z]], TypeError, ["grads[2] is a list"]),
    (GROUPS, [None, [Y], Z], TypeError, ["grads[0] is a NoneType"]),
    (GROUPS, [{"v": X}, [Y], Z], ValueError, ['grads[0]["w"] is missing', 'grads[0]["v"] belongs']),
    (GROUPS, [{"w": X}, [Y, Y], Z], ValueError, ["grads[1] has 2 entries; wanted 1"]),
    (GROUPS, {"w": X, "1": Y, "2": Z}, TypeError, ["grads is a dict", "entry for each group"]),
    (GROUPS, [{"w": X[:1]}, [Y[:1]], Z[:1]], ValueError, ['grads[0]["w"]', "grads[1][0]", "grads[2] has shape"]),
]
TREE = "flax"
WRONG_GRADS += [
    (TREE, None, TypeError, ["grads is a NoneType", "mapping with the names of params"]),
    (TREE, {"params": None}, TypeError, ['grads["params"] is a NoneType', 'with the names of params["params"]']),
    (TREE, {}, ValueError, ['grads["params"] is missing; wanted the gradients in it']),
    (TREE, {**flax_tree(X, Y, Z), "batch_stats": {}}, ValueError, ['grads["batch_stats"] belongs to no parameter']),
    (
        TREE,
        {"params": {"Dense_0": {"kernel": X, "Bias": Y}, "Dense_1": [Z]}},
        TypeError,
        ['["Dense_0"]["bias"] is missing', '["Dense_0"]["Bias"] belongs', 'grads["params"]["Dense_1"] is a list'],
    ),
    (TREE, flax_tree(X, Z, Y), ValueError, ['["Dense_0"]["bias"] has shape (6,)', '["Dense_1"]["kernel"] has shape']),
    (
        TREE,
        {FLAX[0]: X, FLAX[1]: Y, "params.Dense_1.bias": Z},
        ValueError,
        [f'grads["{FLAX[2]}"] is missing', 'grads["params.Dense_1.bias"] belongs'],
    ),
    (TREE, defaultdict(lambda: None, {FLAX[0]: X}), ValueError, [f'grads["{FLAX[1]}"] is missing']),
    (TREE, {"params": defaultdict(dict)}, ValueError, ['grads["params"]["Dense_0"] is missing', '["Dense_1"] is m']),
    ("lists in a mapping", {"layers": [X, Y], "head": [Z]}, TypeError, ['["layers"][1] is a ndarray', "one gradient"]),
    (
        "lists in a mapping",
        {"layers": [X], "head": (Z, Z)},
        ValueError,
        ['grads["layers"] has 1 entries; wanted 2, one entry for each of params["layers"]', 'grads["head"] has 2'],
    ),
    ("lists", {"0.0": X, "0.1": Y, "1.0": Z}, TypeError, ["grads is a dict", "sequence"]),
    ("lists", [X, Y, Z], ValueError, ["grads has 3 entries; wanted 2"]),
    ("groups of trees", {"x.w": X, "y.0": Y}, ValueError, ['grads["3.w"] is missing']),
    ("groups of trees", [{"x": {"w": X}, "y": [Y]}, [[], Z]], TypeError, ["grads[1][1] is a ndarray"]),
]


def any_structure(name, params):
    return STRUCTURES[name][0](params) if name in STRUCTURES else (NESTED | UNNAMED | GROUPED)[name][0](*params)


IDS = [f"{structure}: {texts[0]}" for structure, _, _, texts in WRONG_GRADS]


@pytest.mark.parametrize(("structure", "grads", "kind", "texts"), WRONG_GRADS, ids=IDS)
def test_wrong_gradients_get_one_clear_error(structure, grads, kind, texts):
    opt = RMSProp(any_structure(structure, arrays(1)))
    with refused(kind, *texts, of=[opt]):
        opt.step(grads)


def test_a_list_is_no_gradient_of_one_array():
    opt = RMSProp(one(1))
    with refused(TypeError, "grads is a list", of=[opt]):
        opt.step([one(2)])
    with refused(TypeError, "grads is a dict", of=[opt]):
        opt.step({"params": one(2)})


@pytest.mark.parametrize("others", [{}, {"z": Z}], ids=["one less", "as many"])
def test_default_of_a_defaultdict_is_no_gradient(others):
    opt, grads = RMSProp(named(1)), defaultdict(lambda: None, a=X, b=Y, **others)
    with refused(ValueError, 'grads["c"] is missing', of=[opt]):
        opt.step(grads)
    assert list(grads) == ["a", "b", *others]


# Gradients of None

EVERYTHING = {"momentum": 0.9, "centered": True, "bias_correction": True, "weight_decay": 0.1, "nesterov": True}


@pytest.mark.parametrize("given", [{}, EVERYTHING], ids=["plain", "everything"])
def test_none_leaves_parameter_and_state_alone(given):
    opt = RMSProp(named(1), **given)
    opt.step(named(2))
    params, state = opt.param_groups[0]["params"], opt.state
    before = everything(opt)
    opt.step({"a": None, "b": None, "c": None})
    assert everything(opt)[1:] == before[1:]
    opt.step({"a": X, "b": None, "c": Z})
    assert params[1].tobytes() == before[2][1]
    assert {name: x.tobytes() for name, x in state["b"].items()} == before[3]["b"]
    assert all(state["a"][name].tobytes() != old for name, old in before[3]["a"].items())
    assert [int(state[key]["step"]) for key in "abc"] == [2, 1, 2]


def test_none_for_the_only_parameter():
    opt = RMSProp(one(1))
    before = everything(opt)
    opt.step(None)
    assert everything(opt)[1:] == before[1:]
    assert opt.steps == 1


@pytest.mark.parametrize("gap", [1, 3])
def test_late_first_gradient_equals_an_optimizer_that_starts_then(gap):
    opt, late = RMSProp(named(1), **EVERYTHING), RMSProp(named(1)["b"], **EVERYTHING)
    for seed in range(gap):
        opt.step({**named(seed), "b": None})
    for seed in range(4):
        opt.step(named(seed))
        late.step(named(seed)["b"])
    assert_same_bits(opt.param_groups[0]["params"][1], late.param_groups[0]["params"][0])
    for name, buffer in late.state[0].items():
        assert_same_bits(opt.state["b"][name], buffer)


def test_gradient_again_after_a_pause_goes_on_from_its_state():
    opt, without = RMSProp(named(1), **EVERYTHING), RMSProp(named(1)["b"], **EVERYTHING)
    for seed in range(5):
        pause = seed in (1, 2)
        opt.step({**named(seed), "b": None if pause else named(seed)["b"]})
        if not pause:
            without.step(named(seed)["b"])
    assert_same_bits(opt.param_groups[0]["params"][1], without.param_groups[0]["params"][0])


@pytest.mark.parametrize(
    ("given", "change", "place"),
    [
        (lambda x: dict(zip("abc", x, strict=True)), lambda p, new: p.update(b=new), '["b"]'),
        (lambda x: OrderedDict(zip("abc", x, strict=True)), lambda p, new: p.update(b=new), '["b"]'),
        (list, lambda p, new: p.__setitem__(1, new), "[1]"),
        (lambda x: [{"params": list(x)}], lambda p, new: p[0]["params"].__setitem__(1, new), "[0][1]"),
        (
            lambda x: [{"params": x[0]}, {"params": {"w": x[1]}}],
            lambda p, new: p[1]["params"].update(w=new),
            '[1]["w"]',
        ),
        (
            lambda x: flax_tree(*x),
            lambda p, new: p["params"]["Dense_0"].update(bias=new),
            '["params"]["Dense_0"]["bias"]',
        ),
        (
            lambda x: flax_tree(*x),
            lambda p, new: p["params"].update(Dense_0={**p["params"]["Dense_0"], "bias": new}),
            '["params"]["Dense_0"]["bias"]',
        ),
        (lambda x: ([x[0], {"w": x[1]}], x[2]), lambda p, new: p[0][1].update(w=new), '[0][1]["w"]'),
        (lambda x: [x[0], [x[1]]], lambda p, new: p.__setitem__(1, new), "[1][0]"),
        (lambda x: {"a": [x[1]]}, lambda p, new: p.update(a={"0": new}), '["a"][0]'),
    ],
    ids=[
        "dict",
        "ordered",
        "list",
        "list in a group",
        "dict in a group",
        "nested",
        "nested mapping replaced",
        "in a tuple",
        "an array for a list",
        "a mapping for a list",
    ],
)
def test_a_parameter_that_was_replaced_is_not_trained_in_silence(given, change, place):
    arrays = random(1, *SIZES)
    params = given(arrays)
    opt = RMSProp(params)
    change(params, arrays[1].copy())
    with refused(TypeError, f"params{place} is no longer the", f"(params{place}[...] = ...)", of=[*arrays, opt]):
        opt.step(None)  # a TypeError, since None is wrong too


def test_a_mapping_may_be_sorted_anew_grow_shrink_and_be_written_in_place():
    params = named(1)
    opt = RMSProp(params)
    params["a"] -= 1
    params["z"] = np.ones(3)
    params["a"] = params.pop("a")
    opt.step(named(2))
    del params["b"]
    opt.step(named(2))
    assert opt.steps == 2


def test_nested_mappings_may_be_other_objects_with_the_same_arrays_grow_and_shrink():
    params = flax_tree(*arrays(1))
    opt, twin = RMSProp(params), RMSProp(flax_tree(*arrays(1)))
    params["params"]["Dense_0"] = dict(reversed(params["params"]["Dense_0"].items()))
    params["params"]["Dense_2"] = {"kernel": one(1)}
    params["batch_stats"] = {}
    del params["params"]["Dense_1"]
    for o in (opt, twin):
        o.step(flax_tree(*arrays(2)))
    assert_same(opt, twin)


def test_what_makes_its_entries_when_asked_is_not_watched():
    class Views(dict):
        def __getitem__(self, name):
            return super().__getitem__(name)[:]

    moved = {f"{name}2": x for name, x in named(2).items()}
    opt = RMSProp([{"params": Views(named(1))}, {"params": moved}])
    moved["a2"] = moved.pop("a2")  # forces a look at all entries
    opt.step([named(2), {name: x.copy() for name, x in moved.items()}])
    assert opt.steps == 1
