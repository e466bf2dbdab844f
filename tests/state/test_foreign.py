"""States of torch, Keras and optax: a run switched in its middle ends where it would have ended, or is refused.

Each switch is made twice: from the library itself where it is installed, and from its state as the float64 oracle
leaves it, which runs everywhere and which `test_reference.py` holds against what was recorded of the libraries.
"""

import math
import os
import sys
from collections import namedtuple

import numpy as np
import pytest
from on_host import assert_same_bits, everything, random, refused

from rmsprop_gpu import AdaGrad, RMSProp, reference

SHAPES = {"w": (3, 4), "b": (5,)}
SWITCH, END = 10, 20  # steps there, steps in all
TORCH = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "centered": {"centered": True},
    "weight_decay": {"weight_decay": 0.1},
    "maximize": {"maximize": True},
    "all": {"momentum": 0.9, "centered": True, "weight_decay": 0.1, "maximize": True},
}
KERAS = {n: TORCH[n] for n in ("plain", "momentum", "centered")} | {"both": {"momentum": 0.9, "centered": True}}


def start(dtype=np.float64):
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in SHAPES.items()}


def gradient(step, late=False):
    """Of no effect on each other: the late one is not there in the first steps, beyond the switch."""
    made = dict(zip(SHAPES, random(100 + step, *map(math.prod, SHAPES.values()), dtype=np.float64), strict=True))
    grads = {name: g.reshape(SHAPES[name]) for name, g in made.items()}
    return {**grads, "b": None} if late and step < SWITCH + 2 else grads


def assert_same_end(got, want, first):
    """A parameter, at first below 4, is rounded once a step on either side: 40 * (4 + update) * 2^-53 in all.

    With updates above 0.03 that is 6e-13 of them. What the steps themselves differ by, ten roundings or so each (in
    centered mode of v beside v - m^2), is less.
    """
    for name in SHAPES:
        update = np.max(np.abs(want[name] - first[name]))
        assert update > 0.03
        assert np.max(np.abs(first[name])) < 4
        np.testing.assert_allclose(got[name], want[name], rtol=0, atol=1e-12 * update)


class Oracle:
    """A run in the oracle, with the state of each parameter after its last step."""

    def __init__(self, rule=reference.rmsprop, **given):
        self.rule, self.given = rule, given
        self.params, self.state, self.counts = start(), {}, dict.fromkeys(SHAPES, 0)

    def run(self, steps, late=False, lr=lambda name: 0.1):
        for step in steps:
            for name, grad in gradient(step, late).items():
                if grad is not None:
                    h = {"lr": lr(name), **self.given}
                    self.params[name], self.state[name] = self.rule(self.params[name], grad, self.state.get(name), **h)
                    self.counts[name] += 1
        return self


def two_groups(params):
    """Two groups of different lr, in the order of SHAPES."""
    return [{"params": {"w": params["w"]}, "lr": 0.1}, {"params": {"b": params["b"]}, "lr": 0.03}]


def torch_state(oracle, names=SHAPES, **changed):
    """The state_dict of torch.optim.RMSprop after this run, with NumPy's arrays in the place of tensors."""
    has = (
        ["square_avg"]
        + ["momentum_buffer"] * ("momentum" in oracle.given)
        + ["grad_avg"] * ("centered" in oracle.given)
    )
    state = {
        i: {"step": np.float32(oracle.counts[name]), **{n: oracle.state[name][n] for n in has}}
        for i, name in enumerate(names)
        if name in oracle.state
    }
    h = {"momentum": 0, "eps": 1e-8, "centered": False, "weight_decay": 0, "maximize": False, **oracle.given}
    h |= {"capturable": False, "foreach": None, "differentiable": False, **changed}
    return {"state": state, "param_groups": [{"lr": 0.1, **h, "params": [0]}, {"lr": 0.03, **h, "params": [1]}]}


def here(opt, steps, groups=True, late=False):
    for step in steps:
        grads = gradient(step, late)
        opt.step([{name: g} for name, g in grads.items()] if groups else grads)
    return opt


def rates(name):
    return {"w": 0.1, "b": 0.03}[name]


# torch


@pytest.mark.parametrize("late", [False, True], ids=["", "late"])
@pytest.mark.parametrize("case", TORCH)
def test_a_run_of_torch_continues_here(case, late):
    given = {"alpha": 0.97, **TORCH[case]}
    whole = Oracle(**given).run(range(END), late, rates)
    half = Oracle(**given).run(range(SWITCH), late, rates)
    # What is different in this optimizer is loaded: lr, alpha, eps and where they stand.
    opt = RMSProp(
        two_groups(half.params), lr=9.0, alpha=0.5, eps=0.5, eps_in_sqrt=True, lr_in_momentum=True, nesterov=True
    )
    opt.load_foreign("torch", torch_state(half))
    here(opt, range(SWITCH, END), late=late)
    assert_same_end(half.params, whole.params, start())
    assert opt.steps == END
    assert [opt.state[name]["step"] for name in SHAPES] == [END, END - (SWITCH + 2) * late]


def torch_run(given, params, make="RMSprop", named=False):
    torch = pytest.importorskip("torch")
    tensors = {name: torch.nn.Parameter(torch.from_numpy(p.copy())) for name, p in params.items()}
    groups = [{"params": [(n, p)] if named else [p], "lr": rates(n)} for n, p in tensors.items()]
    return tensors, getattr(torch.optim, make)(groups, **given)


def torch_steps(tensors, optimizer, steps, late=False):
    torch = sys.modules["torch"]
    for step in steps:
        for name, grad in gradient(step, late).items():
            tensors[name].grad = None if grad is None else torch.from_numpy(grad)
        optimizer.step()


def params_of(tensors):
    return {name: p.detach().numpy().copy() for name, p in tensors.items()}


