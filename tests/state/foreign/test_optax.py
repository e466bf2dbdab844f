"""States of optax: a run continues here, or is refused."""

from collections import namedtuple

import numpy as np
import pytest
from foreign_runs import (
    END,
    KERAS,
    LIKE_OPTAX,
    SHAPES,
    SWITCH,
    EmptyState,
    Oracle,
    ScaleByRmsState,
    ScaleByRStdDevState,
    TraceState,
    assert_same_end,
    doubles,
    here,
    optax_state,
    optax_steps,
    start,
)
from on_host import assert_same_bits, refused

from rmsprop_gpu import AdaGrad, RMSProp

ScaleByScheduleState = namedtuple("ScaleByScheduleState", ["count"])
ScaleByRssState = namedtuple("ScaleByRssState", ["sum_of_squares"])
ScaleByAdamState = namedtuple("ScaleByAdamState", ["count", "mu", "nu"])
InjectHyperparamsState = namedtuple("InjectHyperparamsState", ["count", "hyperparams", "inner_state"])

OPTAX = {
    **KERAS,
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "corrected": {"bias_correction": True, "momentum": 0.9},
    "outside": {"eps_in_sqrt": False},
}


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

    with doubles():
        given = {"eps_in_sqrt": True, **OPTAX[case]}
        make = optax.inject_hyperparams(optax.rmsprop) if injected else optax.rmsprop
        rule = optax.chain(optax.clip(1e9), make(learning_rate=0.125, **given))
        whole, _ = optax_steps(rule, start(), rule.init(start()), range(END))
        there, state = optax_steps(rule, start(), rule.init(start()), range(SWITCH))
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
    elif params == "order":  # jax.tree.leaves sorts the keys
        opt, tree, want = RMSProp([np.ones(2) for _ in range(3)]), leaves, [2, 1, 3]
    else:
        opt, tree, want = RMSProp({name: np.ones(2) for name in names[params]}), leaves, [3, 1, 2]
    opt.load_foreign("optax", (ScaleByRmsState(tree), EmptyState(), EmptyState()))
    assert [opt.state[i]["square_avg"][0] for i in range(len(want))] == want


def scaled(tree, scale):
    if isinstance(tree, dict):
        return {key: scaled(entry, scale) for key, entry in tree.items()}
    return [scaled(entry, scale) for entry in tree] if isinstance(tree, list) else tree * scale


NESTED = {
    "flax": {"params": {"Dense_10": {"kernel": 1}, "Dense_2": {"kernel": 2, "bias": 3}}},
    "haiku": {"mlp/~/linear_0": {"w": 1, "b": 2}, "mlp/~/linear_1": {"w": 3}},
    "layers": [{"w": 1, "b": 2}, {"w": 3}],
    "lists": [[1, 2], [3]],
    "integers": {10: 1, 9: {1: 2, 0: 3}},
    "slashes and dots": {"a.b": 1, "a/b": 2, "c": 3},
}


@pytest.mark.parametrize("case", NESTED)
def test_a_tree_matches_parameters_nested_alike(case):
    opt = RMSProp(scaled(NESTED[case], np.ones(2)))
    opt.load_foreign("optax", (ScaleByRmsState(scaled(NESTED[case], np.full(2, 0.5))), EmptyState(), EmptyState()))
    assert [opt.state[i]["square_avg"][0] for i in range(3)] == [0.5, 1.0, 1.5]


LAYERS = [f"Dense_{i}" for i in range(11)]  # as text, Dense_10 sorts before Dense_2
TREE = {layer: {"kernel": np.full(2, i + 1.0)} for i, layer in enumerate(LAYERS)}
IN_ORDER_OF_JAX = [1, 2, 11, 3, 4, 5, 6, 7, 8, 9, 10]


def averages(opt):
    """For each parameter, the number of the layer whose average it got."""
    return [int(opt.state[i]["square_avg"][0]) for i in range(len(opt.state))]


def test_layers_of_other_names_are_refused_unless_order_is_asked_for():
    opt = RMSProp({f"layer{i}": np.ones(2) for i in range(11)})
    texts = ["'Dense_1/kernel', 'Dense_10/kernel', 'Dense_2/kernel'", "wanted 'layer0', 'layer1'", 'or match="order"']
    with refused(ValueError, *texts, of=[opt]):
        opt.load_foreign("optax", (ScaleByRmsState(TREE), EmptyState()))
    opt.load_foreign("optax", (ScaleByRmsState(TREE), EmptyState()), match="order")
    assert averages(opt) == IN_ORDER_OF_JAX


def test_a_list_does_not_take_layers_that_are_sorted_as_text_unasked():
    """The list may be in numeric order."""
    opt = RMSProp([np.ones(2) for _ in LAYERS])
    with refused(ValueError, '"Dense_10/kernel" before "Dense_2/kernel"', 'or match="order"', of=[opt]):
        opt.load_foreign("optax", (ScaleByRmsState(TREE), EmptyState()))
    opt.load_foreign("optax", (ScaleByRmsState(TREE), EmptyState()), match="order")
    assert averages(opt) == IN_ORDER_OF_JAX


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
    "two": ((RMS, EMPTY, RMS), {}, ValueError, ["state[2].nu appears a second time"]),
    "AdaGrad": ((ScaleByRssState(tree()), EMPTY), {}, ValueError, ["state[0].sum_of_squares has no counterpart"]),
    "trace before lr": ((RMS, TRACE, EMPTY), {"momentum": 0.5}, ValueError, ["state[1] does not follow the lea"]),
    "trace before rms": ((EMPTY, TRACE, RMS), {"momentum": 0.5}, ValueError, ["state[1] does not follow the lea"]),
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
