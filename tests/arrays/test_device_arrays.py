"""Arrays on a device, of any library: taken where they lie, or refused with everything as it was."""

import numpy as np
import pytest
from devices import two
from on_device import everything
from variants import bits

from rmsprop_gpu import AdaGrad, RMSProp, available_backends, backend_of, rmsprop_update
from rmsprop_gpu.arrays.interop import cupy_array

pytestmark = pytest.mark.gpu
cupy = pytest.importorskip("cupy", exc_type=ImportError)
F4 = np.float32


class Interface:
    """An array of another library, known by the CUDA array interface alone."""

    def __init__(self, array, **changes):
        self.held = array
        self.__cuda_array_interface__ = {**array.__cuda_array_interface__, "stream": None, **changes}


class DLPack:
    """An array of another library, known by DLPack alone."""

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
    """A DLPack array that makes its memory when it is asked: nobody else holds that."""

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
    """The other's work is on its own stream, and nobody has waited for it."""
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
    if dtype is np.float16:  # no typestr for the other
        RMSProp(Interface(params[0])).step(Interface(grad))
    else:
        RMSProp(params[0]).step(grad)
    RMSProp(params[1]).step(grad)
    assert bits(params[0]) == bits(params[1])


def state_of(opt):
    return [x for i in range(len(opt.state)) for x in opt.state[i].values()]


NOT_PARAMS = {
    "strided": (lambda: cupy.ones(20, F4)[::2], ValueError, "is not dense (shape (10,), strides (8,))"),
    "broadcast": (lambda: cupy.broadcast_to(cupy.ones(1, F4), (4,)), ValueError, "is not dense"),
    "int": (lambda: cupy.ones(3, int), TypeError, "has dtype int64; wanted float32, float64, float16 or bfloat16"),
    "complex": (lambda: cupy.ones(3, complex), TypeError, "has dtype complex128"),
    "unaligned": (lambda: _shifted(cupy.zeros(33, np.uint8)), ValueError, "is not aligned to its 8-byte elements"),
    "read-only": (lambda: _read_only(cupy.ones(3, F4)), ValueError, "is read-only"),
    "masked": (lambda: Interface(cupy.ones(3, F4), mask=1), TypeError, "it has a mask"),
    "nonsense": (lambda: Interface(cupy.ones(3, F4), data=(1 << 40, False)), TypeError, "does not hand out its memory"),
}


def _shifted(memory):
    return cupy.ndarray((3,), np.float64, memory.data + 1)


def _read_only(array):
    return Interface(array, data=(array.data.ptr, True))


@pytest.mark.parametrize("what", NOT_PARAMS)
def test_parameter_refused(what):
    make, kind, text = NOT_PARAMS[what]
    with pytest.raises(kind) as info:
        RMSProp({"w": cupy.ones(3), "odd": make()})
    assert 'params["odd"] ' in str(info.value)
    assert text in str(info.value)


def test_host_and_device_arrays_cannot_be_mixed():
    with pytest.raises(TypeError) as info:
        AdaGrad({"a": cupy.ones(3, F4), "b": np.ones(3, F4), "c": cupy.ones(2)})
    text = str(info.value)
    assert 'params["a"] (on cuda:0), params["c"] (on cuda:0); params["b"] (in host memory)' in text
    with pytest.raises(TypeError, match=r"square_avg is a numpy.ndarray in host memory, but param lies on cuda:0"):
        rmsprop_update(cupy.ones(3), cupy.ones(3), np.zeros(3), lr=0.1)


NOT_GRADS = {
    "NumPy": (
        lambda: np.ones((3, 4), F4),
        TypeError,
        "is a numpy.ndarray in host memory, but the parameter lies on cuda",
    ),
    "scalar": (lambda: F4(1), TypeError, "is a numpy.float32"),
    "dtype": (lambda: cupy.ones((3, 4)), TypeError, "has dtype float64, but the parameter has float32"),
    "shape": (lambda: cupy.ones(12, F4), ValueError, "has shape (12,), but the parameter has shape (3, 4)"),
    "list": (lambda: [[1.0] * 4] * 3, TypeError, "is a list"),
    "number": (lambda: 2, TypeError, "is an int"),
    "nonsense": (lambda: Interface(cupy.ones(3, F4), data=(1 << 40, False)), TypeError, "does not hand out its memory"),
    "unaligned": (
        lambda: cupy.ndarray((3, 4), F4, cupy.zeros(64, np.uint8).data + 2),
        ValueError,
        "is not aligned to its 4-byte elements, as CUDA wants it",
    ),
}


@pytest.mark.parametrize("what", NOT_GRADS)
def test_gradient_refused(what):
    make, kind, text = NOT_GRADS[what]
    opt = RMSProp({"v": cupy.ones(5), "w": cupy.ones((3, 4), F4), "x": cupy.ones(2, F4)})
    good = {"v": cupy.ones(5), "w": cupy.ones((3, 4), F4), "x": cupy.ones(2, F4)}
    for _ in range(2):
        before = everything(opt)
        for bad in ({**good, "w": make()}, {**good, "w": make(), "x": cupy.ones(3, F4)}):
            with pytest.raises((TypeError, ValueError)) as info:
                opt.step(bad)
            assert 'grads["w"] ' in str(info.value)
            assert text in str(info.value)
        assert "2 problems" in str(info.value)
        assert 'grads["x"] has shape (3,)' in str(info.value)
        with pytest.raises(kind):
            opt.step({**good, "w": make()})
        assert everything(opt) == before
        opt.step(good)
    assert opt.steps == 2


