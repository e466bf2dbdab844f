"""Record what other packages' RMSProp do, so that ``RMSProp.from_preset`` can be checked where none is installed.

    python tests/helpers/record_presets.py torch keras optax  # records these presets again; the others stay as they are

writes ``data/presets.json`` (the cases, in each package's own names, and the versions) and ``data/presets.npz``. The
same versions write the same bytes. ``test_parity.py`` reads both. It also runs this script, with ``--to``, ``--live``
and ``--seed``, for the packages that are installed. The script imports NumPy and, in each runner, one package, so that
it runs wherever that package does. CONTRIBUTING.md says which presets need their own environment.

Left out: optax's centered with bias_correction, which is degenerate there (the variance is 0 on the first step), and
features that are not part of a package's RMSProp: timm's caution and corrected_weight_decay, Keras's overwriting of
variables with their averages and its gradient accumulation, tf_keras's clipping by norm after clipping by value,
chainer's hooks.
"""

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from paths import DATA

SEED, STEPS = 20261, 25
SHAPES = ((), (2, 3), (5,))
LIVE_SHAPES = ((), (1,), (3, 5), (37,))
STATE_NAMES = ("square_avg", "grad_avg", "momentum_buffer")  # of the final state, under this package's names


# One runner per package. It gets the case's arguments, the parameters (a list of arrays of the case's dtype), the
# gradients and learning rate of every step, and a list to which it appends the parameters after each step. It returns
# the final state (a list of arrays for each of STATE_NAMES) and, for keras, the averages after each step.


def run_torch(arguments, params, grads, lrs, after):
    """torch.optim.RMSprop."""
    import torch

    return step_torch(torch.optim.RMSprop, arguments, params, grads, lrs, after)


def run_hinton(arguments, params, grads, lrs, after):
    """torch.optim.RMSprop with eps=0 and the lecture's alpha: the lecture's rule where no gradient is 0."""
    return run_torch({"alpha": 0.9, "eps": 0.0} | arguments, params, grads, lrs, after)


def run_timm(arguments, params, grads, lrs, after):
    """timm.optim.RMSpropTF, without what timm.optim imports beside it."""
    return step_torch(rmsprop_tf(), arguments, params, grads, lrs, after)


def rmsprop_tf():
    """Import only the class: timm/__init__.py needs torchvision."""
    import sys
    import types

    stand_ins = {} if "timm" in sys.modules else {"timm": "timm", "timm.optim": "timm/optim"}
    for name, path in stand_ins.items():
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(importlib.metadata.distribution("timm").locate_file(path))]
    try:
        return importlib.import_module("timm.optim.rmsprop_tf").RMSpropTF
    finally:
        for name in stand_ins:
            del sys.modules[name]


def run_bitsandbytes(arguments, params, grads, lrs, after):
    """bitsandbytes.optim.RMSprop, whose state is of 32 bits where a tensor is small."""
    import bitsandbytes

    return step_torch(bitsandbytes.optim.RMSprop, arguments, params, grads, lrs, after)


def step_torch(optimizer, arguments, params, grads, lrs, after):
    """Any optimizer with torch's interface."""
    import torch

    tensors = [torch.tensor(param, requires_grad=True) for param in params]
    opt = optimizer(tensors, **arguments)
    for row, lr in zip(grads, lrs, strict=True):
        if lr is not None:
            opt.param_groups[0]["lr"] = lr
        for tensor, grad in zip(tensors, row, strict=True):
            tensor.grad = torch.tensor(grad)
        opt.step()
        after.append([tensor.detach().numpy().copy() for tensor in tensors])
    states = [{"square_avg": opt.state[tensor].get("state1"), **opt.state[tensor]} for tensor in tensors]
    return {name: [state[name].numpy() for state in states] for name in STATE_NAMES if name in states[0]}, None


