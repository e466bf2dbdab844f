"""What the tensors of a step say of themselves, read and compared in one compiled call.

``torch.Tensor.__dlpack_c_exchange_api__`` (DLPack 1.3, torch 2.10) is a table of C functions. One of them fills a
DLTensor from a ``PyObject *`` without allocating: address, device, dtype, shape and strides. It is to tensors what
NumPy's struct is to arrays in ``steps/headers.py``, and it is asked again in every step, since identity proves nothing:
``p.data = ...``, ``set_`` and ``resize_`` leave the object what it was.

Three things it does not tell. That a tensor is negated or conjugated lazily: see `Reader.lazy_rows`. That an object is
no plain tensor: fake tensors and wrapper subclasses hand out addresses too, so the class of each object is compared
first. And that a storage was resized to nothing: the address is then the offset alone, see `_LOWEST`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit, types

from ..arrays.layout import NDArray
from ..kernels.cpu_code import entry, unique
from ..kernels.intrinsics import HOST, ask, make_scratch, memory, tell
from ..steps.headers import lies_so, overlaps

NEEDED = "torch 2.10 or newer is needed"


class DLTensor(ctypes.Structure):
    """DLPack's: what a tensor says of itself."""

    _fields_ = (
        ("data", ctypes.c_uint64),
        ("device", ctypes.c_int64),  # the type in the lower half, the number in the upper
        ("ndim", ctypes.c_int32),
        ("dtype", ctypes.c_int32),  # code, bits, and lanes in two bytes
        ("shape", ctypes.c_uint64),
        ("strides", ctypes.c_uint64),  # in elements
        ("offset", ctypes.c_uint64),
    )


class _Table(ctypes.Structure):
    """DLPack's table of version 1; of others only the first three fields are known."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("older", ctypes.c_uint64),  # the table of an older version
        ("allocate", ctypes.c_uint64),
        ("export_managed", ctypes.c_uint64),
        ("make", ctypes.c_uint64),
        ("export", ctypes.c_uint64),  # dltensor_from_py_object_no_sync
        ("stream", ctypes.c_uint64),  # current_work_stream
    )


# As DLPack numbers them.
DEVICES = {"cpu": 1, "cuda": 2}
_INT, _UINT, _FLOAT, _BFLOAT, _COMPLEX, _ONE_LANE = 0, 1, 2, 4, 5, 1 << 16
DTYPES = {
    torch.float32: _FLOAT | 32 << 8 | _ONE_LANE,
    torch.float64: _FLOAT | 64 << 8 | _ONE_LANE,
    torch.float16: _FLOAT | 16 << 8 | _ONE_LANE,
    torch.bfloat16: _BFLOAT | 16 << 8 | _ONE_LANE,
    torch.complex64: _COMPLEX | 64 << 8 | _ONE_LANE,
    torch.complex128: _COMPLEX | 128 << 8 | _ONE_LANE,
}
# And those that only state has.
_STORED = {
    torch.uint16: _UINT | 16 << 8 | _ONE_LANE,
    torch.uint8: _UINT | 8 << 8 | _ONE_LANE,
    torch.int16: _INT | 16 << 8 | _ONE_LANE,
}
_NUMBERED = {**DTYPES, **_STORED}

# Verdicts on a row, to be or-ed.
PARAM_CHANGED, GRAD_ODD, GRAD_OVERLAPS, STATE_CHANGED = 1, 2, 4, 8

UNCHECKED = -1  # in the column: no address that was checked
NO_ELEMENTS = 16  # in the column: a gradient without elements; 0 says that there is no gradient

# No allocator of a process of 64 bits gives memory below it; a gradient whose storage was resized to nothing has its
# offset as address. Were there memory, the slow way would be taken, and nothing worse.
_LOWEST = 1 << 32

_TYPE = 8  # the class of an object, in bytes from its start
_DATA, _DEVICE, _NDIM, _DTYPE = (getattr(DLTensor, name).offset for name in ("data", "device", "ndim", "dtype"))
_SHAPE, _STRIDES, _OFFSET = (getattr(DLTensor, name).offset for name in ("shape", "strides", "offset"))

# The block of addresses and counts that the function gets.
(
    _ROWS,
    _COLUMNS,
    _RECORDS,
    _OFFSETS,
    _COLUMN,
    _VERDICTS,
    _LOWS,
    _HIGHS,
    _INTERVALS,
    _EXPORT,
    _CLEAR,
    _NONE,
    _TENSOR,
) = range(13)

# A record of a tensor. Of a parameter, bytes and the dtype before them are those that its gradient has to have.
_R_TYPE, _R_DATA, _R_DEVICE, _R_DTYPE, _R_NDIM, _R_GRAD_DTYPE, _R_BYTES, _R_DIMS = range(8)


class Source(NamedTuple):
    """Whose tensors are read: their class, the address of what fills a DLTensor, and what they say themselves."""

    tensor: type  # of gradients; the class of a parameter or of state is what it was
    export: int
    record: Callable[[Any, Any], list[int]]
    is_lazy: Callable[[Any], bool]


def record(tensor: torch.Tensor, grad_dtype: torch.dtype | None = None) -> list[int]:
    """What a tensor has to go on saying of itself, by the interpreter's own reading.

    Of a parameter with the dtype that its gradient has to have.
    """
    grad_dtype = grad_dtype or tensor.dtype
    device = DEVICES[tensor.device.type] | (tensor.device.index or 0) << 32
    head = [id(type(tensor)), tensor.data_ptr(), device, _NUMBERED[tensor.dtype], tensor.dim()]
    dims = chain.from_iterable(zip(tensor.shape, tensor.stride(), strict=True))
    return [*head, _NUMBERED[grad_dtype], tensor.numel() * grad_dtype.itemsize, *dims]


def is_lazy(tensor: torch.Tensor) -> bool:
    """Is this the negative or the conjugate of what lies in its memory?"""
    return bool(tensor.is_neg() or tensor.is_conj())


def _may_be_lazy(words: list[int]) -> bool:
    """May a tensor with this record be dense, and lazy? One of complex numbers, or of one number."""
    return words[_R_DTYPE] & 0xFF == _COMPLEX or all(n == 1 for n in words[_R_DIMS::2])


def _table() -> _Table:
    """torch's table of version 1; an ImportError where there is none."""
    if ctypes.sizeof(ctypes.c_void_p) != 8 or object.__basicsize__ != 16:
        raise ImportError(
            "rmsprop_gpu.torch needs a CPython of 64 bits with a GIL: objects of this one begin otherwise"
        )
    name = "torch.Tensor.__dlpack_c_exchange_api__"
    capsule = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None:
        raise ImportError(f"torch {torch.__version__} has no {name}; {NEEDED}")
    pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
    pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    try:
        at = pointer_of(capsule, b"dlpack_exchange_api")
    except ValueError:
        raise ImportError(f"{name} of torch {torch.__version__} is {capsule!r}, no table of DLPack; {NEEDED}") from None
    versions = []
    while at:
        found = _Table.from_address(at)
        if found.major == 1:
            if found.export and found.stream:
                return found
            raise ImportError(f"{name} of torch {torch.__version__} lacks a function; {NEEDED}")
        versions.append(f"{found.major}.{found.minor}")
        at = found.older
    raise ImportError(f"{name} of torch {torch.__version__} has DLPack {', '.join(versions)}, not 1; {NEEDED}")