@pytest.mark.parametrize("late", [False, True], ids=["", "late"])
@pytest.mark.parametrize("case", TORCH)
def test_torch_itself_continues_here_and_we_continue_there(case, late):
    whole, optimizer = torch_run(TORCH[case], start())
    torch_steps(whole, optimizer, range(END), late)

    there, optimizer = torch_run(TORCH[case], start())
    torch_steps(there, optimizer, range(SWITCH), late)
    params = params_of(there)
    opt = RMSProp(two_groups(params))
    opt.load_foreign("torch", optimizer.state_dict())
    here(opt, range(SWITCH, END), late=late)
    assert_same_end(params, params_of(whole), start())

    params = start()
    opt = here(RMSProp(two_groups(params), alpha=0.99, **TORCH[case]), range(SWITCH), late=late)
    there, optimizer = torch_run({"alpha": 0.5, "eps": 7, "lr": 7}, params)  # all of which is loaded
    optimizer.load_state_dict(opt.to_foreign("torch"))
    here(opt, [77])  # what torch got are copies
    torch_steps(there, optimizer, range(SWITCH, END), late)
    assert_same_end(params_of(there), params_of(whole), start())


@pytest.mark.parametrize("given", [{}, {"weight_decay": 0.1, "maximize": True, "initial_accumulator_value": 0.5}])
def test_adagrad_of_torch_both_ways(given):
    whole, optimizer = torch_run(given, start(), "Adagrad")
    torch_steps(whole, optimizer, range(END), late=True)
    there, optimizer = torch_run(given, start(), "Adagrad")
    torch_steps(there, optimizer, range(SWITCH), late=True)
    params = params_of(there)
    opt = AdaGrad(two_groups(params))
    opt.load_foreign("torch", optimizer.state_dict())
    there, optimizer = torch_run({"eps": 7}, params, "Adagrad")
    optimizer.load_state_dict(opt.to_foreign("torch"))
    begun = given.get("initial_accumulator_value", 0)
    assert opt.param_groups[0]["initial_scale"] == optimizer.param_groups[0]["initial_accumulator_value"] == begun
    torch_steps(there, optimizer, range(SWITCH, END), late=True)
    here(opt, range(SWITCH, END), late=True)
    assert_same_end(params, params_of(whole), start())
    assert_same_end(params_of(there), params_of(whole), start())


def test_state_goes_to_torch_and_back_to_the_bit():
    pytest.importorskip("torch")
    opt = RMSProp([start(np.float32)["w"].T, start()["b"]], alpha=0.99, momentum=0.5, centered=True)
    for step in range(3):
        opt.step([gradient(step)["w"].T.astype(np.float32), gradient(step)["b"]])
    twin = RMSProp([start(np.float32)["w"].T, start()["b"]])
    twin.load_foreign("torch", opt.to_foreign("torch"))
    assert [g.hyper() for g in twin.param_groups] == [g.hyper() for g in opt.param_groups]
    for i in range(2):
        for name in ("step", "square_avg", "grad_avg", "momentum_buffer"):
            assert_same_bits(twin.state[i][name], opt.state[i][name])


def test_bias_weight_is_what_so_many_steps_leave():
    half = Oracle(alpha=0.9).run(range(SWITCH))
    opt = RMSProp(two_groups(half.params))
    opt.load_foreign("torch", torch_state(half))
    assert abs(opt.state["w"]["bias_weight"] - (1 - 0.9**SWITCH)) < 1e-15


@pytest.mark.parametrize("way", ["param_names", "params"])
def test_names_of_torch_go_before_order(way):
    """The same two shapes, in another order there: names tell them apart."""
    group = {"lr": 0.1, "alpha": 0.9, "eps": 1e-8, "weight_decay": 0, "momentum": 0, "centered": False}
    ids = {"param_names": {"params": [0, 1], "param_names": ["y", "x"]}, "params": {"params": ["y", "x"]}}[way]
    state = {k: {"step": 1, "square_avg": np.full(2, v)} for k, v in zip(ids["params"], [2.0, 1.0], strict=True)}
    saved = {"state": state, "param_groups": [{**group, **ids}]}
    opt = RMSProp({"x": np.ones(2), "y": np.ones(2)})
    opt.load_foreign("torch", saved)
    assert (opt.state["x"]["square_avg"][0], opt.state["y"]["square_avg"][0]) == (1, 2)
    by_order = RMSProp({"p": np.ones(2), "q": np.ones(2)})
    by_order.load_foreign("torch", saved)
    assert (by_order.state["p"]["square_avg"][0], by_order.state["q"]["square_avg"][0]) == (2, 1)
    with refused(ValueError, "of the parameters 'y', 'x'; wanted 'x', 'z'", of=[RMSProp(np.ones(2))]):
        RMSProp({"x": np.ones(2), "z": np.ones(2)}).load_foreign("torch", saved)


def test_named_groups_that_hold_others_are_refused():
    half = Oracle(alpha=0.9).run(range(2))
    saved = torch_state(half)
    saved["param_groups"][0]["param_names"], saved["param_groups"][1]["param_names"] = ["b"], ["w"]
    opt = RMSProp(two_groups(half.params))
    with refused(ValueError, 'state["param_groups"][0] is of the parameters', "'b'; wanted 'w'", of=[opt]):
        opt.load_foreign("torch", saved)


def test_names_of_torch_itself():
    tensors, optimizer = torch_run({}, start(), named=True)
    torch_steps(tensors, optimizer, range(2))
    opt = RMSProp(two_groups(start()))
    opt.load_foreign("torch", optimizer.state_dict())
    assert_same_bits(opt.state["w"]["square_avg"], optimizer.state[tensors["w"]]["square_avg"].numpy())


HALVES = ["float16", "bfloat16"]


