"""Presets: each framework's names, defaults and trajectory, compared with its own formula."""

import ast
import importlib.util
import inspect
from pathlib import Path

import numpy as np
import pytest
from on_host import one, refused
from preset_formulas import FORMULAS

from rmsprop_gpu import RMSProp, hyper
from rmsprop_gpu.conventions.preset import OURS, REQUIRED, Preset
from rmsprop_gpu.conventions.presets import PRESETS

# The cases of each: every word is an argument that gets a drawn value, or a flag that is flipped.
CASES = """
hinton
hinton alpha
graves
graves alpha momentum eps
torch
torch alpha eps weight_decay momentum
torch centered maximize weight_decay
torch centered momentum maximize capturable
torch alpha momentum eps=0
keras
keras rho epsilon momentum
keras centered weight_decay
keras rho centered momentum clipvalue weight_decay
keras clipnorm weight_decay
keras global_clipnorm momentum centered
keras use_ema
keras use_ema ema_momentum momentum weight_decay
keras use_ema ema_momentum global_clipnorm
tf_keras_legacy
tf_keras_legacy rho epsilon
tf_keras_legacy rho epsilon momentum
tf_keras_legacy epsilon=0 clipvalue
tf_keras_legacy epsilon=None clipnorm
tf_keras_legacy global_clipnorm momentum
tf_keras_legacy centered epsilon
tf_keras_legacy centered epsilon momentum
tf_keras_legacy decay=0.5
tf_keras_legacy momentum rho decay=0.03125
tf1
tf1 decay epsilon momentum
tf1 centered epsilon
tf1 centered momentum
optax
optax decay eps momentum
optax momentum nesterov eps eps_in_sqrt
optax initial_scale bias_correction
optax decay bias_correction momentum nesterov eps eps_in_sqrt
optax centered momentum
optax centered eps eps_in_sqrt initial_scale
optax momentum=0 nesterov
timm
timm alpha eps momentum
timm weight_decay momentum lr_in_momentum
timm weight_decay decoupled_decay centered
timm centered momentum weight_decay decoupled_decay lr_in_momentum
chainer
chainer alpha eps
chainer eps eps_inside_sqrt
bitsandbytes
bitsandbytes alpha eps weight_decay
"""
SHAPES = [(), (7,), (3, 5), (0, 2)]
STEPS = 25

# As derived in recorded.py: a step has at most 20 roundings on each side, an average carries those of 25 steps, and
# centered mode magnifies them. Each side rounds the parameter at most twice per step by half an ulp. Every step of the
# formula starts from our parameter, so these do not accumulate.
RELATIVE = 1e-12
ULPS = 2


def drawn(name, words, rng):
    """The arguments of a case."""
    numbers = {
        "alpha": rng.uniform(0.85, 0.99),
        "eps": 10 ** rng.uniform(-8, -3),
        "momentum": rng.uniform(0.5, 0.95),
        "weight_decay": 10 ** rng.uniform(-3, -1),
        "initial_scale": rng.uniform(0.1, 1.0),
        "clipvalue": 10 ** rng.uniform(-2, 0),
        "clipnorm": 10 ** rng.uniform(-2, 0),
        "global_clipnorm": 10 ** rng.uniform(-2, 0),
        "ema_momentum": rng.uniform(0.5, 0.95),
    }
    given = {}
    for word in words:
        key, equals, number = word.partition("=")
        ours = {"rho": "alpha", "decay": "alpha", "epsilon": "eps"}.get(key, key)
        drawn_or_turned = numbers[ours] if ours in numbers else not PRESETS[name].arguments[key]
        given[key] = ast.literal_eval(number) if equals else drawn_or_turned
    return given


