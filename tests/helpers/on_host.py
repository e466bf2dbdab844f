"""Arrays and optimizers on the host: random ones, bitwise comparisons, and refusals that change nothing."""

from contextlib import contextmanager

import numpy as np
import pytest


def everything(x):
    """Every byte that a refusal must not change: of an array, or of an optimizer with everything it holds."""
    if isinstance(x, np.ndarray):
        return x.tobytes()
    return (
        x.steps,
        [group.hyper() for group in x.param_groups],
        [p.tobytes() for group in x.param_groups for p in group["params"]],
        {key: {name: a.tobytes() for name, a in buffers.items()} for key, buffers in x.state.items()},
    )


@contextmanager
def refused(kind, *texts, of):
    """Expect exactly this error, with these texts in its message, and no changed byte in `of` (arrays, optimizers)."""
    before = [everything(x) for x in of]
    with pytest.raises(kind) as error:
        yield
    assert error.type is kind
    for text in texts:
        assert text in str(error.value)
    assert [everything(x) for x in of] == before


def assert_same_bits(got, want):
    """Bit-identical; a NaN equals a NaN, whatever its payload."""
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    assert np.array_equal(np.isnan(got), np.isnan(want))
    at = ~np.isnan(got)
    assert got[at].tobytes() == want[at].tobytes()


def assert_same(opt, twin):
    """Two optimizers over equal parameters are bit-identical."""
    for got, want in zip(opt.param_groups, twin.param_groups, strict=True):
        for p, q in zip(got["params"], want["params"], strict=True):
            assert_same_bits(p, q)
    for got, want in zip(opt.state.values(), twin.state.values(), strict=True):
        assert got.keys() == want.keys()
        for name in got:
            assert_same_bits(got[name], want[name])


def random(seed, *sizes, dtype=np.float32):
    """Arrays over four decades; the same seed gives the same arrays."""
    rng = np.random.default_rng(seed)
    return [(rng.standard_normal(n) * 10.0 ** rng.uniform(-3, 1, n)).astype(dtype) for n in sizes]


def one(seed, dtype=np.float32, size=33):
    return random(seed, size, dtype=dtype)[0]
