"""Arrays that a step refuses without changing anything: wrong ones, overlapping ones, and changed ones."""

import numpy as np
import pytest
from given_arrays import refused
from numpy.lib.stride_tricks import as_strided

from rmsprop_gpu import RMSProp

F4, F8 = np.float32, np.float64


class Cuda:
    """Identifies itself as CuPy arrays do."""

    __cuda_array_interface__ = {"shape": (3,), "typestr": "<f4", "data": (1 << 40, False), "version": 3}  # noqa: RUF012


def frozen(a):
    a.flags.writeable = False
    return a


NOT_PARAMS = {
    "strided": (np.ones(20)[::2], ValueError, "is not dense (shape (10,), strides (16,))"),
    "column": (np.ones((4, 4))[:, 0], ValueError, "is not dense"),
    "broadcast": (as_strided(np.ones(1), (4,), (0,)), ValueError, "is not dense"),
    "read-only": (frozen(np.ones(3)), ValueError, "is read-only"),
    "unaligned": (np.ndarray((3,), F8, bytearray(33), 1), ValueError, "is not aligned"),
    "foreign order": (np.ones(3, ">f4"), TypeError, "float32 of foreign byte order (>f4); wanted float32, float64,"),
    "int": (np.ones(3, int), TypeError, "has dtype int64"),
    "longdouble": (np.ones(3, np.longdouble), TypeError, f"has dtype {np.dtype(np.longdouble)}"),
    "object": (np.array([1.0, None]), TypeError, "has dtype object"),
    "complex": (np.ones(3, complex), TypeError, "has dtype complex128"),
    "string array": (np.array(["a"]), TypeError, "has dtype <U1"),
    "masked": (np.ma.ones(3), TypeError, "is a masked array"),
    "number": (1.5, TypeError, "is a float; wanted a NumPy or CuPy array"),
    "scalar": (F4(1), TypeError, "is a numpy.float32"),
    "text": ("abc", TypeError, "is a str"),
    "None": (None, TypeError, "is a NoneType"),
    "CUDA": (Cuda(), TypeError, "Cuda on a CUDA device: "),
}


@pytest.mark.parametrize("what", NOT_PARAMS)
def test_parameter_refused(what):
    x, kind, text = NOT_PARAMS[what]
    with pytest.raises(kind) as info:
        RMSProp({"w": np.ones(3), "odd": x})
    assert 'params["odd"] ' in str(info.value)
    assert text in str(info.value)


def test_all_bad_parameters_in_one_error():
    a = np.ones(20)
    with pytest.raises(TypeError) as info:
        RMSProp({"a": a, "b": a[3:5], "c": frozen(np.ones(3)), "d": [1.0], "e": a[::2]})
    text = str(info.value)
    assert "4 problems" in text
    for part in (
        'params["b"] overlaps params["a"]',
        'params["c"] is read-only',
        'params["d"][0] is a float',
        '"e"] is not',
    ):
        assert part in text


def test_overlap_of_parameters_is_found_wherever_it_is(rng):
    a = np.zeros(100)
    assert RMSProp([a[:50], a[50:], a[7:7]])  # neighbours and empty arrays do not overlap
    for one, other in ((a, a), (a, a[99:]), (a[10:60], a[59:]), (a[10:60].reshape(5, 10).T, a[20:30])):
        with pytest.raises(ValueError, match="overlaps"):
            RMSProp([np.zeros(3), one, np.zeros(2), other])


NOT_GRADS = {
    "dtype": (np.ones((3, 4), F8), TypeError, "has dtype float64, but the parameter has float32"),
    "shape": (np.ones(12, F4), ValueError, "has shape (12,), but the parameter has shape (3, 4)"),
    "fewer": (np.ones((3, 3), F4), ValueError, "has shape (3, 3)"),
    "order": (np.ones((3, 4), ">f4"), TypeError, "foreign byte order"),
    "list": ([[1.0] * 4] * 3, TypeError, "is a list"),
    "masked": (np.ma.ones((3, 4), F4), TypeError, "masked"),
    "object": (np.full((3, 4), None), TypeError, "has dtype object"),
    "text": ("x", TypeError, "is a str"),
    "number": (2, TypeError, "is an int"),
    "CUDA": (Cuda(), TypeError, "Cuda on a CUDA device: "),
}


@pytest.mark.usefixtures("check")
@pytest.mark.parametrize("what", NOT_GRADS)
def test_gradient_refused(what):
    x, kind, text = NOT_GRADS[what]
    params = {"v": np.ones(5, F8), "w": np.ones((3, 4), F4), "x": np.ones(2, F4)}
    opt = RMSProp(params)
    good = {"v": np.ones(5, F8), "w": np.ones((3, 4), F4), "x": np.ones(2, F4)}
    refused(opt, params.values(), {**good, "w": x}, kind, 'grads["w"] ', text)
    opt.step(good)
    refused(opt, params.values(), {**good, "w": x}, kind, 'grads["w"] ', text)
    bad_too = {**good, "w": x, "x": np.ones(3, F4)}
    refused(
        opt, params.values(), bad_too, (TypeError, ValueError), "2 problems", 'grads["w"] ', 'grads["x"] has shape (3,)'
    )
    opt.step(good)
    assert opt.steps == 2


