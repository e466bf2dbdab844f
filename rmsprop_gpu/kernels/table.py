"""What a kernel reads: addresses and sizes, 64-bit integers at fixed places, written by the plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

# The table has one row a tensor. An address of 0 says: this tensor has none.
PARAM, SQUARE_AVG, GRAD_AVG, MOMENTUM_BUFFER, EMA, STEP, BIAS_WEIGHT, SCALARS_ROW = range(8)
# For fewer bytes: the bases of the codes, what the parameter lacks; what keys are made from, the key of the step, and
# the blocks of elements before the first, where it is a part of a tensor.
BASES, REMAINDER, SEED, KEY, BLOCKS_BEFORE = range(8, 13)
# Where whoever calls the kernels counts, behind the step and as a float: the count of the steps before, one of these.
COUNT_FLOAT32, COUNT_FLOAT64 = range(13, 15)
COLUMNS = 16  # a power of two: a row is found by a shift

# The factors of a tensor, in the compute type: one row each.
SCALE, POWER, CORRECTION, EMA_MOMENTUM, SKIP = range(5)
FACTOR_COLUMNS = 5

# What a step is told beside its gradients, two words each: how the second is to be read, and a number or its address.
GRAD_SCALE, FOUND_INF = 0, 2
TOLD_WORDS = 4
NOTHING, NUMBER, AT_FLOAT32, AT_FLOAT64, AT_INT8, AT_INT32, AT_INT64 = range(7)

# What a device knows of the norms of a step, by addresses: partial sums; for each tensor its segment; the sums of the
# tensors and behind them the total; how many tensors there are; the outcome; whether float32 is the compute type of any
# of them.
PARTIALS, SEGMENTS, SUMS, TENSORS, OUTCOME, NARROW = range(6)
NORMS_WORDS = 6
# Of a tensor: the first of its partial sums, how many it has, the address of its scalars, and are they float32?
FIRST, COUNT, SCALARS_AT, IS_FLOAT32 = range(4)
SEGMENT_COLUMNS = 4
SQUARES, LARGEST = range(2)  # a sum, in float64: of squares; beside it the largest magnitude, infinite if one is NaN
SKIPPED, NORM = range(2)  # the outcome: an int64, a float64

# To the CPU's kernels a batch is known by these addresses: its own tables; what the step is told; the number of each of
# its tensors among those of norms, and its first partial sum; what the device knows of norms.
TABLE, GRADS, SCALARS, FACTORS, TOLD, NUMBERS, FIRSTS, NORMS = range(8)

# The list of chunks has one line a chunk: the tensor's row in the table, the first element, the one behind the last.
ROW, START, STOP = range(3)
CHUNK_COLUMNS = 3

# A row of a copy between a tensor and a bucket: the number of the tensor, whose address, or 0 for none, is in a column;
# where the copy begins, in bytes from there; its address in the bucket; its elements.
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
