"""The norm of gradients, summed again in the documented order: in Python, slowly."""

import math
from fractions import Fraction

import numpy as np
from on_either import F8


def in_lanes(terms):
    """128 lanes, each adding every 128th term in order; then lane j adds lane j + 64, then j + 32, down to 1."""
    lanes = np.zeros(128)
    for start in range(0, len(terms), 128):
        some = np.asarray(terms[start : start + 128], F8)
        lanes[: len(some)] += some
    return folded(lanes)


def folded(lanes):
    lanes = list(lanes)
    while len(lanes) > 1:
        half = len(lanes) // 2
        lanes = [float(lanes[j]) + float(lanes[j + half]) for j in range(half)]
    return lanes[0]


def squares_in_lanes(x):
    """The same for squares. Those of float32 and halves are exact in float64; for float64, each sum rounds once."""
    if x.dtype != F8:
        return in_lanes(x.astype(F8) ** 2)
    lanes = [0.0] * 128
    for i, value in enumerate(x.tolist()):
        lanes[i % 128] = float(Fraction(value) ** 2 + Fraction(lanes[i % 128]))
    return folded(lanes)


def sum_of_squares(x):
    """The sum for one gradient, in memory order: blocks of 4,096 elements, then their sums."""
    return in_lanes([squares_in_lanes(x[start : start + 4096]) for start in range(0, len(x), 4096)])


def norm_of(grads):
    """The norm of all gradients, flat, in parameter order. None has no elements."""
    return math.sqrt(in_lanes([0.0 if x is None else sum_of_squares(x) for x in grads]))
