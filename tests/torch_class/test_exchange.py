"""What torch's tensors report about themselves: any change since binding is seen, and nothing else is."""

import ctypes
import math
import re

import numpy as np
import pytest
from devices import two
from processes import run

torch = pytest.importorskip("torch")

from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.nn import Parameter  # noqa: E402

from rmsprop_gpu.torch import exchange  # noqa: E402
from rmsprop_gpu.torch.exchange import (  # noqa: E402
    GRAD_ODD,
    GRAD_OVERLAPS,
    NO_ELEMENTS,
    PARAM_CHANGED,
    STATE_CHANGED,
    TORCH,
    UNCHECKED,
    DLTensor,
    Reader,
)

WELL = 0
F4, F8, F2, B2, C8 = torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64


class Sub(torch.Tensor):
    pass


class Row:
    """A parameter, its gradient, and two tensors of state."""

    def __init__(self, shape=(4, 4), dtype=F4, grad_dtype=None, cls=Parameter):
        self.p = torch.randn(shape, dtype=dtype)
        self.p = Parameter(self.p) if cls is Parameter else self.p
        self.grad_dtype = grad_dtype or dtype
        self.g = torch.randn(shape, dtype=self.grad_dtype)
        self.s = torch.randn(shape, dtype=dtype)
        self.step = torch.zeros(())

    @property
    def written(self):
        return self.p, self.s, self.step


def intervals(rows):
    spans = sorted((x.data_ptr(), x.data_ptr() + x.nbytes) for row in rows for x in row.written if x.numel())
    return np.array([a for a, _ in spans], np.int64), np.array([b for _, b in spans], np.int64)


class Bound:
    """Rows, and the reader made for them."""

    def __init__(self, rows, library=TORCH):
        self.rows, self.column = rows, np.zeros(len(rows), np.int64)
        params, states = [row.p for row in rows], [[row.s for row in rows], [row.step for row in rows]]
        dtypes = [row.grad_dtype for row in rows]
        self.reader = Reader(params, states, dtypes, self.column, *intervals(rows), library)

    def bind(self):
        rows = self.rows
        states = [row.s for row in rows], [row.step for row in rows]
        verdict = self.reader.bind([row.p for row in rows], [row.g for row in rows], states)
        assert verdict == np.bitwise_or.reduce(self.reader.verdicts, initial=0)
        return verdict


def bound(*rows):
    made = Bound([Row(), *rows, Row((3,))])
    assert made.bind() == WELL
    return made


def set_data(name, change):
    def applied(row):
        x = getattr(row, name)
        x.data = change(x.data)

    return applied


def put(name, change):
    return lambda row: setattr(row, name, change(getattr(row, name)))


def in_place(name, change):
    def applied(row):
        with torch.no_grad():
            change(getattr(row, name))

    return applied


def fake(x):
    with FakeTensorMode() as mode:
        return mode.from_tensor(x)


def on_meta(x):
    return Parameter(torch.empty_like(x, device="meta")) if isinstance(x, Parameter) else x.to("meta")


def freed(x):
    x.untyped_storage().resize_(0)


def inside_freed(x):
    """A tensor that starts at an offset into a storage without memory, so that the offset is its whole address."""
    base = torch.zeros(x.numel() + 5, dtype=x.dtype)
    part = base[5:].view(x.shape)
    freed(base)
    return part


def strided(x):
    return torch.zeros(*x.shape, 2, dtype=x.dtype)[..., 0]


def grown(x):
    before = x.data_ptr()
    x.untyped_storage().resize_(2 * x.nbytes)
    assert x.data_ptr() != before


