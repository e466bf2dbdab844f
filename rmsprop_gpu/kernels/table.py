"""What a kernel reads: addresses and sizes, as 64-bit integers at fixed places, written by the plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

# The table has one row per tensor. An address of 0 means that this tensor has no such buffer.
PARAM, SQUARE_AVG, GRAD_AVG, MOMENTUM_BUFFER, EMA, STEP, BIAS_WEIGHT, SCALARS_ROW = range(8)
# For fewer bytes: the bases of the codes and the remainder of the parameter; what keys are made from, the key of the
# step, and, if this is part of a tensor, the number of blocks before it.
BASES, REMAINDER, SEED, KEY, BLOCKS_BEFORE = range(8, 13)
# If the caller of the kernels counts steps itself, after the step and as a float: the count before, one of these.
COUNT_FLOAT32, COUNT_FLOAT64 = range(13, 15)
COLUMNS = 16  # a power of two: a row is found by a shift

# The factors of a tensor, in the compute type: one row per tensor.
SCALE, POWER, CORRECTION, EMA_MOMENTUM, SKIP = range(5)
FACTOR_COLUMNS = 5

# What a step gets beside its gradients, two words each: how to read the second word, and a number or its address.
GRAD_SCALE, FOUND_INF = 0, 2
TOLD_WORDS = 4
NOTHING, NUMBER, AT_FLOAT32, AT_FLOAT64, AT_INT8, AT_INT32, AT_INT64 = range(7)

# A device's data on the norms of a step, as addresses: partial sums; for each tensor its segment; the sums of the
# tensors, followed by the total; the number of tensors; the outcome; whether any of them has the compute type float32.
PARTIALS, SEGMENTS, SUMS, TENSORS, OUTCOME, NARROW = range(6)
NORMS_WORDS = 6
# Per tensor: its first partial sum, how many it has, the address of its scalars, and whether they are float32.
FIRST, COUNT, SCALARS_AT, IS_FLOAT32 = range(4)
SEGMENT_COLUMNS = 4
SQUARES, LARGEST = range(2)  # float64 sum of squares; beside it the largest magnitude, infinite if one is NaN
SKIPPED, NORM = range(2)  # the outcome: an int64, a float64

# The CPU's kernels get a batch as these addresses: its own tables; what the step is given; the number of each of its
# tensors among those of norms, and its first partial sum; the device's data on norms.
TABLE, GRADS, SCALARS, FACTORS, TOLD, NUMBERS, FIRSTS, NORMS = range(8)

# The list of chunks has one row per chunk: the tensor's row in the table, the first element, and one past the last.
ROW, START, STOP = range(3)
CHUNK_COLUMNS = 3

# A row of a copy between a tensor and a bucket: the number of the tensor, whose address (0 for none) is in a column;
# where the copy begins, in bytes from there; its address in the bucket; its number of elements.
TENSOR, OFFSET, BUCKET, ELEMENTS = range(4)
COPY_COLUMNS = 4
Copying = Literal["pack", "pack and zero", "unpack"]

BUFFERS = {
    "square_avg": SQUARE_AVG,
    "sum": SQUARE_AVG,
    "grad_avg": GRAD_AVG,
    "momentum_buffer": MOMENTUM_BUFFER,
    "ema": EMA,
    "square_avg_base": BASES,
    "sum_base": BASES,
    "param_remainder": REMAINDER,
}
COUNTERS = {"step": STEP, "bias_weight": BIAS_WEIGHT}
COUNTS = {"step of float32": COUNT_FLOAT32, "step of float64": COUNT_FLOAT64}


def chunk_list(sizes: Sequence[int], chunk: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """(row, start, stop) of every chunk; a tensor without elements has one empty chunk, which counts its step."""
    lengths = np.asarray(sizes, np.int64)
    counts = np.maximum(1, -(-lengths // chunk))
    made = np.empty((int(counts.sum()), 3), np.int64)
    rows, starts, stops = made.T
    rows[:] = np.repeat(np.arange(len(sizes)), counts)
    starts[:] = np.arange(len(made))
    starts -= np.repeat(np.cumsum(counts) - counts, counts)
    starts *= chunk
    np.minimum(starts + chunk, lengths[rows], out=stops)
    return made