def run_keras(arguments, params, grads, lrs, after):
    """keras.optimizers.RMSprop on any of its backends."""
    os.environ.setdefault("KERAS_BACKEND", "jax")
    os.environ["JAX_ENABLE_X64"] = "1"
    import keras

    keras.config.set_floatx(params[0].dtype.name)  # sets the dtype of the learning rate's variable
    opt, averages = keras.optimizers.RMSprop(**arguments), []
    variables = [keras.Variable(param, dtype=param.dtype.name, name=f"p{i}") for i, param in enumerate(params)]
    for row, lr in zip(grads, lrs, strict=True):
        if lr is not None:
            opt.learning_rate = lr
        opt.apply([keras.ops.convert_to_tensor(grad, grad.dtype.name) for grad in row], variables)
        after.append([np.array(variable.value) for variable in variables])
        averages.append([np.array(v.value) for v in getattr(opt, "_model_variables_moving_average", [])])
    found = {v.name: np.array(v.value) for v in opt.variables}
    names = {"square_avg": "velocity", "grad_avg": "average_gradient", "momentum_buffer": "momentum"}
    state = {
        ours: [found[f"p{i}_{theirs}"] for i in range(len(params))]
        for ours, theirs in names.items()
        if f"p0_{theirs}" in found
    }
    return state, averages if arguments.get("use_ema") else None


def run_optax(arguments, params, grads, lrs, after):
    """optax.rmsprop; the learning rate is a schedule, so that it can change."""
    os.environ["JAX_ENABLE_X64"] = "1"
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax.numpy as jnp
    import optax

    table = jnp.asarray(np.array(lrs))
    opt = optax.rmsprop(**{**arguments, "learning_rate": lambda count: table[count]})
    params = [jnp.asarray(param) for param in params]
    optimizer_state = opt.init(params)
    for row in grads:
        updates, optimizer_state = opt.update([jnp.asarray(grad) for grad in row], optimizer_state, params)
        params = optax.apply_updates(params, updates)
        after.append([np.asarray(param) for param in params])
    names = {"square_avg": "nu", "grad_avg": "mu", "momentum_buffer": "trace"}
    state = {ours: optax.tree.get(optimizer_state, theirs) for ours, theirs in names.items()}
    if state["momentum_buffer"] is not None:  # it averages -lr * u: our buffer with the opposite sign
        state["momentum_buffer"] = [-np.asarray(b) for b in state["momentum_buffer"]]
    return {name: [np.asarray(x) for x in value] for name, value in state.items() if value is not None}, None


def run_tf1(arguments, params, grads, lrs, after):
    """tf.compat.v1.train.RMSPropOptimizer, which is ResourceApplyRMSProp and ResourceApplyCenteredRMSProp.

    It converts every number to float32, even for float64 variables, but uses tensors as they are.
    """
    import inspect

    import tensorflow as tf

    dtype = params[0].dtype.name
    defaults = inspect.signature(tf.compat.v1.train.RMSPropOptimizer).parameters
    numbers = {name: defaults[name].default for name in ("decay", "momentum", "epsilon")} | arguments
    numbers = {name: value if isinstance(value, bool) else tf.constant(value, dtype) for name, value in numbers.items()}
    now = {}
    opt = tf.compat.v1.train.RMSPropOptimizer(**{**numbers, "learning_rate": lambda: now["lr"]})
    variables = [tf.Variable(param) for param in params]
    for row, lr in zip(grads, lrs, strict=True):
        now["lr"] = tf.constant(lr, dtype)
        opt.apply_gradients([(tf.constant(grad), variable) for grad, variable in zip(row, variables, strict=True)])
        after.append([variable.numpy().copy() for variable in variables])
    names = {"square_avg": "rms", "grad_avg": "mg", "momentum_buffer": "momentum"}
    slots = {
        ours: [opt.get_slot(v, theirs) for v in variables]
        for ours, theirs in names.items()
        if theirs in opt.get_slot_names()
    }
    return {name: [slot.numpy() for slot in row] for name, row in slots.items() if row[0] is not None}, None


def run_tf_keras_legacy(arguments, params, grads, lrs, after):
    """tf_keras.optimizers.legacy.RMSprop, which makes float32 of numbers too, but takes what a callable returns."""
    import inspect

    import tensorflow as tf
    import tf_keras

    dtype = params[0].dtype.name
    legacy = tf_keras.optimizers.legacy.RMSprop
    defaults = {name: p.default for name, p in inspect.signature(legacy).parameters.items()}
    now = {}

    def give(name):
        return lambda: tf.constant(now[name], dtype)

    numbers = {name: defaults[name] for name in ("learning_rate", "rho", "momentum")} | arguments
    if "lr" in numbers:
        numbers["lr"] = tf.constant(numbers["lr"], dtype)
    for name in ("learning_rate", "rho", "momentum"):
        now[name] = numbers[name]
        if numbers[name] or name != "momentum":  # a callable momentum counts as above 0
            numbers[name] = give(name)
    opt = legacy(**numbers)
    variables = [tf.Variable(param) for param in params]
    for row, lr in zip(grads, lrs, strict=True):
        if lr is not None:
            now["learning_rate"] = lr
        opt.apply_gradients([(tf.constant(grad), variable) for grad, variable in zip(row, variables, strict=True)])
        after.append([variable.numpy().copy() for variable in variables])
    names = {"square_avg": "rms", "grad_avg": "mg", "momentum_buffer": "momentum"}
    slots = {
        ours: [opt.get_slot(v, theirs).numpy() for v in variables]
        for ours, theirs in names.items()
        if theirs in opt.get_slot_names()
    }
    return slots, None