@pytest.mark.parametrize("dtype", HALVES)
def test_state_of_halves_is_widened(dtype):
    kind = np.dtype(dtype if dtype == "float16" else pytest.importorskip("ml_dtypes").bfloat16)
    v = np.array([0.25, 3.0, 1e-4]).astype(kind)
    group = {"lr": 0.1, "alpha": 0.9, "eps": 1e-8, "weight_decay": 0, "momentum": 0, "centered": False, "params": [0]}
    opt = RMSProp(np.ones(3, kind))
    opt.load_foreign("torch", {"state": {0: {"step": 1, "square_avg": v}}, "param_groups": [group]})
    assert_same_bits(opt.state[0]["square_avg"], v.astype(np.float32))


@pytest.mark.parametrize("dtype", HALVES)
def test_tensors_of_halves_are_widened(dtype):
    torch = pytest.importorskip("torch")
    kind = np.dtype(dtype if dtype == "float16" else pytest.importorskip("ml_dtypes").bfloat16)
    p = torch.nn.Parameter(torch.ones(3, dtype=getattr(torch, dtype)))
    optimizer = torch.optim.RMSprop([p], lr=torch.tensor(0.25))
    p.grad = torch.full_like(p, 0.3)
    optimizer.step()
    opt = RMSProp(np.ones(3, kind))
    opt.load_foreign("torch", optimizer.state_dict())
    assert_same_bits(opt.state[0]["square_avg"], optimizer.state[p]["square_avg"].float().numpy())
    assert opt.lr == 0.25


def test_what_torch_does_not_have_stays():
    half = Oracle(alpha=0.9).run(range(2))
    opt = RMSProp(two_groups(half.params), clipvalue=0.5)
    opt.load_foreign("torch", torch_state(half, initial_lr=1, max_lr=2))
    assert opt.param_groups[0]["clipvalue"] == 0.5


def test_the_optimizer_of_a_callable_lr_wants_a_number_first():
    half = Oracle(alpha=0.9).run(range(2))
    opt = RMSProp(half.params, lr=lambda step: 0.1)
    with refused(ValueError, "wanted a number as lr", of=[opt]):
        opt.load_foreign(
            "torch", {**torch_state(half), "param_groups": [{**torch_state(half)["param_groups"][0], "params": [0, 1]}]}
        )


def test_steps_may_be_given_for_torch():
    half = Oracle(alpha=0.9).run(range(2))
    opt = RMSProp(two_groups(half.params))
    opt.load_foreign("torch", torch_state(half), steps=50)
    assert (opt.steps, opt.state["w"]["step"]) == (50, 2)


def put(*path):
    """A change of a state_dict: the last entry of the path is put, or with None taken away, at the place before it."""

    def change(saved):
        *way, key, value = path
        at = saved
        for step in way:
            at = at[step]
        if value is None:
            del at[key]
        else:
            at[key] = value

    return change


GROUP, W = ("param_groups", 0), ("state", 0)
WRONG_TORCH = {
    "group lacks": (put(*GROUP, "alpha", None), ["state[\"param_groups\"][0] lacks 'alpha'"]),
    "Adam's": (put(*GROUP, "betas", (0.9, 0.99)), ["state[\"param_groups\"][0] has 'betas'"]),
    "alpha": (put(*GROUP, "alpha", 1.5), ["param_groups[0]", "alpha is 1.5"]),
    "alpha text": (put(*GROUP, "alpha", "x"), ["alpha is 'x'"]),
    "one group": (put("param_groups", 1, None), ["has 1 groups; wanted 2"]),
    "size": (put(*GROUP, "params", [0, 5]), ['state["param_groups"][0] has 2 parameters; wanted 1']),
    "no params": (put(*GROUP, "params", None), ['state["param_groups"][0] is a dict; wanted a mapping with a list']),
    "stranger": (put("state", 7, {}), ['state["state"][7] belongs to no parameter']),
    "no step": (put(*W, "step", None), ["state[\"state\"][0] lacks 'step'"]),
    "no average": (put(*W, "square_avg", None), ["state[\"state\"][0] lacks 'square_avg'"]),
    "no momentum": (put(*W, "momentum_buffer", None), ["state[\"state\"][0] lacks 'momentum_buffer'"]),
    "exp_avg": (put(*W, "exp_avg", np.ones((3, 4))), ["state[\"state\"][0] has 'exp_avg'"]),
    "sum": (put(*W, "sum", np.ones((3, 4))), ["state[\"state\"][0] has 'sum'"]),
    "shape": (put(*W, "square_avg", np.ones(12)), ['state["state"][0]["square_avg"] has shape (12,); wanted (3, 4)']),
    "dtype": (
        put(*W, "square_avg", np.ones((3, 4), np.int32)),
        ['state["state"][0]["square_avg"] has dtype int32; wanted float64'],
    ),
    "below 0": (put(*W, "square_avg", -np.ones((3, 4))), ['state["state"][0]["square_avg"] has elements below 0']),
    "a list": (put(*W, "square_avg", [1.0]), ['state["state"][0]["square_avg"] is a list']),
    "step 1.5": (put(*W, "step", 1.5), ['state["state"][0]["step"] is 1.5; wanted a count']),
    "step NaN": (put(*W, "step", np.float32("nan")), ['state["state"][0]["step"] is nan']),
    "step text": (put(*W, "step", "x"), ['state["state"][0]["step"] is a str; wanted a number']),
    "entry": (put("state", 0, [1]), ['state["state"][0] is a list; wanted a mapping']),
    "no groups": (put("param_groups", None), ['state is a dict; wanted torch\'s, with "state"']),
}


