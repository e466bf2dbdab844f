"""States of torch that cannot be mapped, and features that torch lacks."""

import sys

import numpy as np
import pytest
from foreign_runs import Oracle, here, start, torch_state, two_groups
from on_host import everything, refused

from rmsprop_gpu import AdaGrad, RMSProp


def put(*path):
    """A change to a state dict: set the last item of the path at the place before it, or remove it if None."""

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
    with refused(ValueError, "[0]: lr_decay is 0.5; wanted 0", of=[opt]):
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
    with refused(
        ValueError, f'param_groups[0]["{name}"] = ', "wanted these off, or at the values that torch has", of=[opt]
    ):
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
    with pytest.raises(ImportError, match="it comes with the extra bench: "):
        RMSProp(start()).to_foreign("torch")