def run_chainer(arguments, params, grads, lrs, after):
    """chainer.optimizers.RMSprop."""
    return step_chainer("RMSprop", {"square_avg": ("ms", 1)}, arguments, params, grads, lrs, after)


def run_graves(arguments, params, grads, lrs, after):
    """chainer.optimizers.RMSpropGraves, which has the paper's constants; its buffer is ours with the other sign."""
    names = {"square_avg": ("n", 1), "grad_avg": ("g", 1), "momentum_buffer": ("delta", -1)}
    return step_chainer("RMSpropGraves", names, arguments, params, grads, lrs, after)


def step_chainer(optimizer, names, arguments, params, grads, lrs, after):
    """A rule of chainer on a link that holds the parameters."""
    import chainer

    link = chainer.Link()
    with link.init_scope():
        for i, param in enumerate(params):
            setattr(link, f"p{i}", chainer.Parameter(param.copy()))
    opt = getattr(chainer.optimizers, optimizer)(**arguments).setup(link)
    tensors = [getattr(link, f"p{i}") for i in range(len(params))]
    for row, lr in zip(grads, lrs, strict=True):
        if lr is not None:
            opt.lr = lr
        for tensor, grad in zip(tensors, row, strict=True):
            tensor.grad = grad.copy()
        opt.update()
        after.append([np.array(tensor.data) for tensor in tensors])
    return {
        ours: [sign * np.asarray(t.update_rule.state[theirs]) for t in tensors]
        for ours, (theirs, sign) in names.items()
    }, None


class Preset(NamedTuple):
    """How a preset is recorded, and its cases.

    A case is a list of words. A word is an argument that gets a drawn value, a switch that is on, or a value as
    written. The learning rate, the decay and eps are drawn in every case. Two words stand alone: `plain` adds no
    argument, and `defaults` gives no argument at all, not even the learning rate unless it is required.
    """

    run: Any
    packages: str  # the versions of these are recorded; the first must be installed
    rule: dict  # the names of the learning rate, the decay and eps
    cases: str
    eps: tuple = (-8, -3)  # decades
    alpha: tuple = (0.85, 0.99)
    dtypes: tuple = ("float64", "float32")
    lr_required: bool = False


TORCH = {"lr": "lr", "alpha": "alpha", "eps": "eps"}
KERAS = {"lr": "learning_rate", "alpha": "rho", "eps": "epsilon"}
# If square_avg starts at 1, a small eps inside the root would change nothing in 25 steps.
FROM_ONE = {"eps": (-3, 0), "alpha": (0.6, 0.9)}

