"""Read and compare the metadata of all tensors of a step in one compiled call.

``torch.Tensor.__dlpack_c_exchange_api__`` (DLPack 1.3, torch 2.10) is a table of C functions. One of them fills a
DLTensor from a ``PyObject *`` without allocating: address, device, dtype, shape and strides. It is for tensors what
NumPy's struct is for arrays in ``steps/headers.py``. It is called again in every step, since identity proves nothing:
``p.data = ...``, ``set_`` and ``resize_`` change a tensor, but not the identity of the object.

It does not reveal three things. A tensor may be negated or conjugated lazily: see `Reader.lazy_rows`. An object may not
be a plain tensor: fake tensors and wrapper subclasses return addresses too, so the class of each object is compared
first. And a storage may have been resized to nothing: the address is then just the offset, see `_LOWEST`.
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
    """DLPack's struct: the metadata of a tensor."""

    _fields_ = (
        ("data", ctypes.c_uint64),
        ("device", ctypes.c_int64),  # the type in the lower half, the index in the upper
        ("ndim", ctypes.c_int32),
        ("dtype", ctypes.c_int32),  # code, bits, and lanes in two bytes
        ("shape", ctypes.c_uint64),
        ("strides", ctypes.c_uint64),  # in elements
        ("offset", ctypes.c_uint64),
    )


class _Table(ctypes.Structure):
    """DLPack's table, version 1; in other versions only the first three fields are known."""

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


# DLPack's numbers.
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
# And the dtypes that only state has.
_STORED = {
    torch.uint16: _UINT | 16 << 8 | _ONE_LANE,
    torch.uint8: _UINT | 8 << 8 | _ONE_LANE,
    torch.int16: _INT | 16 << 8 | _ONE_LANE,
}
_NUMBERED = {**DTYPES, **_STORED}

# Verdicts on a row, to be or-ed.
PARAM_CHANGED, GRAD_ODD, GRAD_OVERLAPS, STATE_CHANGED = 1, 2, 4, 8

UNCHECKED = -1  # in the column: no checked address
NO_ELEMENTS = 16  # in the column: a gradient without elements; 0 means that there is no gradient

# No allocator of a 64-bit process returns memory below this; a gradient whose storage was resized to nothing has its
# offset as address. If there were memory, the slow path would be used, and nothing worse.
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

# The record of a tensor. For a parameter, bytes and the dtype before them are those that its gradient has to have.
_R_TYPE, _R_DATA, _R_DEVICE, _R_DTYPE, _R_NDIM, _R_GRAD_DTYPE, _R_BYTES, _R_DIMS = range(8)


class Source(NamedTuple):
    """The tensors to read: their class, the function (by address) that fills a DLTensor, and their own methods."""

    tensor: type  # of gradients; parameters and state must keep their class
    export: int
    record: Callable[[Any, Any], list[int]]
    is_lazy: Callable[[Any], bool]


def record(tensor: torch.Tensor, grad_dtype: torch.dtype | None = None) -> list[int]:
    """The metadata that a tensor has to keep, as read in Python.

    For a parameter, with the dtype that its gradient has to have.
    """
    grad_dtype = grad_dtype or tensor.dtype
    device = DEVICES[tensor.device.type] | (tensor.device.index or 0) << 32
    head = [id(type(tensor)), tensor.data_ptr(), device, _NUMBERED[tensor.dtype], tensor.dim()]
    dims = chain.from_iterable(zip(tensor.shape, tensor.stride(), strict=True))
    return [*head, _NUMBERED[grad_dtype], tensor.numel() * grad_dtype.itemsize, *dims]


def is_lazy(tensor: torch.Tensor) -> bool:
    """Is this the negative or the conjugate of the content of its memory?"""
    return bool(tensor.is_neg() or tensor.is_conj())


def _may_be_lazy(words: list[int]) -> bool:
    """Can a tensor with this record be dense and lazy? Yes if it is complex, or has a single element."""
    return words[_R_DTYPE] & 0xFF == _COMPLEX or all(n == 1 for n in words[_R_DIMS::2])


def _table() -> _Table:
    """torch's table, version 1; an ImportError if there is none."""
    if ctypes.sizeof(ctypes.c_void_p) != 8 or object.__basicsize__ != 16:
        raise ImportError(
            "rmsprop_gpu.torch needs a 64-bit CPython with a GIL: objects of this one have another header"
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
        raise ImportError(f"{name} of torch {torch.__version__} is {capsule!r}, not a DLPack table; {NEEDED}") from None
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
    """A tensor's metadata from the table: in the order of a record up to the number of dimensions, then these."""
    function = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(DLTensor))(export)
    made = DLTensor()
    function(tensor, made)  # PYFUNCTYPE raises the function's exceptions
    dims = [
        ctypes.c_int64.from_address(start + 8 * j).value
        for j in range(made.ndim)
        for start in (made.shape, made.strides)
    ]
    return [id(type(tensor)), made.data + made.offset, made.device, made.dtype, made.ndim, *dims]


