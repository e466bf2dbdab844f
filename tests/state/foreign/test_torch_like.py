"""States of timm and bitsandbytes, whose optimizers are torch's: a run continues here, or is refused."""

import importlib.util

import numpy as np
import pytest
import record_presets
from foreign_runs import (
    END,
    SHAPES,
    SWITCH,
    Formula,
    assert_continues,
    assert_same_end,
    gradient,
    here,
    start,
    two_groups,
)
from on_host import assert_same_bits, refused

from rmsprop_gpu import AdaGrad, RMSProp

TIMM = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "lr outside": {"momentum": 0.9, "lr_in_momentum": False},
    "centered": {"centered": True, "momentum": 0.9},
    "L2": {"weight_decay": 0.1},
    "decoupled": {"weight_decay": 0.1, "decoupled_decay": True},
}
TIMM_GROUP = {
    "momentum": 0.0, "alpha": 0.9, "eps": 1e-10, "centered": False, "weight_decay": 0, "decoupled_decay": False,
    "corrected_weight_decay": False, "max_lr_snapshot": 0.1, "lr_in_momentum": True, "caution": False, "foreach": None,
}  # fmt: skip  # as timm 1.0.31 writes it
WRAPPED = "__bnb_optimizer_quant_state__"  # as bitsandbytes 0.50.2 writes it


def timm_state(run, **changed):
    """The state_dict of timm.optim.RMSpropTF after this run, with NumPy arrays in place of tensors."""
    names = {"square_avg": "square_avg", "grad_avg": "grad_avg", "buf": "momentum_buffer"}
    state = {
        i: {"step": np.float32(SWITCH), **{names[n]: x for n, x in run.state[name].items() if n in names}}
        for i, name in enumerate(SHAPES)
    }
    return {"state": state, "param_groups": [{"lr": 0.1, **TIMM_GROUP, **run.given, "params": [0, 1], **changed}]}


def bitsandbytes_state(run, wrapped=True, **changed):
    """The state_dict of bitsandbytes.optim.RMSprop after this run. Earlier versions wrap nothing."""
    state = {}
    for i, name in enumerate(SHAPES):
        arrays = {"state1": run.state[name]["state1"]}
        state[i] = {"step": SWITCH, **({WRAPPED: arrays} if wrapped else arrays)}
    group = {"lr": 0.1, "betas": (0.99, 0), "eps": 1e-8, "weight_decay": 0, **run.given, "params": [0, 1], **changed}
    return {"state": state, "param_groups": [group]}


@pytest.mark.parametrize("case", TIMM)
def test_a_run_of_timm_continues_here(case):
    opt = assert_continues("timm", timm_state, **TIMM[case])
    assert opt.steps == END


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("decay", [0, 0.1])
def test_a_run_of_bitsandbytes_continues_here(decay, wrapped):
    assert_continues("bitsandbytes", lambda run: bitsandbytes_state(run, wrapped), weight_decay=decay)


@pytest.mark.parametrize("framework", ["timm", "bitsandbytes"])
def test_hyperparameters_come_from_the_state(framework):
    """It does not matter what this optimizer was built with."""
    run = Formula(framework).run(range(SWITCH))
    state = {"timm": timm_state, "bitsandbytes": bitsandbytes_state}[framework](run, initial_lr=0.5)
    others = {"momentum": 0.5, "centered": True, "nesterov": True, "bias_correction": True, "maximize": True}
    opt = RMSProp(run.params, lr=7, alpha=0.5, eps=0.5, weight_decay=0.5, clipvalue=0.25, **others)
    opt.load_foreign(framework, state)
    want = RMSProp.from_preset(framework, start(), lr=0.1).param_groups[0].hyper()
    assert opt.param_groups[0].hyper() == {**want, "clipvalue": 0.25}
    assert opt.param_groups[0]["initial_lr"] == 0.5


