"""Arrays of other libraries in host memory are used in place, or refused with a hint."""

import gc
import weakref

import numpy as np
import pytest
from given_arrays import refused

from rmsprop_gpu import RMSProp, backend_of
from rmsprop_gpu.arrays.interop import host_array

F4 = np.float32


class DLPack:
    """An array of another library that only supports DLPack."""

    def __init__(self, array):
        self.held = array

    def __dlpack__(self, **given):
        return self.held.__dlpack__(**given)

    def __dlpack_device__(self):
        return self.held.__dlpack_device__()


class Interface:
    """An array that only supports NumPy's interface."""

    def __init__(self, array):
        self.held, self.__array_interface__ = array, array.__array_interface__


def torch_array(array):
    return pytest.importorskip("torch").from_numpy(array)


OTHERS = {"DLPack": DLPack, "interface": Interface, "torch": torch_array}
EACH = pytest.mark.parametrize("wrap", OTHERS.values(), ids=OTHERS)


@EACH
def test_memory_is_the_same(wrap):
    array = np.arange(6, dtype=F4).reshape(2, 3).T
    got = host_array(wrap(array))
    assert (got.ctypes.data, got.strides) == (array.ctypes.data, array.strides)
    assert backend_of(wrap(array)) == "cpu"


@pytest.mark.usefixtures("check")
@EACH
def test_parameters_and_gradients_of_others_step_as_those_of_numpy(wrap):
    rng = np.random.default_rng(0)
    mine = [rng.standard_normal(shape).astype(F4) for shape in ((3, 4), (5,), ())]
    theirs = [x.copy() for x in mine]
    opt, twin = RMSProp([wrap(x) for x in theirs], momentum=0.5), RMSProp(mine, momentum=0.5)
    for _ in range(3):
        grads = [rng.standard_normal(x.shape).astype(F4) for x in mine]
        grads = [np.asarray(x, F4) for x in grads]
        opt.step([wrap(g) if i else wrap(np.asfortranarray(g)) for i, g in enumerate(grads)])
        twin.step(grads)
    for got, want in zip(theirs, mine, strict=True):
        assert got.tobytes() == want.tobytes()


@pytest.mark.usefixtures("check")
@EACH
def test_their_half_gradients_are_taken_where_they_lie(wrap):
    """For NumPy parameters and theirs, before and after float32 gradients."""
    rng = np.random.default_rng(0)
    mine, theirs, params = ([np.ones(40, F4), np.ones((4, 5), F4)] for _ in range(3))
    opt, own, twin = RMSProp(params), RMSProp([wrap(x) for x in theirs]), RMSProp(mine)
    for dtype in (np.float16, np.float16, F4, np.float16):
        grads = [rng.standard_normal(x.shape).astype(dtype) for x in mine]
        opt.step([wrap(g) for g in grads])
        own.step([wrap(g) for g in grads])
        twin.step([g.astype(F4) for g in grads])
        assert list(opt.kernels()) == [f"update_kernel[float32{' with float16 gradients' * (dtype != F4)}, plain]"]
        for steps in (opt._planner._plan.steps, own._planner._plan.steps):
            assert not steps._grads._dense  # no copy
    for got in (params, theirs):
        assert [x.tobytes() for x in got] == [x.tobytes() for x in mine]


@pytest.mark.usefixtures("check")
@EACH
def test_their_gradients_are_zeroed_and_kept_apart(wrap):
    param, grad = np.ones(40, F4), np.ones(40, F4)
    opt = RMSProp(param)
    opt.step(wrap(grad), zero_grads=True)
    assert not grad.any()
    refused(opt, [param], wrap(param), ValueError, "grads overlaps params in memory")
    pair = RMSProp([np.ones(20, F4), np.ones(20, F4)])
    with pytest.raises(ValueError, match="overlaps"):
        pair.step([wrap(grad[:20]), wrap(grad[10:30])], zero_grads=True)


class Fresh:
    """Hands out new memory each time."""

    def __init__(self, value):
        self.value, self.made = value, []

    def __dlpack_device__(self):
        return (1, 0)

    def __dlpack__(self, **given):
        memory = np.full(1000, self.value, F4)
        self.made.append(weakref.ref(memory))
        return memory.__dlpack__(**given)


def test_handed_out_memory_is_held_for_the_step_and_no_longer():
    param, twin = np.ones(1000, F4), np.ones(1000, F4)
    grad, opt, other = Fresh(0.5), RMSProp(param), RMSProp(twin)
    for _ in range(2):
        opt.step(grad)
        other.step(np.full(1000, 0.5, F4))
    gc.collect()
    assert [ref() for ref in grad.made] == [None, None]
    assert param.tobytes() == twin.tobytes()


def test_gradients_of_jax():
    jnp = pytest.importorskip("jax.numpy")
    param, twin = np.ones(5, F4), np.ones(5, F4)
    grad = jnp.arange(5, dtype=F4)
    opt = RMSProp(param)
    opt.step(grad)
    RMSProp(twin).step(np.asarray(grad))
    assert param.tobytes() == twin.tobytes()
    refused(opt, [param], jnp.ones(5, jnp.bfloat16), TypeError, "wanted np.asarray(x)")
    with pytest.raises(ValueError, match="read-only"):
        opt.step(grad, zero_grads=True)
    with pytest.raises(ValueError, match="params is immutable"):
        RMSProp(grad)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda torch: torch.nn.Parameter(torch.ones(3)), r"wanted p\.detach\(\), or rmsprop_gpu\.torch\.RMSprop"),
        (lambda torch: torch.ones(3, dtype=torch.bfloat16), r"wanted x\.view\(torch\.int16\)"),
        (lambda torch: torch._neg_view(torch.ones(3)), r"wanted x\.resolve_neg\(\)"),
        (lambda torch: torch.ones(3).to_sparse(), r"wanted x\.to_dense\(\), or rmsprop_gpu\.torch\.RMSprop"),
        (lambda torch: torch.ones(3, 2)[:, 0], r"is not dense.*or rmsprop_gpu\.torch\.RMSprop"),
        (lambda torch: torch.empty(3, device="meta"), "is a torch.Tensor; wanted"),
    ],
)
def test_what_torch_does_not_hand_out_is_refused_with_the_way(make, text):
    torch = pytest.importorskip("torch")
    with pytest.raises((TypeError, ValueError), match=text):
        RMSProp({"w": make(torch)})


@pytest.mark.usefixtures("check")
def test_a_parameter_of_torch_whose_memory_becomes_another_is_refused():
    torch = pytest.importorskip("torch")
    param = torch.ones(3)
    opt = RMSProp(param)
    opt.step(torch.ones(3))
    param.data = torch.ones(3)
    refused(opt, [opt.state[0]["square_avg"]], torch.ones(3), ValueError, "params was changed in place")
