"""States of optax.MultiSteps and optax.partition: the optimizer inside continues here, or is refused."""

from collections import namedtuple

import numpy as np
import pytest
from foreign_runs import (
    END,
    LIKE_OPTAX,
    SHAPES,
    SWITCH,
    EmptyState,
    Oracle,
    ScaleByRmsState,
    TraceState,
    assert_same_end,
    doubles,
    gradient,
    here,
    optax_state,
    optax_steps,
    rates,
    start,
    two_groups,
)
from on_host import refused

from rmsprop_gpu import RMSProp

InjectHyperparamsState = namedtuple("InjectHyperparamsState", ["count", "hyperparams", "inner_state"])
MaskedNode = namedtuple("MaskedNode", [])
MaskedState = namedtuple("MaskedState", ["inner_state"])
MultiStepsState = namedtuple(
    "MultiStepsState", ["mini_step", "gradient_step", "inner_opt_state", "acc_grads", "skip_state"]
)
PartitionState = namedtuple("PartitionState", ["inner_states"])
ScaleByAdamState = namedtuple("ScaleByAdamState", ["count", "mu", "nu"])


def multi_steps(inner, mini_step=0, gradient_step=SWITCH):
    zeros = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    return MultiStepsState(np.int32(mini_step), np.int32(gradient_step), inner, zeros, ())


def of_one(oracle, name, lr=None):
    """The state of the part of a partition that holds this parameter. The other parameters are holes."""

    def masked(x):
        tree = getattr(x, "nu", None) or getattr(x, "trace", None)
        return type(x)({key: tree[key] if key == name else MaskedNode() for key in SHAPES}) if tree else x

    inner = tuple(masked(x) for x in optax_state(oracle))
    if lr is not None:
        inner = InjectHyperparamsState(np.int32(SWITCH), {"learning_rate": np.float64(lr)}, inner)
    return MaskedState(inner)


def test_the_optimizer_in_multi_steps_continues_here():
    given = {**LIKE_OPTAX, "momentum": 0.9}
    whole, half = (Oracle(**given).run(range(steps)) for steps in (END, SWITCH))
    opt = RMSProp(half.params, lr=0.1, **given)
    opt.load_foreign("optax", multi_steps(optax_state(half)))
    assert opt.steps == SWITCH
    assert_same_end(here(opt, range(SWITCH, END), groups=False) and half.params, whole.params, start())


def test_gradients_that_wait_for_a_step_are_refused():
    half = Oracle(**LIKE_OPTAX).run(range(2))
    opt = RMSProp(half.params, **LIKE_OPTAX)
    text = "state.mini_step is 3, and acc_grads holds the gradients since the last step; wanted 0: save after a step"
    with refused(ValueError, text, of=[opt]):
        opt.load_foreign("optax", multi_steps(optax_state(half), mini_step=3))


def test_the_steps_of_multi_steps_are_one_count_with_those_inside():
    half = Oracle(**LIKE_OPTAX, bias_correction=True).run(range(2))
    opt = RMSProp(half.params, **LIKE_OPTAX, bias_correction=True)
    with refused(ValueError, "count is 2, but steps is 5; wanted one count", of=[opt]):
        opt.load_foreign("optax", multi_steps(optax_state(half), gradient_step=5))


@pytest.mark.parametrize("k", [1, 3])
def test_multi_steps_of_optax_itself_continues_here(k):
    optax = pytest.importorskip("optax")

    def steps(params, state, steps):
        for step in steps:
            for i in range(k):  # their mean is gradient(step)
                part = {name: g * (i + 1) * 2 / (k + 1) for name, g in gradient(step).items()}
                updates, state = rule.update(part, state, params)
                params = optax.apply_updates(params, updates)
        return params, state

    with doubles():
        rule = optax.MultiSteps(optax.rmsprop(0.125, momentum=0.9), k, accumulator_dtype=np.float64)
        whole, _ = steps(start(), rule.init(start()), range(END))
        there, state = steps(start(), rule.init(start()), range(SWITCH))
        params = {name: np.array(p) for name, p in there.items()}
        opt = RMSProp.from_preset("optax", params, learning_rate=0.125, momentum=0.9)
        opt.load_foreign("optax", state)
        assert opt.steps == SWITCH
        here(opt, range(SWITCH, END), groups=False)
        assert_same_end(params, {name: np.array(p) for name, p in whole.items()}, start())
        if k > 1:
            _, between = rule.update(gradient(0), state, there)
            with refused(ValueError, "state.mini_step is 1", of=[opt]):
                opt.load_foreign("optax", between)


@pytest.mark.parametrize("kind", ["PartitionState", "MultiTransformState"])
def test_the_parts_of_a_partition_are_merged_by_name(kind):
    """Each part has its own learning rate, and only one has momentum."""
    slow, fast = ({**LIKE_OPTAX, **more} for more in ({}, {"momentum": 0.9}))
    whole, half = (
        {"w": Oracle(**slow).run(range(steps), lr=rates), "b": Oracle(**fast).run(range(steps), lr=rates)}
        for steps in (END, SWITCH)
    )
    params = {name: oracle.params[name] for name, oracle in half.items()}
    groups = two_groups(params)
    groups[0]["lr"], groups[1]["lr"], groups[1]["momentum"] = 7.0, 8.0, 0.9
    opt = RMSProp(groups, **LIKE_OPTAX)
    parts = {name: of_one(oracle, name, rates(name)) for name, oracle in half.items()}
    opt.load_foreign("optax", namedtuple(kind, ["inner_states"])(parts))
    assert ([group["lr"] for group in opt.param_groups], opt.steps) == ([0.1, 0.03], SWITCH)
    here(opt, range(SWITCH, END))
    assert_same_end(params, {name: oracle.params[name] for name, oracle in whole.items()}, start())