PRESETS = {
    "hinton": Preset(run_hinton, "torch", {"lr": "lr", "alpha": "alpha"}, "defaults, plain", lr_required=True),
    "graves": Preset(run_graves, "chainer", TORCH, "defaults, plain, momentum=0.0, momentum", eps=(-6, -3)),
    "torch": Preset(
        run_torch,
        "torch",
        TORCH,
        """
        defaults, plain, eps=0.0, momentum, centered, centered momentum, weight_decay, maximize,
        weight_decay maximize, weight_decay momentum, weight_decay centered momentum maximize,
        weight_decay centered momentum maximize foreach=true
        """,
    ),
    "keras": Preset(
        run_keras,
        "keras jax",
        KERAS,
        """
        defaults, plain, momentum, centered, centered momentum, weight_decay, weight_decay momentum, clipvalue,
        clipnorm, global_clipnorm, clipvalue weight_decay centered momentum, clipnorm weight_decay momentum,
        global_clipnorm centered momentum, use_ema, use_ema ema_momentum momentum,
        use_ema ema_momentum weight_decay global_clipnorm
        """,
        eps=(-8, -4),
    ),
    "tf_keras_legacy": Preset(
        run_tf_keras_legacy,
        "tf_keras tensorflow",
        KERAS,
        """
        defaults, plain, momentum, centered, centered momentum, epsilon=0.0, momentum epsilon=0.0, epsilon=null,
        defaults lr=0.002, clipvalue, clipnorm, global_clipnorm
        """,
    ),
    "tf1": Preset(
        run_tf1,
        "tensorflow",
        {"lr": "learning_rate", "alpha": "decay", "eps": "epsilon"},
        "defaults, plain, momentum, centered, centered momentum",
        lr_required=True,
        **FROM_ONE,
    ),
    "optax": Preset(
        run_optax,
        "optax jax",
        {"lr": "learning_rate", "alpha": "decay", "eps": "eps"},
        """
        defaults, plain, eps_in_sqrt=false, momentum, momentum=0.0, momentum eps_in_sqrt=false, momentum nesterov,
        momentum nesterov eps_in_sqrt=false, initial_scale, initial_scale eps_in_sqrt=false, bias_correction,
        bias_correction eps_in_sqrt=false, bias_correction momentum nesterov, bias_correction initial_scale,
        centered, centered eps_in_sqrt=false, centered momentum,
        centered momentum nesterov eps_in_sqrt=false initial_scale
        """,
        lr_required=True,
    ),
    "timm": Preset(
        run_timm,
        "timm torch",
        TORCH,
        """
        defaults, plain, momentum, momentum lr_in_momentum=false, centered, centered momentum, weight_decay,
        weight_decay momentum, weight_decay decoupled_decay, weight_decay decoupled_decay momentum,
        weight_decay decoupled_decay momentum centered lr_in_momentum=false,
        weight_decay decoupled_decay momentum centered lr_in_momentum=false foreach=true
        """,
        **FROM_ONE,
    ),
    "chainer": Preset(run_chainer, "chainer", TORCH, "defaults, plain, eps_inside_sqrt"),
    "bitsandbytes": Preset(
        run_bitsandbytes,
        "bitsandbytes torch",
        TORCH,
        "defaults, plain, weight_decay",
        dtypes=("float32",),
    ),
}


def draw_arrays(rng, shapes):
    """Parameters, gradients and learning rates for 25 steps, with few digits or exact in float32.

    In each tensor, gradients go from 1e-8 to 10, each element with its own scale, so that sqrt(v) is on both sides of
    eps, and norms are on both sides of their clips.
    """
    params, grads = [], []
    for shape in shapes:
        size = int(np.prod(shape))
        scale = 10 ** (np.linspace(-7, 0, size) if size > 1 else np.full(size, -2.0))
        scale = scale * 10 ** rng.uniform(-1, 1, (STEPS, size))
        grads.append((scale * rng.standard_normal((STEPS, size))).astype(np.float32))
        params.append(rng.standard_normal(size).astype(np.float32))
    lrs = [float(f"{lr:.3g}") for lr in 10 ** rng.uniform(-3, -1, STEPS)]
    return np.concatenate(params), np.concatenate(grads, axis=1), lrs


def draw_arguments(rng, preset):
    """A value for each argument that a case may name, rounded to keep the JSON readable."""
    drawn = {
        "alpha": rng.uniform(*preset.alpha),
        "eps": 10 ** rng.uniform(*preset.eps),
        "momentum": rng.uniform(0.5, 0.95),
        "weight_decay": 10 ** rng.uniform(-3, -1),
        "initial_scale": rng.uniform(0.1, 1.0),
        "clipvalue": 10 ** rng.uniform(-1, 0),
        "clipnorm": 10 ** rng.uniform(-2, -1),
        "global_clipnorm": 10 ** rng.uniform(-2, -1),
        "ema_momentum": rng.uniform(0.5, 0.95),
    }
    return {name: float(f"{value:.3g}") for name, value in drawn.items()}


def arguments_of(preset, words, drawn, lr):
    """The case under the package's own names."""
    given = ("lr",) if preset.lr_required else ()
    names = given if "defaults" in words else preset.rule
    arguments = {preset.rule[name]: lr if name == "lr" else drawn[name] for name in names}
    for word in words:
        name, equals, value = word.partition("=")
        if word not in ("plain", "defaults"):
            arguments[name] = json.loads(value) if equals else drawn.get(name, True)
    return arguments


def split(row, shapes):
    """Split a row of concatenated tensors."""
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1]
    return [part.reshape(shape) for part, shape in zip(np.split(row, ends), shapes, strict=True)]