def exported(export: int, tensor: Any) -> list[int]:
    """What the table says of a tensor, in the order of a record up to the number of dimensions, then those."""
    function = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(DLTensor))(export)
    made = DLTensor()
    function(tensor, made)  # PYFUNCTYPE raises what the function did
    dims = [
        ctypes.c_int64.from_address(start + 8 * j).value
        for j in range(made.ndim)
        for start in (made.shape, made.strides)
    ]
    return [id(type(tensor)), made.data + made.offset, made.device, made.dtype, made.ndim, *dims]


def _samples() -> list[torch.Tensor]:
    """Tensors of each dtype and each way to lie."""
    made = []
    for dtype in DTYPES:
        block = torch.zeros((3, 4, 5), dtype=dtype, device="cpu")
        made += [block, block.mT, block[1:, 1:3, ::2], block[3:], block[0, 0, 2], block[:, :1].expand(3, 4, 5)]
        made += [block[0].clone().requires_grad_(), torch.nn.Parameter(block[1].clone())]
    return made + [torch.zeros((3, 4), dtype=dtype, device="cpu").mT for dtype in _STORED]


def _verified(table: _Table) -> _Table:
    """The table, where it says of samples what their methods say; else an ImportError."""
    for t in _samples():
        words = record(t)
        want, got = words[:_R_GRAD_DTYPE] + words[_R_DIMS:], exported(table.export, t)
        if got != want:
            raise ImportError(
                f"the DLPack table of torch {torch.__version__} says {got} of a {type(t).__name__} of {t.dtype} with "
                f"shape {tuple(t.shape)}, which says {want} of itself; {NEEDED}"
            )
    return table


_TORCH_TABLE = _verified(_table())
TORCH = Source(torch.Tensor, _TORCH_TABLE.export, record, is_lazy)
STREAM = int(_TORCH_TABLE.stream)  # the address of `current_work_stream`

_CLEAR_ERROR = int(ctypes.cast(ctypes.pythonapi.PyErr_Clear, ctypes.c_void_p).value or 0)

