"""Results are bit-identical, however the work is divided."""

import numba
import numpy as np
import pytest
from variants import EVERY, arguments, cover, name, random_problem

from rmsprop_gpu import AdaGrad, RMSProp
from rmsprop_gpu.kernels import cpu_drive
from rmsprop_gpu.kernels.table import chunk_list

VARIANTS = list(dict.fromkeys([EVERY[0], *cover(2)[:4], max(EVERY, key=sum)]))
SIZES = [5, 40_001, 0, 1, 255, 49_152]


def result(variant, dtype, divide=lambda a: [a]):
    """The bytes of everything after three steps of the same problem. `divide` cuts every array into views."""
    rng = np.random.default_rng(7)
    opt, params, grads = random_problem(variant, SIZES, dtype, rng)
    pieces = [piece for p in params for piece in divide(p)]
    cut = (AdaGrad if variant.adagrad else RMSProp)(pieces, **arguments(variant))
    at = 0
    for i in range(len(params)):
        for piece in zip(*(divide(x) for x in opt.state[i].values() if x.ndim), strict=True):
            mine = cut.state[at]
            for x, start in zip((x for x in mine.values() if x.ndim), piece, strict=True):
                x[:] = start
            at += 1
    for _ in range(3):
        cut.step([piece for g in grads for piece in divide(g)])
    state = [
        np.concatenate([cut.state[i][k].ravel() for i in range(len(pieces))]) for k, x in cut.state[0].items() if x.ndim
    ]
    return [np.concatenate(params).view(np.uint8), *(x.view(np.uint8) for x in state)]


def assert_same(got, want):
    for g, w in zip(got, want, strict=True):
        assert np.array_equal(g, w)


@pytest.fixture(params=[np.float32, np.float64])
def dtype(request):
    return request.param


@pytest.fixture(params=VARIANTS, ids=name)
def variant(request):
    return request.param


@pytest.mark.parametrize("unit", [1, 7, 1000, 10**9])
def test_wherever_a_tensor_may_be_cut(variant, dtype, unit, monkeypatch):
    want = result(variant, dtype)
    monkeypatch.setattr(cpu_drive, "UNIT", unit)
    monkeypatch.setattr(cpu_drive, "parts_of", lambda size: 100)
    assert_same(result(variant, dtype), want)


@pytest.mark.parametrize("parts", [1, 3, 1000])
def test_any_number_of_parts_and_threads(variant, dtype, parts, monkeypatch):
    monkeypatch.setattr(cpu_drive, "SERIAL_BELOW", 10**9)
    want = result(variant, dtype)
    monkeypatch.setattr(cpu_drive, "parts_of", lambda size: parts)
    most = numba.get_num_threads()
    try:
        for threads in range(1, most + 1):
            numba.set_num_threads(threads)
            assert_same(result(variant, dtype), want)
    finally:
        numba.set_num_threads(most)


def test_one_array_or_its_pieces(variant, dtype):
    if variant.norm:
        pytest.skip("a norm is summed tensor by tensor, so its last bit depends on how the elements are divided")

    def pieces(a):
        return [a[:3], a[3:1000], a[1000:1001], a[1001:]]

    assert_same(result(variant, dtype, pieces), result(variant, dtype))


def test_a_tensor_left_out_is_found(monkeypatch):
    want = result(VARIANTS[0], np.float32)
    whole = cpu_drive.shares

    def short(sizes, parts, unit):
        bounds = whole(sizes, parts, unit)
        bounds[-1, 0] -= 1
        return bounds

    monkeypatch.setattr(cpu_drive, "shares", short)
    with pytest.raises(AssertionError):
        assert_same(result(VARIANTS[0], np.float32), want)


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_chunks_cover_every_element_once(chunk, rng):
    sizes = [0, 1, 2, 3, 4, 0, 99, 100, 101, 350, 0]
    chunks = chunk_list(sizes, chunk)
    seen = [np.zeros(size, int) for size in sizes]
    for row, start, stop in chunks:
        assert stop - start <= chunk
        seen[row][start:stop] += 1
    assert all((s == 1).all() for s in seen)
    assert [int((chunks[:, 0] == row)[chunks[:, 1] == 0].sum()) for row in range(len(sizes))] == [1] * len(sizes)
