"""Presets: each framework's names, defaults and trajectory, against its own formula, and what is refused how.

The formulas below are written from the source that the preset names, in its order of operations and its names; they
share nothing with the package, nor with each other.
"""

import ast
import importlib.util
import inspect
from pathlib import Path

import numpy as np
import pytest
from on_host import one, refused

from rmsprop_gpu import RMSProp, hyper
from rmsprop_gpu.conventions.preset import OURS, REQUIRED, Preset
from rmsprop_gpu.conventions.presets import PRESETS

# The frameworks. Each takes a parameter, its gradient and a dict that is the state, empty at first, and returns the new
# parameter. Its keywords are the framework's arguments, all of them, with its defaults. The state holds as "all" the
# gradients of all parameters of the step.


def hinton(p, g, s, *, lr, alpha=0.9):
    s["ms"] = alpha * s.get("ms", 0.0) + (1 - alpha) * g**2
    return p - lr * np.divide(g, np.sqrt(s["ms"]), out=np.zeros_like(g), where=s["ms"] != 0)


def graves(p, g, s, *, lr=1e-4, alpha=0.95, momentum=0.9, eps=1e-4):
    s["n"] = alpha * s.get("n", 0.0) + (1 - alpha) * g**2
    s["g"] = alpha * s.get("g", 0.0) + (1 - alpha) * g
    s["delta"] = momentum * s.get("delta", 0.0) - lr * g / np.sqrt(s["n"] - s["g"] ** 2 + eps)
    return p + s["delta"]


def torch(p, g, s, *, lr=1e-2, alpha=0.99, eps=1e-8, weight_decay=0, momentum=0, centered=False, capturable=False,
          foreach=None, maximize=False, differentiable=False):  # fmt: skip
    g = -g if maximize else g
    g = g + weight_decay * p
    s["square_avg"] = s.get("square_avg", 0.0) * alpha + (1 - alpha) * g * g
    avg = s["square_avg"]
    if centered:
        mean = s.get("grad_avg", 0.0)
        s["grad_avg"] = mean + (1 - alpha) * (g - mean)  # lerp_
        avg = avg - s["grad_avg"] * s["grad_avg"]
    avg = np.sqrt(avg) + eps
    if momentum > 0:
        s["momentum_buffer"] = momentum * s.get("momentum_buffer", 0.0) + g / avg
        return p - lr * s["momentum_buffer"]
    return p - lr * g / avg


def keras(p, g, s, *, learning_rate=0.001, rho=0.9, momentum=0.0, epsilon=1e-7, centered=False, weight_decay=None,
          clipnorm=None, clipvalue=None, global_clipnorm=None, use_ema=False, ema_momentum=0.99,
          ema_overwrite_frequency=None, loss_scale_factor=None, gradient_accumulation_steps=None,
          name=None):  # fmt: skip
    g = clipped(g, clipvalue, clipnorm, global_clipnorm, s["all"])
    p = p - p * weight_decay * learning_rate if weight_decay is not None else p
    s["velocity"] = rho * s.get("velocity", 0.0) + (1 - rho) * g**2
    denominator = s["velocity"] + epsilon
    if centered:
        s["average_gradient"] = rho * s.get("average_gradient", 0.0) + (1 - rho) * g
        denominator = s["velocity"] - s["average_gradient"] ** 2 + epsilon
    increment = learning_rate * g / np.sqrt(denominator)
    if momentum > 0:
        increment = s["momentum"] = momentum * s.get("momentum", 0.0) + increment
    p = p - increment
    if use_ema:
        kept = (s.get("iterations", 0) != 0) * ema_momentum
        s["average"] = kept * s.get("average", 0.0) + (1 - kept) * p
        s["iterations"] = s.get("iterations", 0) + 1
    return p


