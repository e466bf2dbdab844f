"""States of TensorFlow 1 and of tf.keras up to 2.10: a run continues here, or is refused.

The names are built as in TensorFlow's sources: slot_creator.py, trackable_utils.py and optimizer_v2.py.
"""

import numpy as np
import pytest
from foreign_runs import SHAPES, SWITCH, Formula, assert_continues, start
from on_host import refused

from rmsprop_gpu import AdaGrad, RMSProp

CASES = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "centered": {"centered": True},
    "both": {"momentum": 0.9, "centered": True},
}
VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"


def model(run, ending=""):
    """The model's own variables, which a checkpoint also contains."""
    more = {"dense/gamma": np.ones(2), "save_counter": np.int64(3), "_CHECKPOINTABLE_OBJECT_GRAPH": b"graph"}
    return {**{f"{name}{ending}": p for name, p in run.params.items()}, **more}


def saver(run, optimizer="RMSProp"):
    """A name-based checkpoint of TensorFlow 1 after a run: mean square, mean if centered, momentum."""
    variables = {**model(run), "global_step": np.int64(SWITCH)}
    for name, s in run.state.items():
        for i, slot in enumerate(n for n in ("ms", "mg", "mom") if n in s):
            variables[f"{name}/{optimizer}" + f"_{i}" * (i > 0)] = s[slot]
    return variables


SLOTS = {"ms": "rms", "rms": "rms", "mg": "mg", "mom": "momentum"}


def slots_of(s):
    """The slots of a parameter. A legacy RMSprop has a momentum slot only with momentum."""
    return {SLOTS[n]: x for n, x in s.items() if n in SLOTS}


def objects(run, optimizer="optimizer", **own):
    """An object-based checkpoint after a run."""
    slots = {
        f"{name}/.OPTIMIZER_SLOT/{optimizer}/{slot}{VALUE}": x
        for name, s in run.state.items()
        for slot, x in slots_of(s).items()
    }
    return {**model(run, VALUE), **slots, **{f"{optimizer}/{name}{VALUE}": x for name, x in own.items()}}


class Variable:
    """A stand-in for a variable of TensorFlow, with only what is read from it."""

    def __init__(self, name, value):
        self.name, self.value = name, value

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.value)

    def __float__(self):
        return float(self.value)


def listed(run, scope="RMSprop/", **own):
    """optimizer.variables() of a legacy RMSprop after a run."""
    slots = {f"{name}/{slot}": x for name, s in run.state.items() for slot, x in slots_of(s).items()}
    both = {"iter": np.int64(SWITCH), **own, **slots}
    return [Variable(f"{scope}{name}:0", x) for name, x in both.items()]


# TensorFlow 1


@pytest.mark.parametrize("optimizer", ["RMSProp", "adam_like"])
@pytest.mark.parametrize("case", CASES)
def test_a_run_of_tf1_continues_here(case, optimizer):
    """TensorFlow 1 has a momentum slot even without momentum."""
    opt = assert_continues("tf1", lambda run: saver(run, optimizer), **CASES[case])
    assert ("momentum_buffer" in opt.state["w"]) == ("momentum" in CASES[case])


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_of_objects_of_tf1_continues_here(case):
    assert_continues("tf1", objects, load={"steps": SWITCH}, **CASES[case])


def test_momentum_of_tf1_for_one_group_alone():
    run = Formula("tf1", momentum=0.9).run(range(2))
    groups = [{"params": {name: p}, "momentum": m} for (name, p), m in zip(run.params.items(), (0, 0.9), strict=True)]
    opt = RMSProp(groups, lr_in_momentum=True)
    opt.load_foreign("tf1", saver(run))
    assert "momentum_buffer" not in opt.state["w"]
    assert opt.state["b"]["momentum_buffer"].tolist() == run.state["b"]["mom"].tolist()


