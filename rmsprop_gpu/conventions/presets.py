"""Every framework's RMSProp in its own terms: the names and defaults of its arguments, and what they mean here.

Each entry was taken from the source that it names. To add one, add it to PRESETS, and its formula to
``tests/helpers/preset_formulas.py``.
"""

from __future__ import annotations

from typing import Any

from .. import hyper
from .preset import OURS, REQUIRED, Preset
from .schedules import InverseTimeDecay


def _ours(a: dict[str, Any], **always: Any) -> dict[str, Any]:
    """The arguments under our names, plus what the framework always does."""
    return {**{OURS.get(key, key): value for key, value in a.items()}, **always}


def _hinton(a: dict[str, Any]) -> dict[str, Any]:
    return _ours(a, eps=0.0)


def _graves(a: dict[str, Any]) -> dict[str, Any]:
    return _ours(a, centered=True, eps_in_sqrt=True, lr_in_momentum=True)


def _keras(a: dict[str, Any]) -> dict[str, Any]:
    clips = {key: a[key] for key in ("clipnorm", "clipvalue", "global_clipnorm") if a[key] is not None}
    if len(clips) > 1:
        said = ", ".join(f"{key}={value!r}" for key, value in clips.items())
        raise ValueError(f"{' and '.join(clips)} are given ({said}); wanted at most one of them, as keras does")
    return _ours(a, eps_in_sqrt=True, lr_in_momentum=True, decoupled_weight_decay=True)


def _tf_keras_legacy(a: dict[str, Any]) -> dict[str, Any]:
    for key in ("clipvalue", "clipnorm", "global_clipnorm"):
        if a[key] == 0:
            raise ValueError(f"{key} is 0, which makes every gradient 0 there; wanted None or a number > 0")
    if a["clipnorm"] is not None and a["global_clipnorm"] is not None:
        raise ValueError("clipnorm and global_clipnorm are given; wanted at most one of them, as tf_keras_legacy does")
    norm = next((key for key in ("clipnorm", "global_clipnorm") if a[key] is not None), None)
    if norm and a["clipvalue"] is not None:
        said = f"clipvalue={a['clipvalue']!r}, {norm}={a[norm]!r}"
        raise ValueError(
            f"clipvalue and {norm} are given ({said}); wanted at most one of them: tf_keras_legacy clips by value and "
            "then by norm, a step here clips once"
        )
    lr = a.pop("lr")
    if lr is not None:  # the older name, which takes precedence
        a["learning_rate"] = lr
    decay = hyper.number("decay", a.pop("decay"), like="lr")
    if decay:
        a["learning_rate"] = InverseTimeDecay(a["learning_rate"], decay)
    a["epsilon"] = a["epsilon"] or 1e-7  # `epsilon or backend_config.epsilon()`: None and 0 mean the default there
    # With momentum it calls the kernel of TensorFlow 1; without, it has its own copy of the formula, in another form.
    return _ours(a, eps_in_sqrt=a["momentum"] > 0, lr_in_momentum=True)


def _tf1(a: dict[str, Any]) -> dict[str, Any]:
    return _ours(a, initial_scale=1.0, eps_in_sqrt=True, lr_in_momentum=True)


def _optax(a: dict[str, Any]) -> dict[str, Any]:
    a["momentum"] = a["momentum"] or 0.0
    ours = _ours(a, lr_in_momentum=True)
    if a["centered"] and a["bias_correction"]:
        raise ValueError(
            "centered and bias_correction are True; wanted at most one of them: optax divides the first step by the "
            "root of a variance that is 0, which gives 0/0 or up to 1e8 learning rates. Here that step is at most "
            f"lr / sqrt(alpha): RMSProp(params, {', '.join(f'{key}={hyper.shown(x)}' for key, x in ours.items())})"
        )
    return ours


def _timm(a: dict[str, Any]) -> dict[str, Any]:
    return _ours(a, initial_scale=1.0, eps_in_sqrt=True)


def _bitsandbytes(a: dict[str, Any]) -> dict[str, Any]:
    if a["alpha"] == 0:
        raise ValueError("alpha is 0, which bitsandbytes refuses; wanted 0 < alpha < 1")
    return _ours(a)


