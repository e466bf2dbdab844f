"""States of torch: a run continues here, and can go back."""

import sys
from itertools import permutations

import numpy as np
import pytest
from foreign_runs import (
    END,
    SHAPES,
    SWITCH,
    TORCH,
    Oracle,
    assert_same_end,
    gradient,
    here,
    rates,
    start,
    torch_state,
    two_groups,
)
from on_host import assert_same_bits, refused

from rmsprop_gpu import AdaGrad, RMSProp


@pytest.mark.parametrize("late", [False, True], ids=["", "late"])
@pytest.mark.parametrize("case", TORCH)
def test_a_run_of_torch_continues_here(case, late):
    given = {"alpha": 0.97, **TORCH[case]}
    whole = Oracle(**given).run(range(END), late, rates)
    half = Oracle(**given).run(range(SWITCH), late, rates)
    # Whatever differs in this optimizer is overwritten by the load: lr, alpha, eps and their placement.
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
    there, optimizer = torch_run({"alpha": 0.5, "eps": 7, "lr": 7}, params)  # all of these are overwritten
    optimizer.load_state_dict(opt.to_foreign("torch"))
    here(opt, [77])  # torch got copies
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
    """The parameters have the same shape and come in another order there. Names tell them apart."""
    group = {"lr": 0.1, "alpha": 0.9, "eps": 1e-8, "weight_decay": 0, "momentum": 0, "centered": False}
    ids = {"param_names": {"params": [0, 1], "param_names": ["y", "x"]}, "params": {"params": ["y", "x"]}}[way]
    state = {k: {"step": 1, "square_avg": np.full(2, v)} for k, v in zip(ids["params"], [2.0, 1.0], strict=True)}
    saved = {"state": state, "param_groups": [{**group, **ids}]}
    opt = RMSProp({"x": np.ones(2), "y": np.ones(2)})
    opt.load_foreign("torch", saved)
    assert (opt.state["x"]["square_avg"][0], opt.state["y"]["square_avg"][0]) == (1, 2)
    for names in ("pq", "xz"):
        by_order = RMSProp({name: np.ones(2) for name in names})
        text = f"of the parameters 'y', 'x'; wanted {names[0]!r}, {names[1]!r}, or match=\"order\""
        with refused(ValueError, text, of=[by_order]):
            by_order.load_foreign("torch", saved)
        by_order.load_foreign("torch", saved, match="order")
        assert [by_order.state[name]["square_avg"][0] for name in names] == [2, 1]
    unnamed = RMSProp([np.ones(2), np.ones(2)])
    unnamed.load_foreign("torch", saved)
    assert [unnamed.state[i]["square_avg"][0] for i in range(2)] == [2, 1]


def named_groups(*groups):
    """A state dict of torch with one element per parameter, whose averages count up from 1."""
    h = {"lr": 0.1, "alpha": 0.9, "eps": 1e-8, "weight_decay": 0, "momentum": 0, "centered": False}
    ids = iter(range(9))
    made = [{**h, "params": [next(ids) for _ in names], "param_names": names} for names in groups]
    state = {i: {"step": 1, "square_avg": np.full(1, i + 1.0)} for group in made for i in group["params"]}
    return {"state": state, "param_groups": made}


WRAPPERS = ["", "_orig_mod.", "module.", "_orig_mod.module.", "module._orig_mod."]


@pytest.mark.parametrize(("theirs", "ours"), list(permutations(WRAPPERS, 2)))
def test_what_wrappers_put_before_all_names_does_not_count(theirs, ours):
    """The parameters have the same shape and come in another order here."""
    opt = RMSProp([{"params": {f"{ours}{name}": np.ones(1) for name in names}} for names in ("cab", "d")])
    opt.load_foreign("torch", named_groups([f"{theirs}{name}" for name in "abc"], [f"{theirs}d"]))
    assert [opt.state[f"{ours}{name}"]["square_avg"][0] for name in "abcd"] == [1, 2, 3, 4]


@pytest.mark.parametrize("names", [["module.a", "b"], ["model.a", "model.b"], ["module.", "module.b"]])
def test_other_prefixes_and_those_of_some_count(names):
    one, two = (RMSProp([{"params": {n: np.ones(1) for n in group}} for group in x]) for x in (["ab"], ["a", "b"]))
    with refused(ValueError, f"{names[0]!r}, {names[1]!r}; wanted 'a', 'b', or match", of=[one]):
        one.load_foreign("torch", named_groups(names))
    with refused(ValueError, f"{names[0]!r}; wanted 'a', or match", of=[two]):
        two.load_foreign("torch", named_groups(*([name] for name in names)))


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


def test_keys_of_others_come_from_torch_and_go_back():
    half = Oracle(alpha=0.9).run(range(2))
    others = {"initial_lr": 0.5, "max_lr": 2, "swa_lr": 0.1, "lr_scale": 0.5, "name": "head"}
    opt = RMSProp(two_groups(half.params))
    opt.load_foreign("torch", torch_state(half, **others))
    for group in opt.param_groups:
        assert {name: group[name] for name in others} == others
        assert not {"foreach", "differentiable", "capturable"} & {*group}
    pytest.importorskip("torch")
    for group in opt.to_foreign("torch")["param_groups"]:
        assert {name: group[name] for name in others} == others


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


def test_what_goes_to_torch_is_contiguous():
    pytest.importorskip("torch")
    state = RMSProp(np.asfortranarray(start()["w"]), momentum=0.5).to_foreign("torch")["state"]
    assert all(x.is_contiguous() for x in state[0].values())