def excess(case):
    """The largest |got - want| / bound over all updates and averages of a case: above 1, or NaN, is a failure."""
    name, *words = case.split()
    rng = np.random.default_rng([7, *case.encode()])
    given, lrs = drawn(name, words, rng), 10 ** rng.uniform(-3, -1, STEPS)
    lr_name = "learning_rate" if "learning_rate" in PRESETS[name].arguments else "lr"
    params = [rng.standard_normal(shape) for shape in SHAPES]
    scheduled = len(words) % 2 == 1  # by schedule in one case, by assignment in the next
    opt = RMSProp.from_preset(name, params, **{lr_name: (lambda step: lrs[step]) if scheduled else 1.0}, **given)
    states, worst, bounds = [{} for _ in params], 0.0, [0.0] * len(params)
    for step, lr in enumerate(lrs):
        if not scheduled:
            opt.lr = lr
        before = [p.copy() for p in params]
        # Over 8 decades, so that the root is on both sides of eps.
        grads = [rng.standard_normal(p.shape) * 10.0 ** rng.uniform(-7, 1, p.shape) for p in params]
        opt.step(grads)
        for i, (p, old, g, s) in enumerate(zip(params, before, grads, states, strict=True)):
            s["all"] = grads
            want = np.asarray(FORMULAS[name](old, g, s, **{lr_name: lr}, **given))
            ulps = ULPS * np.spacing(np.maximum(np.abs(old), np.abs(want)))
            bound = RELATIVE * np.max(np.abs(want - old), initial=0) + ulps
            worst = np.maximum(worst, np.max(np.abs(p - want) / bound, initial=0))  # np.maximum keeps NaN
            if "average" in s:  # of parameters within their bounds, with three roundings per step on each side
                bounds[i] = max(bounds[i], np.max(bound, initial=0))
                rounded = 2 * 3 * 0.5 * (step + 1) * np.spacing(np.abs(s["average"]).max(initial=0))
                worst = np.maximum(worst, np.max(np.abs(opt.ema[i] - s["average"]), initial=0) / (bounds[i] + rounded))
    return worst


@pytest.mark.exhaustive  # the recorded trajectories in test_parity.py are part of every run
@pytest.mark.parametrize("case", CASES.strip().splitlines())
def test_trajectory_is_that_of_the_formula(case):
    assert excess(case) <= 1


def test_every_preset_and_every_argument_that_matters_has_a_case():
    cases = [case.split() for case in CASES.strip().splitlines()]
    assert {name for name, *_ in cases} == set(PRESETS) == set(FORMULAS)
    for name, preset in PRESETS.items():
        said = {word.partition("=")[0] for case, *words in cases if case == name for word in words}
        assert set(preset.arguments) - set(preset.neutral) - {"lr", "learning_rate"} - said == set()


# What the cases can detect: a wrong translation must show in every case in which it matters.
PLANTS = {
    "eps on the other side": ("eps_in_sqrt", lambda h: not h["eps_in_sqrt"], lambda h: h["eps"] > 0),
    "lr on the other side": ("lr_in_momentum", lambda h: not h["lr_in_momentum"], lambda h: h["momentum"] > 0),
    "another start": ("initial_scale", lambda h: 1.0 - h["initial_scale"], lambda h: True),
    "decay of the other kind": (
        "decoupled_weight_decay",
        lambda h: not h["decoupled_weight_decay"],
        lambda h: h["weight_decay"] > 0,
    ),
    "another alpha": ("alpha", lambda h: 0.5, lambda h: True),
    "another clip": ("clipnorm", lambda h: h["clipnorm"] and 0.9 * h["clipnorm"], lambda h: h["clipnorm"]),
    "another clip of all": (
        "global_clipnorm",
        lambda h: h["global_clipnorm"] and 0.9 * h["global_clipnorm"],
        lambda h: h["global_clipnorm"],
    ),
    "another average": ("ema_momentum", lambda h: 0.99 * h["ema_momentum"], lambda h: h["use_ema"]),
}


@pytest.mark.exhaustive  # the recorded trajectories in test_parity.py are part of every run
@pytest.mark.parametrize("plant", PLANTS)
def test_a_wrong_translation_is_seen(plant, monkeypatch):
    key, wrong, matters = PLANTS[plant]
    right = Preset.rmsprop
    hypers = []

    def planted(self, name, given):
        h = RMSProp(np.zeros(1), **right(self, name, given)).param_groups[0].hyper()
        hypers.append(h)
        return {**right(self, name, given), key: wrong(h)}

    monkeypatch.setattr(Preset, "rmsprop", planted)
    for case in CASES.strip().splitlines():
        failed = not excess(case) <= 1
        assert failed == bool(matters(hypers[-1])), case


# Defaults