def test_a_parameter_without_state_begins_as_in_timm():
    """Averages start at 1."""
    saved = timm_state(Formula("timm").run(range(SWITCH)))
    del saved["state"][1]
    opt = RMSProp(start())
    opt.load_foreign("timm", saved)
    assert_same_bits(opt.state["b"]["square_avg"], np.ones(SHAPES["b"]))
    assert opt.state["b"]["step"] == 0


def test_groups_of_earlier_versions_of_timm():
    saved = timm_state(Formula("timm").run(range(SWITCH)))
    for name in ("corrected_weight_decay", "max_lr_snapshot", "caution", "foreach"):
        del saved["param_groups"][0][name]
    opt = RMSProp(start())
    opt.load_foreign("timm", saved)
    assert opt.steps == SWITCH


def test_adagrad_of_bitsandbytes():
    group = {"lr": 0.25, "betas": (0.0, 0.0), "eps": 1e-10, "weight_decay": 0, "params": [0]}
    opt = AdaGrad(np.ones(2), initial_scale=0.5)
    state = {0: {"step": 3, WRAPPED: {"state1": np.full(2, 0.5, np.float32)}}}
    opt.load_foreign("bitsandbytes", {"state": state, "param_groups": [group]})
    assert (opt.lr, opt.state[0]["sum"].tolist(), opt.state[0]["step"]) == (0.25, [0.5, 0.5], 3)


def test_timm_has_no_adagrad():
    opt = AdaGrad(start())
    with refused(ValueError, "framework is 'timm', which has no AdaGrad; wanted 'torch', or RMSProp", of=[opt]):
        opt.load_foreign("timm", {})