@pytest.mark.parametrize("case", WRONG_TORCH)
def test_a_state_of_torch_that_cannot_be_mapped_names_the_entry(case):
    change, texts = WRONG_TORCH[case]
    half = Oracle(alpha=0.9, momentum=0.5).run(range(3))
    saved = torch_state(half)
    change(saved)
    opt = here(RMSProp(two_groups(half.params), momentum=0.1), range(2))
    before = everything(opt)
    with pytest.raises((TypeError, ValueError)) as error:
        opt.load_foreign("torch", saved)
    for text in texts:
        assert text in str(error.value)
    assert everything(opt) == before


def test_all_that_is_wrong_is_named_at_once():
    half = Oracle(alpha=0.9, momentum=0.5).run(range(3))
    saved = torch_state(half)
    cases = ["Adam's", "alpha", "stranger", "no step", "shape"]
    for case in cases:
        WRONG_TORCH[case][0](saved)
    opt = RMSProp(two_groups(half.params))
    with refused(ValueError, "5 problems", *(t for case in cases for t in WRONG_TORCH[case][1]), of=[opt]):
        opt.load_foreign("torch", saved)


def test_no_value_is_rounded():
    half = Oracle(alpha=0.9).run(range(2))
    opt = RMSProp(two_groups(start(np.float32)))
    with refused(TypeError, 'state["state"][0]["square_avg"] has dtype float64; wanted float32', of=[opt]):
        opt.load_foreign("torch", torch_state(half))


def test_adagrad_whose_lr_decays_is_refused():
    group = {"lr": 0.1, "lr_decay": 0.5, "eps": 1e-8, "weight_decay": 0, "initial_accumulator_value": 0, "params": [0]}
    opt = AdaGrad(np.ones(2))
    with refused(ValueError, '["lr_decay"] is 0.5; wanted 0', of=[opt]):
        opt.load_foreign("torch", {"state": {}, "param_groups": [group]})


def test_a_tensor_without_memory_is_named():
    torch = pytest.importorskip("torch")
    saved = torch_state(Oracle(alpha=0.9).run(range(2)))
    saved["state"][0]["square_avg"] = torch.ones((3, 4), dtype=torch.float64).to_sparse()
    opt = RMSProp(two_groups(start()))
    with refused(TypeError, 'state["state"][0]["square_avg"] is a torch.Tensor that does not', of=[opt]):
        opt.load_foreign("torch", saved)


NOT_IN_TORCH = [
    {"eps_in_sqrt": True},
    {"lr_in_momentum": True, "momentum": 0.5},
    {"nesterov": True, "momentum": 0.5},
    {"bias_correction": True},
    {"decoupled_weight_decay": True, "weight_decay": 0.1},
    {"clipvalue": 1.0},
    {"lr": lambda step: 0.1},
    {"use_ema": True},
    {"clipnorm": 1.0},
    {"skip_nonfinite": True},
]


@pytest.mark.parametrize("given", NOT_IN_TORCH, ids=lambda given: next(iter(given)))
def test_what_torch_does_not_have_is_refused(given):
    opt, name = RMSProp(start(), **given), next(iter(given))
    with refused(ValueError, f'param_groups[0]["{name}"] = ', "wanted each at its neutral value", of=[opt]):
        opt.to_foreign("torch")


def test_all_that_torch_does_not_have_is_named_at_once():
    opt = RMSProp(two_groups(start()), clipvalue=1.0, bias_correction=True, eps_in_sqrt=True, nesterov=True)
    texts = [f'param_groups[{i}]["{n}"] = ' for i in range(2) for n in ("clipvalue", "bias_correction", "eps_in_sqrt")]
    with refused(ValueError, *texts, of=[opt]):
        opt.to_foreign("torch")


def test_switches_without_effect_go_to_torch():
    pytest.importorskip("torch")
    given = {"eps": 0, "eps_in_sqrt": True, "nesterov": True, "lr_in_momentum": True, "decoupled_weight_decay": True}
    groups = RMSProp(start(), **given).to_foreign("torch")["param_groups"]
    assert (groups[0]["eps"], groups[0]["params"]) == (0, [0, 1])


def test_without_eps_torch_makes_nan_of_an_element_that_saw_no_gradient():
    """As the docstring of `to_foreign` warns."""
    torch = pytest.importorskip("torch")
    opt, grad = RMSProp(np.ones(2), eps=0), np.array([0.0, 1.0])
    opt.step(grad)
    there = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = torch.optim.RMSprop([there])
    optimizer.load_state_dict(opt.to_foreign("torch"))
    there.grad = torch.from_numpy(grad)
    optimizer.step()
    opt.step(grad)
    assert np.isnan(there.detach().numpy()).tolist() == [True, False]
    assert opt.param_groups[0]["params"][0][0] == 1


def test_a_missing_torch_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"rmsprop-gpu\[bench\]"):
        RMSProp(start()).to_foreign("torch")


@pytest.mark.parametrize("framework", ["jax", "Torch", None, ["torch"]])
def test_another_framework_is_refused(framework):
    opt = RMSProp(start())
    with refused(ValueError, f"framework is {framework!r}; wanted 'torch', 'keras', 'optax'", of=[opt]):
        opt.load_foreign(framework, {})
    with refused(ValueError, f"framework is {framework!r}; wanted 'torch'", of=[opt]):
        opt.to_foreign(framework)


@pytest.mark.parametrize("framework", ["torch", "keras", "optax"])
@pytest.mark.parametrize("state", [None, 5, "state", np.ones(3)], ids=["None", "5", "text", "array"])
def test_what_is_no_state_is_refused(framework, state):
    opt = RMSProp(start())
    with refused(TypeError, "state is a", of=[opt]):
        opt.load_foreign(framework, state)