@pytest.mark.parametrize("name", PRESETS)
def test_arguments_and_defaults_are_those_of_the_formula(name):
    want = [
        (key, p.default) for key, p in inspect.signature(FORMULAS[name]).parameters.items() if p.kind == p.KEYWORD_ONLY
    ]
    got = [(key, inspect.Parameter.empty if x is REQUIRED else x) for key, x in PRESETS[name].arguments.items()]
    assert got == want


@pytest.mark.parametrize(
    ("name", "path", "function", "more"),
    [
        ("torch", "torch/optim/rmsprop.py", "RMSprop", {}),
        ("keras", "keras/src/optimizers/rmsprop.py", "RMSprop", {}),
        ("optax", "optax/_src/alias.py", "rmsprop", {}),
        ("timm", "timm/optim/rmsprop_tf.py", "RMSpropTF", {}),
        ("bitsandbytes", "bitsandbytes/optim/rmsprop.py", "RMSprop", {}),
        ("tf1", "tensorflow/python/training/rmsprop.py", "RMSPropOptimizer", {}),
        (
            "tf_keras_legacy",
            "tf_keras/src/optimizers/legacy/rmsprop.py",
            "RMSprop",
            {"clipnorm": None, "clipvalue": None, "global_clipnorm": None, "lr": None, "decay": 0.0},  # its **kwargs
        ),
    ],
)
def test_arguments_and_defaults_are_those_in_the_source(name, path, function, more):
    """For each framework that is installed. The source is parsed, not imported."""
    spec = importlib.util.find_spec(path.partition("/")[0])
    if spec is None or spec.origin is None:
        pytest.skip(f"{path} is not installed")
    tree = ast.parse((Path(spec.origin).parents[1] / path).read_text())
    (node,) = (x for x in tree.body if isinstance(x, (ast.ClassDef, ast.FunctionDef)) and x.name == function)
    if isinstance(node, ast.ClassDef):
        (node,) = (x for x in node.body if isinstance(x, ast.FunctionDef) and x.name == "__init__")
    names = [x.arg for x in node.args.args if x.arg not in ("self", "params")]
    defaults = [ast.literal_eval(x) for x in node.args.defaults]
    defaults = [REQUIRED] * (len(names) - len(defaults)) + defaults
    assert list(PRESETS[name].arguments.items()) == [*zip(names, defaults, strict=True), *more.items()]


@pytest.mark.parametrize("name", PRESETS)
def test_defaults_are_neutral_and_accepted(name):
    preset = PRESETS[name]
    for key, allowed in preset.neutral.items():
        assert preset.arguments[key] in allowed
    needed = {key: 0.1 for key, x in preset.arguments.items() if x is REQUIRED}
    bare = RMSProp.from_preset(name, one(1), **needed)
    said = RMSProp.from_preset(name, one(1), **{**preset.arguments, **needed})
    assert said.param_groups[0].hyper() == bare.param_groups[0].hyper()


@pytest.mark.parametrize(
    ("name", "given"),
    [(name, {key: x}) for name, preset in PRESETS.items() for key, xs in preset.neutral.items() for x in xs],
)
def test_neutral_value_changes_nothing(name, given):
    needed = {key: 0.1 for key, x in PRESETS[name].arguments.items() if x is REQUIRED}
    opt, bare = (RMSProp.from_preset(name, one(1), **needed, **more) for more in (given, {}))
    assert opt.param_groups[0].hyper() == bare.param_groups[0].hyper()


# Translation


def test_off_in_the_words_of_each_framework():
    keras = RMSProp.from_preset("keras", one(1), weight_decay=None, clipvalue=None).param_groups[0]
    assert (keras["weight_decay"], keras["clipvalue"]) == (0.0, None)
    optax = RMSProp.from_preset("optax", one(1), learning_rate=0.1, momentum=None).param_groups[0]
    assert optax["momentum"] == 0.0


@pytest.mark.parametrize("name", ["keras", "tf_keras_legacy", "tf1"])
@pytest.mark.parametrize("label", ["rmsprop", "mine", ""])
def test_any_name_does(name, label):
    opt, bare = (RMSProp.from_preset(name, one(1), learning_rate=0.1, **more) for more in ({"name": label}, {}))
    assert opt.param_groups[0].hyper() == bare.param_groups[0].hyper()


