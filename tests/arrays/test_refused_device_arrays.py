"""Arrays on a device that a step refuses without changing anything."""

import numpy as np
import pytest
from on_device import Interface, everything

from rmsprop_gpu import AdaGrad, RMSProp, rmsprop_update

pytestmark = pytest.mark.gpu
cupy = pytest.importorskip("cupy", exc_type=ImportError)
F4 = np.float32

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
    with pytest.raises(TypeError, match=r"square_avg is a numpy.ndarray in host memory, but param is on cuda:0"):
        rmsprop_update(cupy.ones(3), cupy.ones(3), np.zeros(3), lr=0.1)


NOT_GRADS = {
    "NumPy": (
        lambda: np.ones((3, 4), F4),
        TypeError,
        "is a numpy.ndarray in host memory, but the parameter is on cuda",
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
        "is not aligned to its 4-byte elements, as CUDA requires",
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
        for _ in range(2):  # a refused address must not be remembered as checked
            before = everything(opt)
            with pytest.raises(ValueError, match="overlaps") as info:
                opt.step(list(grads))
            assert text in str(info.value)
            assert everything(opt) == before
    # A column whose bounds enclose two parameters, without sharing a byte with them.
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
    """A new array often has the id and address of one that was just freed, so its header is checked in each step."""
    opt = RMSProp(cupy.ones(6, F4))
    grad = cupy.ones(6, F4)
    opt.step(grad)
    grad.shape = (2, 3)
    with pytest.raises(ValueError, match="has shape"):
        opt.step(grad)
    grad.shape = (6,)
    opt.step(grad)
    assert opt.steps == 2


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
    with pytest.raises(TypeError, match=f"params is a {Raises.__module__}.Raises on a CUDA device"):
        RMSProp(Raises())


def test_what_looks_like_a_cupy_array_is_none():
    param, grad = cupy.ones(3, F4), cupy.ones(3, F4)
    opt = RMSProp([param])
    opt.step([grad])
    names = ("dtype", "shape", "strides", "data")
    duck = type("Duck", (), {name: getattr(grad, name) for name in names})()
    with pytest.raises(TypeError, match="Duck; wanted a NumPy or CuPy array"):
        opt.step([duck])
