"""Every Variant of the rule, a cover of all triples of settings, and the arguments that make a Variant."""

from functools import cache
from itertools import combinations, product

import ml_dtypes
import numpy as np

from rmsprop_gpu import AdaGrad, RMSProp
from rmsprop_gpu.kernels.rule import Variant

# The settings of each factor, as the fields of Variant that they turn on or off.
FACTORS = {
    "rule": [{}, {"adagrad": True}],
    "scale": [{}, {"scale": True}],
    "clip": [{}, {"clipvalue": True}, {"norm": True, "scale": True}],
    "decay": [{}, {"weight_decay": True}, {"decoupled_weight_decay": True}],
    "centered": [{}, {"centered": True}],
    "correction": [{}, {"bias_correction": True}],
    "eps": [{}, {"eps_in_sqrt": True}, {"eps": False}],
    "momentum": [
        {},
        {"momentum": True},
        {"momentum": True, "lr_in_momentum": True},
        {"momentum": True, "nesterov": True},
        {"momentum": True, "nesterov": True, "lr_in_momentum": True},
    ],
    "check": [{}, {"finite": True}],
    "average": [{}, {"ema": True}],
}


def _settings():
    """Every valid combination, as the index of each factor's setting: AdaGrad has neither averages nor momentum."""
    names = list(FACTORS)
    only_rmsprop = [names.index(name) for name in ("centered", "correction", "momentum")]
    for setting in product(*(range(len(values)) for values in FACTORS.values())):
        if not setting[0] or not any(setting[i] for i in only_rmsprop):
            yield setting


def _variant(setting):
    fields = {}
    for values, i in zip(FACTORS.values(), setting, strict=True):
        fields |= values[i]
    return Variant(**fields)


# Every Variant of the rule. The covers include the switches around it.
EVERY = [v for v in map(_variant, _settings()) if not v.ema and not v.measures]


@cache
def cover(strength):
    """Variants in which every possible combination of settings of `strength` factors occurs (greedy)."""
    groups = list(combinations(range(len(FACTORS)), strength))
    covered_by = {s: {(g, tuple(s[i] for i in g)) for g in groups} for s in _settings()}
    missing = set().union(*covered_by.values())
    chosen = []
    while missing:
        best = max(covered_by, key=lambda s: len(covered_by[s] & missing))
        missing -= covered_by[best]
        chosen.append(_variant(best))
    return chosen


name = str  # of a Variant


# The hyperparameters for a Variant's optimizer. None is exact in binary, so that rounding twice would show.
NUMBERS = {"lr": 0.013, "alpha": 0.93, "eps": 1e-3, "weight_decay": 0.07, "momentum": 0.83, "clipvalue": 3.3}
NUMBERS |= {"global_clipnorm": 1.7, "ema_momentum": 0.87}


def arguments(variant):
    given = {"lr": NUMBERS["lr"], "eps": NUMBERS["eps"] if variant.eps else 0.0, "eps_in_sqrt": variant.eps_in_sqrt}
    given["maximize"] = variant.scale and not variant.norm
    if variant.clipvalue:
        given["clipvalue"] = NUMBERS["clipvalue"]
    if variant.norm:
        given["global_clipnorm"] = NUMBERS["global_clipnorm"]
    if variant.ema:
        given |= {"use_ema": True, "ema_momentum": NUMBERS["ema_momentum"]}
    if variant.finite:
        given["skip_nonfinite"] = True
    if variant.weight_decay or variant.decoupled_weight_decay:
        given["weight_decay"] = NUMBERS["weight_decay"]
        given["decoupled_weight_decay"] = variant.decoupled_weight_decay
    if not variant.adagrad:
        given["alpha"] = NUMBERS["alpha"]
        given["momentum"] = NUMBERS["momentum"] if variant.momentum else 0.0
        for flag in ("centered", "bias_correction", "nesterov", "lr_in_momentum"):
            given[flag] = getattr(variant, flag)
    return given


def optimizer(variant, params):
    return (AdaGrad if variant.adagrad else RMSProp)(params, **arguments(variant))


def random_problem(variant, sizes, dtype, rng):
    """An optimizer with previous state, and gradients over 8 decades, so that sqrt(v) crosses eps.

    Parameters are about as large as a step, so that their own rounding does not hide the step's.
    """

    def spread(n):
        return (rng.standard_normal(n) * 10.0 ** rng.uniform(-6, 2, n)).astype(dtype)

    params = [(rng.standard_normal(n) * 10.0 ** rng.uniform(-4, 0, n)).astype(dtype) for n in sizes]
    opt = optimizer(variant, params)
    for i, size in enumerate(sizes):
        state = opt.state[i]
        if variant.ema:
            state["step"][()] = (i + 1) % 2  # for some, the next step is the first
            state["ema"][:] = spread(size)
        if variant.adagrad:
            state["sum"][:] = spread(size) ** 2
            continue
        state["bias_weight"][()] = 1 - 0.93 ** (i % 5)
        m = spread(size)
        # Half of the variances are small compared with the square of the mean, so that v - m^2 cancels.
        state["square_avg"][:] = m.astype(np.float64) ** 2 * (1 + rng.choice([1e-5, 1.0], size))
        if variant.centered:
            state["grad_avg"][:] = m
        if variant.momentum:
            state["momentum_buffer"][:] = spread(size)
    grads = [spread(n) for n in sizes]
    for i, g in enumerate(grads):
        g[::7] = 0
        if variant.centered:  # v below m^2, as rounding leaves it for a constant gradient, but more so
            g[3::5] = opt.state[i]["grad_avg"][3::5]
            opt.state[i]["square_avg"][3::5] = 0.999 * g[3::5].astype(np.float64) ** 2
        for x in opt.state[i].values():  # elements without a gradient so far: 0/0 without eps
            if x.ndim:
                x[::14] = 0
    return opt, params, grads


def bits(array):
    """The bytes of a NumPy or CuPy array, with all NaNs alike."""
    x = array.get() if hasattr(array, "get") else np.asarray(array)
    x = np.array(x, copy=True)
    if x.dtype.kind not in "iu":
        x[np.isnan(x)] = np.nan
    return x.tobytes()


def specials(dtype):
    """Special values of a float dtype, with both signs."""
    f = ml_dtypes.finfo(dtype)
    tiny, least = f.smallest_normal, f.smallest_subnormal
    x = np.array([np.nan, np.inf, f.max, tiny, tiny - least, 3 * least, least, 0], dtype)
    return np.concatenate([x, -x])


def sprinkle(x, rng):
    """Make a tenth of an array special."""
    special = specials(x.dtype)
    at = rng.random(x.size) < 0.1
    x[at] = special[rng.integers(len(special), size=at.sum())]
