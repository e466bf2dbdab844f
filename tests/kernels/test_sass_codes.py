"""The machine code of the CUDA kernels of fewer bytes, for all architectures, without a GPU."""

import inspect
import itertools
import re

import ml_dtypes
import numpy as np
import pytest
from machine_code_bounds import flaws, problems
from ptx_chain import chain
from variants import name

from rmsprop_gpu.kernels import cuda_fit
from rmsprop_gpu.kernels.rule import Variant
from rmsprop_gpu.profiling.machine_code import read, why_not

if why_not() is None:
    from rmsprop_gpu.kernels import cuda_coded, cuda_prepare

pytestmark = [pytest.mark.sass, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]

F4, BF = np.float32, ml_dtypes.bfloat16
DTYPES = {"float32": F4, "bfloat16": BF}
FORMATS = [
    (Variant(**dict.fromkeys([*moment, *store], True)), dtype)
    for moment, store, dtype in itertools.product(
        [(), ("uint16",), ("uint8",)], [(), ("remainder",), ("stochastic_round",)], DTYPES.values()
    )
    if (moment or store) and (dtype is BF or not store)
]
BUFFERS = {"momentum": True, "nesterov": True, "ema": True, "zero_grads": True}
SWITCHES = {
    "plain": {},
    "buffers": BUFFERS,
    "everything": {
        **BUFFERS,
        "scale": True,
        "told": True,
        "clipvalue": True,
        "weight_decay": True,
        "bias_correction": True,
    },
}


def kinds(dtype, switches):
    """The Variants with these switches, as a kernel is compiled for them."""
    return [v._replace(**SWITCHES[switches]).of_update for v, d in FORMATS if d is dtype]


# Each kernel takes seconds: the oldest architecture, the H200's and the newest; other switches only where registers or
# instructions are most.
PLACES = [("plain", (7, 5)), ("plain", (9, 0)), ("plain", (12, 0))]
PLACES += [("buffers", (7, 5)), ("buffers", (12, 0)), ("everything", (10, 0))]


@pytest.mark.parametrize(("switches", "cc"), PLACES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_update_kernels_of_codes_are_without_flaws(dtype, switches, cc):
    """The first element waits for its chunk and the addresses in its row, but not for the prepare kernel."""
    variants = kinds(dtype, switches)
    facts = read([cuda_coded.make_update_kernel(variant, dtype) for variant in variants], cc)
    found = {name(v): problems(f, v, dtype) for v, f in zip(variants, facts, strict=True)}
    assert not {variant: found for variant, found in found.items() if found}
    if cuda_fit.nvjitlink() is not None and switches != "everything":
        assert max(chain(f.ptx) for f in facts) <= 4
    for variant, f in zip(variants, facts, strict=True):
        assert f.ptx.count("redux.sync.max") == (2 if variant.uint8 and cc >= (8, 0) else 0)  # in either loop
        assert ("shfl.sync" in f.ptx) == (variant.uint8 and cc < (8, 0))
    if cuda_fit.nvjitlink() is not None and (switches, cc) == ("plain", (9, 0)):
        for variant, f in zip(variants, facts, strict=True):
            leaves_a_multiprocessor_full_and_loads_before_it_branches(f, variant)


def leaves_a_multiprocessor_full_and_loads_before_it_branches(facts, variant):
    """At 32 registers per thread, a multiprocessor runs its full 2,048 threads. Unlimited, 8-bit codes would use 40.

    No branch comes before the loads that find an element, not even the branch for a skipped step.
    """
    assert facts.registers <= 32, name(variant)
    before = re.split(r"\bbra\b|\bret\b|\bexit\b", facts.ptx, maxsplit=1)[0]
    assert len(re.findall(r"ld\.global\.", before)) >= 3 + 3 + 4, name(variant)


@pytest.mark.parametrize("cc", [(7, 5), (9, 0), (12, 0)], ids=str)
def test_the_prepare_kernel_of_keys_is_without_flaws(cc):
    kernels = [cuda_prepare.make_prepare_kernel(Variant(uint16=True).of_prepare, dtype) for dtype in DTYPES.values()]
    for facts in read(kernels, cc):
        assert not list(flaws(facts, np.float64))  # gate and counters are float64
        assert facts.registers <= 64


PLANTED = {
    "codes that are loaded one by one": (
        "quarters(_load_word(square_avg + i, _zero))",
        "_load8(square_avg, i), _load8(square_avg, i + 1), _load8(square_avg, i + 2), _load8(square_avg, i + 3)",
        "the vector loop has",
    ),
    "a zero of float64": (" = T(0), np.int32(0), ", " = 0.0, np.int32(0), ", "float64 instructions in the PTX"),
    "a call": ("if skipped else n\n", "if skipped else n\n        print(n)\n", "calls in the PTX"),
}


@pytest.mark.parametrize(("old", "new", "found"), PLANTED.values(), ids=PLANTED)
def test_a_flaw_of_the_loop_is_found(old, new, found):
    source, scope, variant = inspect.getsource(cuda_coded), dict(vars(cuda_coded)), Variant(uint8=True).of_update
    assert source.count(old) == 1
    exec(source.replace(old, new), scope)
    (facts,) = read([scope["make_update_kernel"](variant, F4)], (9, 0))
    assert found in "; ".join(problems(facts, variant, F4))


def test_spills_are_found():
    variant = Variant(uint8=True).of_update
    (facts,) = read([cuda_coded.make_update_kernel(variant, F4)], (9, 0), "-maxrregcount=24")
    found = "; ".join(flaws(facts, F4))
    assert all(what in found for what in ("bytes of spills", "bytes of stack", "accesses to local memory"))