def _samples() -> list[torch.Tensor]:
    """Tensors of every dtype and every kind of layout."""
    made = []
    for dtype in DTYPES:
        block = torch.zeros((3, 4, 5), dtype=dtype, device="cpu")
        made += [block, block.mT, block[1:, 1:3, ::2], block[3:], block[0, 0, 2], block[:, :1].expand(3, 4, 5)]
        made += [block[0].clone().requires_grad_(), torch.nn.Parameter(block[1].clone())]
    return made + [torch.zeros((3, 4), dtype=dtype, device="cpu").mT for dtype in _STORED]


def _verified(table: _Table) -> _Table:
    """The table, if it agrees with the methods of sample tensors; else an ImportError."""
    for t in _samples():
        words = record(t)
        want, got = words[:_R_GRAD_DTYPE] + words[_R_DIMS:], exported(table.export, t)
        if got != want:
            raise ImportError(
                f"the DLPack table of torch {torch.__version__} reports {got} for a {type(t).__name__} of {t.dtype} "
                f"with shape {tuple(t.shape)}, which itself reports {want}; {NEEDED}"
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
    """The handle of torch's current stream on a device, given DLPack's number of its type; 0 is the default stream."""
    handle = ctypes.c_void_p()
    _current_work_stream(device_type, device, ctypes.byref(handle))
    return handle.value or 0


_load, _store = memory(np.int64, HOST)
_load_int32, _ = memory(np.int32, HOST)
_scratch = make_scratch(ctypes.sizeof(DLTensor) // 8 + 1)


def _make_check() -> Any:
    """``check(block, ids)``: verdicts on each row; 0 if nothing needs a closer look.

    `ids` is a matrix: one line for parameters, one for gradients, then one for each column of state. It writes the
    address of each gradient into the column (0 for ``None``, `UNCHECKED` for one that is odd or overlaps), and looks
    for overlaps of changed ones.
    """

    @njit(inline="always")
    def same(block, head, record, T, dtype, tensor):  # type: ignore[no-untyped-def]
        """Does this object match the record? Its metadata is left in `tensor`."""
        if _load(head + _TYPE, 0) != T:
            return False
        if ask(_load(block, _EXPORT), head, tensor) != 0:
            tell(_load(block, _CLEAR))  # the function has set a Python exception
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
    """The tensors of some rows as they were when this was made; `bind` compares those of a step with them.

    Parameters
    ----------
    params : sequence of tensors
        Of class ``Tensor`` or ``Parameter``, one per row; the class of each is compared, too.
    states : sequence of columns of tensors
        What a step writes besides the parameters, one tensor per row in each column; step counters may be a column.
    grad_dtypes : sequence of dtypes
        What the gradient of each row has to have.
    column : int64 array
        Receives the addresses of the gradients, one per row; nothing in it counts as checked.
    lowest, highest : int64 array
        The bounds of everything that the step writes, for all its rows: sorted, disjoint intervals.
    source : Source
        Where the tensors come from.

    Attributes
    ----------
    verdicts : int64 array
        The verdicts of the last `bind`, by row.
    lazy_rows : list of int
        The rows whose tensors may be dense and lazily negated or conjugated, which the table does not reveal: complex
        ones, and real ones with one element (``z.conj().imag`` is). For these rows `bind` asks the tensors themselves.
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
        self._owners = owners  # raw addresses keep nothing alive
        self._column = column
        self._check = entry(_make_check)
        self._arguments = (self._block.ctypes.data, self._ids.ctypes.data)

    def bind(self, params: Sequence[Any], grads: Sequence[Any], states: Sequence[Sequence[Any]]) -> int:
        """Check the tensors of a step and record the addresses of its gradients: all verdicts, or-ed; 0 is fine.

        The gradient of a row may be ``None``. If a gradient is odd or overlaps what is written, the column holds
        `UNCHECKED` for its row: the caller has to put an address there, that of a copy.
        """
        self._ids[:] = np.fromiter(map(id, chain(params, grads, *states)), np.int64, len(self._ids))
        verdict = int(self._check(*self._arguments))
        for i in self.lazy_rows:
            verdict |= self._ask_if_lazy(i, params[i], grads[i], [state[i] for state in states])
        return verdict

    def _ask_if_lazy(self, i: int, param: Any, grad: Any, state: Sequence[Any]) -> int:
        """The verdict on a row whose tensors may be lazy, if their layout is right."""
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
    """``count(counters, column, rows)``: add 1 to the T at each of these addresses whose row has a gradient.

    An address of 0 means no counter. It returns how many rows have a gradient.
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
    """Count a step: add 1 to each of these float32 or float64 scalars in host memory whose row has a gradient.

    They are written at their present addresses: `Reader.bind` checks that they are still there, if they are a column of
    its states. A row with None has no counter here. The call returns how many rows have a gradient.
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
