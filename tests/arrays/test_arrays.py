"""Every array that a step can be given: taken where it lies, copied, or refused with everything as it was."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import as_strided

from rmsprop_gpu import RMSProp, reference
from rmsprop_gpu.steps import batch, headers

F4, F8 = np.float32, np.float64


def everything(opt, params):
    """Every byte that a step may change, in memory order."""
    arrays = [*params, *(x for state in (opt.state[i] for i in range(len(opt.state))) for x in state.values())]
    return [np.asarray(a).tobytes("A") for a in arrays] + [opt.steps]


def refused(opt, params, grads, kind, *texts):
    """The step is refused with these words, and nothing has changed; a right one then works."""
    before = everything(opt, params)
    with pytest.raises(kind) as info:
        opt.step(grads)
    for text in texts:
        assert text in str(info.value)
    assert everything(opt, params) == before


@pytest.fixture(params=["compiled", "python"])
def check(request, monkeypatch):
    """The compiled check of all headers, and the Python checks alone, as where the C struct is not as expected."""
    assert headers.TRUSTED
    monkeypatch.setattr(headers, "TRUSTED", request.param == "compiled")


def step_and_compare(param, grad):
    """One step from a known state against the oracle, whatever the layout; returns the optimizer."""
    dtype, shape = param.dtype, param.shape
    opt = RMSProp(param, lr=0.5)
    opt.state[0]["square_avg"][...] = np.arange(param.size, dtype=dtype).reshape(shape)
    want, state = reference.rmsprop(param, grad, {"square_avg": opt.state[0]["square_avg"].astype(F8)}, lr=0.5)
    opt.step(grad)
    tol = 8 * np.finfo(dtype).eps  # 3 roundings of v, 3 of the step, 1 of the parameter, and the oracle's in float64
    np.testing.assert_allclose(param, want, rtol=tol, atol=tol)
    np.testing.assert_allclose(opt.state[0]["square_avg"], state["square_avg"], rtol=tol)
    return opt


LAYOUTS = {
    "0-d": np.zeros(()),
    "empty": np.zeros((3, 0, 2)),
    "C": np.zeros((3, 4, 5)),
    "F": np.zeros((3, 4, 5), order="F"),
    "permuted": np.zeros((3, 4, 5)).transpose(1, 2, 0),
    "backwards": np.zeros(12)[::-1],
    "partly backwards": np.zeros((3, 4))[:, ::-1],
    "ones": np.zeros((1, 4, 1, 3)).transpose(2, 3, 0, 1),
    "a part": np.zeros((6, 4))[2:5],
    "one row, any stride": as_strided(np.zeros(8), (1, 8), (999_999_999_999_999, 8)),
    "one element, backwards": as_strided(np.zeros(1), (1, 1), (-(2**62), 2**62)),
}


@pytest.mark.usefixtures("check")
@pytest.mark.parametrize("dtype", [F4, F8])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_dense_layout_is_updated_where_it_lies(layout, dtype, rng):
    like = LAYOUTS[layout]
    param = np.array(like, dtype, order="K", copy=True)
    if param.strides != like.strides and like.dtype == dtype:
        param = like.copy() if like.size < 2 else like
    param[...] = rng.standard_normal(like.shape)
    opt = step_and_compare(param, rng.standard_normal(like.shape).astype(dtype))
    state = opt.state[0]["square_avg"]
    assert state.shape == param.shape
    assert all(n < 2 or a == b for n, a, b in zip(param.shape, state.strides, param.strides, strict=True))


@st.composite
def dense_and_any(draw):
    """A dense array of any permutation and direction, and a gradient of its shape in any layout at all."""
    shape = tuple(draw(st.lists(st.integers(0, 4), min_size=0, max_size=4)))
    order = draw(st.permutations(range(len(shape))))
    flip = (..., *(slice(None, None, draw(st.sampled_from([1, -1]))) for _ in shape))
    param = np.zeros([shape[i] for i in order], F4).transpose(np.argsort(order))[flip]
    steps = tuple(draw(st.sampled_from([-3, -1, 1, 2])) for _ in shape)
    big = np.zeros([n * 3 for n in shape], F4, order=draw(st.sampled_from("CF")))
    grad = big[(..., *(slice(None, None, k) for k in steps))][(..., *(slice(0, n) for n in shape))]
    return param, grad


@settings(max_examples=60, deadline=None)
@given(dense_and_any(), st.integers(0, 2**32 - 1))
def test_any_layouts_together(arrays, seed):
    param, grad = arrays
    rng = np.random.default_rng(seed)
    param[...], grad[...] = rng.standard_normal(param.shape), rng.standard_normal(param.shape)
    before = grad.copy()
    step_and_compare(param, grad)
    assert np.array_equal(grad, before)


ODD_GRADS = {
    "permuted": np.arange(12, dtype=F4).reshape(4, 3).T,
    "broadcast": np.broadcast_to(F4(2), (3, 4)),
    "broadcast rows": np.broadcast_to(np.arange(4, dtype=F4), (3, 4)),
    "backwards": np.arange(12, dtype=F4).reshape(3, 4)[::-1, ::-1],
    "strided": np.arange(48, dtype=F4).reshape(6, 8)[::2, ::2],
    "unaligned": np.frombuffer(bytes(1) + np.arange(12, dtype=F4).tobytes(), F4, offset=1).reshape(3, 4),
    "read-only": np.frombuffer(np.arange(12, dtype=F4).tobytes(), F4).reshape(3, 4),
    "memory of a subclass": np.arange(12, dtype=F4).reshape(3, 4).view(np.recarray),
}


@pytest.mark.usefixtures("check")
@pytest.mark.parametrize("odd", ODD_GRADS)
def test_any_gradient_of_the_right_shape_is_read_and_never_written(odd):
    grad = ODD_GRADS[odd]
    before = grad.tobytes()
    opt = step_and_compare(np.ones((3, 4), F4), grad)
    opt.step(grad)  # the buffer of the first step serves again
    assert grad.tobytes() == before


@pytest.mark.usefixtures("check")
def test_memory_mapped_files(tmp_path):
    file = tmp_path / "w.bin"
    np.ones(5000, F4).tofile(file)
    param = np.memmap(file, F4, "r+")
    grad = np.memmap(file, F4, "r")  # the same file mapped twice: other addresses, so it counts as apart
    opt = RMSProp(param)
    for _ in range(3):
        opt.step(grad)
    with pytest.raises(ValueError, match="params is read-only"):
        RMSProp(grad)
    param.flush()
    assert np.all(np.fromfile(file, F4) < 1)


@pytest.mark.usefixtures("check")
def test_the_same_gradient_twice(rng):
    params = [np.ones(9, F4), np.ones(9, F4)]
    grad = rng.standard_normal(9).astype(F4)
    RMSProp(params).step([grad, grad])
    assert np.array_equal(params[0], params[1])
    assert not np.array_equal(params[0], np.ones(9))


class Cuda:
    """What CuPy arrays are known by."""

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
        'params["d"] is a list',
        '"e"] is not',
    ):
        assert part in text


def test_overlap_of_parameters_is_found_wherever_it_is(rng):
    a = np.zeros(100)
    assert RMSProp([a[:50], a[50:], a[7:7]])  # neighbours, and nothing, are apart
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
        for _ in range(2):  # a refused address is not remembered as checked
            refused(opt, params, list(grads), ValueError, "overlaps", text)
    # A column whose bounds hold two parameters, and no byte in common with them.
    opt.step([apart[0], memory[1::2, 9], None])
    assert opt.steps == 1


def _move(a):
    """The same header over other memory."""
    before, shape = a.ctypes.data, a.shape
    size = 100_000
    while a.ctypes.data == before:  # too large for the place where it is; shrinking does not move it back
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
    """Assign, though NumPy deprecates that for shapes and dtypes."""
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


def test_a_dtype_object_of_its_own_is_the_same_dtype():
    odd = np.dtype(F4, metadata={"unit": "m"})
    assert odd == np.dtype(F4)
    assert odd is not np.dtype(F4)
    step_and_compare(np.ones(5, odd), np.ones(5, F4))
    step_and_compare(np.ones(5, F4), np.ones(5, odd))


def test_huge_strides_over_empty_and_single_elements():
    base = np.ones(1, F4)
    for stride in (-(2**62), 2**62, 0, 1):
        step_and_compare(np.ones((1, 1), F4), as_strided(base, (1, 1), (stride, -stride)))
        step_and_compare(np.ones((0, 2), F4), as_strided(base, (0, 2), (stride, stride)))


def test_state_lies_on_cache_lines_of_its_own():
    params = [np.ones(n, F4) for n in (1, 5, 16, 17, 1000)]
    opt = RMSProp(params, momentum=0.5)
    for i, p in enumerate(params):
        for name in ("square_avg", "momentum_buffer"):
            x = opt.state[i][name]
            assert x.ctypes.data % (batch.LINE if x.nbytes >= batch.LINE else 16) == 0
            assert x.nbytes == p.nbytes


def test_header_layout_that_is_not_as_expected_is_noticed(monkeypatch):
    assert headers._layout_is_known()
    for field in ("_DATA", "_ND", "_SHAPE", "_STRIDES", "_DESCR", "_FLAGS"):
        with monkeypatch.context() as patch:
            patch.setattr(headers, field, 8)  # the type's word: readable, and never right
            # Where shapes are read from, the type object's first words; a count of references is no shape.
            assert not headers._layout_is_known()


class Raises:
    """What fails in the middle of the checks, as an interrupt might."""

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
def test_a_scalar_is_a_gradient_of_a_0d_parameter():
    step_and_compare(np.ones((), F4), F4(3))
    refused(RMSProp(param := np.ones((), F4)), [param], F8(3), TypeError, "grads has dtype float64")
    refused(RMSProp(param := np.ones(1, F4)), [param], F4(3), TypeError, "grads is a numpy.float32")


@pytest.mark.usefixtures("check")
@pytest.mark.parametrize(("start", "apart"), [(0, True), (1, False), (9, False), (13, False), (14, True)])
def test_overlap_begins_and_ends_with_the_element(start, apart):
    memory = np.ones(24, F4)
    param = memory[5:14]  # of nine: neighbours of five on both sides, or one element in common
    opt = RMSProp([param, np.ones(5, F4)])
    grads = [np.ones(9, F4), memory[start : start + 5]]
    if apart:
        opt.step(grads)
    else:
        refused(opt, [param], grads, ValueError, "grads[1] overlaps params[0]")
