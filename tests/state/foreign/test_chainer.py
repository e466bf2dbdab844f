"""States of chainer: a run continues here, or is refused.

The keys are those that serializers.save_npz of chainer 7.8.1 writes for an optimizer and for a trainer.
"""

import numpy as np
import pytest
from foreign_runs import SHAPES, SWITCH, Formula, assert_continues, start
from on_host import refused

from rmsprop_gpu import AdaGrad, RMSProp

KEYS = ("ms", "n", "g", "delta")


def optimizer(run):
    """What save_npz(optimizer) writes after a run."""
    entries = {"t": np.int64(SWITCH), "epoch": np.int64(0)}
    for name, s in run.state.items():
        entries |= {f"{name}/t": np.int64(SWITCH), **{f"{name}/{n}": s[n] for n in KEYS if n in s}}
    return entries


def trainer(run, before="updater/optimizer:main/predictor/"):
    """What save_npz(trainer) writes after a run, with a chainer.links.Classifier around the model."""
    own = optimizer(run)
    inside = {f"{before if '/' in key else before.removesuffix('predictor/')}{key}": x for key, x in own.items()}
    iterator = {"updater/iterator:main/epoch": np.int64(1), "updater/iterator:main/order": np.array(None)}
    weights = {f"updater/model:main/predictor/{name}": p for name, p in run.params.items()}
    return {**iterator, **inside, **weights, "updater/iteration": np.int64(SWITCH), "_snapshot_elapsed_time": 1.5}


CASES = {
    "plain": ("chainer", {}),
    "inside": ("chainer", {"eps_inside_sqrt": True}),
    "graves": ("graves", {"momentum": 0.5}),
    "graves without momentum": ("graves", {"momentum": 0.0}),
}


@pytest.mark.parametrize("state_of", [optimizer, trainer])
@pytest.mark.parametrize("case", CASES)
def test_a_run_of_chainer_continues_here(case, state_of):
    preset, given = CASES[case]
    opt = assert_continues(preset, state_of, framework="chainer", **given)
    assert opt.steps == SWITCH + 10


def test_a_file_of_numpy_is_such_a_mapping(tmp_path):
    run = Formula("chainer").run(range(SWITCH))
    np.savez(tmp_path / "trainer.npz", **trainer(run))
    opt = RMSProp(run.params)
    with np.load(tmp_path / "trainer.npz") as file:  # no pickle, although another entry would need it
        opt.load_foreign("chainer", file)
    assert (opt.steps, opt.state["w"]["square_avg"].tolist()) == (SWITCH, run.state["w"]["ms"].tolist())


@pytest.mark.parametrize("before", ["", "/", "updater/optimizer:main/", "/updater/optimizer:main/predictor/"])
@pytest.mark.parametrize("key", ["l1/W", "l1.W", "predictor/l1/W"])
def test_names_of_chainer(before, key):
    """The parameters come in another order here. The leading slash of namedparams() is not part of a name."""
    names = [key, key[:-1] + "b"]
    theirs = "predictor/" * (key.startswith("predictor") and "predictor" not in before)
    state = {f"{before.removesuffix('predictor/')}t": 3}
    state |= {f"{before}{theirs}l1/{n}/ms": np.full(2, x) for n, x in (("b", 1.0), ("W", 2.0))}
    opt = RMSProp({name: np.ones(2) for name in names})
    opt.load_foreign("chainer", state)
    assert [opt.state[name]["square_avg"][0] for name in names] == [2, 1]
    unnamed = RMSProp([np.ones(2), np.ones(2)])
    unnamed.load_foreign("chainer", state)
    assert unnamed.state[0]["square_avg"][0] == 1


def test_adagrad_of_chainer():
    opt = AdaGrad({"W": np.ones(2, np.float32)})
    opt.load_foreign("chainer", {"t": 3, "epoch": 0, "W/t": 3, "W/h": np.full(2, 0.5, np.float32)})
    assert (opt.steps, opt.state["W"]["sum"].tolist()) == (3, [0.5, 0.5])


def test_averages_start_anew_that_chainer_lacks():
    run = Formula("chainer").run(range(2))
    opt = RMSProp(run.params, use_ema=True)
    opt.load_foreign("chainer", optimizer(run))
    assert opt.ema["w"].tolist() == run.params["w"].tolist()


def test_a_state_of_halves_is_widened():
    opt = RMSProp({"W": np.ones(2, np.float16)})
    opt.load_foreign("chainer", {"t": 3, "W/ms": np.full(2, 0.5, np.float16)})
    assert opt.state["W"]["square_avg"].dtype == np.float32


WRONG = {
    "no count": ({"t": None}, 'state lacks "t"; wanted it there, or steps='),
    "Adam": ({"w/m": np.ones((3, 4))}, 'state["w/m"] has no counterpart here; wanted the state of chainer\'s RMS'),
    "AdaGrad": ({"w/h": np.ones((3, 4))}, 'state["w/h"] has no counterpart here'),
    "own": ({"loss_scale": 2.0}, 'state["loss_scale"] has no counterpart here'),
    "Graves": ({f"{n}/g": np.ones(s) for n, s in SHAPES.items()}, 'state["w/g"] has no use with centered=False'),
    "one lacks": ({"w/ms": None}, 'state\'s "square_avg" has 1 parameters; wanted 2'),
    "two optimizers": (
        {"optimizer:gen/t": 1, "optimizer:dis/t": 1}, "state holds the optimizers 'gen', 'dis'; wanted the entries of",
    ),
    "shape": ({"w/ms": np.ones(3)}, 'state["w/ms"] has shape (3,); wanted (3, 4)'),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_states_of_chainer_that_cannot_be_mapped_are_named(case):
    changes, text = WRONG[case]
    state = optimizer(Formula("chainer").run(range(2))) | changes
    opt = RMSProp(start())
    with refused(ValueError, text, of=[opt]):
        opt.load_foreign("chainer", {key: x for key, x in state.items() if x is not None})


def test_buffers_of_some_parameters_without_one_of_all_are_refused():
    groups = [{"params": {"w": np.ones(2)}, "centered": True}, {"params": {"b": np.ones(2)}, "momentum": 0.5}]
    opt = RMSProp(groups, lr_in_momentum=True)
    with refused(ValueError, 'state lacks the arrays of "square_avg"', of=[opt]):
        opt.load_foreign("chainer", {"t": 1, "w/g": np.ones(2), "b/delta": np.ones(2)})


def test_graves_with_lr_outside_the_momentum_is_refused():
    run = Formula("graves").run(range(2))
    opt = RMSProp(run.params, momentum=0.9, centered=True)
    with refused(ValueError, "param_groups[0] has lr_in_momentum=False", of=[opt]):
        opt.load_foreign("chainer", optimizer(run))