@pytest.mark.parametrize("steps", [-1, 1.0, True, "x"])
def test_steps_is_a_count(steps):
    half = Oracle(alpha=0.9).run(range(2))
    opt = RMSProp(two_groups(half.params))
    with refused(TypeError, f"steps is {steps!r}; wanted None or a count", of=[opt]):
        opt.load_foreign("torch", torch_state(half), steps=steps)


# Keras

KERAS_NAMES = {"square_avg": "velocity", "momentum_buffer": "momentum", "grad_avg": "average_gradient"}
LIKE_KERAS = {"eps": 1e-7, "eps_in_sqrt": True, "lr_in_momentum": True}


class Variable:
    """A variable of Keras, as far as it is read."""

    def __init__(self, path, value):
        self.path, self.value = path, value

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.value)

    def __float__(self):
        return float(self.value)


def keras_variables(oracle, prefix="m_"):
    has = [n for n in KERAS_NAMES if n in oracle.state["w"]]
    variables = [("iteration", np.int32(oracle.counts["w"])), ("learning_rate", np.float32(0.125))]
    variables += [(f"{prefix}{key}_{KERAS_NAMES[n]}", oracle.state[key][n]) for n in has for key in SHAPES]
    return [Variable(f"rm_sprop/{name}", value) for name, value in variables]


@pytest.mark.parametrize("named", [True, False], ids=["by name", "by order"])
@pytest.mark.parametrize("case", KERAS)
def test_a_run_of_keras_continues_here(case, named):
    given = {**LIKE_KERAS, **KERAS[case]}
    whole = Oracle(**given).run(range(END), lr=lambda name: 0.125)
    half = Oracle(**given).run(range(SWITCH), lr=lambda name: 0.125)
    variables = keras_variables(half)
    key = "m/{}" if named else "{}"
    params = {key.format(name): half.params[name] for name in (reversed(SHAPES) if named else SHAPES)}
    opt = RMSProp(params, **given)
    opt.load_foreign("keras", {v.path: np.asarray(v) for v in variables} if named else variables)
    assert (opt.steps, opt.lr, opt.state[key.format("b")]["step"]) == (SWITCH, 0.125, SWITCH)
    for step in range(SWITCH, END):
        opt.step({key.format(name): g for name, g in gradient(step).items()})
    assert_same_end(half.params, whole.params, start())


@pytest.fixture
def keras():
    pytest.importorskip("jax")
    os.environ.setdefault("KERAS_BACKEND", "jax")
    with doubles():
        yield pytest.importorskip("keras")


def doubles():
    """float64 in JAX, for as long as it is needed."""
    jax = pytest.importorskip("jax")
    return jax.enable_x64(True)


@pytest.mark.parametrize("case", KERAS)
def test_keras_itself_continues_here(keras, case):
    def steps(optimizer, variables, steps):
        for step in steps:
            optimizer.apply([keras.ops.convert_to_tensor(g) for g in gradient(step).values()], variables)

    def begin():
        variables = [keras.Variable(p, dtype="float64", name=name) for name, p in start().items()]
        return keras.optimizers.RMSprop(learning_rate=0.1, weight_decay=0.01, **KERAS[case]), variables

    optimizer, whole = begin()
    steps(optimizer, whole, range(END))
    optimizer, there = begin()
    steps(optimizer, there, range(SWITCH))
    params = {name: np.asarray(v).copy() for name, v in zip(SHAPES, there, strict=True)}
    given = {**LIKE_KERAS, "weight_decay": 0.01, "decoupled_weight_decay": True, **KERAS[case]}
    opt = RMSProp(params, **given)
    opt.load_foreign("keras", optimizer.variables)
    assert opt.lr == np.float32(0.1)
    here(opt, range(SWITCH, END), groups=False)
    assert_same_end(params, {n: np.asarray(v) for n, v in zip(SHAPES, whole, strict=True)}, start())


def test_adagrad_of_keras():
    opt = AdaGrad(start(), eps_in_sqrt=True)
    sums = {f"adagrad/{name}_accumulator": np.full(shape, 0.5) for name, shape in SHAPES.items()}
    opt.load_foreign("keras", {"adagrad/iteration": 3, **sums})
    assert opt.state["w"]["sum"][0, 0] == 0.5


def test_a_callable_lr_stays_with_keras():
    def rate(step):
        return 0.1

    half = Oracle(**LIKE_KERAS).run(range(2))
    opt = RMSProp(half.params, lr=rate, **LIKE_KERAS)
    opt.load_foreign("keras", keras_variables(half))
    assert (opt.lr, opt.steps) == (rate, 2)


def changed(**changes):
    """Keras's variables, renamed (a name), replaced or removed (None)."""

    def change(variables):
        for old, new in changes.items():
            path = f"rm_sprop/{old}"
            if isinstance(new, np.generic | np.ndarray):
                variables[path] = new
                continue
            value = variables.pop(path)
            if new is not None:
                variables[f"rm_sprop/{new}"] = value

    return change


