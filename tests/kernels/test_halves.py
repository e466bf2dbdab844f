"""float16 and bfloat16: bit-exact conversions, float32 arithmetic and state, and one rounding at the end."""

import math

import ml_dtypes
import numpy as np
import pytest
from numba import cfunc, types
from on_host import assert_same, assert_same_bits, one, refused
from variants import cover, name, optimizer, random_problem

from rmsprop_gpu import AdaGrad, RMSProp, adagrad_update, rmsprop_update
from rmsprop_gpu.kernels.intrinsics import HOST, memory

HALVES = [np.float16, ml_dtypes.bfloat16]
FULL = {"momentum": 0.9, "centered": True, "bias_correction": True, "weight_decay": 0.01}


@pytest.fixture(params=HALVES, ids=lambda dtype: np.dtype(dtype).name)
def half(request):
    return request.param


# Conversions


def copier(source, target, width=1):
    """A function that converts an array to another dtype, `width` elements at a time, as kernels do."""
    load, store = memory(source, HOST, width)[0], memory(target, HOST, width)[1]

    @cfunc(types.void(types.int64, types.int64, types.int64), error_model="numpy")
    def copy(x, y, n):
        for i in range(0, n, width):
            store(y, i, load(x, i))

    def copied(x):
        y = np.empty(x.size, target)
        copy.ctypes(x.ctypes.data, y.ctypes.data, x.size)
        return y

    return copied


def every(half):
    """All 65,536 halves, in the order of their bits."""
    return np.arange(2**16, dtype=np.uint16).view(half)


@pytest.mark.parametrize("width", [1, 4])
def test_every_half_widens_exactly(half, width):
    want = every(half).astype(np.float32)
    assert np.isnan(want).sum() > 100
    assert_same_bits(copier(half, np.float32, width)(every(half)), want)


def around(x):
    """Each number of x and its two neighbours in float32, with both signs."""
    bits = x.view(np.int32)
    magnitudes = np.concatenate([np.maximum(bits - 1, 0), bits, bits + 1])
    return np.concatenate([magnitudes, magnitudes | np.int32(-(2**31))]).view(np.float32)


def borders(half):
    """Every half from 0 to infinity and every midpoint between two. The next power of two stands in for infinity."""
    f = ml_dtypes.finfo(half)
    positive = np.arange(np.array(np.inf, half).view(np.uint16), dtype=np.uint16).view(half).astype(np.float64)
    next_up = np.append(positive[1:], 2.0**f.maxexp)
    with np.errstate(over="ignore"):  # next_up overflows float32 for bfloat16
        return around(np.concatenate([positive, (positive + next_up) / 2, next_up[-1:]]).astype(np.float32))


NANS = np.array([0x7F800001, 0x7F801FFF, 0x7F80FFFF, 0x7FBFFFFF, 0x7FC00000, 0x7FFF7FFF, 0x7FFF8000, 0x7FFFFFFF], "u4")


