"""The bytes and operations of a step in the model, compared with other counts."""

import numpy as np
import pytest
from machine_code_bounds import wanted_instructions
from processes import counted
from variants import EVERY

from rmsprop_gpu.kernels.rule import Variant
from rmsprop_gpu.profiling.traffic import bytes_per_element, flops_per_element

ADDED = {"ema": 8, "zero_grads": 4, "norm": 4, "finite": 4, "told": 0, "scale": 0, "clipvalue": 0, "bias_correction": 0}


@pytest.mark.parametrize("switch", ADDED)
def test_bytes_that_a_feature_adds_to_an_element_are_those_of_the_docstrings(switch):
    """For float32. Half gradients have 2 bytes, and a half's average has 8. A norm and a check share one pass."""
    single, half = np.dtype(np.float32), np.dtype(np.float16)
    assert bytes_per_element(Variant(), single) == 20
    assert bytes_per_element(Variant(**{switch: True}), single) == 20 + ADDED[switch]
    assert bytes_per_element(Variant(**{switch: True}), half) == 14 + (8 if switch == "ema" else ADDED[switch] // 2)
    assert bytes_per_element(Variant(norm=True, finite=True), single) == 24
    own = 8 if switch == "ema" else ADDED[switch] // 2
    assert bytes_per_element(Variant(**{switch: True}), single, half) == 18 + own


def test_flops_are_the_instructions_counted_by_hand():
    for variant in EVERY:
        wanted = wanted_instructions(variant)
        assert flops_per_element(variant) == 2 * wanted["fma"] + sum(
            wanted[op] for op in ("fdiv", "sqrt", "fadd", "fsub", "fmul")
        )


# Steps each Variant of the cover in each dtype and prints the model's bytes, one line per step. For the test below.
STEPS = """
import cupy, ml_dtypes, numpy as np
from rmsprop_gpu.profiling.traffic import bytes_per_element
from variants import cover, optimizer, Variant
from rmsprop_gpu.kernels.cuda import chunk_of
SIZE = 1 << 18
def step(variant, dtype, grad_dtype=None, **told):
    opt = optimizer(variant, cupy.zeros(SIZE, dtype))
    opt.step(cupy.asarray(np.ones(SIZE, grad_dtype or dtype)), **told)
    cupy.cuda.Device().synchronize()
    variant = variant._replace(told="found_inf" in told, zero_grads=bool(told))
    dtype, grad_dtype = np.dtype(dtype), np.dtype(grad_dtype or dtype)
    print(len(opt.kernels()), SIZE * bytes_per_element(variant, dtype, grad_dtype), SIZE // chunk_of(dtype))

DTYPES = (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)
for variant in dict.fromkeys([Variant(), *cover(2)]):
    for dtype in DTYPES:
        step(variant, dtype)
for dtype in DTYPES:
    step(Variant(), dtype, zero_grads=True)
    step(Variant(ema=True), dtype, zero_grads=True, found_inf=False)
for half in DTYPES[2:]:
    step(Variant(), np.float32, half, zero_grads=True)
    step(Variant(norm=True, scale=True, momentum=True, centered=True), np.float32, half)
"""


@pytest.mark.gpu
def test_the_model_is_what_the_device_counts(tmp_path, request):
    """In addition to the streams, a launch reads 24 bytes per chunk and, once per tensor, a row of 64 bytes, at most 72
    bytes of numbers, an address and four counters: less than a thousandth of 2^18 elements of at least 14 bytes.
    """
    lines, ours = counted(STEPS, tmp_path, request)
    for line in lines:
        count, model, chunks = map(int, line.split())
        step, ours = ours[:count], ours[count:]
        moved = sum(x["dram_read_bytes"] + x["dram_write_bytes"] for x in step)
        assert model <= moved <= 1.001 * model + 24 * chunks
    assert not ours


# Takes a step that clips and checks, in each dtype, and prints the bytes of the gradient, one line per step.
LOOKS = """
import cupy, ml_dtypes, numpy as np
from rmsprop_gpu import RMSProp
SIZE = 1 << 16
for dtype in (np.float32, np.float64, np.float16, ml_dtypes.bfloat16):
    opt = RMSProp(cupy.zeros(SIZE, dtype), global_clipnorm=1.0, skip_nonfinite=True)
    opt.step(cupy.asarray(np.ones(SIZE, dtype)))
    cupy.cuda.Device().synchronize()
    print(SIZE * np.dtype(dtype).itemsize)
"""


@pytest.mark.gpu
def test_a_gradient_is_loaded_once_for_its_norm_and_its_check(tmp_path, request):
    """A cache could hide a second load. Each thread also reads its chunk of three numbers, and five addresses."""
    lines, ours = counted(LOOKS, tmp_path, request)
    looks = [x for x in ours if "partials_kernel" in x["kernel"]]
    assert len(looks) == len(lines) == 4
    for line, look in zip(lines, looks, strict=True):
        assert int(line) <= look["load_bytes"] <= int(line) + 64 * (1 << 16) // 4096 * 32


# Bytes per element of a plain step, by the parameters' dtype and storage, and their second moment.
TABLE = {
    ("float32", ""): {"float32": 20, "uint16": 16, "uint8": 14.03},
    ("bfloat16", ""): {"float32": 14, "uint16": 10, "uint8": 8.03},
    ("bfloat16", "bf16_stochastic_round"): {"float32": 14, "uint16": 10, "uint8": 8.03},
    ("bfloat16", "store_param_remainders"): {"float32": 18, "uint16": 14, "uint8": 12.03},
}


def test_bytes_of_codes_and_remainders_are_those_of_the_table():
    switches = {
        "": {},
        "bf16_stochastic_round": {"stochastic_round": True},
        "store_param_remainders": {"remainder": True},
    }
    for (name, stored), columns in TABLE.items():
        for moment, wanted in columns.items():
            variant = Variant(uint16=moment == "uint16", uint8=moment == "uint8", **switches[stored])
            assert bytes_per_element(variant, np.dtype(name)) == pytest.approx(wanted, abs=2e-3)


# Steps each format of the table twice, and prints the bytes that the second step should move, one line per step.
STORED = """
import cupy, ml_dtypes, numpy as np
from rmsprop_gpu import RMSProp
from rmsprop_gpu.kernels.cuda import chunk_of
SIZE = 1 << 18
for (name, stored), columns in TABLE.items():
    for moment, wanted in columns.items():
        options = {stored: True} if stored else {}
        opt = RMSProp(cupy.ones(SIZE, np.dtype(name)), square_avg_dtype=moment, **options)
        grad = cupy.asarray(np.random.default_rng(0).standard_normal(SIZE).astype(np.dtype(name)))
        for _ in range(2):
            opt.step(grad)
            cupy.cuda.Device().synchronize()
        print(len(opt.kernels()), SIZE * wanted, SIZE // chunk_of(np.dtype(name)))
"""


@pytest.mark.gpu
def test_codes_and_remainders_move_as_few_bytes_as_the_table_says(tmp_path, request):
    """In addition, each chunk has 24 bytes. 128 codes share a base of two bytes, hence the 0.03."""
    lines, ours = counted(f"TABLE = {TABLE}\n{STORED}", tmp_path, request)
    assert len(lines) == 12
    for line in lines:
        count, wanted, chunks = int(line.split()[0]), float(line.split()[1]), int(line.split()[2])
        step, ours = ours[count : 2 * count], ours[2 * count :]
        moved = sum(x["dram_read_bytes"] + x["dram_write_bytes"] for x in step) - 24 * chunks
        assert moved == pytest.approx(wanted, rel=0.01)
    assert not ours