GROUP, W = ("param_groups", 0), ("state", 0)
WRONG = {
    "caution": ("timm", GROUP, {"caution": True}, ["[0]: caution is True; wanted False: timm's caution is not done"]),
    "corrected": ("timm", GROUP, {"corrected_weight_decay": True}, ["corrected_weight_decay is True; wanted False"]),
    "torch's": ("timm", GROUP, {"lr_in_momentum": None}, ["[0] lacks 'lr_in_momentum'"]),
    "betas of Adam": ("timm", GROUP, {"betas": (0.9, 0.99)}, ["[0] has 'betas', which is a hyperparameter"]),
    "alpha": ("timm", GROUP, {"alpha": 1.5}, ["param_groups[0]: alpha is 1.5"]),
    "exp_avg": ("timm", W, {"exp_avg": np.ones((3, 4))}, ["[0] has 'exp_avg', which has no counterpart"]),
    "no average": ("timm", W, {"square_avg": None}, ["[0] lacks 'square_avg', which its hyperparameters need"]),
    "8 bits": (
        "bitsandbytes", W,
        {"state1": np.ones(12, np.uint8), "qmap1": np.ones(256), "absmax1": np.ones(1)},
        ["[0] has 'qmap1', so it is 8-bit; wanted a 32-bit one, from optim_bits=32"],
    ),
    "8 bits, not in blocks": ("bitsandbytes", W, {"max1": np.ones(1)}, ["[0] has 'max1', so it is 8-bit"]),
    "two states": ("bitsandbytes", W, {"state2": np.ones((3, 4))}, ["[0] has 'state2', which has no counterpart"]),
    "norms": ("bitsandbytes", W, {"unorm_vec": np.ones(1)}, ["[0] has 'unorm_vec', which has no counterpart"]),
    "momentum": ("bitsandbytes", GROUP, {"betas": (0.9, 0.9)}, ["[0]: momentum is 0.9; wanted 0 or 0.0"]),
    "three betas": ("bitsandbytes", GROUP, {"betas": (0.9, 0.9, 0.9)}, ["[0]: betas is (0.9, 0.9, 0.9); wanted those"]),
    "no betas": ("bitsandbytes", GROUP, {"betas": None}, ["[0] lacks 'betas'"]),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_states_that_cannot_be_mapped_name_the_entry(case):
    framework, (part, key), changes, texts = WRONG[case]
    run = Formula(framework).run(range(SWITCH))
    saved = timm_state(run) if framework == "timm" else bitsandbytes_state(run, wrapped=False)
    entry = saved[part][key]
    for name, value in changes.items():
        entry[name] = value
        if value is None:
            del entry[name]
    opt = RMSProp(start())
    with refused(ValueError, *texts, of=[opt]):
        opt.load_foreign(framework, saved)


def test_no_8_bits_in_the_wrapping_either():
    saved = bitsandbytes_state(Formula("bitsandbytes").run(range(SWITCH)))
    saved["state"][1][WRAPPED]["absmax1"] = np.ones(1, np.float32)
    opt = RMSProp(start())
    with refused(ValueError, "state[\"state\"][1] has 'absmax1', so it is 8-bit", of=[opt]):
        opt.load_foreign("bitsandbytes", saved)


# The real packages


def steps_of(tensors, optimizer, steps, dtype):
    torch = pytest.importorskip("torch")
    for step in steps:
        for tensor, grad in zip(tensors, gradient(step).values(), strict=True):
            tensor.grad = torch.from_numpy(grad.astype(dtype))
        optimizer.step()
    return [tensor.detach().numpy() for tensor in tensors]


def begun(make, dtype):
    torch = pytest.importorskip("torch")
    tensors = [torch.from_numpy(p.astype(dtype)).requires_grad_() for p in start().values()]
    groups = [{"params": tensors[:1], "lr": 0.1}, {"params": tensors[1:], "lr": 0.03}]
    return tensors, make(groups)


@pytest.mark.parametrize("case", TIMM)
def test_timm_itself_continues_here(case):
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    tensors, optimizer = begun(lambda groups: record_presets.rmsprop_tf()(groups, **TIMM[case]), np.float64)
    steps_of(tensors, optimizer, range(SWITCH), np.float64)
    params = {name: t.detach().numpy().copy() for name, t in zip(SHAPES, tensors, strict=True)}
    opt = RMSProp(two_groups(params))
    opt.load_foreign("timm", optimizer.state_dict())
    here(opt, range(SWITCH, END))
    want = steps_of(tensors, optimizer, range(SWITCH, END), np.float64)
    assert_same_end(params, dict(zip(SHAPES, want, strict=True)), start())


def test_bitsandbytes_itself_continues_here():
    """Its only state is float32. In each step both sides round the parameter, by up to half an ulp."""
    rmsprop = pytest.importorskip("bitsandbytes").optim.RMSprop
    tensors, optimizer = begun(lambda groups: rmsprop(groups, weight_decay=0.1), np.float32)
    steps_of(tensors, optimizer, range(SWITCH), np.float32)
    params = {name: t.detach().numpy().copy() for name, t in zip(SHAPES, tensors, strict=True)}
    before = {name: p.copy() for name, p in params.items()}
    opt = RMSProp(two_groups(params))
    opt.load_foreign("bitsandbytes", optimizer.state_dict())
    for step in range(SWITCH, END):
        opt.step([{name: g.astype(np.float32)} for name, g in gradient(step).items()])
    want = steps_of(tensors, optimizer, range(SWITCH, END), np.float32)
    for (name, got), there in zip(params.items(), want, strict=True):
        ulps = (END - SWITCH) * 2 * 0.5 * np.spacing(np.float32(np.abs(there).max()))
        update = np.abs(there - before[name]).max()
        assert update > 0.03
        np.testing.assert_allclose(got, there, rtol=0, atol=ulps + 1e-6 * update)


def test_8_bits_of_bitsandbytes_itself_are_refused():
    torch = pytest.importorskip("torch")
    bitsandbytes = pytest.importorskip("bitsandbytes")
    tensor = torch.ones(5000, requires_grad=True)
    optimizer = bitsandbytes.optim.RMSprop8bit([tensor])
    tensor.grad = torch.ones(5000)
    optimizer.step()
    opt = RMSProp(np.ones(5000, np.float32))
    with refused(ValueError, "state[\"state\"][0] has 'qmap1', so it is 8-bit", of=[opt]):
        opt.load_foreign("bitsandbytes", optimizer.state_dict())
