"""The trajectories recorded from torch, optax and Keras, and the bound for an update in them."""

import json

import numpy as np
from paths import DATA

CASES = {case["name"]: case for case in json.loads((DATA / "trajectories.json").read_text())["cases"]}
with np.load(DATA / "trajectories.npz") as archive:
    ARRAYS = {key: archive[key] for key in archive.files}
for array in ARRAYS.values():
    array.setflags(write=False)  # the oracle changes nothing in place
ROWS = {name: {key: array[row] for key, array in ARRAYS.items()} for row, name in enumerate(CASES)}
STATE_NAMES = ("square_avg", "grad_avg", "momentum_buffer", "sum")

# The bound for an update: RELATIVE times the tensor's largest update in that step, plus ULPS ulps of the parameter.
# * RELATIVE. A step has at most 20 roundings of 2**-53 on each side (other orders of sums and powers, rsqrt for 1 /
#   sqrt, lerp for the average), and an average carries those of 25 steps: 1000 * 2**-53, or 1.1e-13. In centered
#   mode, v - m^2 cancels and magnifies that by (v + m^2) / (v - m^2), at most 8 in these cases: 1e-12 in all. The
#   largest error seen beyond the ulps is 8e-16.
# * ULPS. An update is only known through the parameter, which each side rounds at most twice, once after decoupled
#   decay and once after the step, by half an ulp each: 2 * 2 * 0.5 = 2. Every step starts from the recorded
#   parameter, so these do not accumulate.
RELATIVE = 1e-12
ULPS = 2