def clipped(g, clipvalue, clipnorm, global_clipnorm, every):
    """As Keras and TensorFlow have it."""
    if clipvalue is not None:
        return np.clip(g, -clipvalue, clipvalue)
    if clipnorm is not None:
        return g * clipnorm / np.maximum(np.sqrt(np.sum(g**2)), clipnorm)
    if global_clipnorm is not None:
        norm = np.sqrt(sum(np.sum(x**2) for x in every))
        return g * (global_clipnorm * np.minimum(1 / norm, 1 / global_clipnorm))
    return g


def tf1(p, g, s, *, learning_rate, decay=0.9, momentum=0.0, epsilon=1e-10, use_locking=False, centered=False,
        name="RMSProp"):  # fmt: skip
    s["ms"] = s.get("ms", 1.0) + (g**2 - s.get("ms", 1.0)) * (1 - decay)
    denom = s["ms"] + epsilon
    if centered:
        s["mg"] = s.get("mg", 0.0) + (g - s.get("mg", 0.0)) * (1 - decay)
        denom = denom - s["mg"] ** 2
    s["mom"] = s.get("mom", 0.0) * momentum + g * learning_rate / np.sqrt(denom)
    return p - s["mom"]


def tf_keras_legacy(p, g, s, *, learning_rate=0.001, rho=0.9, momentum=0.0, epsilon=1e-7, centered=False,
                    name="RMSprop", clipnorm=None, clipvalue=None, global_clipnorm=None, lr=None,
                    decay=0.0):  # fmt: skip
    learning_rate = learning_rate if lr is None else lr
    epsilon = epsilon or 1e-7
    g = clipped(g, clipvalue, clipnorm, global_clipnorm, s["all"])
    if momentum > 0:
        s.setdefault("ms", 0.0)  # the slot "rms", zeros here
        return tf1(p, g, s, learning_rate=learning_rate, decay=rho, momentum=momentum, epsilon=epsilon,
                   centered=centered)  # fmt: skip
    denom = s["rms"] = rho * s.get("rms", 0.0) + (1 - rho) * g**2
    if centered:
        s["mg"] = rho * s.get("mg", 0.0) + (1 - rho) * g
        denom = s["rms"] - s["mg"] ** 2
    return p - learning_rate * g / (np.sqrt(denom) + epsilon)


def optax(p, g, s, *, learning_rate, decay=0.9, eps=1e-8, initial_scale=0.0, eps_in_sqrt=True, centered=False,
          momentum=None, nesterov=False, bias_correction=False):  # fmt: skip
    s["count"] = s.get("count", 0) + 1
    s["nu"] = (1 - decay) * g**2 + decay * s.get("nu", initial_scale)
    n = s["nu"] / (1 - decay ** s["count"]) if bias_correction else s["nu"]
    if centered:
        s["mu"] = (1 - decay) * g + decay * s.get("mu", 0.0)
        n = n - s["mu"] ** 2
    scaling = 1 / np.sqrt(n + eps) if eps_in_sqrt else 1 / (np.sqrt(n) + eps)
    update = -learning_rate * (scaling * g)
    if momentum is not None:
        s["trace"] = update + momentum * s.get("trace", 0.0)
        update = update + momentum * s["trace"] if nesterov else s["trace"]
    return p + update


def timm(p, g, s, *, lr=1e-2, alpha=0.9, eps=1e-10, weight_decay=0, momentum=0.0, centered=False,
         decoupled_decay=False, corrected_weight_decay=False, lr_in_momentum=True, caution=False,
         foreach=None):  # fmt: skip
    if decoupled_decay:
        p = p * (1 - lr * weight_decay)
    else:
        g = g + weight_decay * p
    s["square_avg"] = s.get("square_avg", 1.0) + (1 - alpha) * (g**2 - s.get("square_avg", 1.0))
    avg = s["square_avg"]
    if centered:
        s["grad_avg"] = s.get("grad_avg", 0.0) + (1 - alpha) * (g - s.get("grad_avg", 0.0))
        avg = avg - s["grad_avg"] ** 2
    avg = np.sqrt(avg + eps)
    if momentum > 0 and lr_in_momentum:
        s["buf"] = s.get("buf", 0.0) * momentum + lr * g / avg
        return p - s["buf"]
    if momentum > 0:
        s["buf"] = s.get("buf", 0.0) * momentum + g / avg
        return p - lr * s["buf"]
    return p - lr * g / avg


