"""All arrays that a step accepts, in place or copied: parameters in any dense layout, gradients in any layout."""

import numpy as np
import pytest
from given_arrays import refused, step_and_compare
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import as_strided

from rmsprop_gpu import RMSProp
from rmsprop_gpu.steps import batch, headers

F4, F8 = np.float32, np.float64

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
    """A dense array with any axis order and direction, and a gradient of its shape in any layout."""
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
    opt.step(grad)  # the first step's buffer is reused
    assert grad.tobytes() == before


@pytest.mark.usefixtures("check")
def test_memory_mapped_files(tmp_path):
    file = tmp_path / "w.bin"
    np.ones(5000, F4).tofile(file)
    param = np.memmap(file, F4, "r+")
    grad = np.memmap(file, F4, "r")  # the same file mapped twice has other addresses, so it counts as separate memory
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
            patch.setattr(headers, field, 8)  # the word that holds the type: readable, but never right
            # For shapes, this reads the type object's first words, and a reference count is not a shape.
            assert not headers._layout_is_known()


@pytest.mark.usefixtures("check")
def test_a_scalar_is_a_gradient_of_a_0d_parameter():
    step_and_compare(np.ones((), F4), F4(3))
    refused(RMSProp(param := np.ones((), F4)), [param], F8(3), TypeError, "grads has dtype float64")
    refused(RMSProp(param := np.ones(1, F4)), [param], F4(3), TypeError, "grads is a numpy.float32")
