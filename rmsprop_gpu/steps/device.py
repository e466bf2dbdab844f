"""Steps over arrays on CUDA devices: the check of a step's gradients, the launches, what a graph captures.

Nothing here waits for a device. A step of unchanged arrays and scalars copies nothing and allocates nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from operator import attrgetter, methodcaller
from typing import Any

import cupy
import numpy as np
from cupy.cuda import Device, runtime

from ..arrays.checks import Problems, Tensor, check_grad, check_grad_apart, check_grads_disjoint
from ..arrays.interop import cupy_array
from ..arrays.layout import Array, NDArray, address_of
from ..kernels import cuda
from .batch import Batch, Written
from .resident import Resident, ResidentNorms, allocate
from .signals import SILENCE, Signals
from .streams import Order

EMPTY = 16  # the address of a gradient without elements: not 0, which says that there is none

_layout_of = attrgetter("__class__", "dtype", "shape", "strides", "data.device_id")
_address_of = attrgetter("data.ptr")
_call = methodcaller("__call__")

WARM_UP = "take the same step once before the capture, on the stream that is captured"


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
        known = {batch.device: batch.norms for batch in batches if batch.variant.prepared}
        norms = {device: ResidentNorms(x, device or 0, order) for device, x in known.items()}
        first = next((batch for batch in batches if batch.variant.prepared), None)
        self._residents = [
            Resident(batch, batch.device or 0, norms.get(batch.device), batch is first, order) for batch in batches
        ]
        self._zeros = any(batch.variant.zero_grads for batch in batches)
        ends = np.cumsum([len(batch.sizes) for batch in batches]).tolist()
        self._slices = [slice(a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True)]

        layouts = [tensor.layout for tensor in tensors]
        self._layouts = [
            (cupy.ndarray, x.dtype, x.shape, x.strides, t.device) for x, t in zip(layouts, tensors, strict=True)
        ]
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
        self._signals = SILENCE
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

    def alone(self, i: int) -> Callable[[], object]:
        """The launches of one batch by themselves, on the current stream, as they were bound last."""
        resident = self._residents[i]
        with Device(resident.device):
            calls = resident.launches(self._order.enter(resident.device))
        return lambda: list(map(_call, [partial(runtime.setDevice, resident.device), *calls.values()]))

    # Gradients

    def bind(self, grads: list[Any], signals: Signals) -> None:
        """Take the gradients of the next step, in the order of the tensors; every refusal comes from here."""
        try:
            layouts: list[Any] = list(map(_layout_of, grads))
            addresses = list(map(_address_of, grads))
        except Exception:  # a None, another library's array, or one whose attributes raise
            known = [grad if type(grad) is cupy.ndarray else None for grad in grads]
            layouts = [None if grad is None else _layout_of(grad) for grad in known]
            addresses = [0 if grad is None else grad.data.ptr for grad in known]
        if addresses != self._addresses or layouts != self._layouts:
            self._addresses = []  # what is not right to the end is not right the next time
            self._examine(grads, layouts, addresses)
            if layouts == self._layouts:
                self._addresses = addresses
        if signals.words != self._signals.words:
            self._changed = True
        self._grads, self._signals = grads, signals

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
            array = check_grad(grad, tensor, problems, written=self._zeros)
            if array is None:
                continue
            check_grad_apart(array, tensor.grad_label, self._written.near(array), problems)
            views.append(array)
            if tensor.layout.matches(array):
                column[i] = address_of(array) if array.size else EMPTY
            else:
                copies.append((i, array))
        problems.raise_any()
        if self._zeros:
            self._check_apart(grads)
        self._column, self._copies, self._changed = column, copies, True
        self._views = views  # another library's memory is held by the view as well as by its array

    def _check_apart(self, grads: list[Any]) -> None:
        """What is written to must not be another's gradient."""
        problems = Problems()
        pairs = zip(self._tensors, grads, strict=True)
        check_grads_disjoint([(t.grad_label, cupy_array(g)) for t, g in pairs if g is not None], problems)
        problems.raise_any()

    # Launches

    def launch(self) -> None:
        """Enqueue the step that was bound, on the current stream of each device."""
        if self._order.capturing():
            self._capture()
            return
        try:
            streams = {device: self._order.enter(device) for device in self._order.devices}
            if self._changed:
                self._prepare(streams)
            if streams != self._streams:
                self._make_calls(streams)
            self._changed = False
        except runtime.CUDARuntimeError as error:
            self._changed = True
            raise self._failure(error, None) from error
        self._run([*self._calls, *self._zeroing(), self._count])
        for device in self._order.devices:
            self._order.enqueued(device)
        self._grads, self._views = [], []
        if self._signals.arrays:
            self._signals = self._signals._replace(arrays=())

    def _zeroing(self) -> list[Callable[[], Any]]:
        """What writes zeros into gradients of which the kernels saw a copy."""
        if not self._zeros:
            return []
        calls: list[Callable[[], Any]] = []
        for i, array in self._copies:
            calls += [partial(runtime.setDevice, self._tensors[i].device or 0), partial(array.fill, 0)]
        return calls

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
                if resident.take(self._words(rows), streams[resident.device], self._order):
                    self._streams = {}  # the calls name the buffer

    def _words(self, rows: slice) -> NDArray:
        """The column of a batch: the addresses of its gradients, and what the step is told beside them, if anything."""
        column = self._column[rows]
        return np.append(column, np.array(self._signals.words, np.int64)) if self._signals.asked.told else column

    def _make_calls(self, streams: dict[int, Any]) -> None:
        """What one step calls, without a return to Python between: Ctrl-C cannot leave it half done.

        All partial sums come first, since each prepare kernel adds up those of all batches.
        """
        launches = []
        for resident in self._residents:
            with Device(resident.device):
                launches.append((resident.device, resident.launches(streams[resident.device])))
        self._calls, current = [], None
        for name in cuda.ORDER:
            for device, made in launches:
                if name in made:
                    self._calls += [partial(runtime.setDevice, device)] * (device != current)
                    self._calls.append(made[name])
                    current = device
        self._streams = streams

    def _run(self, calls: list[Callable[[], Any]]) -> None:
        device = runtime.getDevice()
        done: list[Any] = []
        try:
            done.extend(map(_call, [*calls, partial(runtime.setDevice, device)]))
        except Exception as error:  # CUDA's errors have no base of their own in cuda.core
            failure = self._failure(error, len(done))
            with suppress(runtime.CUDARuntimeError):  # of a device that is lost
                runtime.setDevice(device)
            raise failure from error

    def _failure(self, error: Exception, done: int | None) -> RuntimeError:
        """One exception that says what failed, and whether the optimizer can go on."""
        named = enumerate(getattr(call, "kernel", None) for call in self._calls)
        kernels = {i: str(name) for i, name in named if name}
        if done is None:
            what, before = "CUDA failed before the first launch of the step", 0
        else:
            failed = next((name for i, name in kernels.items() if i >= done), None)
            what = f"CUDA did not launch {failed}" if failed else "CUDA did not write zeros into gradients"
            launched = [name for i, name in kernels.items() if i < done]
            # Sums of gradients are nobody's state.
            before = len(launched) if any(not name.startswith("partials_kernel") for name in launched) else 0
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
        if self._signals.numbers:
            raise RuntimeError(
                f"the step is captured in a CUDA graph, which would keep {' and '.join(self._signals.numbers)} as the "
                "number it is now; wanted an array of one element on the device"
            )
        for resident, rows in zip(self._residents, self._slices, strict=True):
            for i, _ in self._copies:
                if rows.start <= i < rows.stop and i in self._dense:
                    self._column[i] = address_of(self._dense[i])
            copied = all(i in self._dense for i, _ in self._copies if rows.start <= i < rows.stop)
            known = resident.known(self._words(rows)) is not None
            if copied and not known and resident.known_grads(self._column[rows]):
                raise RuntimeError(
                    "the step is captured in a CUDA graph, but the addresses of its grad_scale and found_inf are not "
                    f"on the device; {WARM_UP}"
                )
            if not copied or not known:
                labels = ", ".join(t.grad_label for t in self._tensors[rows][:3])
                raise RuntimeError(
                    f"the step is captured in a CUDA graph, but the addresses of its gradients ({labels}, ...) are not "
                    f"on the device; {WARM_UP}"
                )
        streams = {device: self._order.enter_captured(device) for device in self._order.devices}
        for resident, rows in zip(self._residents, self._slices, strict=True):
            resident.take(self._words(rows), streams[resident.device], self._order)
            resident.capture()
        self._kept.append((self._grads, self._views, self._signals.arrays))
        for i, array in self._copies:
            with Device(self._tensors[i].device):
                cupy.copyto(self._dense[i], array)
        self._make_calls(streams)
        self._changed, self._grads, self._views = True, [], []
        self._run([*self._calls, *self._zeroing()])
