"""Fewer bytes on a device: bit-identical to NumPy arrays, whatever the memory, and however a step is launched."""

import few_bytes as oracle
import ml_dtypes
import numpy as np
import pytest
from devices import two
from on_device import capture, replay, scalar
from variants import bits

from rmsprop_gpu import RMSProp

pytestmark = pytest.mark.gpu
cupy = pytest.importorskip("cupy", exc_type=ImportError)

BF, F2, F4 = ml_dtypes.bfloat16, np.float16, np.float32
SIZES = (1, 127, 128, 1024, 1025, 4097)
# Parameters, and how they and their second moments are stored.
FORMATS = {
    "uint16": (F4, {"square_avg_dtype": "uint16"}),
    "uint8": (F4, {"square_avg_dtype": "uint8"}),
    "remainder": (BF, {"store_param_remainders": True}),
    "uint16, dithered": (BF, {"square_avg_dtype": "uint16", "bf16_stochastic_round": True}),
    "uint8, remainder": (BF, {"square_avg_dtype": "uint8", "store_param_remainders": True}),
}
every_format = pytest.mark.parametrize("stored", FORMATS)
codes = pytest.mark.parametrize("stored", ["uint16", "uint8, remainder"])  # where one of each kind is enough


def draw(seed, dtype, sizes=SIZES):
    return [np.random.default_rng([seed, n]).standard_normal(n).astype(F4).astype(dtype) for n in sizes]


def nasty(seed, dtype, sizes=SIZES):
    return [oracle.nasty(np.random.default_rng([seed, n]), n, dtype) for n in sizes]


def shifted(x, by):
    """A copy on the device, `by` elements into its allocation."""
    whole = cupy.zeros(x.size + by, x.dtype)
    whole[by:] = cupy.asarray(x)
    return whole[by:]


def pair(stored, move=cupy.asarray, sizes=SIZES, **given):
    """The same optimizer on the device and on the host."""
    dtype, options = FORMATS[stored]
    start = draw(0, dtype, sizes)
    return [
        RMSProp([place(x) for x in start], lr=1e-2, alpha=0.97, seed=3, **options, **given) for place in (move, np.copy)
    ]


def assert_same(opt, twin):
    for x, y in zip(opt.param_groups[0]["params"], twin.param_groups[0]["params"], strict=True):
        with getattr(x, "device", cupy.cuda.Device()):
            assert bits(x) == bits(y)
    for key, buffers in twin.state.items():
        for name, y in buffers.items():
            assert bits(opt.state[key][name]) == bits(y), (key, name)


@pytest.mark.parametrize("by", [1, *(pytest.param(by, marks=pytest.mark.exhaustive) for by in (2, 4))])
@every_format
def test_arrays_that_are_not_aligned(stored, by):
    """Parameters alone, gradients alone, or both: single accesses, and vectors where the offset is even."""
    dtype = FORMATS[stored][0]
    for params_by, grads_by in ((by, 0), (0, by), (by, by)):
        opt, twin = pair(stored, lambda x, by=params_by: shifted(x, by))
        for step in range(2):
            grads = nasty(step, dtype)
            opt.step([shifted(g, grads_by) for g in grads])
            twin.step(grads)
        assert_same(opt, twin)


@pytest.mark.parametrize("half", [F2, pytest.param(BF, marks=pytest.mark.exhaustive)], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("stored", ["uint16", "uint8"])
def test_half_gradients_beside_float32(stored, half):
    opt, twin = pair(stored)
    for step in range(2):
        grads = nasty(step, half)
        opt.step([shifted(g, step) for g in grads])
        twin.step(grads)
    assert_same(opt, twin)


@every_format
def test_each_replay_of_a_graph_has_a_key_of_its_own(stored, stream):
    dtype = FORMATS[stored][0]
    grads = draw(1, dtype)
    with stream:
        opt, twin = pair(stored)
        here = [cupy.asarray(g) for g in grads]
        opt.step(here)
        graph = capture(opt, here, stream)
        replay(graph, stream, 4)
        for _ in range(5):
            twin.step(grads)
        assert_same(opt, twin)
        opt.step(here)
        twin.step(grads)
        assert_same(opt, twin)


@two
@pytest.mark.usefixtures("pool")
@codes
def test_parameters_on_two_devices(stored):
    dtype, options = FORMATS[stored]
    places = [0, 1, 0, 1, 1, 0]

    def on_devices(arrays):
        made = []
        for place, x in zip(places, arrays, strict=True):
            with cupy.cuda.Device(place):
                made.append(cupy.asarray(x))
        return made

    start = draw(0, dtype)
    opt, twin = (RMSProp(xs, **options) for xs in (on_devices(start), [x.copy() for x in start]))
    for step in range(3):
        grads = nasty(step, dtype)
        opt.step(on_devices(grads))
        twin.step(grads)
    assert_same(opt, twin)


@every_format
def test_gradients_are_zeroed_in_the_same_pass(stored):
    """Also if a step is skipped and writes nothing else."""
    dtype = FORMATS[stored][0]
    opt, twin = pair(stored)
    for step, found in enumerate([0.0, 1.0, 0.0]):
        grads = draw(step, dtype)
        here = [shifted(g, i % 2) for i, g in enumerate(grads)]
        opt.step(here, found_inf=scalar(found), zero_grads=True)
        twin.step(grads, found_inf=found, zero_grads=True)
        assert not any(g.any() for g in here)
        assert_same(opt, twin)
    assert int(opt.state[0]["step"]) == 2


@codes
def test_a_step_that_the_device_skips_advances_no_key(stored, stream):
    """Even when a replayed graph contains the step."""
    dtype = FORMATS[stored][0]
    grads = draw(1, dtype)
    with stream:
        opt, twin = pair(stored)
        here, found = [cupy.asarray(g) for g in grads], scalar(0)
        opt.step(here, found_inf=found)
        stream.begin_capture()
        opt.step(here, found_inf=found)
        graph = stream.end_capture()
        for skipped in (1, 0, 1, 1, 0):
            found.fill(skipped)
            replay(graph, stream)
        for _ in range(3):
            twin.step(grads)
        assert_same(opt, twin)


@codes
def test_a_parameter_without_a_gradient_keeps_its_codes_and_its_key(stored):
    dtype = FORMATS[stored][0]
    opt, twin = pair(stored)
    for step in range(3):
        grads = draw(step, dtype)
        grads[step] = None
        opt.step([None if g is None else cupy.asarray(g) for g in grads])
        twin.step(grads)
    assert_same(opt, twin)


@pytest.mark.parametrize("way", ["_largest_of_warp", "_largest_by_shuffles"])
def test_each_thread_gets_the_largest_of_its_warp(way):
    """The first is one instruction from compute capability 8.0 on; before, it is the second."""
    from rmsprop_gpu.kernels import cuda_coded

    largest, cuda = getattr(cuda_coded, way), cuda_coded.target

    @cuda.jit
    def kernel(x, found):
        i = cuda.grid(1)
        found[i] = largest(x[i])

    x = np.random.default_rng(0).integers(0, 2**31, (256, 32), np.int32)
    found = cupy.empty_like(cupy.asarray(x.ravel()))
    kernel[128, 64](cupy.asarray(x.ravel()), found)
    np.testing.assert_array_equal(found.get().reshape(x.shape), np.broadcast_to(x.max(1, keepdims=True), x.shape))
