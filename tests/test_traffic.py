"""What a step moves and computes, against what is counted elsewhere."""

import json
import os
import subprocess
import sys

import pytest
from test_rule import wanted_instructions
from variants import EVERY

from rmsprop_gpu.traffic import flops_per_element


def test_flops_are_the_instructions_counted_by_hand():
    for variant in EVERY:
        wanted = wanted_instructions(variant)
        assert flops_per_element(variant) == 2 * wanted["fma"] + sum(
            wanted[op] for op in ("fdiv", "sqrt", "fadd", "fsub", "fmul")
        )


# Steps each Variant of the cover in each dtype and prints the bytes of the model, a line a step; run by the test below.
STEPS = """
import cupy, ml_dtypes, numpy as np
from rmsprop_gpu.traffic import bytes_per_element
from variants import cover, optimizer, Variant
SIZE = 1 << 18
for variant in dict.fromkeys([Variant(), *cover(2)]):
    for dtype in (np.float32, np.float64, np.float16, ml_dtypes.bfloat16):
        opt = optimizer(variant, cupy.zeros(SIZE, dtype))
        opt.step(cupy.asarray(np.ones(SIZE, dtype)))
        cupy.cuda.Device().synchronize()
        print(len(opt.kernels()), SIZE * bytes_per_element(variant, np.dtype(dtype)))
"""


@pytest.mark.gpu
def test_the_model_is_what_the_device_counts(tmp_path, request):
    """Beside the streams a launch reads 24 bytes a chunk of 8,192 elements and, once a tensor, a row of 64, numbers of
    at most 72, an address and four counters: below a thousandth of 2^18 elements of at least 14 bytes."""
    if request.config.getoption("--no-pool"):
        pytest.skip("it runs a process of its own, in which the pool stays on")
    statistics = tmp_path / "launches.jsonl"
    here = os.path.dirname(__file__)
    environment = {**os.environ, "VGPU_STATS": str(statistics), "PYTHONPATH": os.pathsep.join([here, *sys.path])}
    done = subprocess.run([sys.executable, "-c", STEPS], env=environment, capture_output=True, text=True, check=True)
    if not statistics.exists():
        pytest.skip("this device writes no count of its launches to the file that VGPU_STATS names")
    launches = [json.loads(line) for line in statistics.read_text().splitlines()]
    ours = [x for x in launches if "_kernel" in x["kernel"]]
    for line in done.stdout.splitlines():
        count, model = map(int, line.split())
        step, ours = ours[:count], ours[count:]
        counted = sum(x["dram_read_bytes"] + x["dram_write_bytes"] for x in step)
        assert model <= counted <= 1.001 * model
    assert not ours
