"""Arrays on a device, from any library, are used in place."""

import numpy as np
import pytest
from devices import two
from on_device import Interface, everything
from variants import bits

from rmsprop_gpu import RMSProp, available_backends, backend_of, rmsprop_update
from rmsprop_gpu.arrays.interop import cupy_array

pytestmark = pytest.mark.gpu
cupy = pytest.importorskip("cupy", exc_type=ImportError)
F4 = np.float32


class DLPack:
    """An array of another library that only supports DLPack."""

    def __init__(self, array):
        self.held = array

    def __dlpack__(self, **given):
        return self.held.__dlpack__(**given)

    def __dlpack_device__(self):
        return self.held.__dlpack_device__()


def numba_array(array):
    from numba import cuda

    return cuda.as_cuda_array(array)


OTHERS = {"interface": Interface, "DLPack": DLPack, "Numba": numba_array}


@pytest.mark.parametrize("wrap", OTHERS.values(), ids=OTHERS)
def test_any_device_array_is_parameter_and_gradient_without_a_copy(wrap, rng):
    host = rng.standard_normal((7, 30)).astype(F4)
    memory = [cupy.asarray(host) for _ in range(4)]
    foreign, plain = RMSProp(wrap(memory[0]), momentum=0.5), RMSProp(memory[1], momentum=0.5)
    assert backend_of(wrap(memory[0])) == "cuda"
    for _ in range(3):
        foreign.step(wrap(memory[2]))
        plain.step(memory[2])
        memory[2] *= 2
    assert bits(memory[0]) == bits(memory[1]) != bits(host)
    assert type(foreign.state[0]["square_avg"]) is cupy.ndarray
    plain.step(wrap(memory[3]))
    foreign.step(memory[3])
    assert bits(memory[0]) == bits(memory[1])
    square_avg = cupy.zeros((7, 30), F4)
    rmsprop_update(wrap(memory[0]), wrap(memory[3]), wrap(square_avg), lr=0.1)
    rmsprop_update(memory[1], memory[3], square_avg * 0, lr=0.1)
    assert bits(memory[0]) == bits(memory[1])
    assert float(square_avg.sum()) > 0


@pytest.mark.parametrize(
    "make", [lambda a: a.T, lambda a: a[::-1], lambda a: a[:, ::-1].T, lambda a: a[:0], lambda a: a[1:, 3:]]
)
def test_an_interface_with_strides_is_the_array_that_it_describes(make, rng):
    array = make(cupy.asarray(rng.standard_normal((5, 8)).astype(F4)))
    strides = {"strides": array.strides}
    got = cupy_array(Interface(array, **strides))
    assert (got.shape, got.strides) == (array.shape, array.strides)
    assert got.data.ptr == array.data.ptr or not array.size
    assert bits(got) == bits(array)


def test_what_hands_out_memory_of_the_moment_is_held_until_the_step_is_enqueued():
    """A DLPack array that makes its memory when asked, so that nobody else keeps it alive."""

    class Fleeting(DLPack):
        def __dlpack__(self, **given):
            return (self.held * 1).__dlpack__(**given)

    pool = cupy.cuda.get_allocator()
    cupy.cuda.set_allocator(None)
    try:
        params = [cupy.ones(1000, F4) for _ in range(2)]
        fleeting, plain = RMSProp(params[0]), RMSProp(params[1])
        grad = cupy.full(1000, 0.5, F4)
        for _ in range(3):
            fleeting.step(Fleeting(grad))
            plain.step(grad)
        assert bits(params[0]) == bits(params[1])
    finally:
        cupy.cuda.set_allocator(pool)


def test_the_producers_stream_is_awaited_on_the_device():
    """The other library's work is on its own stream, and nobody has waited for it."""
    stream = cupy.cuda.Stream(non_blocking=True)
    opt = RMSProp(cupy.zeros(100_000, F4), lr=1.0, eps=1.0)
    cupy.cuda.Device().synchronize()
    with stream:
        grad = cupy.zeros(100_000, F4)
        for _ in range(20):
            grad += 1
    opt.step(Interface(grad, stream=stream.ptr))
    v = opt.state[0]["square_avg"].get()
    assert np.allclose(v, 0.1 * 20**2)


