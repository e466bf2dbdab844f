"""Real numbers of any library are accepted as numbers, and so are those that other libraries' schedules return."""

import importlib
import os
from decimal import Decimal

import numpy as np
import pytest
from on_host import assert_same, assert_same_bits, one, random, refused
from states import build, run

from rmsprop_gpu import RMSProp


def of_keras(x):
    pytest.importorskip("jax")
    os.environ.setdefault("KERAS_BACKEND", "jax")
    return pytest.importorskip("keras").Variable(x)


# How each library represents the number 0.5 (or another that is exact in float32).
LIBRARIES = {
    "numpy": np.float32,
    "numpy array": np.asarray,
    "decimal": Decimal,
    "torch": lambda x: pytest.importorskip("torch").tensor(x),
    "torch parameter": lambda x: pytest.importorskip("torch").tensor(x, requires_grad=True),
    "jax": lambda x: pytest.importorskip("jax.numpy").asarray(x),
    "keras": of_keras,
    "cupy": pytest.param(lambda x: importlib.import_module("cupy").asarray(x), marks=pytest.mark.gpu),
}
EACH = [x if isinstance(x, type(pytest.param())) else pytest.param(x, id=name) for name, x in LIBRARIES.items()]
COUNTS = {n: LIBRARIES[n] for n in ("numpy array", "torch", "jax")}


@pytest.mark.parametrize("as_theirs", EACH)
def test_a_number_of_another_library_is_a_number(as_theirs):
    given = {"lr": 0.25, "alpha": 0.5, "momentum": 0.75, "eps": 2.0**-20, "weight_decay": 0.125}
    theirs = {name: as_theirs(x) for name, x in given.items()}
    opt, twin = RMSProp(one(1), **theirs), RMSProp(one(1), **given)
    assert all(type(opt.param_groups[0][name]) is float for name in given)
    opt.step(one(2)), twin.step(one(2))
    opt.lr, twin.lr = as_theirs(0.5), 0.5
    opt.param_groups[0]["momentum"] = as_theirs(0.5)
    twin.param_groups[0]["momentum"] = 0.5
    opt.step(one(3)), twin.step(one(3))
    assert_same(opt, twin)


@pytest.mark.parametrize("as_theirs", EACH)
def test_a_schedule_may_return_it(as_theirs):
    opt, twin = RMSProp(one(1), lr=lambda step: as_theirs(0.5**step)), RMSProp(one(1), lr=lambda step: 0.5**step)
    for step in range(3):
        opt.step(one(step)), twin.step(one(step))
    assert_same(opt, twin)


@pytest.mark.parametrize("library", ["torch", "jax.numpy"])
@pytest.mark.parametrize("x", [[0.5], [0.5, 0.25], True, 0.5j, -0.5], ids=repr)
def test_what_is_not_one_number_in_its_range_is_refused(library, x):
    theirs = pytest.importorskip(library).asarray(x)
    opt, scheduled = RMSProp(one(1)), RMSProp(one(1), lr=lambda step: theirs)
    with refused(ValueError if x == -0.5 else TypeError, "lr is ", "wanted a finite number >= 0", of=[opt]):
        opt.lr = theirs
    with refused(ValueError if x == -0.5 else TypeError, "lr(0): lr is ", of=[scheduled]):
        scheduled.step(one(2))


@pytest.mark.parametrize("as_theirs", COUNTS.values(), ids=COUNTS)
def test_the_counts_of_a_state_dict_may_be_of_another_library(as_theirs):
    exact = {"lr": 0.25, "alpha": 0.5, "eps": 2.0**-20, "ema_momentum": 0.5}  # exact in float32, too
    opt, twin = build(**exact), run(build(**exact), 1, 2)
    saved = twin.state_dict()
    for name in ("version", "steps", "skipped_steps"):
        saved[name] = as_theirs(saved[name])
    for entry in saved["state"].values():
        entry["step"] = as_theirs(int(entry["step"]))
    for group in saved["param_groups"]:
        group |= {name: as_theirs(x) for name, x in group.items() if type(x) is float}
    opt.load_state_dict(saved)
    assert opt.state_dict()["param_groups"] == twin.state_dict()["param_groups"]
    for key in twin.state:
        assert_same_bits(opt.state[key]["step"], twin.state[key]["step"])
    assert opt.steps == twin.steps == 2
    assert type(opt.state_dict()["steps"]) is int