@pytest.mark.parametrize("step", [{}, {"global_step": np.int64(7)}, {f"global_step{VALUE}": np.int64(7)}])
def test_the_count_of_tf1_is_that_of_the_graph(step):
    state = {"w/RMSProp": np.ones(2), "w/RMSProp_1": np.ones(2), **step}
    opt = RMSProp({"w": np.ones(2)}, lr=lambda step: 0.1)
    if step:
        opt.load_foreign("tf1", state)
        assert opt.steps == 7
        with refused(ValueError, "is 7, but steps is 8; wanted one count", of=[opt]):
            opt.load_foreign("tf1", state, steps=8)
    else:
        with refused(ValueError, "state has no count, which a callable lr", of=[opt]):
            opt.load_foreign("tf1", state)


@pytest.mark.parametrize("key", ["deep/net/w", "deep.net.w"])
def test_scopes_of_tensorflow_are_slashes_or_dots(key):
    slots = {f"deep/net/{n}/RMSProp{i}": np.full(2, x) for n, x in (("b", 1.0), ("w", 2.0)) for i in ("", "_1")}
    opt = RMSProp({key: np.ones(2), key[:-1] + "b": np.ones(2)})
    opt.load_foreign("tf1", slots)
    assert opt.state[key]["square_avg"].tolist() == [2, 2]
    unnamed = RMSProp([np.ones(2), np.ones(2)])
    unnamed.load_foreign("tf1", slots)
    assert unnamed.state[0]["square_avg"].tolist() == [1, 1]


def test_slots_of_any_name_beside_averages_and_numbered_variables():
    numbered = {f"net/Variable{i}": np.ones(3) for i in ("", "_1", "_2")}
    slots = {"w/x": np.full(2, 1.0), "w/x_1": np.full(2, 2.0), "w/ExponentialMovingAverage": np.full(2, 3.0)}
    opt = RMSProp({"w": np.ones(2)}, momentum=0.9, lr_in_momentum=True)
    opt.load_foreign("tf1", {"w": np.ones(2), **numbered, **slots})
    state = opt.state["w"]
    assert (state["square_avg"].tolist(), state["momentum_buffer"].tolist()) == ([1, 1], [2, 2])


@pytest.mark.parametrize("framework", ["tf1", "tf_keras_legacy"])
def test_averages_start_anew_that_tensorflow_keeps_elsewhere(framework):
    run = Formula(framework).run(range(2))
    opt = RMSProp(run.params, use_ema=True)
    opt.load_foreign(framework, objects(run, iter=2))
    assert opt.ema["w"].tolist() == run.params["w"].tolist()


def test_a_list_does_not_take_what_is_sorted_as_text():
    slots = {f"layer_{n}/w/RMSProp{i}": np.ones(1) for n in (1, 10, 2) for i in ("", "_1")}
    opt = RMSProp([np.ones(1) for _ in range(3)])
    with refused(ValueError, '"layer_10/w" before "layer_2/w", as text is sorted', of=[opt]):
        opt.load_foreign("tf1", slots)
    opt.load_foreign("tf1", slots, match="order")


def test_adagrad_of_tf1():
    for state in (
        {"w/Adagrad": np.full(2, 0.5), "w": np.ones(2), "w/RMSProp": np.ones(2)},
        {f"w/.OPTIMIZER_SLOT/opt/accumulator{VALUE}": np.full(2, 0.5)},
    ):
        opt = AdaGrad({"w": np.ones(2)}, eps=0)
        opt.load_foreign("tf1", state)
        assert opt.state["w"]["sum"].tolist() == [0.5, 0.5]