_current_work_stream = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_int32, ctypes.POINTER(ctypes.c_void_p))(
    STREAM
)


def current_stream(device_type: int, device: int) -> int:
    """The handle of torch's current stream on a device, by DLPack's number of its type; 0 is the default stream."""
    handle = ctypes.c_void_p()
    _current_work_stream(device_type, device, ctypes.byref(handle))
    return handle.value or 0


_load, _store = memory(np.int64, HOST)
_load_int32, _ = memory(np.int32, HOST)
_scratch = make_scratch(ctypes.sizeof(DLTensor) // 8 + 1)


def _make_check() -> Any:
    """``check(block, ids)``: verdicts on each row; 0 when there is nothing to look into.

    `ids` is a matrix: a line of parameters, one of gradients, then one for each column of state. Writes the address of
    each gradient into the column (0 for ``None``, `UNCHECKED` for one that is odd or overlaps), and looks for an
    overlap where it changed.
    """

    @njit(inline="always")
    def same(block, head, record, T, dtype, tensor):  # type: ignore[no-untyped-def]
        """Does this object lie as the record says? What it says of itself is left in `tensor`."""
        if _load(head + _TYPE, 0) != T:
            return False
        if ask(_load(block, _EXPORT), head, tensor) != 0:
            tell(_load(block, _CLEAR))  # it has set a Python exception
            return False
        nd = _load(record, _R_NDIM)
        if _load(tensor + _DEVICE, 0) != _load(record, _R_DEVICE) or _load_int32(tensor + _DTYPE, 0) != dtype:
            return False
        if _load_int32(tensor + _NDIM, 0) != nd:
            return False
        shape, strides = _load(tensor + _SHAPE, 0), _load(tensor + _STRIDES, 0)
        return lies_so(shape, strides, nd, _load(record, _R_BYTES), record + 8 * _R_DIMS)

    @njit(inline="always")
    def unmoved(block, head, record, tensor):  # type: ignore[no-untyped-def]
        if not same(block, head, record, _load(record, _R_TYPE), _load(record, _R_DTYPE), tensor):
            return False
        return _load(tensor + _DATA, 0) + _load(tensor + _OFFSET, 0) == _load(record, _R_DATA)

    @njit(types.int64(types.int64, types.int64))
    @unique
    def check(block, ids):  # type: ignore[no-untyped-def]
        rows, columns = _load(block, _ROWS), _load(block, _COLUMNS)
        records, offsets, column = _load(block, _RECORDS), _load(block, _OFFSETS), _load(block, _COLUMN)
        tensor, any_verdict = _scratch(), 0
        for i in range(rows):
            verdict = 0
            record = records + 8 * _load(offsets, i)
            if not unmoved(block, _load(ids, i), record, tensor):
                verdict = PARAM_CHANGED
            head = _load(ids, rows + i)
            if head == _load(block, _NONE):
                _store(column, i, 0)
            elif not same(block, head, record, _load(block, _TENSOR), _load(record, _R_GRAD_DTYPE), tensor):
                _store(column, i, UNCHECKED)
                verdict |= GRAD_ODD
            else:
                size = _load(record, _R_BYTES)
                start = _load(tensor + _DATA, 0) + _load(tensor + _OFFSET, 0) if size != 0 else NO_ELEMENTS
                if start != _load(column, i):
                    if size != 0 and 0 <= start < _LOWEST:
                        start = UNCHECKED
                        verdict |= GRAD_ODD
                    elif overlaps(_load(block, _LOWS), _load(block, _HIGHS), _load(block, _INTERVALS), start, size):
                        start = UNCHECKED
                        verdict |= GRAD_OVERLAPS
                    _store(column, i, start)
            for k in range(columns):
                j = (2 + k) * rows + i
                if not unmoved(block, _load(ids, j), records + 8 * _load(offsets, j - rows), tensor):
                    verdict |= STATE_CHANGED
            _store(_load(block, _VERDICTS), i, verdict)
            any_verdict |= verdict
        return any_verdict

    return check


class Reader:
    """The tensors of some rows as they were when it was made; `bind` compares those of a step with them.

    Parameters
    ----------
    params : sequence of tensors
        Of class ``Tensor`` or ``Parameter``, one a row; of each the class counts, too.
    states : sequence of columns of tensors
        What a step writes beside the parameters, one tensor a row in each column; the counters of steps may be one.
    grad_dtypes : sequence of dtypes
        What the gradient of each row has to have.
    column : int64 array
        Where the addresses of the gradients are to stand, one a row; nothing in it counts as checked.
    lowest, highest : int64 array
        The bounds of everything that the step writes, of all its rows: sorted, disjoint intervals.
    source : Source
        Whose tensors they are.

    Attributes
    ----------
    verdicts : int64 array
        What the last `bind` had to say of each row.
    lazy_rows : list of int
        The rows whose tensors may be dense and negated or conjugated lazily, of which the table says nothing: complex
        ones, and real ones of one element (``z.conj().imag`` is). `bind` asks the tensors of these rows themselves.
    """

    def __init__(
        self,
        params: Sequence[Any],
        states: Sequence[Sequence[Any]],
        grad_dtypes: Sequence[Any],
        column: NDArray,
        lowest: NDArray,
        highest: NDArray,
        source: Source = TORCH,
    ) -> None:
        rows = len(params)
        records = [source.record(p, T) for p, T in zip(params, grad_dtypes, strict=True)]
        for state in states:
            records += [source.record(x, None) for x in state]
        flat = np.array([word for record in records for word in record], np.int64)
        offsets = np.cumsum([0, *map(len, records)], dtype=np.int64)
        column.fill(UNCHECKED)
        self.verdicts = np.zeros(rows, np.int64)
        self.lazy_rows = [i for i in range(rows) if _may_be_lazy(records[i])]
        self._is_lazy = source.is_lazy
        self._ids = np.zeros((2 + len(states)) * rows, np.int64)
        owners = (flat, offsets, column, self.verdicts, lowest, highest)
        addresses = [x.ctypes.data for x in owners]
        constants = [len(lowest), source.export, _CLEAR_ERROR, id(None), id(source.tensor)]
        self._block = np.array([rows, len(states), *addresses, *constants], np.int64)
        self._owners = owners  # addresses do not own
        self._column = column
        self._check = entry(_make_check)
        self._arguments = (self._block.ctypes.data, self._ids.ctypes.data)

    def bind(self, params: Sequence[Any], grads: Sequence[Any], states: Sequence[Sequence[Any]]) -> int:
        """Look at the tensors of a step and take the addresses of its gradients: all verdicts, or-ed; 0 is well.

        The gradient of a row may be ``None``. Of a row with a verdict, the column holds `UNCHECKED` where its gradient
        is odd or overlaps what is written: it is for the caller to put an address there, that of a copy.
        """
        self._ids[:] = np.fromiter(map(id, chain(params, grads, *states)), np.int64, len(self._ids))
        verdict = int(self._check(*self._arguments))
        for i in self.lazy_rows:
            verdict |= self._ask_if_lazy(i, params[i], grads[i], [state[i] for state in states])
        return verdict

    def _ask_if_lazy(self, i: int, param: Any, grad: Any, state: Sequence[Any]) -> int:
        """The verdict on a row whose tensors may be lazy, where they lie as they should."""
        verdict = 0
        if not self.verdicts[i] & PARAM_CHANGED and self._is_lazy(param):
            verdict |= PARAM_CHANGED
        if grad is not None and not self.verdicts[i] & GRAD_ODD and self._is_lazy(grad):
            verdict |= GRAD_ODD
            self._column[i] = UNCHECKED
        if not self.verdicts[i] & STATE_CHANGED and any(map(self._is_lazy, state)):
            verdict |= STATE_CHANGED
        self.verdicts[i] |= verdict
        return verdict


def _make_count(T: Any) -> Any:
    """``count(counters, column, rows)``: one more in the T at each of these addresses whose row has a gradient.

    An address of 0 is no counter. Returns how many rows have a gradient.
    """
    load, store = memory(T, HOST)
    one = T(1)

    @njit(types.int64(types.int64, types.int64, types.int64))
    @unique
    def count(counters, column, rows):  # type: ignore[no-untyped-def]
        counted = 0
        for i in range(rows):
            if _load(column, i) != 0:
                counted += 1
                counter = _load(counters, i)
                if counter != 0:
                    store(counter, 0, load(counter, 0) + one)
        return counted

    return count


def counter(steps: Sequence[torch.Tensor | None], column: NDArray) -> Callable[[], int]:
    """Count a step: one more in each of these float32 or float64 scalars in host memory whose row has a gradient.

    They are written where they are now: `Reader.bind` tells whether they still are, if they are a column of its states.
    A row with None has none here. The call returns how many rows have a gradient.
    """
    kinds = []
    for theirs, T in ((torch.float32, np.float32), (torch.float64, np.float64)):
        addresses = np.array([x.data_ptr() if x is not None and x.dtype == theirs else 0 for x in steps], np.int64)
        kinds.append((entry(_make_count, T), addresses, (addresses.ctypes.data, column.ctypes.data, len(column))))
    kinds = [kind for kind in kinds if kind[1].any()] or kinds[:1]

    def count() -> int:
        counted = 0
        for add, _, arguments in kinds:
            counted = add(*arguments)
        return counted

    return count
