"""What a kernel reads: addresses and sizes, 64-bit integers at fixed places, written by the plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

# The table has one row a tensor. An address of 0 says: this tensor has none.
PARAM, SQUARE_AVG, GRAD_AVG, MOMENTUM_BUFFER, STEP, BIAS_WEIGHT, SIZE, SCALARS_ROW = range(8)
COLUMNS = 8

# To the CPU's kernels a batch is known by the addresses of its table, gradient column, scalars and factors.
TABLE, GRADS, SCALARS, FACTORS = range(4)

# The list of chunks has one line a chunk: the tensor's row in the table, the first element, the one behind the last.
ROW, START, STOP = range(3)
CHUNK_COLUMNS = 3

BUFFERS = {"square_avg": SQUARE_AVG, "sum": SQUARE_AVG, "grad_avg": GRAD_AVG, "momentum_buffer": MOMENTUM_BUFFER}
COUNTERS = {"step": STEP, "bias_weight": BIAS_WEIGHT}


def chunk_list(sizes: Sequence[int], chunk: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """(row, start, stop) of every chunk; a tensor without elements has one empty chunk, which counts its step."""
    counts = [max(1, -(-size // chunk)) for size in sizes]
    rows = np.repeat(np.arange(len(sizes)), counts)
    starts = (np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)) * chunk
    stops = np.minimum(starts + chunk, np.asarray(sizes, np.int64)[rows])
    return np.stack([rows, starts, stops], axis=1).astype(np.int64)
