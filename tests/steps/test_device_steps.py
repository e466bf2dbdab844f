"""Steps on a device: their launches, copies and allocations."""

import numpy as np
import pytest
from on_device import arrays, everything
from variants import bits

from rmsprop_gpu import RMSProp
from rmsprop_gpu.hyper import scalars
from rmsprop_gpu.kernels import cuda
from rmsprop_gpu.kernels.rule import Variant
from rmsprop_gpu.kernels.table import PARAM, SQUARE_AVG
from rmsprop_gpu.steps import on_cupy
from rmsprop_gpu.steps.batch import Norms, make_batch

pytestmark = pytest.mark.gpu
cupy = pytest.importorskip("cupy", exc_type=ImportError)
F4 = np.float32


@pytest.fixture
def uploads(monkeypatch):
    """The sizes of the copies from the host."""
    sizes, upload = [], on_cupy.upload

    def spy(target, source, stream):
        sizes.append(source.nbytes)
        upload(target, source, stream)

    monkeypatch.setattr(on_cupy, "upload", spy)
    return sizes


class Allocations(cupy.cuda.MemoryHook):
    """Records the sizes of CuPy's allocations."""

    name = "allocations"

    def __init__(self):
        self.sizes = []

    def malloc_postprocess(self, **given):
        self.sizes.append(given["size"])


def test_one_launch_a_batch_and_two_with_bias_correction(launched):
    grads = arrays(1) * 40  # 160 tensors
    params = [g.copy() for g in grads]
    opt = RMSProp(params)
    opt.step(grads)
    assert len(launched) == 1
    assert launched[0].startswith(
        "update_kernel[float32, plain] over 160 arrays (params[0], params[1], params[2], ...)"
    )
    launched.clear()
    RMSProp([p.copy() for p in params], bias_correction=True).step(grads)
    assert [text.split("[")[0] for text in launched] == ["prepare_kernel", "update_kernel"]
    launched.clear()
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 1.0}, {"params": arrays(0, np.float64)}]
    RMSProp(groups).step([grads[:2], grads[2:], arrays(1, np.float64)])
    assert len(launched) == 2  # numbers share a batch, dtypes do not


def test_a_step_copies_what_changed_and_allocates_nothing(uploads):
    opt, grads, others = RMSProp(arrays(0), momentum=0.5), arrays(1), arrays(2)
    for _ in range(2):
        opt.step(grads)
    uploads.clear()
    with Allocations() as allocations:
        for _ in range(5):
            opt.step(grads)
        assert uploads == []
        opt.step(others)
        assert uploads == [8 * len(grads)]  # the column
        opt.lr = 0.5
        opt.step(others)
        opt.lr = 0.5
        opt.step(others)
        assert uploads == [8 * len(grads), 13 * 4]  # the scalars, once
        opt.param_groups[0]["alpha"] = 0.7
        opt.step(others)
        assert uploads == [8 * len(grads), 13 * 4, 13 * 4]
    assert allocations.sizes == []


def test_lr_is_sent_when_it_is_assigned(uploads):
    opt, grads = RMSProp(arrays(0)), arrays(1)
    opt.step(grads)
    uploads.clear()
    opt.lr = 0.25
    assert uploads == [13 * 4]
    opt.step(grads)
    assert uploads == [13 * 4]


def test_an_odd_gradient_is_copied_into_a_buffer_that_is_kept(rng):
    host = rng.standard_normal((6, 8)).astype(F4)
    params = [cupy.asarray(host.copy()), cupy.asarray(host.copy())]
    odd, opt, plain = cupy.asarray(host.T.copy()).T, RMSProp(params[0]), RMSProp(params[1])
    opt.step(odd)
    plain.step(cupy.asarray(host))
    with Allocations() as allocations:
        for k in range(3):  # the same array with other values, copied each time
            odd *= 2
            opt.step(odd)
            plain.step(cupy.asarray(host * 2 ** (k + 1)))
            allocations.sizes and allocations.sizes.pop()  # drop the allocation of cupy.asarray
    assert allocations.sizes == []
    assert everything(opt) == everything(plain)


