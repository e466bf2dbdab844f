"""A CUDA device is bit-identical to the CPU: for a cover of all Variants and every dtype, however the work is divided.

What the CPU computes is judged elsewhere (test_rule.py, test_halves.py). Here the two are only compared.
"""

import inspect
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
from devices import clear
from variants import arguments, cover, name, optimizer, random_problem, sprinkle

from rmsprop_gpu import RMSProp, rmsprop_update
from rmsprop_gpu.kernels import rule
from rmsprop_gpu.kernels.rule import Variant, make_rule

pytestmark = pytest.mark.gpu

DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]
VARIANTS = list(dict.fromkeys([Variant(), *cover(2)]))
# all switches that a single array can have
FULL = Variant(scale=True, weight_decay=True, centered=True, momentum=True, nesterov=True)
CORRECTED = Variant(bias_correction=True, centered=True, momentum=True, clipvalue=True, ema=True)
ADAGRAD = next(v for v in VARIANTS if v.adagrad)
# The division is the same for all Variants: one per dtype is enough, with and without a kernel before the update.
CASES = list(zip([Variant(), CORRECTED, FULL, ADAGRAD], DTYPES, strict=True))


def kind(x):
    return name(x) if isinstance(x, Variant) else np.dtype(x).name


@pytest.fixture
def cuda():
    from rmsprop_gpu.kernels import cuda  # imports Numba's CUDA target, which need not be installed

    return cuda


# Problems


def problem(variant, sizes, dtype, rng):
    """An optimizer over NumPy arrays with previous state, and gradients for three steps. All contain special values."""
    with np.errstate(over="ignore"):  # a square in float16
        opt, params, grads = random_problem(variant, sizes, dtype, rng)
    steps = [grads, *([g[rng.permutation(g.size)] for g in grads] for _ in range(2))]
    for x in [*params, *(g for grads in steps for g in grads)]:
        sprinkle(x, rng)
    for i in range(len(sizes)):
        for x in opt.state[i].values():
            if x.ndim:
                sprinkle(x, rng)
        opt.state[i]["step"][()] = 2**40 + i  # shows a counter that loses its upper half
    return opt, steps


def around(*sizes):
    return [n + d for n in sizes for d in (-1, 0, 1)]


# A division is a list of pieces (array, start, stop). On the device, each piece is a parameter of its own.


def undivided(arrays):
    return [(i, 0, a.size) for i, a in enumerate(arrays)]


def divided(arrays, rng):
    """Cut at random places, mostly aligned to single elements only. Some pieces are empty."""
    pieces = []
    for i, a in enumerate(arrays):
        ends = [0, *sorted(rng.integers(0, a.size + 1, rng.integers(0, 4)).tolist()), a.size]
        pieces += [(i, start, stop) for start, stop in pairwise(ends)]
    return pieces


def to_device(arrays, pieces):
    """Views of copies of these arrays on the device."""
    import cupy

    copies = [cupy.array(a) for a in arrays]
    return [copies[i][start:stop] for i, start, stop in pieces]


def on_device(variant, opt, pieces):
    """An optimizer over copies of this one's parameters on the device, with copies of its state."""
    import cupy

    twin = optimizer(variant, to_device(opt.param_groups[0]["params"], pieces))
    for j, (i, start, stop) in enumerate(pieces):
        for key, x in twin.state[j].items():
            want = opt.state[i][key]
            x[...] = cupy.asarray(want[start:stop] if want.ndim else want)
    return twin


def assert_same_bits(got, want, what):
    """Bit-identical, except that any NaN equals any NaN."""
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    unsigned = f"u{got.itemsize}"
    bits, wanted = (np.atleast_1d(x).view(unsigned) for x in (got, want))
    wrong = ((bits != wanted) & ~np.atleast_1d(np.isnan(got) & np.isnan(want))).nonzero()[0]
    if wrong.size:
        k = wrong[0]
        pair = f"{np.atleast_1d(got)[k]} ({bits[k]:#x}) for {np.atleast_1d(want)[k]} ({wanted[k]:#x})"
        pytest.fail(f"{what}: {wrong.size} of {got.size} differ, the first is element {k}, {pair}")


