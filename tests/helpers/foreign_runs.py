"""Runs that switch from torch, Keras or optax to this package halfway. They must end where they would have ended.

Each switch is made twice: from the library itself where it is installed, and from its state as the float64 oracle
leaves it. The latter runs everywhere, and `test_reference.py` compares it with what was recorded from the libraries.
"""

import math
from collections import namedtuple

import numpy as np
import pytest
from on_host import random
from preset_formulas import FORMULAS

from rmsprop_gpu import RMSProp, reference

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
    """The gradients of a step, independent of each other. A late one is missing until shortly after the switch."""
    made = dict(zip(SHAPES, random(100 + step, *map(math.prod, SHAPES.values()), dtype=np.float64), strict=True))
    grads = {name: g.reshape(SHAPES[name]) for name, g in made.items()}
    return {**grads, "b": None} if late and step < SWITCH + 2 else grads


def optax_steps(rule, params, state, steps):
    """Take these steps with optax's own rule. Returns parameters and state."""
    apply_updates = pytest.importorskip("optax").apply_updates
    for step in steps:
        updates, state = rule.update(gradient(step), state, params)
        params = apply_updates(params, updates)
    return params, state


def assert_same_end(got, want, first):
    """A parameter, initially below 4, is rounded once per step on each side: 40 * (4 + update) * 2^-53 in all.

    With updates above 0.03, that is 6e-13 of them. The steps themselves differ by less: ten roundings or so each (in
    centered mode, of v against v - m^2).
    """
    for name in SHAPES:
        update = np.max(np.abs(want[name] - first[name]))
        assert update > 0.03
        assert np.max(np.abs(first[name])) < 4
        np.testing.assert_allclose(got[name], want[name], rtol=0, atol=1e-12 * update)


class Oracle:
    """A run of the oracle, with each parameter's state after its last step."""

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


class Formula:
    """A run of a preset's formula with the framework's arguments, and each parameter's state after its last step.

    The learning rate changes at the switch, so that it matters on which side of the momentum it is.
    """

    def __init__(self, preset, **given):
        self.preset, self.given = preset, given
        self.params, self.state = start(), {name: {} for name in SHAPES}

    def run(self, steps):
        for step in steps:
            grads = gradient(step)
            for name, grad in grads.items():
                given = {**lr_of(self.preset, step), **self.given}
                self.state[name]["all"] = list(grads.values())
                self.params[name] = np.asarray(
                    FORMULAS[self.preset](self.params[name], grad, self.state[name], **given)
                )
        return self


def lr_of(preset, step):
    """The learning rate of a step, as an argument of the preset."""
    lr = 0.1 if step < SWITCH else 0.03
    return {"learning_rate" if preset in ("keras", "optax", "tf1", "tf_keras_legacy") else "lr": lr}


def assert_continues(preset, state_of, *, framework=None, lr=True, load=None, **given):
    """A run continued from the formula's state at the switch must end where the formula itself ends."""
    whole, half = (Formula(preset, **given).run(range(steps)) for steps in (END, SWITCH))
    opt = RMSProp.from_preset(preset, half.params, **{**lr_of(preset, 0), **given})
    opt.load_foreign(framework or preset, state_of(half), **(load or {}))
    if lr:
        opt.lr = next(iter(lr_of(preset, SWITCH).values()))
    here(opt, range(SWITCH, END), groups=False)
    assert_same_end(half.params, whole.params, start())
    return opt


def two_groups(params):
    """Two groups with different lr, in the order of SHAPES."""
    return [{"params": {"w": params["w"]}, "lr": 0.1}, {"params": {"b": params["b"]}, "lr": 0.03}]


def torch_state(oracle, names=SHAPES, **changed):
    """The state_dict of torch.optim.RMSprop after this run, with NumPy arrays in place of tensors."""
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


KERAS_NAMES = {"square_avg": "velocity", "momentum_buffer": "momentum", "grad_avg": "average_gradient"}


def doubles():
    """A context in which JAX has float64."""
    jax = pytest.importorskip("jax")
    return jax.enable_x64(True)


EmptyState = namedtuple("EmptyState", [])
ScaleByRmsState = namedtuple("ScaleByRmsState", ["nu"])
ScaleByRmsWithCountState = namedtuple("ScaleByRmsWithCountState", ["count", "nu"])
ScaleByRStdDevState = namedtuple("ScaleByRStdDevState", ["mu", "nu"])
TraceState = namedtuple("TraceState", ["trace"])
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