# What happens to a row, and the resulting verdict.
EVERYWHERE = {
    "data": (set_data, torch.clone),
    "data of another dtype": (set_data, torch.Tensor.double),
    "data of another shape": (set_data, lambda x: x[:, :3]),
    "data of another rank": (set_data, lambda x: x.view(16)),
    "data transposed": (set_data, torch.t),
    "data with a step": (set_data, strided),
    "transposed in place": (in_place, lambda x: x.t_()),
    "a dimension more": (in_place, lambda x: x.unsqueeze_(0)),
    "a last dimension more": (in_place, lambda x: x.unsqueeze_(-1)),
    "no memory": (in_place, freed),
    "other memory": (in_place, grown),
    "set": (in_place, lambda x: x.set_(torch.zeros(4, 4))),
    "set elsewhere in its storage": (in_place, lambda x: x.set_(x.untyped_storage(), 1, (3, 4), (4, 1))),
    "copy": (put, lambda x: type(x)(x.detach().clone())),
    "subclass": (put, lambda x: x.detach().as_subclass(Sub)),
    "fake": (put, fake),
    "meta": (put, on_meta),
    "sparse": (put, lambda x: x.detach().to_sparse()),
    "mkldnn": (put, lambda x: x.detach().to_mkldnn()),
    "array": (put, lambda x: x.detach().numpy()),
    "number": (put, lambda x: 1.0),
}
CASES = [
    (f"{name}: {what}", how(name, change), verdict)
    for name, verdict in (("p", PARAM_CHANGED), ("s", STATE_CHANGED))
    for what, (how, change) in EVERYWHERE.items()
]
CASES += [
    (f"g: {what}", how("g", change), GRAD_ODD)
    for what, (how, change) in EVERYWHERE.items()
    if what not in ("data", "other memory", "set", "copy")
]
CASES += [
    ("p: a Tensor of the same memory", put("p", torch.Tensor.detach), PARAM_CHANGED),
    ("p: None", put("p", lambda x: None), PARAM_CHANGED),
    ("s: a Parameter of the same memory", put("s", Parameter), STATE_CHANGED),
    ("s: None", put("s", lambda x: None), STATE_CHANGED),
    ("step: data", set_data("step", torch.clone), STATE_CHANGED),
    ("step: another", put("step", torch.clone), STATE_CHANGED),
    ("step: another dtype", set_data("step", torch.Tensor.double), STATE_CHANGED),
    ("g: None", put("g", lambda x: None), WELL),
    ("g: copy", put("g", torch.clone), WELL),
    ("g: requires grad", put("g", lambda x: x.clone().requires_grad_()), WELL),
    ("g: has a history", put("g", lambda x: x.clone().requires_grad_() * 2), WELL),
    ("g: within another", put("g", lambda x: torch.zeros(40)[3:19].view(4, 4)), WELL),
    ("g: other memory", in_place("g", grown), WELL),
    ("g: a Parameter", put("g", Parameter), GRAD_ODD),
    ("g: expanded", put("g", lambda x: torch.ones(()).expand(4, 4)), GRAD_ODD),
    ("g: expanded along one", put("g", lambda x: torch.ones(4).expand(4, 4)), GRAD_ODD),
    ("g: half", put("g", torch.Tensor.half), GRAD_ODD),
    ("g: empty", put("g", lambda x: x[:0]), GRAD_ODD),
    ("g: no memory behind an offset", put("g", inside_freed), GRAD_ODD),
]


@pytest.mark.parametrize(("change", "verdict"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, about a beta feature
def test_whatever_differs_is_seen(change, verdict):
    made = bound(Row())
    before = made.column.copy()
    row = made.rows[1]
    change(row)
    for _ in range(2):  # an odd tensor stays odd
        assert made.bind() == verdict
        assert made.reader.verdicts.tolist() == [WELL, verdict, WELL]
        address = 0 if row.g is None else UNCHECKED if verdict & GRAD_ODD else row.g.data_ptr()
        assert made.column.tolist() == [before[0], address, before[2]]


def test_each_tensor_of_each_row_is_compared():
    count = 7
    for i in range(count):
        for name, verdict in (("p", PARAM_CHANGED), ("g", WELL), ("s", STATE_CHANGED), ("step", STATE_CHANGED)):
            made = Bound([Row((3, 1 + j)) for j in range(count)])
            assert made.bind() == WELL
            set_data(name, torch.clone)(made.rows[i])
            assert made.bind() == verdict
            assert np.flatnonzero(made.reader.verdicts).tolist() == [i] * (verdict > 0)
            assert made.column.tolist() == [row.g.data_ptr() for row in made.rows]


def test_all_verdicts_are_said_at_once():
    made = bound(Row())
    for name in ("p", "s"):
        set_data(name, torch.clone)(made.rows[1])
    made.rows[1].g = made.rows[1].g.t()
    made.rows[2].g = None
    assert made.bind() == PARAM_CHANGED | STATE_CHANGED | GRAD_ODD
    assert made.reader.verdicts.tolist() == [WELL, PARAM_CHANGED | STATE_CHANGED | GRAD_ODD, WELL]


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (0,), (3, 0, 2), (2, 1, 3, 1, 2)], ids=str)
@pytest.mark.parametrize("dtype", exchange.DTYPES, ids=str)
@pytest.mark.parametrize("cls", [Parameter, torch.Tensor])
def test_every_dtype_and_shape(shape, dtype, cls):
    row = Row(shape, dtype, cls=cls)
    made = bound(row)
    empty = 0 in shape
    assert made.column[1] == (NO_ELEMENTS if empty else row.g.data_ptr())
    assert (1 in made.reader.lazy_rows) == (dtype.is_complex or math.prod(shape) == 1)