def test_gradient_that_overlaps_is_refused():
    memory = cupy.zeros((8, 10), F4)
    params = [memory[2], memory[4, :4], cupy.zeros(4, F4)]
    opt = RMSProp(params, momentum=0.9)
    apart = cupy.zeros(10, F4), cupy.zeros(4, F4), cupy.zeros(4, F4)
    cases = {
        "params[0] in memory": (memory[2], apart[1], apart[2]),
        "params[1] in memory": (memory.ravel()[34:44], apart[1], apart[2]),
        "state[2].square_avg": (apart[0], apart[1], opt.state[2]["square_avg"]),
        "state[1].momentum_buffer": (apart[0], opt.state[1]["momentum_buffer"], apart[2]),
        "grads[0] overlaps params[0]": (memory[2][::-1], *apart[1:]),
    }
    for text, grads in cases.items():
        for _ in range(2):  # a refused address is not remembered as checked
            before = everything(opt)
            with pytest.raises(ValueError, match="overlaps") as info:
                opt.step(list(grads))
            assert text in str(info.value)
            assert everything(opt) == before
    # A column whose bounds hold two parameters, and no byte in common with them.
    opt.step([apart[0], memory[1::2, 9], None])
    assert opt.steps == 1


def test_neighbours_in_memory_are_apart():
    memory = cupy.ones(24, F4)
    opt = RMSProp(memory[5:14])
    for start in (0, 14):
        with pytest.raises(ValueError, match="has shape"):
            opt.step(memory[start : start + 5])
    opt = RMSProp([memory[5:14], cupy.ones(5, F4)])
    for start, apart in ((0, True), (1, False), (9, False), (13, False), (14, True)):
        grads = [cupy.ones(9, F4), memory[start : start + 5]]
        if apart:
            opt.step(grads)
        else:
            with pytest.raises(ValueError, match="overlaps"):
                opt.step(grads)


def test_identity_of_a_gradient_proves_nothing():
    """A new array often has the id and the address of one that was just freed; its header is looked at each step."""
    opt = RMSProp(cupy.ones(6, F4))
    grad = cupy.ones(6, F4)
    opt.step(grad)
    grad.shape = (2, 3)
    with pytest.raises(ValueError, match="has shape"):
        opt.step(grad)
    grad.shape = (6,)
    opt.step(grad)
    assert opt.steps == 2


def test_state_dict_stays_on_the_device_and_loads_from_either_side():
    given = {"momentum": 0.9, "centered": True}
    params, host = [cupy.ones((3, 2), F4).T, cupy.ones(4)], [np.ones((3, 2), F4).T, np.ones(4)]
    grads = [x * 2 for x in params]
    opt, twin = RMSProp(params, **given), RMSProp(host, **given)
    opt.step(grads)
    twin.step([x * 2 for x in host])
    saved = opt.state_dict()
    assert {type(x) for entry in saved["state"].values() for x in entry.values()} == {cupy.ndarray}
    opt.step(grads)  # does not change what was saved
    assert saved["state"]["0"]["square_avg"].get() == pytest.approx(0.4)
    for source in (saved, twin.state_dict()):
        opt.load_state_dict(source)
        assert [bits(x) for x in state_of(opt)] == [bits(x) for x in state_of(twin)]
    other = RMSProp([x.copy(order="K") for x in host], **given)
    other.load_state_dict(saved)  # a checkpoint goes home
    assert [bits(x) for x in state_of(other)] == [bits(x) for x in state_of(twin)]
    assert isinstance(other.state[0]["square_avg"], np.ndarray)
    assert saved["state"]["0"]["square_avg"].strides == params[0].strides
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


class Raises:
    """An array whose attributes raise, as a deleted one's might."""

    @property
    def dtype(self):
        raise RuntimeError("deleted")

    __cuda_array_interface__ = dtype


def test_arrays_that_fail_when_they_are_asked_are_named():
    opt = RMSProp([cupy.ones(3, F4)])
    for bad, text in (
        (
            Raises(),
            r"grads\[0\] is a .*Raises on a CUDA device: it does not hand out its memory \(deleted",
        ),
        (Interface(cupy.ones(3, F4), data=()), r"grads\[0\] .*does not hand out its memory"),
        (type("Duck", (), {"dtype": np.dtype(F4), "shape": (3,)})(), r"grads\[0\] is a .*Duck; wanted a NumPy or CuPy"),
    ):
        with pytest.raises(TypeError, match=text):
            opt.step([bad])
    with pytest.raises(TypeError, match=r"params is a test_gpu_arrays.Raises on a CUDA device"):
        RMSProp(Raises())


def test_what_looks_like_a_cupy_array_is_none():
    param, grad = cupy.ones(3, F4), cupy.ones(3, F4)
    opt = RMSProp([param])
    opt.step([grad])
    names = ("dtype", "shape", "strides", "data")
    duck = type("Duck", (), {name: getattr(grad, name) for name in names})()
    with pytest.raises(TypeError, match="Duck; wanted a NumPy or CuPy array"):
        opt.step([duck])


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