@pytest.mark.parametrize("dtype", [np.float16, "bfloat16"])
def test_halves_by_the_interface(dtype):
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    params = [cupy.asarray(np.linspace(-1, 1, 50).astype(dtype)) for _ in range(2)]
    grad = cupy.asarray(np.linspace(1, 2, 50).astype(dtype))
    if dtype is np.float16:  # bfloat16 has no typestr
        RMSProp(Interface(params[0])).step(Interface(grad))
    else:
        RMSProp(params[0]).step(grad)
    RMSProp(params[1]).step(grad)
    assert bits(params[0]) == bits(params[1])


def state_of(opt):
    return [x for i in range(len(opt.state)) for x in opt.state[i].values()]


def test_state_dict_stays_on_the_device_and_loads_from_either_side():
    given = {"momentum": 0.9, "centered": True}
    params, host = [cupy.ones((3, 2), F4).T, cupy.ones(4)], [np.ones((3, 2), F4).T, np.ones(4)]
    grads = [x * 2 for x in params]
    opt, twin = RMSProp(params, **given), RMSProp(host, **given)
    opt.step(grads)
    twin.step([x * 2 for x in host])
    saved = opt.state_dict()
    assert {type(x) for entry in saved["state"].values() for x in entry.values()} == {cupy.ndarray}
    opt.step(grads)  # must not change what was saved
    assert saved["state"]["0"]["square_avg"].get() == pytest.approx(0.4)
    for source in (saved, twin.state_dict()):
        opt.load_state_dict(source)
        assert [bits(x) for x in state_of(opt)] == [bits(x) for x in state_of(twin)]
    other = RMSProp([x.copy(order="K") for x in host], **given)
    other.load_state_dict(saved)  # the checkpoint loads on the host
    assert [bits(x) for x in state_of(other)] == [bits(x) for x in state_of(twin)]
    assert isinstance(other.state[0]["square_avg"], np.ndarray)
    assert saved["state"]["0"]["square_avg"].flags.c_contiguous
    wrong = {**saved, "state": {**saved["state"], "1": {**saved["state"]["1"], "square_avg": cupy.full(4, -1.0)}}}
    before = everything(opt)
    with pytest.raises(ValueError, match=r'state\["1"\]\["square_avg"\] has elements below 0'):
        opt.load_state_dict(wrong)
    assert everything(opt) == before


def test_what_is_empty_and_what_has_no_dimension():
    params = [cupy.zeros((0, 3), F4), cupy.ones((), F4), cupy.zeros(0)]
    opt = RMSProp(params)
    opt.step([cupy.zeros((0, 3), F4), cupy.ones((), F4), cupy.zeros(0)])
    opt.step([cupy.zeros((0, 3), F4), None, cupy.zeros(0)])
    assert [int(opt.state[i]["step"]) for i in range(3)] == [2, 1, 2]
    assert float(params[1]) != 1


def test_repr_and_backends():
    opt = RMSProp({"w": cupy.ones(3, F4)})
    assert (
        repr(opt).splitlines()[0] == "RMSProp(1 tensor, 3 parameters of float32 on cuda:0, 24 bytes of state, 0 steps)"
    )
    text = available_backends()["cuda"]
    assert text.startswith("CuPy arrays, ")
    assert "compute capability" in text
    assert "GiB free" in text


@two
def test_foreign_arrays_on_the_other_device():
    stream = cupy.cuda.Stream(non_blocking=True)
    with cupy.cuda.Device(1):
        params = [cupy.ones(9, F4), cupy.zeros(0, F4)]
        theirs = cupy.cuda.Stream(non_blocking=True)
        with theirs:
            grads = [cupy.full(9, 0.5, F4), cupy.zeros(0, F4)]
    opt = RMSProp(params)
    with stream:
        opt.step([Interface(grads[0], stream=theirs.ptr), Interface(grads[1])])
    with cupy.cuda.Device(1):
        assert opt.state[0]["square_avg"].get() == pytest.approx(0.025)
        assert int(opt.state[1]["step"]) == 1


@two
def test_the_state_of_one_device_is_loaded_on_another():
    made = []
    for place in (0, 1):
        with cupy.cuda.Device(place):
            params, grads = [cupy.ones(50_000, F4)], [cupy.full(50_000, 0.5, F4)]
            made.append((RMSProp(params, centered=True), grads))
    (here, _), (there, grads) = made
    for _ in range(3):
        there.step(grads)
    here.load_state_dict(there.state_dict())
    assert int(here.state[0]["step"]) == 3
    for name in ("square_avg", "grad_avg"):
        got = here.state[0][name].get()
        with cupy.cuda.Device(1):
            assert bits(got) == bits(there.state[0][name])
