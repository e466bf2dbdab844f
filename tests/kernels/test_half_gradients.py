"""float32 parameters with half gradients: bit-identical to a step with float32 gradients, on both backends."""

import importlib

import ml_dtypes
import numpy as np
import pytest
from devices import MODULES
from judge import judge, snapshot
from on_either import ALL, CLIPPED, F2, F4, F8, assert_same, copies, draw, host, refusing, seeds
from variants import bits, cover, name, random_problem, sprinkle

from rmsprop_gpu import AdaGrad, RMSProp, adagrad_update, rmsprop_update
from rmsprop_gpu.kernels.rule import Variant

pytestmark = pytest.mark.parametrize("half", [F2, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
either = pytest.mark.parametrize("module", MODULES)

# Around a thread's vector (4), the CPU's (16), a cut of the work (64), a block of the device (1,024) and of sums.
SIZES = [0, 1, 3, 4, 5, 15, 17, 63, 65, 255, 1023, 1024, 1025, 4097, 3 * 4096 + 130]

FULL = {"momentum": 0.9, "centered": True, "nesterov": True, "weight_decay": 0.01, "clipvalue": 0.8, "maximize": True}
GIVEN = {"plain": {}, "full": FULL, "clipped": {"momentum": 0.9, "clipnorm": 0.7}, "all": ALL}


def problem(half, seed, *, special=False):
    """Parameters, and gradients of which two in three are halves."""
    params, grads = draw(seeds(seed, 0), *SIZES), draw(seeds(seed, 1), *SIZES)
    grads = [g.astype(half if i % 3 else F4) for i, g in enumerate(grads)]
    if special:
        for g in grads:
            sprinkle(g, np.random.default_rng(seed))
    return params, grads


def wide(grads):
    return [None if g is None else g.astype(F4) for g in grads]


@either
@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
def test_step_is_that_of_the_gradient_as_float32(module, given, half):
    """The float32 twin runs on the host, so this also compares the device with the CPU."""
    xp = importlib.import_module(module)
    params, _ = problem(half, 0)
    opt, twin = RMSProp(copies(xp, params), **given), RMSProp(params, **given)
    for seed in range(1, 4):
        _, grads = problem(half, seed, special=not given.get("global_clipnorm") and not given.get("clipnorm"))
        opt.step(copies(xp, grads), grad_scale=seed / 3)
        twin.step(wide(grads), grad_scale=seed / 3)
        assert_same(opt, twin)
    assert opt.last_grad_norm == twin.last_grad_norm
    assert [name.partition("[")[2].partition(",")[0] for name in opt.kernels() if "update" in name] == [
        "float32",
        f"float32 with {np.dtype(half)} gradients",
    ]


@either
def test_adagrad_too(module, half):
    xp = importlib.import_module(module)
    params, grads = problem(half, 0, special=True)
    opt, twin = AdaGrad(copies(xp, params)), AdaGrad(params)
    for _ in range(2):
        opt.step(copies(xp, grads))
        twin.step(wide(grads))
    assert_same(opt, twin)


@either
@pytest.mark.parametrize("found", [False, True])
@pytest.mark.parametrize("given", [{}, ALL], ids=["plain", "all"])
def test_their_zeros_are_written(module, given, found, half):
    """Also if the step is skipped, and for a gradient whose layout differs from its parameter's."""
    xp = importlib.import_module(module)
    params, grads = problem(half, 0)
    opt, twin = RMSProp(copies(xp, params), **given), RMSProp(params, **given)
    mine = copies(xp, grads)
    mine[-2] = xp.zeros(2 * SIZES[-2], half)[::2]
    mine[-2][:] = xp.array(grads[-2])
    opt.step(mine, zero_grads=True, found_inf=found)
    twin.step(wide(grads), found_inf=found)
    assert_same(opt, twin)
    assert not any(host(g).astype(F4).any() for g in mine)


@either
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_one_that_is_not_finite_skips(module, bad, half):
    xp = importlib.import_module(module)
    params, grads = problem(half, 0)
    opt = RMSProp(copies(xp, params), skip_nonfinite=True)
    opt.step(copies(xp, grads))
    grads[-2][77] = bad
    before = [bits(p) for p in opt.param_groups[0]["params"]]
    opt.step(copies(xp, grads))
    assert opt.skipped_steps == 1
    assert [bits(p) for p in opt.param_groups[0]["params"]] == before


@pytest.mark.parametrize("variant", [Variant(), max(cover(2), key=sum)], ids=name)
def test_step_agrees_with_the_oracle(variant, half, rng):
    opt, params, grads = random_problem(variant, SIZES, F4, rng)
    grads = [g.astype(half) for g in grads]
    before = snapshot(opt, params)
    opt.step(grads)
    judge(variant, opt, F4, before, snapshot(opt, params), grads)


# Alignment and layout


def at(xp, values, offset):
    """A copy of the array, `offset` bytes after a boundary for vectors."""
    memory = xp.zeros(values.nbytes + 64, np.uint8)
    start = -(memory.ctypes.data if xp is np else memory.data.ptr) % 64 + offset
    array = memory[start : start + values.nbytes].view(values.dtype)
    array[...] = xp.array(values)
    return array


@either
@pytest.mark.parametrize("size", [7, 1025, 4100])
@pytest.mark.parametrize("offsets", [(0, 2), (0, 4), (0, 8), (0, 6), (4, 0), (8, 8), (4, 2), (12, 14)])
def test_vectors_need_not_be_aligned(module, offsets, size, half):
    """A vector is 16 bytes of a parameter and 8 of its gradient, and either can be misaligned alone."""
    xp = importlib.import_module(module)
    (p, g), out = draw(seeds(*offsets, size), size, size), np.zeros(size, F4)
    g = g.astype(half)
    param, grad = at(xp, p, offsets[0]), at(xp, g, offsets[1])
    out = p.copy()
    opt, twin = RMSProp(param), RMSProp(out)
    for _ in range(2):
        opt.step(grad, zero_grads=True)
        twin.step(g.astype(F4), zero_grads=True)
        assert not host(grad).astype(F4).any()
        assert_same(opt, twin)
        grad[...] = xp.array(g)


def test_odd_addresses_are_copied_on_the_host(half):
    (p, g), memory = draw(3, 33, 33), np.zeros(67, np.uint8)
    g = g.astype(half)
    grad = np.frombuffer(memory, half, 33, 1)
    grad[:] = g
    assert not grad.flags.aligned
    opt, twin = RMSProp(p), RMSProp(p.copy())
    opt.step(grad, zero_grads=True)
    twin.step(g.astype(F4))
    assert_same(opt, twin)
    assert not memory.any()


LAYOUTS = {
    "transposed": lambda xp, a: a.T.copy().T,
    "Fortran": lambda xp, a: xp.asfortranarray(a),
    "reversed": lambda xp, a: a[::-1, ::-1],
    "one row": lambda xp, a: a[:1],
}


@either
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(module, layout, half):
    """A gradient with its parameter's layout is read in place. Any other is copied, once."""
    xp = importlib.import_module(module)
    p, g = (x.reshape(5, 6) for x in draw(4, 30, 30))
    g = g.astype(half)
    lay = LAYOUTS[layout]
    param, grad = lay(xp, xp.array(p)), lay(xp, xp.array(g))
    opt, twin = RMSProp(param), RMSProp(lay(np, p.copy()))
    opt.step(grad)
    opt.step(xp.ascontiguousarray(grad))
    for _ in range(2):
        twin.step(lay(np, g).astype(F4))
    assert bits(xp.ascontiguousarray(param)) == bits(np.ascontiguousarray(twin.param_groups[0]["params"][0]))


# The functional form, and refusals


@either
@pytest.mark.parametrize("update", [rmsprop_update, adagrad_update])
def test_update_of_one_array(module, update, half):
    xp = importlib.import_module(module)
    p, g = draw(5, 1030, 1030)
    g, sums = g.astype(half), np.zeros(1030, F4)
    param, state = xp.array(p), xp.array(sums)
    for _ in range(2):
        update(param, xp.array(g), state, lr=0.1)
        update(p, g.astype(F4), sums, lr=0.1)
    assert (bits(param), bits(state)) == (bits(p), bits(sums))


@either
def test_parameters_of_other_dtypes_take_no_other_gradient(module, half):
    xp = importlib.import_module(module)
    other = F2 if half is not F2 else ml_dtypes.bfloat16
    for D, G in ((F8, half), (F8, F4), (half, F4), (half, other), (half, F8), (F4, F8)):
        opt = RMSProp({"a": xp.ones(3, F4), "b": xp.ones(3, D)}, **CLIPPED)
        found = f'grads["b"] has dtype {np.dtype(G)}, but the parameter has {np.dtype(D)}; wanted {np.dtype(D)}'
        also = " or float16 or bfloat16" if D is F4 else ""
        with refusing(opt, TypeError, found + also):
            opt.step({"a": xp.ones(3, half), "b": xp.ones(3, G)})
        with pytest.raises(TypeError) as error:
            rmsprop_update(xp.ones(3, D), xp.ones(3, G), xp.zeros(3, F8 if D is F8 else F4), lr=0.1)
        assert str(error.value) == found.replace('grads["b"]', "grad") + also


def test_scalars_of_numpy_are_gradients_of_0d_parameters(half):
    opt, twin = RMSProp(np.ones((), F4)), RMSProp(np.ones((), F4))
    opt.step(half(0.3))
    twin.step(F4(half(0.3)))
    assert_same(opt, twin)