W = np.ones(2)
WRONG_TF1 = {
    "Adam": ({"w": W, "w/Adam": W, "w/Adam_1": W}, 'state["w/Adam"] is from another optimizer; wanted the slots of RM'),
    "Adam by another name": ({"w": W, "w/x": W, "w/x_1": W, "beta1_power": 0.5}, 'state["beta1_power"] is from anoth'),
    "Momentum": ({"w": W, "w/Momentum:0": W}, 'state["w/Momentum:0"] is from another optimizer'),
    "AdaGrad": ({"w/Adagrad": W}, 'state["w/Adagrad"] is from another optimizer'),
    "averages": ({"w": W, "w/ExponentialMovingAverage": W}, 'state lacks the arrays of "square_avg"'),
    "one slot": ({"w/RMSProp": W}, 'state has the slots "w/RMSProp"; wanted those of one RMSProp'),
    "four slots": (
        {f"w/RMSProp{i}": W for i in ("", "_1", "_2", "_3")},
        'state has the slots "w/RMSProp", "w/RMSProp_1", "w/RMSProp_2", "w/RMSProp_3"; wanted those of one RMSProp',
    ),
    "the second of two": ({"w/RMSProp_2": W, "w/RMSProp_3": W}, 'state has the slots "w/RMSProp_2", "w/RMSProp_3"'),
    "two names": ({"w": W, "w/x": W, "w/x_1": W, "w/y": W, "w/y_1": W}, "slots of the optimizers 'x', 'y'; wanted"),
    "centered": ({"w/RMSProp": W, "w/RMSProp_1": W, "w/RMSProp_2": W}, 'state["w/RMSProp_1"] has no use with centered'),
    "shape": ({"w/RMSProp": np.ones(3), "w/RMSProp_1": W}, 'state["w/RMSProp"] has shape (3,); wanted (2,)'),
    "another variable": ({"v/RMSProp": W, "v/RMSProp_1": W}, "is of the parameters 'v'; wanted 'w'"),
    "two objects": (
        {f"w/.OPTIMIZER_SLOT/{n}/{slot}{VALUE}": W for n in ("g", "d") for slot in ("rms", "momentum")},
        "slots of the optimizers 'g', 'd'; wanted those of one",
    ),
    "object of Adam": (
        {f"w/.OPTIMIZER_SLOT/o/m{VALUE}": W, f"w/.OPTIMIZER_SLOT/o/v{VALUE}": W},
        f'state["w/.OPTIMIZER_SLOT/o/m{VALUE}"] has no counterpart here; wanted the slots of RMSProp',
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_TF1)
def test_checkpoints_of_tf1_that_cannot_be_mapped_are_named(case):
    state, text = WRONG_TF1[case]
    opt = RMSProp({"w": np.ones(2)})
    with refused(ValueError, text, of=[opt]):
        opt.load_foreign("tf1", state)


def test_variables_without_a_name_are_none():
    opt = RMSProp(start())
    for framework in ("tf1", "tf_keras_legacy"):
        with refused(
            TypeError, "state[0] is a numpy.ndarray without a name; wanted a variable of TensorFlow", of=[opt]
        ):
            opt.load_foreign(framework, [np.ones(3)])


# tf.keras up to 2.10


@pytest.mark.parametrize("way", ["variables", "mapping", "objects"])
@pytest.mark.parametrize("case", CASES)
def test_a_run_of_tf_keras_legacy_continues_here(case, way):
    hyper = {"learning_rate": np.float32(0.1), "rho": np.float32(0.9), "momentum": np.float32(0.9)}

    def state_of(run):
        if way == "objects":
            return objects(run, iter=np.int64(SWITCH), **hyper)
        variables = listed(run, **hyper)
        return variables if way == "variables" else {v.name: np.asarray(v) for v in variables}

    opt = assert_continues("tf_keras_legacy", state_of, **CASES[case])
    assert opt.steps == SWITCH + 10


@pytest.mark.parametrize("scope", ["", "RMSprop/", "training/RMSprop/"])
def test_the_learning_rate_and_names_of_any_scope(scope):
    run = Formula("tf_keras_legacy").run(range(SWITCH))
    opt = RMSProp(dict(reversed(run.params.items())), lr=7)
    opt.load_foreign("tf_keras_legacy", listed(run, scope, learning_rate=np.float32(0.25)))
    assert opt.lr == 0.25
    assert opt.state["w"]["square_avg"].tolist() == run.state["w"]["rms"].tolist()


@pytest.mark.parametrize("way", [listed, objects])
def test_decay_goes_on_from_the_count(way):
    """With or without the hyperparameters' own variables: optimizer.variables() leaves them out."""
    given = {"learning_rate": 0.1, "decay": 0.125, "momentum": 0.5}
    said = {"decay": np.float32(0.125), "learning_rate": np.float32(0.1)}
    for own in ({}, said):

        def state_of(run, own=own):
            return way(run, **{"iter": np.int64(SWITCH), **own} if way is objects else own)

        opt = assert_continues("tf_keras_legacy", state_of, lr=False, **given)
        assert opt.lr(opt.steps) == 0.1 / (1 + 0.125 * opt.steps)


@pytest.mark.parametrize(
    ("ours", "theirs", "text"),
    [
        (
            {},
            {"decay": 0.25},
            'state["RMSprop/decay:0"] is 0.25; wanted 0.0, as here in param_groups[0], or build with d',
        ),
        (
            {"decay": 0.5},
            {"decay": 0.25},
            'state["RMSprop/decay:0"] is 0.25; wanted 0.5, as here in param_groups[0], or',
        ),
        ({"decay": 0.5}, {"decay": 0.0}, 'state["RMSprop/decay:0"] is 0.0; wanted 0.5, as here in param_groups[0]'),
        (
            {"decay": 0.5, "learning_rate": 0.25},
            {"decay": 0.5, "learning_rate": 0.125},
            'state["RMSprop/learning_rate:0"] is 0.125; wanted 0.25, as here in param_groups[0], or build with lear',
        ),
    ],
)
def test_another_decay_is_refused(ours, theirs, text):
    run = Formula("tf_keras_legacy").run(range(2))
    opt = RMSProp.from_preset("tf_keras_legacy", run.params, **ours)
    with refused(ValueError, text, of=[opt]):
        opt.load_foreign("tf_keras_legacy", listed(run, **theirs))


def test_a_schedule_of_ones_own_stays_whatever_decays_there():
    def rate(step):
        return 0.1

    run = Formula("tf_keras_legacy").run(range(2))
    opt = RMSProp(run.params, lr=rate)
    opt.load_foreign("tf_keras_legacy", listed(run, decay=np.float32(0.25)))
    assert opt.lr is rate


WRONG_LEGACY = {
    "no count": ({"iter": None}, 'state lacks "iter"; wanted it there, or steps='),
    "Adam": ({"w/m": np.ones((3, 4))}, 'state["w/m"] has no counterpart here; wanted the variables of RMSProp of t'),
    "no momentum here": (
        {f"{n}/momentum": np.ones(s) for n, s in SHAPES.items()}, 'state["w/momentum"] has no use with momentum=0.0',
    ),
    "lr": ({"learning_rate": -1.0}, "lr is -1.0"),
    "count": ({"iter": 1.5}, 'state["iter"] is 1.5; wanted a count'),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_LEGACY)
def test_variables_of_tf_keras_legacy_that_cannot_be_mapped_are_named(case):
    changes, text = WRONG_LEGACY[case]
    run = Formula("tf_keras_legacy").run(range(2))
    variables = {v.name[:-2]: np.asarray(v) for v in listed(run, scope="")} | changes
    opt = RMSProp.from_preset("tf_keras_legacy", run.params)
    with refused(ValueError, text, of=[opt]):
        opt.load_foreign("tf_keras_legacy", {name: x for name, x in variables.items() if x is not None})


def test_adagrad_of_tf_keras_legacy():
    opt = AdaGrad({"w": np.ones(2)})
    opt.load_foreign("tf_keras_legacy", {"Adagrad/iter:0": 3, "Adagrad/w/accumulator:0": np.full(2, 0.5)})
    assert (opt.steps, opt.state["w"]["sum"].tolist()) == (3, [0.5, 0.5])
