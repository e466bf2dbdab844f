"""States of Keras: a run continues here, or is refused."""

import os

import numpy as np
import pytest
from foreign_runs import (
    END,
    KERAS,
    KERAS_NAMES,
    SHAPES,
    SWITCH,
    Oracle,
    assert_same_end,
    doubles,
    gradient,
    here,
    start,
)
from on_host import assert_same_bits, refused

from rmsprop_gpu import AdaGrad, RMSProp

LIKE_KERAS = {"eps": 1e-7, "eps_in_sqrt": True, "lr_in_momentum": True}


class Variable:
    """A stand-in for a variable of Keras, with only what is read from it."""

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
    if named:
        opt.load_foreign("keras", {v.path: np.asarray(v) for v in variables})
    else:
        with refused(ValueError, "of the parameters 'm_w', 'm_b'; wanted 'w', 'b', or match=\"order\"", of=[opt]):
            opt.load_foreign("keras", variables)
        opt.load_foreign("keras", variables, match="order")
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


LOSS_SCALE = {"iteration": 0, "learning_rate": 0.0, "step_counter": 7, "dynamic_scale": np.float32(2**15)}


@pytest.mark.parametrize("name", ["loss_scale_optimizer", "adam"])
def test_the_optimizer_in_a_loss_scale_optimizer_continues_here(name):
    """The wrapper's own count stays 0, and so does its learning rate."""
    given = {**LIKE_KERAS, "momentum": 0.9}
    whole, half = (Oracle(**given).run(range(steps), lr=lambda name: 0.125) for steps in (END, SWITCH))
    opt = RMSProp(half.params, lr=7.0, **given)
    own = [Variable(f"{name}/{tail}", value) for tail, value in LOSS_SCALE.items()]
    opt.load_foreign("keras", own + keras_variables(half, prefix=""))
    assert (opt.steps, opt.lr) == (SWITCH, 0.125)
    here(opt, range(SWITCH, END), groups=False)
    assert_same_end(half.params, whole.params, start())


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras's own warning
def test_a_loss_scale_optimizer_of_keras_itself_continues_here(keras):
    """One gradient overflows, so that its step is skipped and the scale is halved."""

    def steps(params, state, steps):
        for step in steps:
            scale = np.asarray(state[names.index("dynamic_scale")], np.float64)
            grads = [keras.ops.convert_to_tensor(g * scale) for g in gradient(step).values()]
            if step == SWITCH // 2:
                _, state = optimizer.stateless_apply(state, [g * np.inf for g in grads], params)
                scale /= 2
                grads = [g / 2 for g in grads]
            params, state = optimizer.stateless_apply(state, grads, params)
        return params, state

    inner = keras.optimizers.RMSprop(learning_rate=0.125, momentum=0.9, name="nadam_like")
    optimizer = keras.optimizers.LossScaleOptimizer(inner)
    variables = [keras.Variable(p, dtype="float64", name=name) for name, p in start().items()]
    optimizer.build(variables)
    names = [v.path.rpartition("/")[2] for v in optimizer.variables]
    begun = [v.value for v in variables], [v.value for v in optimizer.variables]
    whole, _ = steps(*begun, range(END))
    there, state = steps(*begun, range(SWITCH))
    params = {name: np.array(p) for name, p in zip(SHAPES, there, strict=True)}
    opt = RMSProp.from_preset("keras", params, **optimizer.get_config()["inner_optimizer"]["config"])
    opt.load_foreign("keras", {v.path: np.asarray(x) for v, x in zip(optimizer.variables, state, strict=True)})
    assert opt.steps == SWITCH
    here(opt, range(SWITCH, END), groups=False)
    assert_same_end(params, {n: np.asarray(p) for n, p in zip(SHAPES, whole, strict=True)}, start())


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
    opt.load_foreign("keras", keras_variables(half, prefix=""))
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
    """They are called momentum and velocity, too, but mean something else."""
    half = Oracle(**LIKE_KERAS, momentum=0.9).run(range(2))
    variables = {v.path.replace("rm_sprop", "adamw_1"): np.asarray(v) for v in keras_variables(half)}
    opt = RMSProp(half.params, **LIKE_KERAS, momentum=0.9)
    with refused(ValueError, 'state["adamw_1/m_w_velocity"] is from another optimizer', of=[opt]):
        opt.load_foreign("keras", variables)


@pytest.mark.parametrize("name", ["adam_like", "adams_rms", "lamb_chop", "nadamant"])
def test_what_is_called_like_another_optimizer_is_none(name):
    half = Oracle(**LIKE_KERAS, momentum=0.9).run(range(2))
    variables = {v.path.replace("rm_sprop", name): np.asarray(v) for v in keras_variables(half, prefix="")}
    opt = RMSProp(half.params, **LIKE_KERAS, momentum=0.9)
    opt.load_foreign("keras", variables)
    assert_same_bits(opt.state["w"]["square_avg"], half.state["w"]["square_avg"])


def test_arrays_without_a_path_are_no_variables():
    opt = RMSProp(start())
    with refused(TypeError, "state[0] is a numpy.ndarray without a path", of=[opt]):
        opt.load_foreign("keras", [np.ones(3)])


def with_averages(oracle):
    averages = {f"rm_sprop/{name}_average": np.full_like(p, 0.5) for name, p in oracle.params.items()}
    return {v.path: np.asarray(v) for v in keras_variables(oracle, prefix="")} | averages


def test_the_average_of_the_parameters_is_loaded():
    half = Oracle(**LIKE_KERAS).run(range(2))
    opt = RMSProp(half.params, **LIKE_KERAS, use_ema=True)
    opt.load_foreign("keras", with_averages(half))
    for name, p in half.params.items():
        assert_same_bits(opt.ema[name], np.full_like(p, 0.5))


def test_averages_on_one_side_alone_are_refused_with_keras():
    half = Oracle(**LIKE_KERAS).run(range(2))
    opt = RMSProp(half.params, **LIKE_KERAS)
    with refused(ValueError, 'state["rm_sprop/w_average"] has no use with use_ema=False', of=[opt]):
        opt.load_foreign("keras", with_averages(half))
    opt = RMSProp(half.params, **LIKE_KERAS, use_ema=True)
    with refused(ValueError, 'state lacks the arrays of "ema", which use_ema=True', of=[opt]):
        opt.load_foreign("keras", keras_variables(half, prefix=""))


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
