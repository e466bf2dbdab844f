"""An optimizer: several groups and dtypes at once, its repr, and what it refuses."""

import copy
import pickle

import numpy as np
import pytest
from on_host import assert_same_bits, one, refused

from rmsprop_gpu import AdaGrad, RMSProp

# Several groups and dtypes at once


def test_groups_with_other_variants_and_dtypes_equal_an_optimizer_each():
    """They share one launch, in an order that differs from the parameters'."""
    overrides = [{"lr": 0.1}, {"momentum": 0.9}, {"lr": 0.2, "momentum": 0.0}, {"eps": 0}]
    dtypes = [[np.float32, np.float64], [np.float64, np.float32, np.float32], [np.float32], [np.float32, np.float64]]
    params = [[one(i, dtype, 5 + i) for i, dtype in enumerate(row)] for row in dtypes]
    together = RMSProp([{"params": [p.copy() for p in row], **h} for row, h in zip(params, overrides, strict=True)])
    alone = [[RMSProp(p, **h) for p in row] for row, h in zip(params, overrides, strict=True)]
    for step in range(3):
        grads = [[one([step, i, j], p.dtype, p.size) for j, p in enumerate(row)] for i, row in enumerate(params)]
        grads[1][1] = grads[1][1][::-1]  # copied before use
        grads[2][0] = None if step == 1 else grads[2][0]
        together.step(grads)
        for row, row_grads in zip(alone, grads, strict=True):
            for opt, grad in zip(row, row_grads, strict=True):
                opt.step(grad)
    flat = [opt for row in alone for opt in row]
    for i, opt in enumerate(flat):
        for name, buffer in opt.state[0].items():
            assert_same_bits(together.state[i][name], buffer)
    got = [p for group in together.param_groups for p in group["params"]]
    for p, q in zip(got, [p for row in params for p in row], strict=True):
        assert_same_bits(p, q)
    assert together.steps == 3


def test_steps_counts_calls_and_state_counts_gradients():
    opt = RMSProp({"a": np.zeros(0, np.float32), "b": np.zeros((), np.float32), "c": one(1)})
    assert opt.steps == 0
    for grad in (one(2), None, one(3)):
        opt.step({"a": np.zeros(0, np.float32), "b": np.ones((), np.float32), "c": grad})
    opt.step({"a": None, "b": None, "c": None})
    assert opt.steps == 4
    assert [int(opt.state[key]["step"]) for key in "abc"] == [3, 3, 2]
    assert opt.state["c"]["step"].dtype == np.int64
    with pytest.raises(AttributeError):
        opt.steps = 0


# Its repr, and refusals


def test_repr():
    def warm_up(step):
        return 0.1

    opt = RMSProp(
        [
            {"params": {"w": np.zeros((1000, 2), np.float32), "b": np.zeros(2)}, "momentum": 0.9},
            {"params": np.zeros(1), "lr": warm_up, "eps": 0, "centered": True},
        ]
    )
    opt.step([{"w": None, "b": None}, None])
    state = 2 * 8000 + 12 + 2 * 16 + 16 + 2 * 8 + 16  # buffers, then step and bias_weight
    assert repr(opt).splitlines() == [
        f"RMSProp(3 tensors, 2,003 parameters of float32, float64 on the cpu, {state:,} bytes of state, 1 step)",
        "  group 0: 2 tensors, 2,002 parameters: lr=0.01, alpha=0.9, eps=1e-08, momentum=0.9",
        f"  group 1: 1 tensor, 1 parameter: lr={warm_up.__qualname__}, alpha=0.9, eps=0.0, centered=True",
    ]
    assert repr(AdaGrad(np.zeros(3), clipvalue=2)).splitlines() == [
        "AdaGrad(1 tensor, 3 parameters of float64 on the cpu, 32 bytes of state, 0 steps)",
        "  group 0: 1 tensor, 3 parameters: lr=0.01, eps=1e-10, clipvalue=2.0",
    ]


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
@pytest.mark.parametrize("make", [RMSProp, AdaGrad])
def test_copies_and_pickles_are_refused(make, duplicate):
    opt = make(one(1))
    with refused(TypeError, make.__name__, "state_dict()", of=[opt]):
        duplicate(opt)


def test_hyperparameters_are_not_attributes_but_lr():
    opt = RMSProp(one(1))
    with refused(AttributeError, "'momentum'", "param_groups[i]['momentum']", of=[opt]):
        opt.momentum = 0.9
    opt.lr = 0.5
    assert opt.param_groups[0]["lr"] == 0.5