@pytest.mark.parametrize("width", [1, 4])
def test_a_float32_is_rounded_once_to_the_nearest_half_ties_to_even(half, width, rng):
    random = rng.integers(0, 2**32, 2**20, dtype=np.uint32)
    x = np.concatenate([borders(half), NANS.view(np.float32), (NANS | 2**31).view(np.float32), random.view(np.float32)])
    x = x[: x.size // 4 * 4]
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        want = x.astype(half)
    assert {0, 1, 0x8000, 0x8001} < set(want.view(np.uint16).tolist())
    got = copier(np.float32, half, width)(x)
    assert_same_bits(got, want)
    number = ~np.isnan(x)
    assert np.array_equal(np.signbit(got)[number], np.signbit(x)[number])


def test_the_borders_are_those_of_rounding():
    """The largest float16 is 65504. From halfway to 65536 on, numbers become infinite. Half the least one becomes 0."""
    x = set(borders(np.float16).tolist())
    for k in (65504, 65520, 2.0**-24, 2.0**-25, 2.0**-14, 3 * 2.0**-25):
        for y in (
            np.float32(k),
            np.nextafter(np.float32(k), np.float32(0)),
            np.nextafter(np.float32(k), np.float32(9e9)),
        ):
            assert y in x
            assert -y in x
    assert not any(map(math.isnan, x))


# Arithmetic


def special(rng, *arrays):
    """Scatter special values of each array's dtype over it."""
    for x in arrays:
        f = ml_dtypes.finfo(x.dtype)
        values = np.array([np.nan, np.inf, f.max, f.smallest_normal, f.smallest_subnormal, 0], x.dtype)
        at = rng.random(x.size) < 0.05
        x[at] = np.concatenate([values, -values])[rng.integers(12, size=at.sum())]


@pytest.mark.parametrize("variant", cover(2), ids=name)
def test_update_is_that_of_float32_rounded_once(variant, half, rng):
    with np.errstate(over="ignore"):  # a square in float16
        opt, params, grads = random_problem(variant, [0, 1, 7, 40_001], half, rng)
    given = [] if variant.measures else grads  # one NaN there would poison or skip everything
    special(rng, *params, *given, *(x for i in range(4) for x in opt.state[i].values() if x.ndim))
    wide = [p.astype(np.float32) for p in params]
    twin = optimizer(variant, wide)
    for i in range(4):
        for key, x in opt.state[i].items():
            twin.state[i][key][...] = x
    for _ in range(3):
        opt.step(grads)
        twin.step([g.astype(np.float32) for g in grads])
        for i, (p, w) in enumerate(zip(params, wide, strict=True)):
            with np.errstate(over="ignore", under="ignore"):
                assert_same_bits(p, w.astype(half))
            w[...] = p  # compare single steps: roundings would add up
            assert opt.state[i].keys() == twin.state[i].keys()
            for key, x in opt.state[i].items():
                assert_same_bits(x, twin.state[i][key])
        grads = [g[::-1] for g in grads]
    assert sum(np.isfinite(p.astype(np.float32)).sum() for p in params) > 20_000


def test_numbers_that_a_half_cannot_hold_count(half):
    """Hyperparameters stay float32: in float16, 1e-8 would be 0; in bfloat16, 0.999 would be 1."""
    param, wide, grad = one(1, half), one(1, half).astype(np.float32), np.zeros(33, half)
    given = {"lr": 1e-5, "alpha": 0.9999, "eps": 1e-8}
    opt, twin = RMSProp(param, **given), RMSProp(wide, **given)
    assert opt.param_groups[0].hyper() == twin.param_groups[0].hyper()
    opt.step(grad)
    twin.step(grad.astype(np.float32))
    assert_same_bits(param, wide.astype(half))
    assert_same_bits(param, one(1, half))  # 0 / eps, not 0 / 0
    with pytest.raises(ValueError, match="eps is 1e-50, which is 0 in float32"):
        RMSProp(param, eps=1e-50)


# State


def test_state_is_float32(half):
    for opt, names in ((RMSProp(one(1, half), **FULL), 5), (AdaGrad(one(1, half)), 2)):
        dtypes = {name: x.dtype for name, x in opt.state[0].items()}
        assert len(dtypes) == names
        assert dtypes.pop("step") == np.int64
        assert set(dtypes.values()) == {np.dtype(np.float32)}


def test_state_dict_goes_out_and_comes_in(half):
    opt, twin = RMSProp({"a": one(1, half)}, **FULL), RMSProp({"a": one(1, half)}, **FULL)
    opt.step({"a": one(2, half)})
    saved = opt.state_dict()
    twin.param_groups[0]["params"][0][:] = opt.param_groups[0]["params"][0]
    twin.load_state_dict(saved)
    for o in (opt, twin):
        o.step({"a": one(3, half)})
    assert_same(twin, opt)
    assert saved["state"]["a"]["step"] == 1

    saved["state"]["a"]["square_avg"] = saved["state"]["a"]["square_avg"].astype(half)
    wrong = f'state["a"]["square_avg"] has dtype {np.dtype(half)}; wanted float32'
    with refused(TypeError, wrong, of=[twin]):
        twin.load_state_dict(saved)


LAYOUTS = {
    "transposed": lambda a: a.T.copy().T,
    "Fortran": lambda a: np.asfortranarray(a.reshape(5, 2, 3)),
    "reversed": lambda a: a[::-1, ::-1],
    "permuted and reversed": lambda a: a.reshape(5, 2, 3).transpose(1, 2, 0).copy().transpose(2, 0, 1)[:, ::-1],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_state_lies_as_the_parameter_does(half, layout):
    lay = LAYOUTS[layout]
    param, flat = lay(one(1, half, 30).reshape(5, 6)), one(1, half, 30)
    opt, twin = RMSProp(param, **FULL), RMSProp(flat, **FULL)
    start = param.copy()
    for seed in (2, 3):
        grad = lay(one(seed, half, 30).reshape(5, 6))
        opt.step(grad if seed == 2 else np.ascontiguousarray(grad))  # read in place, or copied
        twin.step(one(seed, half, 30))
    assert not np.array_equal(param, start)
    wanted = {"param": flat, **twin.state[0]}
    for key, x in {"param": param, **opt.state[0]}.items():
        if x.ndim:
            assert x.shape == param.shape
            assert x.strides == tuple(s * x.itemsize // param.itemsize for s in param.strides)
            assert_same_bits(x, lay(wanted[key].reshape(5, 6)))


# Refusals, and the functional form


@pytest.mark.parametrize("other", [np.float32, np.float64, "the other half"])
def test_gradient_of_another_dtype_is_refused(half, other):
    other = next(T for T in HALVES if T is not half) if isinstance(other, str) else other
    opt = RMSProp({"w": one(1, half)})
    found, wanted = np.dtype(other), np.dtype(half)
    text = f'grads["w"] has dtype {found}, but the parameter has {wanted}'
    grad = one(2, other)
    with refused(TypeError, text, of=[opt, grad]):
        opt.step({"w": grad})


@pytest.mark.parametrize(
    ("make", "update", "given"),
    [
        (RMSProp, rmsprop_update, {}),
        (RMSProp, rmsprop_update, {"momentum": 0.9, "centered": True, "nesterov": True, "weight_decay": 0.1}),
        (AdaGrad, adagrad_update, {}),
    ],
)
def test_update_of_one_array_keeps_float32_state(half, make, update, given):
    param, want = one(1, half), one(1, half)
    opt = make(want, lr=0.1, **given)
    state = {name: np.zeros(33, np.float32) for name, x in opt.state[0].items() if x.ndim}
    for seed in (2, 3):
        update(param, one(seed, half), lr=0.1, **state, **given)
        opt.step(one(seed, half))
    assert_same_bits(param, want)
    for key, x in state.items():
        assert_same_bits(x, opt.state[0][key])

    for wrong, x in state.items():
        halved = {**state, wrong: x.astype(half)}
        text = f"{wrong} has dtype {np.dtype(half)}, but param has {np.dtype(half)}; wanted float32"
        with refused(TypeError, text, of=[param, *halved.values()]):
            update(param, one(4, half), lr=0.1, **halved, **given)