def chainer(p, g, s, *, lr=0.01, alpha=0.99, eps=1e-8, eps_inside_sqrt=False):
    s["ms"] = s.get("ms", 0.0) * alpha + (1 - alpha) * g * g
    return p - lr * g / (np.sqrt(s["ms"] + eps) if eps_inside_sqrt else np.sqrt(s["ms"]) + eps)


def bitsandbytes(p, g, s, *, lr=1e-2, alpha=0.99, eps=1e-8, weight_decay=0, momentum=0, centered=False, optim_bits=32,
                 args=None, min_8bit_size=4096):  # fmt: skip
    g = g + weight_decay * p
    s["state1"] = s.get("state1", 0.0) * alpha + (1 - alpha) * g * g
    return p - lr * (g / (np.sqrt(s["state1"]) + eps))


FORMULAS = {
    f.__name__: f
    for f in (hinton, graves, torch, keras, tf_keras_legacy, tf1, optax, timm, chainer, bitsandbytes)
}  # fmt: skip

# The cases of each: every word an argument that gets a drawn value, or a flag that is turned over.
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

# As in recorded.py, where both are derived: a step has at most 20 roundings on each side, an average carries
# those of 25 steps, and centered magnifies them. Each side rounds the parameter at most twice a step by half an ulp,
# and every step of the formula starts from our parameter, so that these do not accumulate.
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
    scheduled = len(words) % 2 == 1  # by the step count in one case, by assignment in the next
    opt = RMSProp.from_preset(name, params, **{lr_name: (lambda step: lrs[step]) if scheduled else 1.0}, **given)
    states, worst, bounds = [{} for _ in params], 0.0, [0.0] * len(params)
    for step, lr in enumerate(lrs):
        if not scheduled:
            opt.lr = lr
        before = [p.copy() for p in params]
        # Over 8 decades, so that the root lies on both sides of eps.
        grads = [rng.standard_normal(p.shape) * 10.0 ** rng.uniform(-7, 1, p.shape) for p in params]
        opt.step(grads)
        for i, (p, old, g, s) in enumerate(zip(params, before, grads, states, strict=True)):
            s["all"] = grads
            want = np.asarray(FORMULAS[name](old, g, s, **{lr_name: lr}, **given))
            ulps = ULPS * np.spacing(np.maximum(np.abs(old), np.abs(want)))
            bound = RELATIVE * np.max(np.abs(want - old), initial=0) + ulps
            worst = np.maximum(worst, np.max(np.abs(p - want) / bound, initial=0))  # np.maximum keeps a NaN
            if "average" in s:  # of parameters within their bounds, with three roundings a step on each side
                bounds[i] = max(bounds[i], np.max(bound, initial=0))
                rounded = 2 * 3 * 0.5 * (step + 1) * np.spacing(np.abs(s["average"]).max(initial=0))
                worst = np.maximum(worst, np.max(np.abs(opt.ema[i] - s["average"]), initial=0) / (bounds[i] + rounded))
    return worst


@pytest.mark.exhaustive  # the recorded trajectories of test_parity.py are in every run
@pytest.mark.parametrize("case", CASES.strip().splitlines())
def test_trajectory_is_that_of_the_formula(case):
    assert excess(case) <= 1


def test_every_preset_and_every_argument_that_matters_has_a_case():
    cases = [case.split() for case in CASES.strip().splitlines()]
    assert {name for name, *_ in cases} == set(PRESETS) == set(FORMULAS)
    for name, preset in PRESETS.items():
        said = {word.partition("=")[0] for case, *words in cases if case == name for word in words}
        assert set(preset.arguments) - set(preset.neutral) - {"lr", "learning_rate"} - said == set()