def join(tensors):
    return np.concatenate([np.ravel(tensor) for tensor in tensors])


def record(name, seed, shapes, dtypes):
    """A preset's cases and arrays: row i of `params` and of the states belongs to case i of its dtype."""
    preset = PRESETS[name]
    param, grads, lrs = draw_arrays(np.random.default_rng([seed, *name.encode()]), shapes)
    cases, arrays = [], {f"{name}/param": param, f"{name}/grads": grads}
    for dtype in dtypes:
        rows = {key: [] for key in ("params", "averages", *STATE_NAMES)}
        for text in preset.cases.split(","):
            words = text.split()
            rng = np.random.default_rng([seed, *" ".join([name, dtype, *words]).encode()])  # a seed for each case
            arguments = arguments_of(preset, words, draw_arguments(rng, preset), lrs[0])
            scheduled = preset.lr_required or "defaults" not in words
            after = []
            state, averages = preset.run(
                dict(arguments),
                split(param.astype(dtype), shapes),
                [split(row, shapes) for row in grads.astype(dtype)],
                lrs if scheduled else [None] * STEPS,
                after,
            )
            params = np.stack([join(tensors) for tensors in after])
            assert params.dtype == dtype, (name, words)  # a package that falls back to float32 proves nothing
            assert np.isfinite(params).all(), (name, words)
            nothing = np.full_like(params, np.nan)
            rows["params"].append(params)
            rows["averages"].append(nothing if averages is None else np.stack([join(row) for row in averages]))
            for key in STATE_NAMES:
                rows[key].append(join(state[key]) if key in state else nothing[0])
            case = {"preset": name, "dtype": dtype, "words": " ".join(words), "arguments": arguments}
            cases.append(case | {"lr_changes": scheduled})
        arrays |= {f"{name}/{dtype}/{key}": np.stack(row) for key, row in rows.items() if not np.isnan(row).all()}
    versions = {"python": platform.python_version(), "numpy": np.__version__}
    versions |= {package: importlib.metadata.version(package) for package in preset.packages.split()}
    source = preset.run.__doc__.partition("\n")[0]
    return {"source": source, "versions": versions, "lrs": lrs, "shapes": shapes}, cases, arrays


def load(folder):
    """The content of a folder of records: per preset its versions, learning rates and shapes; the cases; the arrays."""
    if not (folder / "presets.json").exists():
        return {}, [], {}
    text = json.loads((folder / "presets.json").read_text())
    with np.load(folder / "presets.npz") as archive:
        return text["presets"], text["cases"], {key: archive[key] for key in archive.files}


def save(folder, presets, cases, arrays):
    """Write both files, presets in the order of the table, so that the same versions write the same bytes."""
    order = [name for name in PRESETS if name in presets]
    head = ",\n".join(f"  {json.dumps(name)}: {json.dumps(presets[name])}" for name in order)
    lines = ",\n".join(f"  {json.dumps(case)}" for name in order for case in cases if case["preset"] == name)
    folder.mkdir(exist_ok=True)
    (folder / "presets.json").write_text(f'{{\n"presets": {{\n{head}\n}},\n"cases": [\n{lines}\n]\n}}\n')
    named = {key: arrays[key] for name in order for key in arrays if key.startswith(f"{name}/")}
    np.savez_compressed(folder / "presets.npz", **named)


def main():
    """Record the given presets."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("presets", nargs="+", choices=list(PRESETS), metavar="PRESET", help=", ".join(PRESETS))
    parser.add_argument("--to", type=Path, default=DATA, help="the folder")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--live", action="store_true", help="more and larger shapes, of one dtype")
    options = parser.parse_args()

    presets, cases, arrays = load(options.to)
    for name in options.presets:
        shapes, dtypes = (LIVE_SHAPES, 1) if options.live else (SHAPES, None)
        head, new_cases, new_arrays = record(name, options.seed, shapes, PRESETS[name].dtypes[:dtypes])
        presets[name] = head
        cases = [case for case in cases if case["preset"] != name] + new_cases
        arrays = {key: array for key, array in arrays.items() if not key.startswith(f"{name}/")} | new_arrays
        print(f"{name}: {len(new_cases)} cases, {head['versions']}")
    save(options.to, presets, cases, arrays)
    print(f"{len(cases)} cases, {sum(f.stat().st_size for f in options.to.glob('presets.*')) / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