@pytest.mark.usefixtures("check")
def test_gradient_that_overlaps_is_refused():
    memory = np.zeros((8, 10), F4)
    params = [memory[2], memory[4, :4], np.zeros(4, F4)]
    opt = RMSProp(params, momentum=0.9)
    apart = np.zeros(10, F4), np.zeros(4, F4), np.zeros(4, F4)
    cases = {
        "params[0] in memory": (memory[2], apart[1], apart[2]),
        "params[1] in memory": (memory.ravel()[34:44], apart[1], apart[2]),
        "state[2].square_avg": (apart[0], apart[1], opt.state[2]["square_avg"]),
        "state[1].momentum_buffer": (apart[0], opt.state[1]["momentum_buffer"], apart[2]),
        "grads[0] overlaps params[0]": (memory[2][::-1], *apart[1:]),
    }
    for text, grads in cases.items():
        for _ in range(2):  # a refused address must not be remembered as checked
            refused(opt, params, list(grads), ValueError, "overlaps", text)
    # A column whose bounds enclose two parameters, without sharing a byte with them.
    opt.step([apart[0], memory[1::2, 9], None])
    assert opt.steps == 1


def _move(a):
    """The same header with other memory."""
    before, shape = a.ctypes.data, a.shape
    size = 100_000
    while a.ctypes.data == before:  # grow beyond the space available; shrinking does not move it back
        a.resize(size, refcheck=False)
        size *= 10
    a.resize(shape, refcheck=False)
    assert a.ctypes.data != before


CHANGES = {
    "at another address": (_move, "at another address"),
    "resized": (lambda a: a.resize(4000, refcheck=False), "changed in place: it has shape (4000,)"),
    "reshaped": (lambda a: _set(a, "shape", (2, 3)), "it has shape (2, 3)"),
    "retyped": (lambda a: _set(a, "dtype", np.int32), "dtype int32"),
    "of another byte order": (lambda a: _set(a, "dtype", np.dtype(">f4")), "foreign byte order"),
    "read-only": (lambda a: a.setflags(write=False), "read-only"),
}


def _set(a, name, value):
    """Assign, although NumPy deprecates that for shapes and dtypes."""
    type(a).__dict__[name].__set__(a, value)


@pytest.mark.usefixtures("check")
@pytest.mark.parametrize("stepped", [True, False])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("change", CHANGES)
def test_arrays_changed_in_place_between_steps(change, stepped):
    alter, text = CHANGES[change]
    params, grads = [np.ones(6, F4), np.ones(6, F4)], [np.ones(6, F4), np.ones(6, F4)]
    opt = RMSProp(params)
    if stepped:
        opt.step(grads)
    alter(params[0])
    refused(opt, params, grads, ValueError, "params[0] ", text)
    opt = RMSProp(params[1])
    opt.step(grads[1])
    alter(grads[1])
    if change in ("read-only", "at another address"):
        opt.step(grads[1])
    else:
        refused(opt, params[1:], grads[1], (ValueError, TypeError), "grads has")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.usefixtures("check")
def test_a_parameter_changed_back_is_right_again():
    param = np.ones(6, F4)  # changed even before the first step
    opt = RMSProp(param)
    _set(param, "shape", (3, 2))
    refused(opt, [param], np.ones(6, F4), ValueError, "shape (3, 2)")
    _set(param, "shape", (6,))
    opt.step(np.ones(6, F4))
    assert opt.steps == 1


class Raises:
    """Fails in the middle of the checks, as an interrupt might."""

    @property
    def __cuda_array_interface__(self):
        raise KeyboardInterrupt


@pytest.mark.usefixtures("check")
def test_an_address_is_not_remembered_as_checked_when_the_checks_are_cut_off():
    a, b = np.ones(4, F4), np.ones(4, F4)
    opt = RMSProp([a, b])
    with pytest.raises(KeyboardInterrupt):
        opt.step([a, Raises()])
    refused(opt, [a, b], [a, np.ones(4, F4)], ValueError, "grads[0] overlaps params[0]")


def test_a_cuda_array_that_does_not_hand_out_its_interface_is_refused_as_one():
    kind = type("Tensor", (), {"__cuda_array_interface__": property(lambda self: 1 / 0)})
    with pytest.raises(TypeError, match="on a CUDA device: "):
        RMSProp(kind())


@pytest.mark.usefixtures("check")
@pytest.mark.parametrize(("start", "apart"), [(0, True), (1, False), (9, False), (13, False), (14, True)])
def test_overlap_begins_and_ends_with_the_element(start, apart):
    memory = np.ones(24, F4)
    param = memory[5:14]  # nine elements: five-element neighbours on both sides, or one shared element
    opt = RMSProp([param, np.ones(5, F4)])
    grads = [np.ones(9, F4), memory[start : start + 5]]
    if apart:
        opt.step(grads)
    else:
        refused(opt, [param], grads, ValueError, "grads[1] overlaps params[0]")
