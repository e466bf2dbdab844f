"""Keys of a group that are not hyperparameters here: which are kept, and why others are refused."""

from __future__ import annotations

from difflib import get_close_matches

from .. import hyper
from .preset import LABELS, OURS
from .presets import PRESETS

# Hyperparameters of other optimizers in the frameworks that have a preset; those of their RMSProp are in PRESETS.
_OTHERS = {
    "torch": """betas amsgrad dampening lr_decay rho lambd t0 etas step_sizes momentum_decay initial_accumulator_value
        fused history_size tolerance_grad tolerance_change line_search_fn max_iter max_eval ns_coefficients ns_steps
        adjust_lr_fn""",
    "keras": """beta_1 beta_2 amsgrad beta learning_rate_power l1_regularization_strength l2_regularization_strength
        l2_shrinkage_regularization_strength initial_accumulator_value beta2_decay epsilon_1 epsilon_2
        clip_threshold""",
    "optax": """b1 b2 b3 eps_root eps_scale initial_accumulator_value accumulator_dtype mu_dtype trust_coefficient
        noise_seed min_dim_size_to_factor decay_rate decay_offset multiply_by_parameter_scale clipping_threshold
        weight_decay_mask""",
    "timm": "betas trust_coeff trust_clip always_adapt grad_averaging max_grad_norm beta",
    "chainer": "beta1 beta2 eta weight_decay_rate amsgrad adabound final_lr gamma",
    "bitsandbytes": "betas block_wise percentile_clipping max_unorm is_paged beta3 t_alpha t_beta3 dampening",
}
_THEIRS = {name for preset in PRESETS.values() for name in preset.arguments if name not in LABELS}
_HYPERPARAMETERS = {*hyper.ALL, *OURS, *_THEIRS, *" ".join(_OTHERS.values()).split()}

# What torch's schedulers leave in a group; some names are close to ours.
_SCHEDULERS = {"initial_lr", "max_lr", "min_lr", "swa_lr", "base_momentum", "max_momentum"}


def refusal(name: object) -> str | None:
    """Why a group cannot have this key besides its hyperparameters; None if it is kept and ignored.

    A key is kept if no optimizer's step reads it. A hyperparameter, ours or from a framework with a preset, would be
    ignored although an effect was wanted, and so would a misspelling of ours.

    Examples
    --------
    >>> for name in ("initial_lr", "lr_scale", "betas", "momentun"):
    ...     print(name, refusal(name))
    initial_lr None
    lr_scale None
    betas which is a hyperparameter, but not here
    momentun which is not a hyperparameter, but close to 'momentum'
    """
    if not isinstance(name, str):
        return "which is not a name"
    if name in _HYPERPARAMETERS:
        return "which is a hyperparameter, but not here"
    meant = None if name in _SCHEDULERS else _meant(name)
    return meant and f"which is not a hyperparameter, but close to {meant!r}"


def _meant(name: str) -> str | None:
    """The hyperparameter of which this is a misspelling."""
    letters = _letters(name)
    for one in _HYPERPARAMETERS:
        if _letters(one) == letters:
            return one
    ours = {_letters(one): one for one in hyper.ALL}
    words = [word for word in name.lower().replace("-", "_").split("_") if word]
    # With an additional word (lr_scale, warmup_momentum) it is a different name, unless it is very close to one.
    longer = any(_within(one.split("_"), words) for one in hyper.ALL)
    close = get_close_matches(letters, ours, 1, 0.85 if longer else 0.65)
    return ours[close[0]] if close else None


def _letters(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


def _within(part: list[str], words: list[str]) -> bool:
    """Do the words contain this part, with others around it?"""
    n = len(part)
    return len(words) > n and any(words[i : i + n] == part for i in range(len(words) - n + 1))
