"""The machine code of the CUDA kernels for all architectures, without a GPU."""

import inspect
import re

import ml_dtypes
import numpy as np
import pytest
from machine_code_bounds import CAPABILITIES, flaws, problems
from ptx_chain import chain
from variants import cover, name

from rmsprop_gpu.kernels import cuda_fit, intrinsics, rule
from rmsprop_gpu.kernels.rule import Variant
from rmsprop_gpu.profiling.machine_code import read, why_not

if why_not() is None:
    from rmsprop_gpu.kernels import cuda, cuda_copies
    from rmsprop_gpu.kernels.cuda_prepare import grids

pytestmark = [pytest.mark.sass, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]

DTYPES = {np.dtype(dtype).name: dtype for dtype in (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)}
PLAIN, BOTH = Variant(), Variant(centered=True, momentum=True)
VARIANTS = list(dict.fromkeys([PLAIN, *cover(2)]))
TOLD = Variant(scale=True, told=True, zero_grads=True)
FEW = [PLAIN, BOTH, TOLD, max(VARIANTS, key=sum)]  # enough for most architectures: a kernel takes half a second
OF = {cc: [*VARIANTS, TOLD] if cc in {(7, 5), (9, 0)} else FEW for cc in CAPABILITIES}


@pytest.mark.parametrize("cc", CAPABILITIES, ids=lambda cc: f"{cc[0]}.{cc[1]}")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_update_kernels_are_without_flaws(dtype, cc):
    facts = read([cuda.make_update_kernel(variant, dtype) for variant in OF[cc]], cc)
    found = {name(v): problems(f, v, dtype) for v, f in zip(OF[cc], facts, strict=True)}
    assert not {variant: flaws for variant, flaws in found.items() if flaws}


