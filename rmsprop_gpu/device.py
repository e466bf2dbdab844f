"""Steps over arrays on CUDA devices: the memory of their state, the check of a step's gradients, the launches.

Nothing here waits for a device. A step of unchanged arrays and scalars copies nothing and allocates nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter, methodcaller
from typing import Any

import cupy
import numpy as np
from cupy.cuda import Device, runtime

from .arrays import Array, Layout, NDArray, Problems, Tensor, address_of, check_grad, check_grad_apart
from .backends import cuda
from .batch import LINE, Batch, Written, places
from .streams import Order

EMPTY = 16  # the address of a gradient without elements: not 0, which says that there is none

_layout_of = attrgetter("dtype", "shape", "strides", "data.device_id")
_address_of = attrgetter("data.ptr")
_call = methodcaller("__call__")

WARM_UP = "take the same step once before the capture, on the stream that is captured"


def allocate(layouts: Sequence[Layout], device: int, order: Order) -> list[Array]:
    """Zeroed CuPy arrays of these layouts, views of one aligned allocation."""
    offsets, end = places(layouts)
    with order.allocating(device):
        memory = cupy.zeros(end + LINE, np.uint8)
    first = -memory.data.ptr % LINE
    return [layout.over(memory, first + offset) for layout, offset in zip(layouts, offsets, strict=True)]


def _upload(target: Array, source: NDArray, stream: Any) -> None:
    """Enqueue a small copy from pageable memory, which the driver takes at the call: `source` may change afterwards."""
    target.data.copy_from_host_async(source.ctypes.data, source.nbytes, stream)


class _Column:
    """A gradient column on the device, and what stands in it."""

    def __init__(self, rows: int) -> None:
        self.buffer = cupy.empty(rows, np.int64)
        self.content = b""


class _Resident:
    """A batch on its device: the table, the chunks, the scalars, the factors, the gradient columns."""

    def __init__(self, batch: Batch, device: int, order: Order) -> None:
        self.batch, self.device = batch, device
        self._sent = batch.scalars.tobytes()
        self.kernels = cuda.kernels(batch.variant, batch.dtype, device)
        with order.allocating(device) as stream:
            chunks = cuda.chunks(batch.sizes)
            sources = (batch.table, chunks, batch.scalars, batch.factors)
            self.table, self.chunks, self.scalars, self.factors = (cupy.empty(a.shape, a.dtype) for a in sources)
            for target, source in zip((self.table, self.chunks, self.scalars, self.factors), sources, strict=True):
                _upload(target, source, stream)
            self.column = _Column(len(batch.sizes))
        self._own: _Column | None = self.column  # the one that no graph has captured
        self._captured: list[_Column] = []

    def send(self, order: Order) -> None:
        """Send the scalars if they differ from those that were sent last."""
        wanted = self.batch.scalars.tobytes()
        if wanted != self._sent:
            with order.on(self.device) as stream:
                _upload(self.scalars, self.batch.scalars, stream)
            self._sent = wanted

    def known(self, column: NDArray) -> _Column | None:
        """A column of these addresses that is on the device already."""
        content = column.tobytes()
        return next((c for c in (self._own, *self._captured) if c and c.content == content), None)

    def take(self, column: NDArray, stream: Any, order: Order) -> bool:
        """Make this the column that the next launch reads: is it another buffer? A captured one is not written to."""
        found, before = self.known(column), self.column
        if found is None:
            if self._own is None:
                with order.allocating(self.device):
                    self._own = _Column(len(column))
            found = self._own
            found.content = b""  # until it is sent
            _upload(found.buffer, column, stream)
            found.content = column.tobytes()
        self.column = found
        return found is not before

    def capture(self) -> None:
        """Keep the current column as it is from now on."""
        if self.column is self._own:
            self._captured.append(self.column)
            self._own = None

    def launches(self, stream: Any) -> list[cuda.Launch]:
        """The calls that launch a step."""
        arguments = (self.table, self.column.buffer, self.chunks, self.scalars, self.factors)
        return cuda.launches(self.kernels, stream, len(self.chunks), self.batch, [a.data.ptr for a in arguments])


class DeviceSteps:
    """The steps of a plan over arrays on CUDA devices.

    A graph keeps what it captured: the column of its gradients and the arrays behind it are never written to or freed
    while this lives.
    """

    def __init__(
        self, tensors: Sequence[Tensor], batches: Sequence[Batch], written: Written, steps: NDArray, order: Order
    ) -> None:
        self._tensors, self._written, self._order = tensors, written, order
        self._count = partial(np.add, steps, 1, steps)
        self._residents = [_Resident(batch, batch.device or 0, order) for batch in batches]
        ends = np.cumsum([len(batch.sizes) for batch in batches]).tolist()
        self._slices = [slice(a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True)]

        layouts = [tensor.layout for tensor in tensors]
        self._layouts = [(x.dtype, x.shape, x.strides, t.device) for x, t in zip(layouts, tensors, strict=True)]
        self._low = np.array([x.low for x in layouts], np.int64)
        self._nbytes = np.array([x.nbytes for x in layouts], np.int64)
        self._itemsize = np.array([x.dtype.itemsize for x in layouts], np.int64)
        self._addresses: list[Any] = []  # of the gradients that were found right last
        self._column = np.zeros(len(tensors), np.int64)
        self._dense: dict[int, Array] = {}
        self._copies: list[tuple[int, Array]] = []
        self._grads: list[Any] = []  # held until their step is enqueued
        self._views: list[Array] = []
        self._kept: list[Any] = []  # what graphs have captured
        self._changed = True
        self._calls: list[Callable[[], Any]] = []
        self._streams: dict[int, Any] = {}  # of the calls

    @property
    def captured(self) -> bool:
        """Has a graph captured a step of this plan?"""
        return bool(self._kept)

    def send(self) -> None:
        """Send the scalars that have changed to where the kernels read them."""
        for resident in self._residents:
            resident.send(self._order)

    # Gradients

    def bind(self, grads: list[Any]) -> None:
        """Take the gradients of the next step, in the order of the tensors; every refusal comes from here."""
        try:
            layouts: list[Any] = list(map(_layout_of, grads))
            addresses = list(map(_address_of, grads))
        except AttributeError:  # a None, or another library's array
            known = [grad if type(grad) is cupy.ndarray else None for grad in grads]
            layouts = [None if grad is None else _layout_of(grad) for grad in known]
            addresses = [0 if grad is None else grad.data.ptr for grad in known]
        if addresses != self._addresses or layouts != self._layouts:
            self._addresses = []  # what is not right to the end is not right the next time
            self._examine(grads, layouts, addresses)
            if layouts == self._layouts:
                self._addresses = addresses
        self._grads = grads

    def _examine(self, grads: list[Any], layouts: list[Any], addresses: list[int]) -> None:
        """Check what is not as in the last step."""
        problems, copies, views = Problems(), [], []
        column = np.array(addresses, np.int64) + self._low
        column[self._nbytes == 0] = EMPTY
        odd = set()
        if layouts != self._layouts:
            odd = {i for i, (got, want) in enumerate(zip(layouts, self._layouts, strict=True)) if got != want}
        odd |= set((column % self._itemsize).nonzero()[0].tolist())
        odd |= set(self._written.hit(column, self._nbytes).tolist())
        for i in sorted(odd):
            tensor, grad = self._tensors[i], grads[i]
            if grad is None:
                column[i] = 0
                continue
            array = check_grad(grad, tensor, problems)
            if array is None:
                continue
            check_grad_apart(array, tensor.grad_label, self._written.near(array), problems)
            views.append(array)
            if tensor.layout.matches(array):
                column[i] = address_of(array) if array.size else EMPTY
            else:
                copies.append((i, array))
        problems.raise_any()
        self._column, self._copies, self._changed = column, copies, True
        self._views = views  # another library's memory is held by the view as well as by its array

    # Launches

    def launch(self) -> None:
        """Enqueue the step that was bound, on the current stream of each device."""
        if self._order.broken:
            raise RuntimeError(self._order.broken)
        if self._order.capturing():
            self._capture()
            return
        try:
            streams = {device: self._order.enter(device) for device in self._order.devices}
            if self._changed or self._copies:
                self._prepare(streams)
            if streams != self._streams:
                self._make_calls(streams)
            self._changed = False
        except runtime.CUDARuntimeError as error:
            self._changed = True
            raise self._failure(error, None) from error
        self._run([*self._calls, self._count])
        for device in self._order.devices:
            self._order.enqueued(device)
        self._grads, self._views = [], []

    def _prepare(self, streams: dict[int, Any]) -> None:
        """Copy odd gradients into dense buffers, and send the columns that changed."""
        for i, array in self._copies:
            tensor, device = self._tensors[i], self._tensors[i].device or 0
            if i not in self._dense:
                (self._dense[i],) = allocate([tensor.layout], device, self._order)
            with self._order.on(device):
                cupy.copyto(self._dense[i], array)
            self._column[i] = address_of(self._dense[i])
        for resident, rows in zip(self._residents, self._slices, strict=True):
            with Device(resident.device):  # the default stream is that of the current device
                if resident.take(self._column[rows], streams[resident.device], self._order):
                    self._streams = {}  # the calls name the buffer

    def _make_calls(self, streams: dict[int, Any]) -> None:
        """What one step calls, without a return to Python between: Ctrl-C cannot leave it half done."""
        self._calls = []
        for resident in self._residents:
            self._calls.append(partial(runtime.setDevice, resident.device))
            with Device(resident.device):
                self._calls += resident.launches(streams[resident.device])
        self._streams = streams

    def _run(self, calls: list[Callable[[], Any]]) -> None:
        device = runtime.getDevice()
        done: list[Any] = []
        try:
            done.extend(map(_call, [*calls, partial(runtime.setDevice, device)]))
        except Exception as error:  # CUDA's errors have no base of their own in cuda.core
            raise self._failure(error, len(done)) from error

    def _failure(self, error: Exception, done: int | None) -> RuntimeError:
        """One exception that says what failed, and whether the optimizer can go on."""
        kernels = [i for i, call in enumerate(self._calls) if hasattr(call, "kernel")]
        if done is None:
            what, before = "CUDA failed before the first launch of the step", 0
        else:
            failed: Any = next((self._calls[i] for i in kernels if i >= done), self._calls[kernels[-1]])
            what, before = f"CUDA did not launch {failed.kernel}", sum(i < done for i in kernels)
        try:
            runtime.memGetInfo()  # fails for good after a kernel has failed
        except runtime.CUDARuntimeError:
            self._order.broken = f"{what} ({error}): the device is lost to this process, start a new one"
            return RuntimeError(self._order.broken)
        if before:
            half = f"{before} of the step's {len(kernels)} launches were made"
            again = "restore the parameters, then load_state_dict makes it usable again"
            self._order.broken = f"{what} ({error}): {half}, the optimizer is between two steps; {again}"
            return RuntimeError(self._order.broken)
        return RuntimeError(f"{what} ({error}): nothing was updated, the optimizer is usable as it was before the step")

    def _capture(self) -> None:
        """Enqueue the step that was bound into a graph; nothing may be copied then that is not part of the step."""
        for resident, rows in zip(self._residents, self._slices, strict=True):
            for i, _ in self._copies:
                if rows.start <= i < rows.stop and i in self._dense:
                    self._column[i] = address_of(self._dense[i])
            if resident.known(self._column[rows]) is None:
                labels = ", ".join(t.grad_label for t in self._tensors[rows][:3])
                raise RuntimeError(
                    f"the step is captured in a CUDA graph, but the addresses of its gradients ({labels}, ...) are not "
                    f"on the device; {WARM_UP}"
                )
        streams = {device: self._order.enter_captured(device) for device in self._order.devices}
        for resident, rows in zip(self._residents, self._slices, strict=True):
            resident.take(self._column[rows], streams[resident.device], self._order)
            resident.capture()
        self._kept.append((self._grads, self._views))
        for i, array in self._copies:
            with Device(self._tensors[i].device):
                cupy.copyto(self._dense[i], array)
        self._make_calls(streams)
        self._changed, self._grads, self._views = True, [], []
        self._run(self._calls)