def params_of(opt):
    return [p for group in opt.param_groups for p in group["params"]]


def assert_same(twin, opt, pieces):
    """Parameters and all state are bit-identical."""
    params, device_params = params_of(opt), params_of(twin)
    for j, (i, start, stop) in enumerate(pieces):
        assert_same_bits(device_params[j].get(), params[i][start:stop], f"parameter {i} from {start}")
        state, device_state = opt.state[i], twin.state[j]
        assert state.keys() == device_state.keys()
        for key, x in state.items():
            got = device_state[key].get()
            assert_same_bits(got, x[start:stop] if x.ndim else x, f"{key} of parameter {i} from {start}")


def assert_same_steps(opt, twins, steps):
    """Take these steps on the CPU, and on the device with each division. Compare after each step."""
    for grads in steps:
        opt.step(grads)
        for twin, pieces in twins:
            twin.step(to_device(grads, pieces))
            assert_same(twin, opt, pieces)


@pytest.mark.parametrize("dtype", DTYPES, ids=kind)
@pytest.mark.parametrize("variant", VARIANTS, ids=kind)
def test_same_bits_in_whole_arrays_and_in_pieces(variant, dtype, cuda):
    rng = np.random.default_rng([VARIANTS.index(variant), DTYPES.index(dtype)])
    width = cuda.VECTOR // np.dtype(dtype).itemsize
    sizes = [0, 1, *around(width, cuda.THREADS * width, 8192), 3 * 8192]
    sizes += rng.integers(2, 3 * 8192, 2).tolist()
    opt, steps = problem(variant, sizes, dtype, rng)
    params = params_of(opt)
    twins = [(on_device(variant, opt, pieces), pieces) for pieces in (undivided(params), divided(params, rng))]
    assert_same_steps(opt, twins, steps)


def test_dtypes_and_groups_in_one_optimizer(rng):
    """Batches of several dtypes and Variants, different scalars within a batch, and missing gradients."""
    import cupy

    own = [{}, {"lr": 0.5, "alpha": 0.3, "eps": 0.1}, arguments(CORRECTED)]
    dtypes = [DTYPES, DTYPES[::-1], [np.float16]]

    def arrays():
        made = [[rng.standard_normal(n).astype(T) for T in some for n in (700, 0, 9000)] for some in dtypes]
        for x in (x for group in made for x in group):
            sprinkle(x, rng)
        return made

    def copied(groups):
        return [[None if x is None else cupy.asarray(x) for x in group] for group in groups]

    params = arrays()
    opt, twin = (
        RMSProp([{"params": group, **h} for group, h in zip(groups, own, strict=True)], lr=0.013, alpha=0.93)
        for groups in (params, copied(params))
    )
    for step in range(3):
        grads = arrays()
        grads[step][2] = None
        opt.step(grads)
        twin.step(copied(grads))
        assert_same(twin, opt, undivided(params_of(opt)))
    assert [int(opt.state[i]["step"]) for i in (0, 2, 14, 26)] == [3, 2, 2, 2]


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000, 10**9])
@pytest.mark.parametrize(("variant", "dtype"), CASES, ids=kind)
def test_any_chunk_length(variant, dtype, chunk, cuda, monkeypatch, rng):
    opt, steps = problem(variant, [5, 0, 1, 255, min(300 * chunk + 1, 8192 + 5)], dtype, rng)
    monkeypatch.setattr(cuda, "chunk_of", lambda dtype: chunk)
    pieces = undivided(params_of(opt))
    assert_same_steps(opt, [(on_device(variant, opt, pieces), pieces)], steps)


def test_more_arrays_than_a_block_has_threads(cuda, rng):
    """Work done once per array and step uses one thread per array."""
    opt, steps = problem(CORRECTED, [1 + i % 3 for i in range(2 * cuda.THREADS + 7)], np.float64, rng)
    pieces = undivided(params_of(opt))
    assert_same_steps(opt, [(on_device(CORRECTED, opt, pieces), pieces)], steps[:1])