WRONG_KERAS = {
    "no count": (changed(iteration=None), {}, ['state lacks "iteration"']),
    "unknown": (changed(iteration="dynamic_scale"), {}, ['state["rm_sprop/dynamic_scale"] has no counterpart']),
    "shape": (changed(m_w_velocity=np.ones(3)), {}, ['state["rm_sprop/m_w_velocity"] has shape (3,); wanted (3, 4)']),
    "one lacks": (changed(m_w_velocity=None), {}, ['state\'s "square_avg" has 1 parameters; wanted 2']),
    "kind lacks": (changed(m_w_momentum=None, m_b_momentum=None), {}, ['lacks the arrays of "momentum_buffer"', "0.9"]),
    "lr": (changed(learning_rate=np.float32(-1)), {}, ["lr is -1.0"]),
    "lr outside": (changed(), {"lr_in_momentum": False}, ["lr_in_momentum=False", "lr inside; wanted True"]),
    "no momentum here": (changed(), {"momentum": 0}, ['state["rm_sprop/m_w_momentum"] has no use with momentum=0']),
    "gathered": (
        changed(iteration="w_gradient_accumulator"), {}, ['state["rm_sprop/w_gradient_accumulator"] holds gradients'],
    ),
    "half of the names": (
        changed(m_w_velocity="v_velocity"), {}, ["is of the parameters 'm_b', 'v'; wanted 'm_w', 'm_b'"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_KERAS)
def test_variables_of_keras_that_cannot_be_mapped_are_named(case):
    change, other, texts = WRONG_KERAS[case]
    half = Oracle(**LIKE_KERAS, momentum=0.9).run(range(2))
    variables = {v.path: np.asarray(v) for v in keras_variables(half)}
    change(variables)
    params = {f"m/{name}": p for name, p in half.params.items()}
    opt = RMSProp(params, **{**LIKE_KERAS, "momentum": 0.9, **other})
    with refused(ValueError, *texts, of=[opt]):
        opt.load_foreign("keras", variables)


def test_variables_of_adam_are_refused():
    """They are a momentum and a velocity too, of another meaning."""
    half = Oracle(**LIKE_KERAS, momentum=0.9).run(range(2))
    variables = {v.path.replace("rm_sprop", "adamw_1"): np.asarray(v) for v in keras_variables(half)}
    opt = RMSProp(half.params, **LIKE_KERAS, momentum=0.9)
    with refused(ValueError, 'state["adamw_1/m_w_velocity"] is of another optimizer', of=[opt]):
        opt.load_foreign("keras", variables)


def test_arrays_without_a_path_are_no_variables():
    opt = RMSProp(start())
    with refused(TypeError, "state[0] is a numpy.ndarray without a path", of=[opt]):
        opt.load_foreign("keras", [np.ones(3)])


def with_averages(oracle):
    averages = {f"rm_sprop/m_{name}_average": np.full_like(p, 0.5) for name, p in oracle.params.items()}
    return {v.path: np.asarray(v) for v in keras_variables(oracle)} | averages


def test_the_average_of_the_parameters_is_loaded():
    half = Oracle(**LIKE_KERAS).run(range(2))
    opt = RMSProp(half.params, **LIKE_KERAS, use_ema=True)
    opt.load_foreign("keras", with_averages(half))
    for name, p in half.params.items():
        assert_same_bits(opt.ema[name], np.full_like(p, 0.5))


def test_averages_on_one_side_alone_are_refused_with_keras():
    half = Oracle(**LIKE_KERAS).run(range(2))
    opt = RMSProp(half.params, **LIKE_KERAS)
    with refused(ValueError, 'state["rm_sprop/m_w_average"] has no use with use_ema=False', of=[opt]):
        opt.load_foreign("keras", with_averages(half))
    opt = RMSProp(half.params, **LIKE_KERAS, use_ema=True)
    with refused(ValueError, 'state lacks the arrays of "ema", which use_ema=True', of=[opt]):
        opt.load_foreign("keras", keras_variables(half))


def test_averages_of_keras_itself_continue_here(keras):
    given = {"use_ema": True, "ema_momentum": 0.75, "momentum": 0.5}

    def steps(optimizer, variables, steps):
        for step in steps:
            optimizer.apply([keras.ops.convert_to_tensor(g) for g in gradient(step).values()], variables)

    def begin():
        variables = [keras.Variable(p, dtype="float64", name=name) for name, p in start().items()]
        return keras.optimizers.RMSprop(learning_rate=0.125, **given), variables

    optimizer, whole = begin()
    steps(optimizer, whole, range(END))
    want = {v.path.rpartition("/")[2].removesuffix("_average"): np.asarray(v) for v in optimizer.variables}
    optimizer, there = begin()
    steps(optimizer, there, range(SWITCH))
    params = {name: np.asarray(v).copy() for name, v in zip(SHAPES, there, strict=True)}
    opt = RMSProp.from_preset("keras", params, **given)
    opt.load_foreign("keras", optimizer.variables)
    here(opt, range(SWITCH, END), groups=False)
    assert_same_end(opt.ema, want, start())


@pytest.mark.parametrize("late", [False, True], ids=["", "late"])
@pytest.mark.parametrize("framework", ["torch", "optax"])
def test_averages_that_the_framework_lacks_start_anew(framework, late):
    """From the parameters as they are, whatever was averaged before; a late parameter's first step sets its own."""
    given = LIKE_OPTAX if framework == "optax" else {"alpha": 0.9}
    half = Oracle(**given).run(range(SWITCH), late=late and framework == "torch")
    opt = here(RMSProp(two_groups(half.params), **given, use_ema=True, ema_momentum=0.75), range(3))
    opt.load_foreign(framework, torch_state(half) if framework == "torch" else optax_state(half))
    begun = {name: half.params[name].copy() for name in SHAPES}
    for name in SHAPES:
        assert_same_bits(opt.ema[name], begun[name])
    here(opt, [SWITCH])
    for name in SHAPES:
        first = framework == "optax" or (late and name == "b")  # optax's state has no count here
        want = half.params[name] if first else 0.75 * begun[name] + 0.25 * half.params[name]
        np.testing.assert_allclose(opt.ema[name], want, rtol=1e-15, atol=1e-16)


# optax

EmptyState = namedtuple("EmptyState", [])
ScaleByRmsState = namedtuple("ScaleByRmsState", ["nu"])
ScaleByRmsWithCountState = namedtuple("ScaleByRmsWithCountState", ["count", "nu"])
ScaleByRStdDevState = namedtuple("ScaleByRStdDevState", ["mu", "nu"])
ScaleByScheduleState = namedtuple("ScaleByScheduleState", ["count"])
ScaleByRssState = namedtuple("ScaleByRssState", ["sum_of_squares"])
ScaleByAdamState = namedtuple("ScaleByAdamState", ["count", "mu", "nu"])
TraceState = namedtuple("TraceState", ["trace"])
InjectHyperparamsState = namedtuple("InjectHyperparamsState", ["count", "hyperparams", "inner_state"])

OPTAX = {
    **KERAS,
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "corrected": {"bias_correction": True, "momentum": 0.9},
    "outside": {"eps_in_sqrt": False},
}
LIKE_OPTAX = {"eps": 1e-8, "eps_in_sqrt": True, "lr_in_momentum": True}


def optax_state(oracle):
    trees = {n: {key: oracle.state[key][n] for key in SHAPES} for n in KERAS_NAMES if n in oracle.state["w"]}
    if "grad_avg" in trees:
        first = ScaleByRStdDevState(trees["grad_avg"], trees["square_avg"])
    elif oracle.given.get("bias_correction"):
        first = ScaleByRmsWithCountState(np.int32(oracle.counts["w"]), trees["square_avg"])
    else:
        first = ScaleByRmsState(trees["square_avg"])
    trace = {key: -b for key, b in trees.get("momentum_buffer", {}).items()}
    return first, EmptyState(), TraceState(trace) if trace else EmptyState()


@pytest.mark.parametrize("case", OPTAX)
def test_a_run_of_optax_continues_here(case):
    given = {**LIKE_OPTAX, **OPTAX[case]}
    whole = Oracle(**given).run(range(END))
    half = Oracle(**given).run(range(SWITCH))
    opt = RMSProp(half.params, lr=0.1, **given)
    opt.load_foreign("optax", optax_state(half))
    assert opt.steps == SWITCH * ("bias_correction" in given)
    here(opt, range(SWITCH, END), groups=False)
    assert_same_end(half.params, whole.params, start())


@pytest.mark.parametrize("injected", [False, True], ids=["plain", "injected"])
@pytest.mark.parametrize("case", OPTAX)
def test_optax_itself_continues_here(case, injected):
    optax = pytest.importorskip("optax")

    def steps(params, state, steps):
        for step in steps:
            updates, state = rule.update(gradient(step), state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    with doubles():
        given = {"eps_in_sqrt": True, **OPTAX[case]}
        make = optax.inject_hyperparams(optax.rmsprop) if injected else optax.rmsprop
        rule = optax.chain(optax.clip(1e9), make(learning_rate=0.125, **given))
        whole, _ = steps(start(), rule.init(start()), range(END))
        there, state = steps(start(), rule.init(start()), range(SWITCH))
        params = {name: np.array(p) for name, p in there.items()}
        lr, alpha = 7.0 if injected else 0.125, 0.9
        opt = RMSProp(params, **{**LIKE_OPTAX, "lr": lr, "alpha": alpha, **OPTAX[case]})
        opt.load_foreign("optax", state)
        here(opt, range(SWITCH, END), groups=False)
        assert_same_end(params, {name: np.array(p) for name, p in whole.items()}, start())


@pytest.mark.parametrize("params", ["slash", "dot", "order", "one"])
def test_trees_of_optax_match_by_path_or_in_the_order_of_jax(params):
    leaves = {"b": np.full(2, 3.0), "a": {"k": np.full(2, 1.0), "c": np.full(2, 2.0)}}
    names = {"slash": ["b", "a/k", "a/c"], "dot": ["b", "a.k", "a.c"]}
    if params == "one":
        opt, tree, want = RMSProp(np.ones(2)), np.full(2, 3.0), [3]
    elif params == "order":  # of jax.tree.leaves: keys are sorted
        opt, tree, want = RMSProp([np.ones(2) for _ in range(3)]), leaves, [2, 1, 3]
    else:
        opt, tree, want = RMSProp({name: np.ones(2) for name in names[params]}), leaves, [3, 1, 2]
    opt.load_foreign("optax", (ScaleByRmsState(tree), EmptyState(), EmptyState()))
    assert [opt.state[i]["square_avg"][0] for i in range(len(want))] == want


def test_steps_of_optax_are_counted_or_given():
    half = Oracle(**LIKE_OPTAX, bias_correction=True).run(range(2))
    first, empty, last = optax_state(half)
    bare = (ScaleByRmsState(first.nu), empty, last)
    opt = RMSProp(half.params, **LIKE_OPTAX, bias_correction=True)
    with refused(ValueError, "no count, which bias_correction=True in param_groups[0] needs; wanted steps=", of=[opt]):
        opt.load_foreign("optax", bare)
    opt.load_foreign("optax", bare, steps=2)
    assert (opt.steps, opt.state["w"]["step"]) == (2, 2)
    assert_same_bits(opt.state["w"]["bias_weight"], np.float64(1 - 0.9**2) * np.ones(()))
    scheduled = RMSProp(half.params, lr=lambda step: 0.1, **LIKE_OPTAX)
    with refused(ValueError, "no count, which a callable lr in param_groups[0] needs", of=[scheduled]):
        scheduled.load_foreign("optax", bare)
    scheduled.load_foreign("optax", (bare[0], ScaleByScheduleState(np.int32(6)), last))
    assert scheduled.steps == 6
    with refused(ValueError, "state[0].count is 2, but steps is 3; wanted one count", of=[opt]):
        opt.load_foreign("optax", (first, empty, last), steps=3)


def test_the_rate_of_injected_hyperparameters_is_loaded():
    half = Oracle(**LIKE_OPTAX).run(range(2))
    opt = RMSProp(half.params, **LIKE_OPTAX)
    opt.load_foreign(
        "optax", InjectHyperparamsState(np.int32(2), {"learning_rate": np.float32(0.5)}, optax_state(half))
    )
    assert (opt.lr, opt.steps) == (0.5, 2)


def test_adagrad_of_optax():
    opt = AdaGrad(start(), eps_in_sqrt=True)
    opt.load_foreign("optax", (ScaleByRssState({n: np.full(s, 0.5) for n, s in SHAPES.items()}), EmptyState()))
    assert opt.state["b"]["sum"][0] == 0.5


def tree(**changes):
    return {**{name: np.ones(shape) for name, shape in SHAPES.items()}, **changes}


RMS, EMPTY, TRACE = ScaleByRmsState(tree()), EmptyState(), TraceState(tree())
WRONG_OPTAX = {
    "Adam": ((ScaleByAdamState(3, tree(), tree()), EMPTY), {}, TypeError, ["state[0] is a", "ScaleByAdamState"]),
    "two": ((RMS, EMPTY, RMS), {}, ValueError, ["state[2].nu is a second one"]),
    "AdaGrad": ((ScaleByRssState(tree()), EMPTY), {}, ValueError, ["state[0].sum_of_squares has no counterpart"]),
    "trace before lr": ((RMS, TRACE, EMPTY), {"momentum": 0.5}, ValueError, ["state[1] does not come behind the lea"]),
    "trace before rms": ((EMPTY, TRACE, RMS), {"momentum": 0.5}, ValueError, ["state[1] does not come behind the lea"]),
    "no trace": ((RMS, EMPTY, EMPTY), {"momentum": 0.5}, ValueError, ['lacks the arrays of "momentum_buffer"']),
    "lr outside": (
        (RMS, EMPTY, TRACE), {"momentum": 0.5, "lr_in_momentum": False}, ValueError, ["has lr_in_momentum=False"],
    ),
    "not centered": (
        (ScaleByRStdDevState(tree(), tree()), EMPTY), {}, ValueError, ['state[0].mu["b"] has no use with centered'],
    ),
    "masked": ((ScaleByRmsState(tree(w=EMPTY)), EMPTY), {}, ValueError, ['"square_avg" has 1 parameters; wanted 2']),
    "shape": ((ScaleByRmsState(tree(w=np.ones(3))), EMPTY), {}, ValueError, ['state[0].nu["w"] has shape (3,)']),
    "text": ((ScaleByRmsState(tree(w="x")), EMPTY), {}, TypeError, ['state[0].nu["w"] is a str']),
    "empty": ((), {}, ValueError, ['lacks the arrays of "square_avg"']),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_OPTAX)
def test_states_of_optax_that_cannot_be_mapped_are_named(case):
    state, other, kind, texts = WRONG_OPTAX[case]
    opt = RMSProp(start(), **{**LIKE_OPTAX, **other})
    with refused(kind, *texts, of=[opt]):
        opt.load_foreign("optax", state)


# On a device


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["host", "device"])
def test_a_run_of_torch_continues_on_a_device(where):
    cupy = pytest.importorskip("cupy", exc_type=ImportError)
    given = {"alpha": 0.97, **TORCH["all"]}
    half = Oracle(**given).run(range(SWITCH), lr=rates)
    saved = torch_state(half)
    host = RMSProp(two_groups({name: p.copy() for name, p in half.params.items()}))
    host.load_foreign("torch", saved)
    params = {name: cupy.asarray(p) for name, p in half.params.items()}
    opt = RMSProp(two_groups(params))
    if where == "device":
        for entry in saved["state"].values():
            entry.update({name: cupy.asarray(x) for name, x in entry.items()})
    opt.load_foreign("torch", saved)
    for step in range(SWITCH, SWITCH + 3):
        host.step([{name: g} for name, g in gradient(step).items()])
        opt.step([{name: cupy.asarray(g)} for name, g in gradient(step).items()])
    for name in SHAPES:
        for buffer, want in host.state[name].items():
            assert_same_bits(opt.state[name][buffer].get(), want)


@pytest.mark.gpu
def test_a_negated_trace_and_a_widened_average_on_a_device():
    cupy = pytest.importorskip("cupy", exc_type=ImportError)
    trace, average = cupy.full(3, 0.5), cupy.full(3, 0.25, cupy.float32)
    opt = RMSProp(cupy.ones(3), momentum=0.9, lr_in_momentum=True)
    opt.load_foreign("optax", (ScaleByRmsState(average), EmptyState(), TraceState(trace)))
    state = opt.state[0]
    assert (state["momentum_buffer"].get().tolist(), state["square_avg"].get().tolist()) == ([-0.5] * 3, [0.25] * 3)
    assert state["square_avg"].dtype == np.float64
    assert trace.get().tolist() == [0.5] * 3


@pytest.mark.gpu
def test_averages_start_anew_on_a_device_after_the_steps_before():
    cupy = pytest.importorskip("cupy", exc_type=ImportError)
    half = Oracle(alpha=0.9).run(range(SWITCH))
    params = {name: cupy.asarray(p) for name, p in half.params.items()}
    opt = RMSProp(two_groups(params), use_ema=True)
    with cupy.cuda.Stream(non_blocking=True):
        opt.step([{name: cupy.asarray(g)} for name, g in gradient(0).items()])
    opt.load_foreign("torch", torch_state(half))
    for name in SHAPES:
        assert_same_bits(opt.ema[name].get(), params[name].get())


@pytest.mark.gpu
def test_no_state_is_loaded_into_a_graph():
    cupy = pytest.importorskip("cupy", exc_type=ImportError)
    opt, grad, stream = RMSProp(cupy.ones(3)), cupy.ones(3), cupy.cuda.Stream(non_blocking=True)
    with stream:
        opt.step(grad)
        stream.begin_capture()
        try:
            with pytest.raises(RuntimeError, match="load_foreign"):
                opt.load_foreign("torch", {})
        finally:
            stream.end_capture()