def test_groups_compare_by_identity():
    groups = RMSProp([{"params": one(1)}, {"params": one(1)}]).param_groups
    assert groups[0] != groups[1]
    assert groups.index(groups[1]) == 1


def test_clipvalue_that_rounds_to_nothing_is_refused():
    with refused(ValueError, "clipvalue is 1e-60, which is 0 in float32", of=[]):
        RMSProp(one(1), clipvalue=1e-60)


def test_kernels_are_what_a_step_launches():
    params = [np.ones(3, np.float32), np.ones(3)]
    groups = [{"params": params[:1], "momentum": 0.9}, {"params": params[1:], "bias_correction": True}]
    opt = RMSProp(groups)
    kernels = opt.kernels()
    assert list(kernels) == [
        "update_kernel[float32, momentum]",
        "prepare_kernel[float64, bias_correction]",
        "update_kernel[float64, bias_correction]",
    ]
    assert all("ret" in asm for kernel in kernels.values() for asm in kernel.inspect_asm().values())
    assert opt.steps == 0
    assert all((x == 1).all() for x in params)
    opt.param_groups[0]["momentum"] = 0.0
    assert "update_kernel[float32, plain]" in opt.kernels()


# Assignable attributes


class Counting(RMSProp):
    """A subclass with its own attributes."""

    beta = None  # declared, since other libraries have a hyperparameter of this name

    def __init__(self, params, **given):
        self.calls, self.log_every = 0, 10
        super().__init__(params, **given)
        self.beta = 0.5

    def step(self, grads, **told):
        self.calls += 1
        super().step(grads, **told)

    @property
    def learning_rate(self):
        return self.lr

    @learning_rate.setter
    def learning_rate(self, value):
        self.lr = value


def test_a_subclass_may_have_attributes_of_its_own():
    opt = Counting(np.ones(3))
    opt.step(np.ones(3))
    opt.step(np.ones(3), zero_grads=True)
    opt.model = "a model"
    opt.learning_rate = 0.5
    assert (opt.calls, opt.steps, opt.log_every, opt.beta, opt.model, opt.lr) == (2, 2, 10, 0.5, "a model", 0.5)


@pytest.mark.parametrize("cls", [RMSProp, AdaGrad, type("Mine", (RMSProp,), {})])
@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("eps", "wanted opt.param_groups[i]['eps'] = ..."),
        ("weight_decay", "wanted opt.param_groups[i]['weight_decay'] = ..."),
        ("learning_rate", "wanted opt.param_groups[i]['lr'] = ..."),
        ("epsilon", "wanted opt.param_groups[i]['eps'] = ..."),
        ("momentun", "close to 'momentum'"),
        ("Weight_Decay", "close to 'weight_decay'"),
        (
            "betas",
            "a hyperparameter, but not here; wanted opt.param_groups[i][...] = ..., or a subclass that declares it",
        ),
        ("steps", "'steps' of "),
        ("state", "'state' of "),
        ("step", "wanted a function"),
    ],
)
def test_what_would_have_no_effect_cannot_be_assigned(cls, name, wanted):
    opt = cls(np.ones(3))
    with refused(AttributeError, f"{name!r} ", "cannot be assigned", wanted, of=[opt]):
        setattr(opt, name, 0.5)


@pytest.mark.parametrize("cls", [RMSProp, AdaGrad])
def test_our_own_classes_have_no_other_attributes(cls):
    opt = cls(np.ones(3))
    with refused(AttributeError, f"'model' cannot be assigned to {cls.__name__}", "or a subclass", of=[opt]):
        opt.model = "a model"


def test_a_step_may_be_wrapped():
    opt, twin, seen = RMSProp(np.ones(3)), RMSProp(np.ones(3)), []
    step = opt.step

    def wrapped(grads, **told):
        seen.append(opt.steps)
        step(grads, **told)

    opt.step = wrapped
    opt.step(np.ones(3))
    opt.step(np.ones(3), zero_grads=True)
    del opt.step
    opt.step(np.ones(3))
    for _ in range(3):
        twin.step(np.ones(3))
    assert seen == [0, 1]
    assert_same_bits(opt.param_groups[0]["params"][0], twin.param_groups[0]["params"][0])


def test_what_a_refusal_advises_is_taken():
    opt = Counting(np.ones(3))
    opt.param_groups[0]["eps"] = 0.5
    opt.param_groups[0]["lr"] = 0.5
    assert (opt.param_groups[0]["eps"], opt.lr) == (0.5, 0.5)
    Declaring = type("Declaring", (RMSProp,), {"betas": None})
    other = Declaring(np.ones(3))
    other.betas = (0.9, 0.99)
    assert other.betas == (0.9, 0.99)