NAMES = ["param", "grad", "square_avg", "grad_avg", "momentum_buffer"]


@pytest.mark.parametrize("dtype", DTYPES, ids=kind)
def test_any_array_may_be_misaligned(dtype, cuda, rng):
    """A vectorised kernel needs five aligned arrays: any one that is misaligned must rule it out."""
    import cupy

    opt, (grads, *_) = problem(FULL, [6145], dtype, rng)
    given = {k: v for k, v in arguments(FULL).items() if k != "bias_correction"}
    start = {"param": params_of(opt)[0], "grad": grads[0], **opt.state[0]}
    want = {}  # results when all are aligned, which comes first
    for misaligned in [(), *((key,) for key in NAMES), tuple(NAMES)]:
        for by_half in (False, True):
            got = {}
            for key in NAMES:
                x = start[key]
                offset = cuda.VECTOR // 2 // x.itemsize if by_half else 1
                memory = cupy.empty(x.size + offset, x.dtype)
                got[key] = memory[offset:] if key in misaligned else memory[: x.size]
                got[key].set(x)
                assert (got[key].data.ptr % cuda.VECTOR != 0) == (key in misaligned)
            rmsprop_update(**got, **given)
            want = want or {key: x.get() for key, x in got.items()}
            for key in NAMES:
                assert_same_bits(got[key].get(), want[key], f"{key}, with {misaligned} off by {offset} elements")


# These tests can fail


def assert_found(variant, rng):
    opt, steps = problem(variant, [40, 9000], np.float32, rng)
    pieces = undivided(params_of(opt))
    with pytest.raises(pytest.fail.Exception, match="differ"):
        assert_same_steps(opt, [(on_device(variant, opt, pieces), pieces)], steps[:1])


def test_a_chunk_left_out_is_found(cuda, monkeypatch, rng):
    whole = cuda.chunk_list
    monkeypatch.setattr(cuda, "chunk_list", lambda sizes, chunk: np.delete(whole(sizes, chunk), 2, axis=0))
    assert_found(Variant(), rng)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(s.one_minus_alpha * g) * g", "s.one_minus_alpha * (g * g)"),
        ("fma(-s.lr, step, p)", "fma(-s.lr * g, one / r, p)"),
    ],
)
def test_another_rounding_is_found(old, new, cuda, monkeypatch, rng):
    source = inspect.getsource(make_rule)
    assert source.count(old) == 1
    scope = dict(vars(rule))
    exec(source.replace(old, new).replace("zero = T(0)", "zero, one = T(0), T(1)"), scope)
    monkeypatch.setattr(cuda, "make_rule", scope["make_rule"])
    clear(cuda, monkeypatch)
    assert_found(Variant(), rng)


def test_fast_math_is_found(cuda, monkeypatch, rng):
    """Fast math flushes subnormal numbers to 0, and approximates divisions and roots."""
    from rmsprop_gpu.kernels import cuda_code

    monkeypatch.setattr(cuda_code, "jitted", lambda make, *key: cuda.target.jit(make(*key), fastmath=True))
    clear(cuda, monkeypatch)
    assert_found(Variant(), rng)


@pytest.mark.parametrize("dtype", DTYPES, ids=kind)
def test_one_bit_is_found(dtype):
    x = np.array([1, 0, np.nan, np.inf], dtype)
    negative_nan = np.array([1, 0, -np.float64("nan"), np.inf], dtype)
    assert_same_bits(negative_nan, x, "NaNs")
    assert negative_nan.tobytes() != x.tobytes()
    for k in range(4):
        other = x.copy()
        other.view(f"u{x.itemsize}")[k] ^= 1 if k == 0 else 1 << (8 * x.itemsize - 1 - (k == 2))
        with pytest.raises(pytest.fail.Exception, match=f"1 of 4 differ, the first is element {k}"):
            assert_same_bits(other, x, "x")
