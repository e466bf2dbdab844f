"""The check of tensors over memory of a device: CuPy's arrays, by a table as DLPack's that is made here."""

import ctypes

import numpy as np
import pytest

pytest.importorskip("torch")
cupy = pytest.importorskip("cupy", exc_type=ImportError)

from rmsprop_gpu.torch import exchange  # noqa: E402

pytestmark = pytest.mark.gpu
CODES = {np.dtype(np.float32): 2 | 32 << 8 | 1 << 16, np.dtype(np.float16): 2 | 16 << 8 | 1 << 16}


def dims(x):
    return [n for pair in zip(x.shape, (s // x.itemsize for s in x.strides), strict=True) for n in pair]


def record_of(x, grad_dtype):
    grad_dtype = np.dtype(grad_dtype or x.dtype)
    head = [id(type(x)), x.data.ptr, 2 | x.data.device_id << 32, CODES[x.dtype], x.ndim]
    return [*head, CODES[grad_dtype], x.size * grad_dtype.itemsize, *dims(x)]


@pytest.fixture
def cupys():
    """CuPy's arrays as a `Library`, by a table of one function that is made here, and lives until the test ends."""
    held = []

    @ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(exchange.DLTensor))
    def export(x, made):
        shape, strides = (ctypes.c_int64 * x.ndim)(*dims(x)[::2]), (ctypes.c_int64 * x.ndim)(*dims(x)[1::2])
        held.append((shape, strides))
        words = x.data.ptr, 2 | x.data.device_id << 32, x.ndim, CODES[x.dtype], *map(ctypes.addressof, held[-1]), 0
        made[0] = exchange.DLTensor(*words)
        return 0

    address = ctypes.cast(export, ctypes.c_void_p).value
    yield exchange.Library(cupy.ndarray, address, record_of, lambda _: False)
    held.clear()


class Checked:
    """Arrays on the device, and the reader that was made for them."""

    def __init__(self, library):
        self.params, self.grads, self.states = ([cupy.zeros((4, n), np.float32) for n in (3, 5)] for _ in range(3))
        written = sorted((x.data.ptr, x.data.ptr + x.nbytes) for x in (*self.params, *self.states))
        lows, highs = (np.array(x, np.int64) for x in zip(*written, strict=True))
        self.column = np.zeros(2, np.int64)
        dtypes = [np.float32, np.float16]
        self.reader = exchange.Reader(self.params, [self.states], dtypes, self.column, lows, highs, library)
        self.grads[1] = self.grads[1].astype(np.float16)

    def verdicts(self):
        self.reader.bind(self.params, self.grads, [self.states])
        return self.reader.verdicts.tolist()


def test_the_check_reads_what_lies_on_a_device(cupys):
    it = Checked(cupys)
    assert it.verdicts() == [0, 0]
    assert it.column.tolist() == [g.data.ptr for g in it.grads]
    assert it.verdicts() == [0, 0]
    it.grads[0] = None
    assert it.verdicts() == [0, 0]
    assert it.column[0] == 0


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        (lambda it: it.params.__setitem__(0, it.params[0].copy()), exchange.PARAM_CHANGED),
        (lambda it: it.states.__setitem__(0, it.states[0].copy()), exchange.STATE_CHANGED),
        (lambda it: it.grads.__setitem__(0, cupy.asfortranarray(it.grads[0])), exchange.GRAD_ODD),
        (lambda it: it.grads.__setitem__(0, it.grads[0].astype(np.float16)), exchange.GRAD_ODD),
        (lambda it: it.grads.__setitem__(0, it.grads[0][:2]), exchange.GRAD_ODD),
        (lambda it: it.grads.__setitem__(0, it.grads[0].get()), exchange.GRAD_ODD),
        (lambda it: it.grads.__setitem__(0, it.states[0]), exchange.GRAD_OVERLAPS),
    ],
    ids=["param", "state", "layout", "dtype", "shape", "host", "overlap"],
)
def test_the_check_sees_what_is_another_on_a_device(change, verdict, cupys):
    it = Checked(cupys)
    it.verdicts()
    change(it)
    assert it.verdicts() == [verdict, 0]


def test_the_check_tells_devices_apart(cupys):
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("there is one device")
    it = Checked(cupys)
    with cupy.cuda.Device(1):
        it.grads[0] = cupy.zeros((4, 3), np.float32)
    assert it.verdicts() == [exchange.GRAD_ODD, 0]