@pytest.mark.parametrize("shape", [(1, 4), (4, 1, 3), (0, 4)])
def test_strides_that_say_nothing_do_not_count(shape):
    row = Row(shape)
    made = bound(row)
    strides = [77 if n == 1 or 0 in shape else stride for n, stride in zip(shape, row.g.stride(), strict=True)]
    row.g = torch.zeros(400).as_strided(shape, strides)
    assert made.bind() == WELL


@pytest.mark.parametrize("dtype", [F2, B2])
def test_the_dtype_of_a_gradient_is_its_own(dtype):
    row = Row(dtype=F4, grad_dtype=dtype)
    made = bound(row)
    assert made.column[1] == row.g.data_ptr()
    for other in {F2, B2, F4, F8} - {dtype}:
        row.g = torch.zeros(4, 4, dtype=other)
        assert made.bind() == GRAD_ODD


def test_a_gradient_that_comes_goes_and_comes_back():
    made = bound(Row())
    row, grad = made.rows[1], made.rows[1].g
    for g, address in ((None, 0), (grad, grad.data_ptr()), (None, 0), (None, 0), (grad, grad.data_ptr())):
        row.g = g
        assert made.bind() == WELL
        assert made.column[1] == address


@pytest.mark.parametrize(
    ("start", "nbytes", "overlap"),
    [
        *[(0, 64, False), (4, 64, True), (64, 64, True), (80, 16, True), (124, 64, True), (128, 64, False)],
        *[(124, 4, True), (132, 64, True), (128, 128, True), (252, 4, True), (256, 64, False), (0, 320, True)],
    ],
)
@pytest.mark.parametrize("grad_dtype", [F4, F2])
def test_a_gradient_that_overlaps_what_is_written(start, nbytes, overlap, grad_dtype):
    """The parameter has bytes 64 to 128 of the block, and its state 192 to 256."""
    block = torch.zeros(80)
    other = Row((16,), cls=torch.Tensor)
    other.p, other.s = block[16:32], block[48:64]
    row = Row((nbytes // grad_dtype.itemsize,), grad_dtype=grad_dtype)
    made = Bound([row, other])
    assert made.bind() == WELL
    row.g = block.view(torch.uint8)[start : start + nbytes].view(grad_dtype)
    for _ in range(2):  # again at the same address
        assert made.bind() == (GRAD_OVERLAPS if overlap else WELL)
        assert made.column[0] == (UNCHECKED if overlap else row.g.data_ptr())


def test_an_address_that_the_caller_wrote_is_looked_at_again():
    made = bound(Row())
    row, fine = made.rows[1], made.rows[1].g
    row.g = torch.zeros(4, 4).t()
    assert made.bind() == GRAD_ODD
    made.column[1] = fine.data_ptr() + 4096  # the address of a copy
    row.g = fine
    assert made.bind() == WELL
    assert made.column[1] == fine.data_ptr()


def test_nothing_in_the_column_counts_as_checked_for_a_new_reader():
    """Otherwise a gradient that overlaps memory only the new reader writes would be accepted."""
    made = bound(Row())
    grad = made.rows[1].g
    late = Row(cls=torch.Tensor)
    late.p = grad
    reader = Reader([made.rows[1].p], [], [F4], made.column[1:2], *intervals([late]))
    assert reader.bind([made.rows[1].p], [grad], []) == GRAD_OVERLAPS


LAZY = [
    ("p", C8, (3,), set_data("p", torch.conj), PARAM_CHANGED),
    ("s", C8, (3,), set_data("s", torch.conj), STATE_CHANGED),
    ("g", C8, (3,), put("g", torch.conj), GRAD_ODD),
    ("g", C8, (), put("g", lambda x: torch.zeros((), dtype=C8).conj()), GRAD_ODD),
    ("g", F4, (), put("g", lambda x: torch.ones((), dtype=C8).conj().imag), GRAD_ODD),
    ("g", F4, (1, 1), put("g", lambda x: torch.ones((1, 1), dtype=C8).conj().imag), GRAD_ODD),
    ("g", F4, (1,), put("g", lambda x: torch.ones((1,), dtype=C8).imag), WELL),
    ("g", F4, (2,), put("g", lambda x: torch.ones((2,), dtype=C8).conj().imag), GRAD_ODD),  # not dense
]


@pytest.mark.parametrize(("name", "dtype", "shape", "change", "verdict"), LAZY)
def test_what_is_lazy_is_asked_for(name, dtype, shape, change, verdict):
    row = Row(shape, dtype)
    made = bound(row)
    change(row)
    assert made.bind() == verdict
    assert made.reader.verdicts.tolist() == [WELL, verdict, WELL]
    assert (made.column[1] == UNCHECKED) == (verdict == GRAD_ODD)


def test_a_lazy_row_may_hold_what_is_no_tensor():
    row = Row((), F4)
    made = bound(row)
    row.p, row.g, row.s = None, 1.0, None
    assert made.bind() == PARAM_CHANGED | GRAD_ODD | STATE_CHANGED


def test_the_device_counts():
    def elsewhere(tensor, grad_dtype):
        words = exchange.record(tensor, grad_dtype)
        words[exchange._R_DEVICE] += 1 << 32
        return words

    made = Bound([Row()], TORCH._replace(record=elsewhere))
    assert made.bind() == PARAM_CHANGED | GRAD_ODD | STATE_CHANGED


def test_no_rows():
    none = np.zeros(0, np.int64)
    assert Reader([], [[]], [], none, none, none).bind([], [], [[]]) == WELL


@pytest.mark.parametrize("dtypes", [[F4] * 4, [F8] * 4, [F4, F8, F8, F4]], ids=["float32", "float64", "both"])
def test_counters_of_rows_with_a_gradient_count(dtypes):
    steps = [torch.tensor(float(i), dtype=dtype) for i, dtype in enumerate(dtypes)]
    steps[3].fill_(2**24 if dtypes[3] == F4 else 2**53)  # adding one leaves it unchanged
    column = np.array([NO_ELEMENTS, 0, 4096, 4096], np.int64)
    count = exchange.counter(steps, column)
    count()
    count()
    assert [float(x) for x in steps[:3]] == [2, 1, 4]
    assert float(steps[3]) == (2**24 if dtypes[3] == F4 else 2**53)
    column[:] = 0
    count()
    assert float(steps[0]) == 2


KEPT = """
import numpy as np, torch
from numba.core import event
from rmsprop_gpu.torch import exchange
p, g, step = torch.zeros(3), torch.ones(3), torch.zeros(())
column, none = np.zeros(1, np.int64), np.zeros(0, np.int64)
with event.install_recorder("numba:compile") as recorder:
    verdict = exchange.Reader([p], [[step]], [p.dtype], column, none, none).bind([p], [g], [[step]])
    exchange.counter([step], column)()
print(len(recorder.buffer) > 0, verdict, column[0] == g.data_ptr(), float(step))
"""


def test_the_next_process_finds_the_check_on_disk_and_gives_it_addresses_of_its_own(tmp_path):
    pytest.importorskip("platformdirs")
    for compiles in ("True", "False"):
        assert run(KEPT, RMSPROP_GPU_CACHE_DIR=str(tmp_path)) == f"{compiles} 0 True 1.0"


# The table itself


def capsule_of(table, name=b"dlpack_exchange_api"):
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    return new(ctypes.addressof(table), name, None)


def changed(**fields):
    """torch's table with other values in some fields."""
    table = exchange._Table.from_buffer_copy(exchange._table())
    for name, value in fields.items():
        setattr(table, name, value)
    return table


@pytest.fixture
def offered(monkeypatch):
    """Make torch offer this table."""

    def offer(table, **options):
        monkeypatch.setattr(torch.Tensor, "__dlpack_c_exchange_api__", capsule_of(table, **options))
        return table

    return offer


def test_a_newer_table_leads_to_the_one_that_is_known(offered):
    known = changed()
    newer = changed(major=2, older=ctypes.addressof(known))
    newest = offered(changed(major=3, older=ctypes.addressof(newer)))
    assert ctypes.addressof(exchange._table()) == ctypes.addressof(known)
    assert newest.older == ctypes.addressof(newer)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"major": 2, "minor": 1, "older": 0}, r"has DLPack 2\.1, not 1"),
        ({"export": 0}, "lacks a function"),
        ({"stream": 0}, "lacks a function"),
    ],
)
def test_a_table_that_does_not_serve_is_refused(fields, said, offered):
    table = offered(changed(**fields))
    version = re.escape(torch.__version__)
    with pytest.raises(ImportError, match=rf"torch {version} {said}.*; torch 2\.10 or newer is needed"):
        exchange._table()
    assert table


