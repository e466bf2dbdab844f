"""Record what torch, optax and Keras do, so that the oracle can be checked where none of them is installed.

    python tests/helpers/record_trajectories.py

writes ``data/trajectories.json`` (the cases, under the names of ``rmsprop_gpu.reference``) and
``data/trajectories.npz``, where row i of each array belongs to case i. The same versions write the same bytes.
``recorded.py`` reads both.
"""

import json
import os
import platform

os.environ["KERAS_BACKEND"] = "jax"  # Keras and JAX read these on import
os.environ["JAX_ENABLE_X64"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import torch
from paths import DATA

SEED, STEPS, SIZE = 20260, 25, 7
STATE_NAMES = ("square_avg", "grad_avg", "momentum_buffer", "sum")

# What a framework's optimizer always does, under our names, then its cases. A word of a case is a hyperparameter that
# gets a drawn value, a switch that is on, or a number as written. Left out: centered with bias_correction, which is
# degenerate in optax (variance 0 on the first step) and means something else here.
TABLE = [
    (
        ("torch", "RMSprop", "rmsprop", {}),
        """
        plain
        eps=0
        momentum
        centered
        centered momentum
        weight_decay
        maximize
        weight_decay maximize
        weight_decay momentum
        weight_decay centered momentum maximize
        """,
    ),
    (
        ("torch", "Adam", "rmsprop", {"bias_correction": True}),
        """
        plain
        maximize
        weight_decay
        """,
    ),
    (
        ("torch", "AdamW", "rmsprop", {"bias_correction": True, "decoupled_weight_decay": True}),
        """
        weight_decay
        weight_decay maximize
        """,
    ),
    (
        ("torch", "Adagrad", "adagrad", {}),
        """
        plain
        initial_scale
        weight_decay
        maximize
        initial_scale weight_decay maximize
        """,
    ),
    (
        ("optax", "rmsprop", "rmsprop", {"lr_in_momentum": True}),
        """
        plain
        eps_in_sqrt
        momentum
        momentum eps_in_sqrt
        momentum nesterov
        momentum nesterov eps_in_sqrt
        initial_scale
        initial_scale eps_in_sqrt
        bias_correction
        bias_correction eps_in_sqrt
        bias_correction momentum nesterov
        centered
        centered eps_in_sqrt
        centered momentum
        centered momentum nesterov eps_in_sqrt initial_scale
        clipvalue
        clipvalue momentum nesterov eps_in_sqrt
        clipvalue weight_decay
        clipvalue weight_decay bias_correction momentum nesterov initial_scale
        weight_decay decoupled_weight_decay
        weight_decay decoupled_weight_decay eps_in_sqrt bias_correction
        weight_decay decoupled_weight_decay centered
        """,
    ),
    (
        ("optax", "adagrad", "adagrad", {"eps_in_sqrt": True}),
        """
        plain
        initial_scale
        clipvalue weight_decay
        """,
    ),
    (
        ("keras", "RMSprop", "rmsprop", {"eps_in_sqrt": True, "lr_in_momentum": True, "decoupled_weight_decay": True}),
        """
        plain
        momentum
        centered
        centered momentum
        weight_decay
        weight_decay momentum
        clipvalue
        clipvalue weight_decay centered momentum
        """,
    ),
    (
        ("keras", "Adagrad", "adagrad", {"eps_in_sqrt": True, "decoupled_weight_decay": True}),
        """
        plain
        initial_scale
        clipvalue weight_decay initial_scale
        """,
    ),
]


def draw_hyperparameters(rng):
    """A value for each hyperparameter that a case may name, rounded to keep the JSON readable."""
    drawn = {
        "alpha": rng.uniform(0.85, 0.99),
        "eps": 10 ** rng.uniform(-8, -3),
        "momentum": rng.uniform(0.5, 0.95),
        "weight_decay": 10 ** rng.uniform(-3, -1),
        "initial_scale": rng.uniform(0.1, 1.0),
        "clipvalue": 10 ** rng.uniform(-2, 0),
    }
    return {name: float(f"{value:.3g}") for name, value in drawn.items()}


def draw_arrays(rng):
    """Gradients from 1e-8 to 10, each element with its own scale, so that sqrt(v) is on both sides of eps."""
    scale = 10 ** np.linspace(-7, 0, SIZE) * 10 ** rng.uniform(-1, 1, (STEPS, SIZE))
    grads = (scale * rng.standard_normal((STEPS, SIZE))).astype(np.float32)  # exact when widened, in half the space
    return grads, rng.standard_normal(SIZE), 10 ** rng.uniform(-3, -1, STEPS)


def keywords_of(words, function, fixed, drawn):
    """The case under the names of reference.py: what the framework always does, then its words."""
    keywords = {name: drawn[name] for name in ("alpha", "eps") if function == "rmsprop" or name != "alpha"} | fixed
    for word in words:
        name, equals, number = word.partition("=")
        if word != "plain":
            keywords[name] = float(number) if equals else drawn.get(name, True)
    return keywords


def run_torch(optimizer, k, grads, param, lrs):
    """torch.optim.RMSprop, Adagrad, and Adam or AdamW with betas=(0, alpha): RMSProp with bias correction."""
    param = torch.tensor(param, dtype=torch.float64, requires_grad=True)
    options = {"eps": k["eps"], "weight_decay": k.get("weight_decay", 0), "maximize": k.get("maximize", False)}
    if optimizer == "RMSprop":
        options |= {"alpha": k["alpha"], "momentum": k.get("momentum", 0), "centered": k.get("centered", False)}
    elif optimizer == "Adagrad":
        options |= {"lr_decay": 0, "initial_accumulator_value": k.get("initial_scale", 0)}
    else:
        options |= {"betas": (0.0, k["alpha"]), "amsgrad": False}
    opt = getattr(torch.optim, optimizer)([param], **options)

    params = []
    for grad, lr in zip(grads, lrs, strict=True):
        opt.param_groups[0]["lr"] = float(lr)
        param.grad = torch.tensor(grad, dtype=torch.float64)
        opt.step()
        params.append(param.detach().numpy().copy())
    state = {"exp_avg_sq": None, **opt.state[param]}
    return params, {"square_avg": state["exp_avg_sq"], **state}


def optax_rule(optimizer, k, schedule):
    """The alias if it has everything needed, otherwise the chain that the alias itself would build."""
    if optimizer == "adagrad":
        return optax.adagrad(schedule, initial_accumulator_value=k.get("initial_scale", 0.0), eps=k["eps"])
    options = {name: k[name] for name in ("eps", "initial_scale", "bias_correction") if name in k}
    options |= {"decay": k["alpha"], "eps_in_sqrt": k.get("eps_in_sqrt", False)}
    if k.get("decoupled_weight_decay"):
        scale_by = optax.scale_by_stddev if k.get("centered") else optax.scale_by_rms
        decay = optax.add_decayed_weights(k["weight_decay"])
        return optax.chain(scale_by(**options), decay, optax.scale_by_learning_rate(schedule))
    options |= {name: k[name] for name in ("momentum", "nesterov", "centered") if name in k}
    return optax.rmsprop(schedule, **options)


def run_optax(optimizer, k, grads, param, lrs):
    """Optax: its momentum follows the learning rate (scale_by_learning_rate, then trace): lr_in_momentum."""
    table = jnp.asarray(lrs)
    before = [optax.clip(k["clipvalue"])] if "clipvalue" in k else []
    if "weight_decay" in k and not k.get("decoupled_weight_decay"):
        before.append(optax.add_decayed_weights(k["weight_decay"]))
    opt = optax.chain(*before, optax_rule(optimizer, k, lambda count: table[count]))

    param = jnp.asarray(param, jnp.float64)
    state, params = opt.init(param), []
    for grad in grads:
        updates, state = opt.update(jnp.asarray(grad, jnp.float64), state, param)
        param = optax.apply_updates(param, updates)
        params.append(np.asarray(param))
    names = {"square_avg": "nu", "grad_avg": "mu", "sum": "sum_of_squares"}
    ours = {ours: optax.tree.get(state, theirs) for ours, theirs in names.items()}
    trace = optax.tree.get(state, "trace")  # it averages -lr * u: our buffer with the opposite sign
    return params, ours | {"momentum_buffer": None if trace is None else -trace}


def run_keras(optimizer, k, grads, param, lrs):
    """keras.optimizers on JAX: eps inside the root, lr inside momentum, decay before the step. All of that is fixed."""
    keras.config.set_floatx("float64")  # sets the dtype of the learning rate's variable
    options = {"epsilon": k["eps"], "weight_decay": k.get("weight_decay"), "clipvalue": k.get("clipvalue")}
    if optimizer == "RMSprop":
        options |= {"rho": k["alpha"], "momentum": k.get("momentum", 0.0), "centered": k.get("centered", False)}
    else:
        options |= {"initial_accumulator_value": k.get("initial_scale", 0.0)}
    opt = getattr(keras.optimizers, optimizer)(learning_rate=1.0, **options)

    variable, params = keras.Variable(param, dtype="float64", name="p"), []
    for grad, lr in zip(grads, lrs, strict=True):
        opt.learning_rate = float(lr)
        opt.apply([jnp.asarray(grad, jnp.float64)], [variable])
        params.append(np.array(variable.value))
    state = {v.name: v.value for v in opt.variables}
    names = {"square_avg": "velocity", "grad_avg": "average_gradient", "momentum_buffer": "momentum"}
    names["sum"] = "accumulator"
    return params, {ours: state.get(f"p_{theirs}") for ours, theirs in names.items()}


RUNNERS = {"torch": run_torch, "optax": run_optax, "keras": run_keras}


def record(framework, optimizer, function, fixed, words):
    """One case and its arrays. The seed depends on its name, so that a new case in the table changes no other."""
    name = "-".join([framework, optimizer.lower(), *words])
    rng = np.random.default_rng([SEED, *name.encode()])
    keywords = keywords_of(words, function, fixed, draw_hyperparameters(rng))
    grads, param, lrs = draw_arrays(rng)
    params, state = RUNNERS[framework](optimizer, keywords, grads.astype(np.float64), param, lrs)

    arrays = {"grads": grads, "lrs": lrs, "params": np.stack([param, *params])}
    for key in STATE_NAMES:
        value = state.get(key)
        arrays[key] = np.full(SIZE, np.nan) if value is None else np.asarray(value)
    assert arrays["params"].dtype == np.float64, name  # a framework that falls back to float32 proves nothing
    assert np.isfinite(arrays["params"]).all(), name
    return {"name": name, "framework": framework, "function": function, "keywords": keywords}, arrays


def main():
    """Record the whole table and write the two files."""
    rows = [(*head, line.split()) for head, lines in TABLE for line in lines.strip().splitlines()]
    cases, arrays = zip(*[record(*row) for row in rows], strict=True)
    assert len({case["name"] for case in cases}) == len(cases)

    modules = {"numpy": np, "torch": torch, "jax": jax, "optax": optax, "keras": keras}
    versions = {"python": platform.python_version()} | {name: m.__version__ for name, m in modules.items()}
    lines = ",\n".join(f"  {json.dumps(case)}" for case in cases)
    text = f'{{\n"versions": {json.dumps(versions)},\n"cases": [\n{lines}\n]\n}}\n'
    DATA.mkdir(exist_ok=True)
    (DATA / "trajectories.json").write_text(text)
    np.savez_compressed(DATA / "trajectories.npz", **{key: np.stack([a[key] for a in arrays]) for key in arrays[0]})
    print(f"{len(cases)} cases, {sum(f.stat().st_size for f in DATA.glob('trajectories.*')) / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