def test_any_dense_layout_is_updated_where_it_lies(rng):
    host = rng.standard_normal((6, 5, 4)).astype(F4)
    makers = [lambda a: a, lambda a: a.T, lambda a: a.transpose(1, 0, 2), lambda a: a[::-1], lambda a: a[:, ::-1, ::-1]]
    for make in makers:
        p, g = make(host.copy()), make(host * 0.5)
        dp, dg = make(cupy.asarray(host)), make(cupy.asarray(host * F4(0.5)))
        for params, grads in ((p, g), (dp, dg)):
            opt = RMSProp(params, centered=True)
            for x in (grads, grads.copy(), grads):
                opt.step(x)
        assert bits(p) == bits(dp)
        assert bits(opt.state[0]["square_avg"]) == bits(_twin(p, g, "square_avg"))
        assert opt.state[0]["square_avg"].strides == dp.strides


def _twin(p, g, name):
    opt = RMSProp(p.copy(order="K"), centered=True)
    for _ in range(3):
        opt.step(g)
    return opt.state[0][name]


def test_beyond_two_to_the_31_elements(rng):
    """A chunk whose offset needs more than 32 bits. Bases are moved back, so that base plus offset is real memory."""
    for dtype, offset in ((F4, 2**31 + 8192), (np.float64, 2**33), (np.float16, 2**32 + 8)):
        n, size = 1003, np.dtype(dtype).itemsize
        host = [rng.standard_normal(n).astype(dtype) for _ in range(2)]
        p, g = (cupy.asarray(x) for x in host)
        compute = np.float64 if dtype is np.float64 else F4
        v = cupy.zeros(n, compute)
        h = RMSProp(host[0].copy()).param_groups[0].hyper()
        norms = Norms([], [], 0, narrow=compute is F4)
        batch = make_batch(Variant(), np.dtype(dtype), np.dtype(dtype), 0, [], [], [], norms)
        table = np.zeros((1, 8), np.int64)
        table[0, PARAM], table[0, SQUARE_AVG] = p.data.ptr - offset * size, v.data.ptr - offset * v.itemsize
        column, chunks = np.array([g.data.ptr - offset * size]), np.array([[0, offset, offset + n]])
        row = scalars(h, 0.1, np.dtype(compute))
        sent = [cupy.asarray(x) for x in (table, column, chunks, row)]
        at = cuda.Addresses(*[x.data.ptr for x in sent], 0, 0, 0, 0, 0)
        kernels, stream = cuda.kernels(Variant(), np.dtype(dtype), np.dtype(dtype)), cupy.cuda.get_current_stream()
        cuda.launches(kernels, stream, batch, at, 1, 0, False)["update_kernel"]()
        want = host[0].copy()
        RMSProp(want, lr=0.1).step(host[1])
        assert bits(p) == bits(want)


def test_a_kernel_is_compiled_once_for_all_optimizers_and_devices():
    dtype, variant = np.dtype(F4), Variant(momentum=True)
    first = cuda.kernels(variant, dtype, dtype)
    for _ in range(2):
        RMSProp(arrays(0), momentum=0.25).step(arrays(1))
    assert cuda.kernels(variant, dtype, dtype) == first
    kernel = cuda.functions(variant, dtype, dtype)["update_kernel"]
    assert len(kernel.overloads) == 1


def test_kernels_are_what_a_step_launches(launched):
    opt = RMSProp(arrays(0), bias_correction=True, eps=0)
    kernels = opt.kernels()
    assert list(kernels) == [
        "prepare_kernel[float32, bias_correction+no eps]",
        "update_kernel[float32, bias_correction+no eps]",
    ]
    assert all(".entry" in ptx for kernel in kernels.values() for ptx in kernel.inspect_asm().values())
    assert not launched
    opt.step(arrays(1))
    assert [text.split(" over")[0] for text in launched] == list(kernels)