# What such cases can see: a preset that translates otherwise must be seen in every case in which it matters.
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


@pytest.mark.exhaustive  # the recorded trajectories of test_parity.py are in every run
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
    """Of whichever framework is installed, read and not imported."""
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


# Refusals


@pytest.mark.parametrize("name", ["Torch", "", None, ["torch"]])
def test_unknown_preset_lists_those_there_are(name):
    with refused(ValueError, f"no preset {name!r}", *PRESETS, of=[]):
        RMSProp.from_preset(name, one(1))


@pytest.mark.parametrize("name", PRESETS)
def test_argument_that_the_framework_lacks_lists_those_it_has(name):
    for key in (
        "nonsense",
        "params",
        "skip_nonfinite",
        *({"lr", "alpha", "eps", "rho"} - set(PRESETS[name].arguments)),
    ):
        with refused(TypeError, f"{name} has no argument {key!r}", *PRESETS[name].arguments, of=[]):
            RMSProp.from_preset(name, one(1), **{key: 0.1})


@pytest.mark.parametrize(("name", "key"), [("hinton", "lr"), ("tf1", "learning_rate"), ("optax", "learning_rate")])
def test_required_argument_is_missed_by_its_name(name, key):
    with refused(TypeError, f"{key} is missing", name, of=[]):
        RMSProp.from_preset(name, one(1))


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("torch", "differentiable", True),
        ("torch", "foreach", 1),
        ("torch", "capturable", None),
        ("keras", "name", "mine"),
        ("keras", "loss_scale_factor", 1.0),
        ("keras", "gradient_accumulation_steps", 2),
        ("keras", "ema_overwrite_frequency", 100),
        ("tf_keras_legacy", "decay", 0.1),
        ("tf_keras_legacy", "name", None),
        ("tf1", "use_locking", True),
        ("timm", "caution", True),
        ("timm", "corrected_weight_decay", True),
        ("bitsandbytes", "momentum", 0.9),
        ("bitsandbytes", "centered", True),
        ("bitsandbytes", "optim_bits", 8),
        ("bitsandbytes", "optim_bits", np.array([32])),
        ("bitsandbytes", "min_8bit_size", 1),
        ("bitsandbytes", "alpha", 0),
        ("tf_keras_legacy", "clipvalue", 0),
    ],
)
def test_what_is_not_done_here_is_refused(name, key, value):
    needed = {k: 0.1 for k, x in PRESETS[name].arguments.items() if x is REQUIRED}
    with refused(ValueError, f"{key} is {value!r}", "wanted", of=[]):
        RMSProp.from_preset(name, one(1), **needed, **{key: value})


@pytest.mark.parametrize(
    ("name", "given", "kind", "text"),
    [
        ("keras", {"rho": 1.5}, ValueError, "rho is 1.5; wanted a number with 0 <= rho < 1"),
        ("keras", {"rho": "alpha"}, TypeError, "rho is 'alpha' (a str); wanted a number with 0 <= rho < 1"),
        ("keras", {"learning_rate": -1}, ValueError, "learning_rate is -1; wanted a finite number >= 0"),
        ("keras", {"epsilon": None}, TypeError, "epsilon is None"),
        ("optax", {"learning_rate": 0.1, "decay": 1}, ValueError, "decay is 1; wanted a number with 0 <= decay < 1"),
        ("optax", {"learning_rate": "lr"}, TypeError, "learning_rate is 'lr' (a str); wanted"),
        ("timm", {"decoupled_decay": 1}, TypeError, "decoupled_decay is 1 (a int); wanted True or False"),
        ("chainer", {"eps_inside_sqrt": None}, TypeError, "eps_inside_sqrt is None"),
        ("torch", {"alpha": 2}, ValueError, "alpha is 2; wanted a number with 0 <= alpha < 1"),
        ("torch", {"weight_decay": -1}, ValueError, "weight_decay is -1"),
        # What only the parameters' dtype decides
        ("keras", {"epsilon": 1e-60}, ValueError, "epsilon is 1e-60, which is 0 in float32"),
        ("tf1", {"learning_rate": 1, "decay": 1 - 1e-9}, ValueError, "decay is 0.999999999, which is 1 in float32; "
         "wanted decay < 1"),
        ("keras", {"learning_rate": 1e20, "weight_decay": 1e20}, ValueError, "learning_rate * weight_decay is "),
    ],
)  # fmt: skip
def test_wrong_value_is_named_as_the_framework_does(name, given, kind, text):
    param = one(1)
    with refused(kind, text, of=[param]):
        RMSProp.from_preset(name, param, **given)


