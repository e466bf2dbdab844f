"""Bounds for the machine code of a kernel."""

from collections import Counter

import numpy as np

from rmsprop_gpu.arrays.dtypes import compute_dtype
from rmsprop_gpu.kernels.rule import Variant

# For Turing (T4), Ampere (A100, RTX 30), Hopper, and Blackwell (B200, RTX 50).
CAPABILITIES = [(7, 5), (8, 0), (8, 6), (9, 0), (10, 0), (12, 0)]


def lanes(dtype):
    """Elements per thread at a time: 128 bits of state."""
    return 16 // compute_dtype(np.dtype(dtype)).itemsize


def instructions_per_element(facts, dtype):
    return sum(facts.loop.values()) / lanes(dtype)


def bounds(variant, dtype, grad_dtype=None):
    """The most registers, and the most instructions per element in the vector loop.

    The average adds two operations per element and two accesses per vector. In float64, an IEEE division and root take
    more than the 64 registers and 64 instructions of all others. A fourth stream of state takes an address, two doubles
    and the two numbers of its average: 2 + 4 + 4 registers.
    """
    if variant.coded:
        return bounds_of_codes(variant)
    if np.dtype(dtype) == np.float64:
        return 72 + 10 * (variant.centered and variant.momentum and variant.ema), 96
    is_plain = np.dtype(dtype) == np.dtype(grad_dtype or dtype) == np.float32 and variant == Variant()
    return (40, 42) if is_plain else (64, 64 + 3 * variant.ema)


def bounds_of_codes(variant):
    """Bounds for kernels of fewer bytes.

    Each element adds instructions for its word of dither and the rounding. An 8-bit code adds its share of finding the
    block's largest element, and the two ends of a window. A remainder is joined and split, with two more for NaN.
    """
    # A remainder adds two streams with an address each. With four buffers that is 66, on 12.0.
    registers = 64 + 2 * variant.remainder
    instructions = 64 + 3 * variant.ema + 4 * variant.zero_grads + 16 * variant.uint8 + 6 * variant.remainder
    return registers, instructions + 8 * (variant.uint16 or variant.stochastic_round)


def wanted_accesses(variant, dtype, grad_dtype=None):
    """Loads and stores of the vector loop: each stream once, in 128 bits. Four halves are 64 bits, four codes 64 or 32.

    8-bit codes add their base.
    """
    floats = variant.centered + variant.momentum + variant.ema
    streams = [(_width(dtype), 1, 1), (_width(grad_dtype or dtype), 1, variant.zero_grads), (".128", floats, floats)]
    if variant.uint8:
        streams += [("", 1, 1), (".U16", 1, 1)]
    else:
        streams.append((".64" if variant.uint16 else ".128", 1, 1))
    streams.append((".64", variant.remainder, variant.remainder))
    wanted = Counter()
    for width, loads, stores in streams:
        wanted.update({f"LDG.E{width}": loads, f"STG.E{width}": stores})
    return dict(+wanted)


def _width(dtype):
    return ".64" if np.dtype(dtype).itemsize == 2 else ".128"


def flaws(facts, dtype):
    """Flaws that no kernel of this dtype may have."""
    if np.dtype(dtype) != np.float64:
        yield from _nothing(facts, "float64", "float64 instructions")
        yield from _nothing(facts, "ptx_float64", "float64 instructions in the PTX")
    yield from _nothing(facts, "spill_bytes", "bytes of spills")
    yield from _nothing(facts, "stack_bytes", "bytes of stack")
    yield from _nothing(facts, "local", "accesses to local memory")
    yield from _nothing(facts, "calls", "calls in the PTX")


def _nothing(facts, field, what):
    if getattr(facts, field):
        yield f"{getattr(facts, field)} {what}"


def flaws_of_update(facts, variant, dtype, grad_dtype=None):
    """Flaws of an update kernel."""
    yield from flaws(facts, dtype)
    wanted = wanted_accesses(variant, dtype, grad_dtype)
    if facts.accesses != wanted:
        yield f"the vector loop has {facts.accesses}; wanted {wanted}"
    registers, instructions = bounds(variant, dtype, grad_dtype)
    if facts.registers > registers:
        yield f"{facts.registers} registers; wanted at most {registers}"
    if instructions_per_element(facts, dtype) > instructions:
        yield f"{instructions_per_element(facts, dtype):g} instructions per element; wanted at most {instructions}"


def wanted_instructions(v):
    """The operations of the rule, counted by hand, line by line."""
    return {
        "fdiv": 1,
        "sqrt": 1,
        "fadd": int(v.eps and not (v.eps_in_sqrt and v.bias_correction)),
        "fsub": int(v.lr_in_momentum),
        "fmul": 2 * (not v.adagrad)
        + v.scale * (1 + (v.told or v.norm))
        + (v.bias_correction and not v.eps_in_sqrt)
        + v.lr_in_momentum
        + v.ema,
        "fcmp": 2 * v.clipvalue + v.centered + (not v.eps) + v.ema,
        "fma": 1
        + 2 * v.centered
        + v.weight_decay
        + v.decoupled_weight_decay
        + (v.eps_in_sqrt and v.bias_correction)
        + v.momentum
        + v.nesterov
        + v.ema
        + (not v.lr_in_momentum),
    }


def problems(facts, variant, dtype, grad_dtype=None):
    """The flaws of an update kernel, including an fma that the rule does not have: a contraction."""
    advance = not variant.adagrad and not variant.prepared
    # The kernel contains the rule once per lane of a vector, and once for the ragged end.
    wanted = wanted_instructions(variant)["fma"] * (lanes(dtype) + 1) + advance
    found = list(flaws_of_update(facts, variant, dtype, grad_dtype))
    return found if facts.fma == wanted else [*found, f"{facts.fma} fma in the PTX; wanted {wanted}"]