@pytest.mark.parametrize("injected", [False, True])
def test_a_partition_of_optax_itself_continues_here(injected):
    optax = pytest.importorskip("optax")
    make = optax.inject_hyperparams(optax.rmsprop) if injected else optax.rmsprop

    with doubles():
        parts = {"slow": make(learning_rate=0.125), "fast": make(learning_rate=0.0625, momentum=0.9)}
        rule = optax.partition(parts, {"w": "slow", "b": "fast"})
        whole, _ = optax_steps(rule, start(), rule.init(start()), range(END))
        there, state = optax_steps(rule, start(), rule.init(start()), range(SWITCH))
        params = {name: np.array(p) for name, p in there.items()}
        groups = two_groups(params)
        groups[0]["lr"], groups[1]["lr"], groups[1]["momentum"] = *((7, 8) if injected else (0.125, 0.0625)), 0.9
        opt = RMSProp(groups, **LIKE_OPTAX)
        opt.load_foreign("optax", state)
        here(opt, range(SWITCH, END))
        assert_same_end(params, {name: np.array(p) for name, p in whole.items()}, start())


def test_a_rate_that_is_injected_around_a_partition_is_of_all_its_parts():
    half = Oracle(**LIKE_OPTAX).run(range(SWITCH))
    opt = RMSProp(half.params, **LIKE_OPTAX)
    state = PartitionState({name: of_one(half, name) for name in SHAPES})
    opt.load_foreign("optax", InjectHyperparamsState(np.int32(SWITCH), {"learning_rate": np.float64(0.5)}, state))
    assert opt.lr == 0.5


def averages_of(holes):
    """A part of a partition over a list. Its arrays are filled with their number from 1, and 0 is a hole."""
    return MaskedState((ScaleByRmsState([np.full(2, float(x)) if x else MaskedNode() for x in holes]), EmptyState()))


def test_the_parts_of_a_partition_are_merged_in_the_order_of_the_tree():
    opt = RMSProp({name: np.ones(2) for name in "pqr"})
    state = PartitionState({"x": averages_of([0, 2, 0]), "y": averages_of([1, 0, 3])})
    opt.load_foreign("optax", state, match="order")
    assert [opt.state[name]["square_avg"][0] for name in "pqr"] == [1, 2, 3]


@pytest.mark.parametrize("match", ["name", "order"])
def test_a_buffer_of_some_parameters_goes_to_the_same_ones(match):
    """In a list, where only the second parameter has momentum."""
    part = MaskedState(
        (ScaleByRmsState([MaskedNode(), np.ones(2)]), EmptyState(), TraceState([MaskedNode(), np.ones(2)]))
    )
    state = PartitionState({"x": averages_of([1, 0]), "y": part})

    def optimizer(*momenta):
        return RMSProp([{"params": np.ones(2), "momentum": x} for x in momenta], lr_in_momentum=True)

    opt = optimizer(0, 0.5)
    opt.load_foreign("optax", state, match=match)
    assert opt.state[1]["momentum_buffer"].tolist() == [-1, -1]
    for momenta, text in (
        ((0.5, 0), "is of the parameters '1'; wanted '0'"),
        ((0.5, 0.5), "has 1 parameters; wanted 2"),
    ):
        opt = optimizer(*momenta)
        with refused(ValueError, f'state\'s "momentum_buffer" {text}', of=[opt]):
            opt.load_foreign("optax", state, match=match)
    opt = optimizer(0, 0)
    with refused(ValueError, 'state.inner_states["y"].inner_state[2].trace[1] has no use with momentum=0', of=[opt]):
        opt.load_foreign("optax", state, match=match)


def test_parameters_of_one_group_have_one_learning_rate():
    half = Oracle(**LIKE_OPTAX).run(range(SWITCH))
    opt = RMSProp(half.params, **LIKE_OPTAX)
    state = PartitionState({name: of_one(half, name, rates(name)) for name in SHAPES})
    text = "param_groups[0] has the learning rates 0.1, 0.03 in this state; wanted a group each"
    with refused(ValueError, text, of=[opt]):
        opt.load_foreign("optax", state)


WHOLE = ScaleByRmsState({name: np.ones(shape) for name, shape in SHAPES.items()})
WRONG = {
    "Adam": ({"b": MaskedState((ScaleByAdamState(3, {}, {}),))}, TypeError, '["b"].inner_state[0] is a'),
    "twice": ({"w": MaskedState((WHOLE,)), "b": MaskedState((WHOLE,))}, ValueError, '["b"].inner_state[0].nu appears'),
    "trace": (
        {"w": MaskedState((WHOLE, EmptyState())), "b": MaskedState((TraceState({}),))},
        ValueError,
        'state.inner_states["b"].inner_state[0] does not follow the learning rate',
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_partitions_that_cannot_be_mapped_are_named(case):
    parts, kind, text = WRONG[case]
    opt = RMSProp(start(), **LIKE_OPTAX)
    with refused(kind, text, of=[opt]):
        opt.load_foreign("optax", PartitionState(parts))