def test_wrong_parameter_is_refused_in_the_usual_words():
    with refused(TypeError, "params[0] is a float; wanted", of=[]):
        RMSProp.from_preset("keras", [1.0])
    with refused(ValueError, "params[0]: alpha is 2; wanted", of=[]):  # a group has our names
        RMSProp.from_preset("keras", [{"params": one(1), "alpha": 2}])


def test_optax_centered_with_bias_correction_is_refused_and_ours_offered():
    given = {"learning_rate": 0.1, "centered": True, "bias_correction": True, "momentum": 0.5}
    with pytest.raises(ValueError, match=r"centered and bias_correction are True.*0/0 or up to 1e8") as error:
        RMSProp.from_preset("optax", one(1), **given)
    offered = str(error.value).rpartition(": ")[2]
    ours = eval(offered, {"RMSProp": RMSProp, "params": one(1)}).param_groups[0].hyper()
    del given["bias_correction"]
    want = RMSProp.from_preset("optax", one(1), **given).param_groups[0].hyper()
    assert ours == {**want, "bias_correction": True}


def test_clips_that_exclude_each_other():
    with refused(ValueError, "clipnorm and global_clipnorm", "at most one", of=[]):
        RMSProp.from_preset("tf_keras_legacy", one(1), clipnorm=1.0, global_clipnorm=1.0)
    with refused(ValueError, "clipnorm and clipvalue are given (clipnorm=1.0, clipvalue=0.0)", of=[]):
        RMSProp.from_preset("keras", one(1), clipnorm=1.0, clipvalue=0.0)


@pytest.mark.parametrize("norm", ["clipnorm", "global_clipnorm"])
def test_two_clips_one_after_the_other_are_refused(norm):
    texts = f"clipvalue and {norm} are given (clipvalue=0.5, {norm}=1.0)", "by value and then by norm", "clips once"
    with refused(ValueError, *texts, of=[]):
        RMSProp.from_preset("tf_keras_legacy", one(1), clipvalue=0.5, **{norm: 1})


# What is translated


def test_off_in_the_words_of_each_framework():
    keras = RMSProp.from_preset("keras", one(1), weight_decay=None, clipvalue=None).param_groups[0]
    assert (keras["weight_decay"], keras["clipvalue"]) == (0.0, None)
    optax = RMSProp.from_preset("optax", one(1), learning_rate=0.1, momentum=None).param_groups[0]
    assert optax["momentum"] == 0.0


def test_older_name_of_the_learning_rate_wins_in_tf_keras_legacy():
    assert RMSProp.from_preset("tf_keras_legacy", one(1), lr=0.5, learning_rate=0.25).lr == 0.5
    assert RMSProp.from_preset("tf_keras_legacy", one(1), learning_rate=0.25).lr == 0.25


def test_epsilon_of_none_is_that_of_the_backend_in_tf_keras_legacy():
    for momentum in (0.0, 0.5):
        group = RMSProp.from_preset("tf_keras_legacy", one(1), epsilon=None, momentum=momentum).param_groups[0]
        assert group["eps"] == 1e-7


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