def test_an_alpha_of_numpy_in_a_state_of_torch_counts():
    """``bias_weight`` is 1 - alpha**step. It used to be 0 if alpha was not a Python float."""
    group = {"lr": 0.1, "alpha": np.float32(0.5), "eps": 1e-8, "weight_decay": 0, "momentum": 0, "centered": False}
    state = {0: {"step": 3.0, "square_avg": np.full(2, 0.25, np.float32)}}
    opt = RMSProp(one(1, size=2), bias_correction=True)
    opt.load_foreign("torch", {"state": state, "param_groups": [{**group, "params": [0]}]})
    assert opt.state[0]["bias_weight"] == 1 - 0.5**3


# Other libraries' schedules in their presets, each compared with the package itself


def assert_close(mine, theirs):
    """After six steps of at most lr / sqrt(1 - decay) / (1 - momentum) = 0.64, with parameters below 32.

    Each step has some 16 roundings (rate, average, root, quotient, buffer), and half an ulp of the parameter.
    """
    eps = np.finfo(np.float32).eps
    np.testing.assert_allclose(mine, np.asarray(theirs), rtol=0, atol=6 * (0.64 * 16 + 16) * eps)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("constant_schedule", {"value": 0.1}),
        ("cosine_decay_schedule", {"init_value": 0.1, "decay_steps": 8}),
        ("exponential_decay", {"init_value": 0.1, "transition_steps": 3, "decay_rate": 0.5}),
        ("warmup_cosine_decay_schedule", {"init_value": 0.0, "peak_value": 0.1, "warmup_steps": 3, "decay_steps": 9}),
        ("piecewise_constant_schedule", {"init_value": 0.1, "boundaries_and_scales": {2: 0.5, 4: 0.1}}),
    ],
)
def test_schedule_of_optax_in_its_preset(name, given):
    optax = pytest.importorskip("optax")
    schedule = getattr(optax, name)(**given)
    jnp = importlib.import_module("jax.numpy")
    start, grads = one(1), random(2, *[33] * 6)
    mine = start.copy()
    opt = RMSProp.from_preset("optax", mine, learning_rate=schedule, momentum=0.5)
    transform = optax.rmsprop(schedule, momentum=0.5)
    theirs = jnp.asarray(start)
    state = transform.init(theirs)
    for g in grads:
        updates, state = transform.update(jnp.asarray(g), state, theirs)
        theirs = optax.apply_updates(theirs, updates)
        opt.step(g)
    assert_close(mine, theirs)
    assert not np.array_equal(mine, start)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("CosineDecay", {"initial_learning_rate": 0.1, "decay_steps": 8}),
        ("ExponentialDecay", {"initial_learning_rate": 0.1, "decay_steps": 3, "decay_rate": 0.5}),
        ("PiecewiseConstantDecay", {"boundaries": [2, 4], "values": [0.1, 0.05, 0.01]}),
        ("InverseTimeDecay", {"initial_learning_rate": 0.1, "decay_steps": 1, "decay_rate": 0.5}),
    ],
)
def test_schedule_of_keras_in_its_preset(name, given):
    """Keras evaluates its schedule at the count of steps before the current one, and so do we."""
    pytest.importorskip("jax")
    os.environ.setdefault("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras")
    schedule = getattr(keras.optimizers.schedules, name)(**given)
    start, grads = one(1), random(2, *[33] * 6)
    mine, variable = start.copy(), keras.Variable(start)
    opt = RMSProp.from_preset("keras", mine, learning_rate=schedule, momentum=0.5)
    fixed = RMSProp.from_preset("keras", start.copy(), learning_rate=0.0, momentum=0.5)
    optimizer = keras.optimizers.RMSprop(learning_rate=schedule, momentum=0.5)
    for step, g in enumerate(grads):
        fixed.lr = float(schedule(step))
        optimizer.apply([keras.ops.convert_to_tensor(g)], [variable])
        opt.step(g), fixed.step(g)
    assert_same_bits(mine, fixed.param_groups[0]["params"][0])
    assert_close(mine, variable)
    assert not np.array_equal(mine, start)