@pytest.mark.parametrize("cc", CAPABILITIES, ids=lambda cc: f"{cc[0]}.{cc[1]}")
@pytest.mark.parametrize("half", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
def test_update_kernels_of_half_gradients_are_without_flaws(half, cc):
    facts = read([cuda.make_update_kernel(variant, np.float32, half) for variant in OF[cc]], cc)
    found = {name(v): problems(f, v, np.float32, half) for v, f in zip(OF[cc], facts, strict=True)}
    assert not {variant: flaws for variant, flaws in found.items() if flaws}


@pytest.mark.parametrize("cc", CAPABILITIES, ids=lambda cc: f"{cc[0]}.{cc[1]}")
def test_prepare_kernels_are_without_flaws(cc):
    facts = read([cuda.make_prepare_kernel(Variant(bias_correction=True), dtype) for dtype in DTYPES.values()], cc)
    assert not [list(flaws(f, dtype)) for dtype, f in zip(DTYPES.values(), facts, strict=True) if any(flaws(f, dtype))]


@pytest.mark.parametrize("cc", CAPABILITIES, ids=lambda cc: f"{cc[0]}.{cc[1]}")
def test_kernels_of_norms_are_without_flaws(cc):
    """Except for float64, they are like the others. A block of 1,024 threads has 64 registers per thread."""
    variant = Variant(scale=True, norm=True, finite=True, told=True, ema=True)
    makers = (cuda.make_partials_kernel, cuda.make_prepare_kernel)
    facts = read([make(variant, dtype) for make in makers for dtype in DTYPES.values()], cc)
    assert not [list(flaws(f, np.float64)) for f in facts if any(flaws(f, np.float64))]
    assert max(f.registers for f in facts) <= 64


@pytest.mark.parametrize("cc", CAPABILITIES, ids=lambda cc: f"{cc[0]}.{cc[1]}")
@pytest.mark.parametrize("kind", ["pack", "pack and zero", "unpack"])
def test_copies_are_by_128_bits_and_without_flaws(kind, cc):
    """At 32 registers per thread, a multiprocessor runs its full 2,048 threads."""
    for facts in read([cuda_copies.make_copies_kernel(word, kind) for word in (np.int16, np.int32, np.int64)], cc):
        assert not list(flaws(facts, np.float32))
        assert facts.accesses == {"LDG.E.128": 1, "STG.E.128": 2 if "zero" in kind else 1}
        assert facts.registers <= 32


linked = pytest.mark.skipif(cuda_fit.nvjitlink() is None, reason="needs nvJitLink, which links for real GPUs")


@linked
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_the_first_element_waits_for_few_loads(dtype):
    """Its chunk, then the addresses in its row. A tensor's first element adds its count's address and value."""
    kernels = [cuda.make_update_kernel(variant, dtype) for variant in OF[9, 0]]
    chains = {name(v): chain(facts.ptx) for v, facts in zip(OF[9, 0], read(kernels, (9, 0)), strict=True)}
    assert max(chains.values()) <= 4, chains


@linked
def test_plain_float32_leaves_a_multiprocessor_full():
    """At 32 registers per thread, it runs its full 2,048 threads."""
    (facts,) = read([cuda.make_update_kernel(PLAIN, np.float32)], (9, 0))
    assert facts.registers <= 32


@linked
def test_a_longer_chain_is_found(monkeypatch):
    """As it was when the step was counted before the addresses were read."""
    count = (
        "        if not prepared and has_grad and start == 0 and target.threadIdx.x == 0:\n            advance(row, s)"
    )
    text = inspect.getsource(cuda)
    assert text.count(count) == 1
    first = "        row = table + index * 8 * COLUMNS\n"
    assert text.count(first) == 1
    early = (
        "        if _load_int(grads, index) != 0 and start == 0:\n            advance(row, scalars_of(scalars, row))\n"
    )
    scope = dict(vars(cuda))
    exec(text.replace(count, "        if False:\n            pass").replace(first, first + early), scope)
    (facts,) = read([scope["make_update_kernel"](PLAIN, np.float32)], (9, 0))
    assert chain(facts.ptx) > 4


@pytest.mark.parametrize("measures", [False, True])
def test_a_block_has_registers_for_all_its_threads(measures):
    """A launch that needs more than 65,536 registers fails, whatever they are used for."""
    variant = Variant(scale=True, norm=measures, finite=measures, told=True, ema=True)
    kernels = [cuda.make_prepare_kernel(variant, dtype) for dtype in DTYPES.values()]
    threads = {kernel.launch_bounds for kernel in kernels}
    assert threads == {grids(variant, 1, 1)["prepare_kernel"][1]} == {1024 if measures else 256}
    for cc in CAPABILITIES:
        for facts in read(kernels, cc):
            assert re.search(rf"^\.maxntid {max(threads)}\b", facts.ptx, re.MULTILINE)
            assert facts.registers * max(threads) <= 65_536


def planted(module, old, new):
    """A module's names, after a replacement in its source."""
    source = inspect.getsource(module)
    assert old in source
    scope = dict(vars(module))
    exec(source.replace(old, new), scope)
    return scope


def problems_of(variant, dtype, *options, cc=(9, 0)):
    (facts,) = read([cuda.make_update_kernel(variant, dtype)], cc, *options)
    return "; ".join(problems(facts, variant, dtype))


PLANTED = {
    "a zero of float64": ("zero = T(0)", "zero = 0.0", "float64 instructions;"),
    "a one of float64": ("s.one_minus_alpha * g) * g", "(1.0 - s.alpha) * g) * g", "float64 instructions in the PTX"),
    "a contraction": ("r = r + s.eps", "r = s.lr * r + s.eps", "26 fma in the PTX; wanted 21"),
    "an fma less": ("fma(-s.lr, step, p)", "p - step", "16 fma in the PTX; wanted 21"),
    "three divisions": ("u = g / r", "u = g / r / r / r", "instructions per element; wanted at most 64"),
    "a call": ("g = grad\n", "print(1)\n        g = grad\n", "calls in the PTX"),
}


@pytest.mark.parametrize(("old", "new", "found"), PLANTED.values(), ids=PLANTED)
def test_a_flaw_of_the_rule_is_found(old, new, found, monkeypatch):
    monkeypatch.setattr(cuda, "make_rule", planted(rule, old, new)["make_rule"])
    assert found in problems_of(Variant(centered=True), np.float32)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("old", ["*args), align=align", "width * dtype.itemsize"], ids=["loads", "both"])
def test_narrower_accesses_are_found(old, dtype, monkeypatch):
    monkeypatch.setattr(cuda, "memory", planted(intrinsics, old, f"{old} // 2")["memory"])
    assert "the vector loop has" in problems_of(BOTH, dtype)


@pytest.mark.parametrize(
    "found", ["the vector loop has {}", "registers; wanted at most 40", "fma in the PTX; wanted 11"]
)
def test_a_loop_that_the_compiler_unrolls_is_found(found, monkeypatch):
    old = "opaque(Index(i + THREADS * width))"
    monkeypatch.setattr(cuda, "make_update_kernel", planted(cuda, old, old[7:-1])["make_update_kernel"])
    assert found in problems_of(PLAIN, np.float32, cc=(7, 5))


def test_spills_are_found():
    found = problems_of(BOTH, np.float32, "-maxrregcount=24")
    assert all(what in found for what in ("bytes of spills", "bytes of stack", "accesses to local memory"))
