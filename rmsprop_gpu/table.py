"""What a kernel reads: addresses and sizes, 64-bit integers at fixed places, written by the plan."""

from __future__ import annotations

# The table has one row a tensor. An address of 0 says: this tensor has none.
PARAM, SQUARE_AVG, GRAD_AVG, MOMENTUM_BUFFER, STEP, BIAS_WEIGHT, SIZE, SCALARS_ROW = range(8)
COLUMNS = 8

# A batch is known by the addresses of its table, gradient column, scalars and factors.
TABLE, GRADS, SCALARS, FACTORS = range(4)

BUFFERS = {"square_avg": SQUARE_AVG, "sum": SQUARE_AVG, "grad_avg": GRAD_AVG, "momentum_buffer": MOMENTUM_BUFFER}
COUNTERS = {"step": STEP, "bias_weight": BIAS_WEIGHT}