# As keras 3.15.1 returns it, except for the values.
CONFIG = {
    "name": "rmsprop", "learning_rate": 0.125, "weight_decay": 0.25, "clipnorm": None, "global_clipnorm": None,
    "clipvalue": 0.5, "use_ema": True, "ema_momentum": 0.75, "ema_overwrite_frequency": None, "loss_scale_factor": None,
    "gradient_accumulation_steps": None, "rho": 0.875, "momentum": 0.5, "epsilon": 1e-5, "centered": True,
}  # fmt: skip
WANT = {
    "lr": 0.125, "weight_decay": 0.25, "clipvalue": 0.5, "use_ema": True, "ema_momentum": 0.75, "alpha": 0.875,
    "momentum": 0.5, "eps": 1e-5, "centered": True,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras's own warning
@pytest.mark.parametrize("itself", [False, True], ids=["recorded", "keras itself"])
def test_the_config_of_keras_is_its_arguments(itself, monkeypatch):
    config = CONFIG
    if itself:
        pytest.importorskip("jax")
        monkeypatch.setenv("KERAS_BACKEND", "jax")
        made = pytest.importorskip("keras").optimizers.RMSprop(**CONFIG).get_config()
        assert made == {**CONFIG, "name": made["name"]}
        config = made
    hyper = RMSProp.from_preset("keras", one(1), **config).param_groups[0].hyper()
    assert {name: hyper[name] for name in WANT} == WANT


def test_older_name_of_the_learning_rate_wins_in_tf_keras_legacy():
    assert RMSProp.from_preset("tf_keras_legacy", one(1), lr=0.5, learning_rate=0.25).lr == 0.5
    assert RMSProp.from_preset("tf_keras_legacy", one(1), learning_rate=0.25).lr == 0.25


def test_epsilon_of_none_is_that_of_the_backend_in_tf_keras_legacy():
    for momentum in (0.0, 0.5):
        group = RMSProp.from_preset("tf_keras_legacy", one(1), epsilon=None, momentum=momentum).param_groups[0]
        assert group["eps"] == 1e-7


# As tf_keras 2.21.0 returns it for a legacy RMSprop, except for the values.
LEGACY_CONFIG = {
    "name": "mine", "learning_rate": 0.125, "decay": 0.25, "rho": 0.875, "momentum": 0.5, "epsilon": 1e-5,
    "centered": True,
}  # fmt: skip


def test_decay_of_tf_keras_legacy_is_a_schedule_of_the_steps():
    opt = RMSProp.from_preset("tf_keras_legacy", one(1), **LEGACY_CONFIG)
    assert [opt.lr(step) for step in (0, 1, 4)] == [0.125, 0.1, 0.0625]
    assert opt.param_groups[0]["alpha"] == 0.875
    opt.step(one(2))
    twin = RMSProp.from_preset("tf_keras_legacy", one(1), **LEGACY_CONFIG)
    twin.load_state_dict(opt.state_dict())
    assert twin.lr(twin.steps) == 0.1
    assert "lr = 0.1" in str(twin.explain())
    assert "InverseTimeDecay(1)" in str(twin.explain())


def test_decay_of_tf_keras_legacy_divides_what_a_schedule_says_too():
    opt = RMSProp.from_preset("tf_keras_legacy", one(1), decay=np.float32(0.5), learning_rate=lambda step: 0.25 * step)
    assert opt.lr(2) == 0.25
    negative = RMSProp.from_preset("tf_keras_legacy", one(1), decay=1, learning_rate=lambda step: -1)
    with refused(ValueError, "lr(0): lr is -1; wanted a finite number >= 0", of=[negative]):
        negative.step(one(2))
    assert RMSProp.from_preset("tf_keras_legacy", one(1), decay=0, learning_rate=0.5).lr == 0.5


def test_averages_are_those_of_keras_whether_on_or_off():
    for on in (False, True):
        group = RMSProp.from_preset("keras", one(1), use_ema=on, ema_momentum=0.5).param_groups[0]
        assert (group["use_ema"], group["ema_momentum"]) == (on, 0.5)


def test_every_preset_states_its_source_and_translates_into_our_names():
    for name, preset in PRESETS.items():
        assert any(c.isdigit() for c in preset.source), name
        assert set(OURS.values()) <= set(hyper.RMSPROP)


def test_subclass_is_what_is_built():
    class Mine(RMSProp):
        pass

    assert type(Mine.from_preset("torch", one(1))) is Mine