def test_a_capsule_of_another_name_is_refused(offered):
    name = b"dltensor"
    table = offered(changed(), name=name)
    with pytest.raises(ImportError, match=r"is <capsule .*, not a DLPack table; torch 2\.10"):
        exchange._table()
    assert table


def test_objects_that_begin_otherwise_are_refused(monkeypatch):
    monkeypatch.setattr(exchange, "object", type("o", (), {"__slots__": ("a", "b")}), raising=False)  # 32 bytes
    with pytest.raises(ImportError, match="64-bit CPython with a GIL"):
        exchange._table()


OLDER_NAME = """
import torch
asked = []
del torch.optim.Optimizer._accelerator_graph_capture_health_check
torch.optim.Optimizer._cuda_graph_capture_health_check = lambda self: asked.append(self)
from rmsprop_gpu.torch import RMSprop
p = torch.nn.Parameter(torch.ones(3))
p.grad = torch.ones(3)
opt = RMSprop([p])
opt.step()
print(asked == [opt], p.tolist() != [1, 1, 1])
"""


def test_torchs_check_of_a_capture_goes_by_its_name_in_torch_2_10_too():
    assert run(OLDER_NAME) == "True True"


@pytest.mark.parametrize("field", ["data", "device", "ndim", "dtype", "shape", "strides", "offset"])
def test_a_table_that_says_otherwise_than_the_tensors_is_refused(field):
    export = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(DLTensor))(exchange.TORCH.export)
    wrong = (ctypes.c_int64 * 8)(*[9] * 8)

    @ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(DLTensor))
    def lies(tensor, out):
        export(tensor, out)
        was = getattr(out.contents, field)
        setattr(out.contents, field, ctypes.addressof(wrong) if field in ("shape", "strides") else was ^ 1)
        return 0

    table = changed(export=ctypes.cast(lies, ctypes.c_void_p).value)
    with pytest.raises(ImportError, match=r"itself reports \[.*; torch 2\.10 or newer is needed"):
        exchange._verified(table)


