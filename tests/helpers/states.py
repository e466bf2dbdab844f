"""Optimizers over three tensors, to test how state is shown, saved and loaded."""

import math

import numpy as np
from on_host import random

from rmsprop_gpu import RMSProp

SHAPES = {"a": (3, 4), "b": (5,), "c": ()}
DTYPES = {"a": np.float32, "b": np.float32, "c": np.float64}
FULL = {"momentum": 0.9, "centered": True, "bias_correction": True, "weight_decay": 0.01}


def tensors(seed):
    arrays = random(seed, *(math.prod(shape) for shape in SHAPES.values()), dtype=np.float64)
    return {
        name: a.reshape(shape).astype(DTYPES[name]) for a, (name, shape) in zip(arrays, SHAPES.items(), strict=True)
    }


def grads(seed):
    t = tensors(100 + seed)
    return [{"a": t["a"], "b": t["b"]}, {"c": t["c"]}]


def build(make=RMSProp, seed=1, **given):
    """Two groups with two dtypes. The first parameter is in Fortran order."""
    p = tensors(seed)
    groups = [{"params": {"a": np.asfortranarray(p["a"]), "b": p["b"]}}, {"params": {"c": p["c"]}, "lr": 0.5}]
    return make(groups, **given)


def run(opt, *seeds):
    for seed in seeds:
        opt.step(grads(seed))
    return opt


def params_of(opt):
    return [p for group in opt.param_groups for p in group["params"]]