PRESETS: dict[str, Preset] = {
    "hinton": Preset(
        "Tieleman and Hinton, lecture 6e (2012), slide 29; no eps is on it; recorded by torch with eps 0",
        {"lr": REQUIRED, "alpha": 0.9},
        _hinton,
    ),
    "graves": Preset(
        "Graves, arXiv:1308.0850v5 (2013), equations 38 to 45, in the names of chainer 7.8.1, RMSpropGraves",
        {"lr": 1e-4, "alpha": 0.95, "momentum": 0.9, "eps": 1e-4},
        _graves,
    ),
    "torch": Preset(
        "torch 2.13.0, torch/optim/rmsprop.py, RMSprop",
        {
            "lr": 1e-2,
            "alpha": 0.99,
            "eps": 1e-8,
            "weight_decay": 0,
            "momentum": 0,
            "centered": False,
            "capturable": False,
            "foreach": None,
            "maximize": False,
            "differentiable": False,
        },
        _ours,
        # The first two choose how torch runs the same formula: a step here is always one pass and can be captured.
        {"capturable": (False, True), "foreach": (None, False, True), "differentiable": (False,)},
    ),
    "keras": Preset(
        "keras 3.15.1, keras/src/optimizers/rmsprop.py and base_optimizer.py, RMSprop",
        {
            "learning_rate": 0.001,
            "rho": 0.9,
            "momentum": 0.0,
            "epsilon": 1e-7,
            "centered": False,
            "weight_decay": None,
            "clipnorm": None,
            "clipvalue": None,
            "global_clipnorm": None,
            "use_ema": False,
            "ema_momentum": 0.99,
            "ema_overwrite_frequency": None,
            "loss_scale_factor": None,
            "gradient_accumulation_steps": None,
            "name": None,
        },
        _keras,
        {
            "ema_overwrite_frequency": (None,),
            "loss_scale_factor": (None,),
            "gradient_accumulation_steps": (None,),
            "name": (None,),
        },
        strangers={
            "decay": "it belongs to tf.keras up to 2.10, the preset 'tf_keras_legacy'",
            "inner_optimizer": "of a LossScaleOptimizer's get_config() its arguments are "
            'config["inner_optimizer"]["config"]',
        },
    ),
    "tf_keras_legacy": Preset(
        "tf_keras 2.21.0, tf_keras/src/optimizers/legacy/rmsprop.py and optimizer_v2.py, RMSprop: tf.keras up to 2.10",
        {
            "learning_rate": 0.001,
            "rho": 0.9,
            "momentum": 0.0,
            "epsilon": 1e-7,
            "centered": False,
            "name": "RMSprop",
            "clipnorm": None,
            "clipvalue": None,
            "global_clipnorm": None,
            "lr": None,
            "decay": 0.0,
        },
        _tf_keras_legacy,
        {"name": ("RMSprop",)},
        none=("epsilon",),
        own=("decay",),
    ),
    "tf1": Preset(
        "tensorflow at 0304934, tensorflow/python/training/rmsprop.py, RMSPropOptimizer: ResourceApplyRMSProp",
        {
            "learning_rate": REQUIRED,
            "decay": 0.9,
            "momentum": 0.0,
            "epsilon": 1e-10,
            "use_locking": False,
            "centered": False,
            "name": "RMSProp",
        },
        _tf1,
        {"use_locking": (False,), "name": ("RMSProp",)},
    ),
    "optax": Preset(
        "optax 0.2.8, optax/_src/alias.py, rmsprop",
        {
            "learning_rate": REQUIRED,
            "decay": 0.9,
            "eps": 1e-8,
            "initial_scale": 0.0,
            "eps_in_sqrt": True,
            "centered": False,
            "momentum": None,
            "nesterov": False,
            "bias_correction": False,
        },
        _optax,
    ),
    "timm": Preset(
        "timm 1.0.31, timm/optim/rmsprop_tf.py, RMSpropTF",
        {
            "lr": 1e-2,
            "alpha": 0.9,
            "eps": 1e-10,
            "weight_decay": 0,
            "momentum": 0.0,
            "centered": False,
            "decoupled_decay": False,
            "corrected_weight_decay": False,
            "lr_in_momentum": True,
            "caution": False,
            "foreach": None,
        },
        _timm,
        {"corrected_weight_decay": (False,), "caution": (False,), "foreach": (None, False, True)},
    ),
    "chainer": Preset(
        "chainer 7.8.1, chainer/optimizers/rmsprop.py, RMSprop",
        {"lr": 0.01, "alpha": 0.99, "eps": 1e-8, "eps_inside_sqrt": False},
        _ours,
    ),
    "bitsandbytes": Preset(
        "bitsandbytes 0.50.2, bitsandbytes/optim/rmsprop.py, RMSprop; it ignores momentum, so 0 alone is its meaning",
        {
            "lr": 1e-2,
            "alpha": 0.99,
            "eps": 1e-8,
            "weight_decay": 0,
            "momentum": 0,
            "centered": False,
            "optim_bits": 32,
            "args": None,
            "min_8bit_size": 4096,
        },
        _bitsandbytes,
        {
            "momentum": (0, 0.0),
            "centered": (False,),
            "optim_bits": (32,),
            "args": (None,),
            "min_8bit_size": (4096,),
        },
    ),
}


def preset_of(name: object) -> Preset:
    """The preset with this name; a ValueError if there is none."""
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(f"there is no preset {name!r}; wanted one of {', '.join(PRESETS)}")
    return PRESETS[name]