@pytest.mark.parametrize(
    ("before", "said"),
    [
        ("import sys; sys.modules['torch'] = None", "import of torch halted"),
        ("import torch; del torch.Tensor.__dlpack_c_exchange_api__", "has no torch.Tensor.__dlpack_c_exchange_api__"),
    ],
)
def test_without_the_torch_that_is_needed_the_import_says_what_to_install(before, said):
    program = f"{before}\ntry:\n    import rmsprop_gpu.torch\nexcept ImportError as error:\n    print(error)"
    text = run(program)
    assert said in text
    assert "it comes with the extra torch: " in text


@pytest.mark.parametrize("mode", [lambda: torch.device("meta"), torch.inference_mode, torch.no_grad])
def test_the_table_is_verified_in_any_mode(mode):
    with mode():
        assert exchange._verified(exchange._table()).export == TORCH.export


def test_the_stream_of_the_host_is_the_default_one():
    assert exchange.current_stream(exchange.DEVICES["cpu"], 0) == 0


# Arrays on a device, through a table of our own: torch itself need not support the device


class Devices:
    """A function that fills a DLTensor from a CuPy array, like the one in a table of C functions."""

    def __init__(self):
        self._kept = {}
        self._function = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(DLTensor))(self._export)

    def _export(self, array, out):
        nd = array.ndim
        shape = (ctypes.c_int64 * nd)(*array.shape)
        strides = (ctypes.c_int64 * nd)(*(stride // array.itemsize for stride in array.strides))
        self._kept[id(array)] = shape, strides
        t = out.contents
        # This is not the address of the first element: the offset has to be added.
        t.data, t.offset = array.data.mem.ptr, array.data.ptr - array.data.mem.ptr
        t.device, t.ndim, t.dtype = self._device(array), nd, self._dtype(array.dtype)
        t.shape, t.strides = ctypes.addressof(shape), ctypes.addressof(strides)
        return 0

    def _device(self, array):
        return exchange.DEVICES["cuda"] | array.device.id << 32

    def _dtype(self, dtype):
        return exchange.DTYPES[getattr(torch, np.dtype(dtype).name)]

    def record(self, array, grad_dtype):
        grad_dtype = np.dtype(grad_dtype or array.dtype)
        head = [id(type(array)), array.data.ptr, self._device(array), self._dtype(array.dtype), array.ndim]
        dims = [x for n, s in zip(array.shape, array.strides, strict=True) for x in (n, s // array.itemsize)]
        return [*head, self._dtype(grad_dtype), array.size * grad_dtype.itemsize, *dims]

    def source(self):
        import cupy

        address = ctypes.cast(self._function, ctypes.c_void_p).value
        return exchange.Source(cupy.ndarray, address, self.record, lambda array: False)


@pytest.fixture
def on_device():
    """Rows on a device, bound to a reader. Yields a function that binds them again with some tensors replaced."""
    import cupy

    devices = Devices()
    # The second parameter has an offset into its memory, and so does its DLTensor.
    params = [cupy.zeros((3, 4), np.float32), cupy.zeros((5, 4), np.float32)[1:], cupy.zeros(0, np.float32)]
    states = [[cupy.zeros_like(p) for p in params]]
    grads = [cupy.ones_like(p) for p in params]
    spans = sorted((x.data.ptr, x.data.ptr + x.nbytes) for x in [*params, *states[0]] if x.size)
    column = np.zeros(3, np.int64)
    bounds = np.array(spans, np.int64).T.copy()
    reader = Reader(params, states, [np.float32] * 3, column, *bounds, devices.source())
    assert reader.bind(params, grads, states) == WELL
    assert column.tolist() == [grads[0].data.ptr, grads[1].data.ptr, NO_ELEMENTS]
    yield lambda p=None, g=None, s=None: _bind(reader, column, params, grads, states, p, g, s)
    assert devices  # keep the function alive until here


def _bind(reader, column, params, grads, states, p, g, s):
    params, grads, states = [*params], [*grads], [[*states[0]]]
    params[1] = params[1] if p is None else p(params[1])
    grads[1] = grads[1] if g is None else g(grads[1], params[1], states[0][1])
    states[0][1] = states[0][1] if s is None else s(states[0][1])
    verdict = reader.bind(params, grads, states)
    assert reader.verdicts.tolist() == [WELL, verdict, WELL]
    return verdict, int(column[1]), grads[1]


@pytest.mark.gpu
def test_arrays_of_a_device_are_read_and_compared(on_device):
    import cupy

    def fresh(x):
        return x.copy()

    assert on_device()[0] == WELL
    for well in (fresh, lambda g: cupy.zeros((5, 4), np.float32)[1:]):
        verdict, address, grad = on_device(g=lambda g, p, s, well=well: well(g))
        assert (verdict, address) == (WELL, grad.data.ptr)
    assert on_device(p=fresh)[0] == PARAM_CHANGED
    assert on_device(s=fresh)[0] == STATE_CHANGED
    for odd in (lambda x: x.T, lambda x: x[:3], lambda x: x.astype(np.float64), lambda x: x.ravel(), cupy.asnumpy):
        assert on_device(g=lambda g, p, s, odd=odd: odd(g))[:2] == (GRAD_ODD, UNCHECKED)
        assert on_device(p=odd)[0] == PARAM_CHANGED
        assert on_device(s=odd)[0] == STATE_CHANGED
    assert on_device(g=lambda g, p, s: p)[:2] == (GRAD_OVERLAPS, UNCHECKED)
    assert on_device(g=lambda g, p, s: s)[:2] == (GRAD_OVERLAPS, UNCHECKED)


@pytest.mark.gpu
@two
def test_an_array_of_another_device_is_odd(on_device):
    import cupy

    with cupy.cuda.Device(1):
        elsewhere = cupy.ones((4, 4), np.float32)
    assert on_device(g=lambda g, p, s: elsewhere)[:2] == (GRAD_ODD, UNCHECKED)
    assert on_device(p=lambda x: elsewhere)[0] == PARAM_CHANGED
    assert on_device(s=lambda x: elsewhere)[0] == STATE_CHANGED
