"""Steps over arrays on CUDA devices: the kernel launches, and what a graph captures.

Nothing here waits for a device. A step with unchanged arrays and scalars copies and allocates nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from operator import methodcaller
from typing import Any, Protocol

import numpy as np

from ..arrays.checks import Tensor
from ..arrays.layout import NDArray
from ..kernels import cuda
from .batch import Batch
from .failures import failure
from .library import Block, Streams
from .resident import Resident, ResidentNorms
from .signals import SILENCE, Signals

_call = methodcaller("__call__")


class Gradients(Protocol):
    """The gradients of successive steps, in the order of the tensors; those of CuPy are in `gradients`."""

    column: NDArray  # the addresses that kernels read

    def bind(self, grads: list[Any]) -> bool:
        """Accept the gradients of the next step and return whether any address changed. All refusals come from here."""

    def make_copies(self, order: Streams) -> None:
        """Enqueue copies of those whose memory layout differs from their parameter's; the column names the copies."""

    def capture_copies(self) -> None:
        """The same as part of a graph, in which no memory is allocated."""

    def lack_memory(self, rows: slice) -> bool:
        """Would a copy of any of these need new memory? If not, the column names the copies."""

    def before(self) -> list[Callable[[], Any]]:
        """What a step, also one in a graph, does on the device before its kernel launches."""

    def after(self) -> list[Callable[[], Any]]:
        """What it does after them."""

    behind: str  # the same in words, following "CUDA did not"

    def memory(self) -> list[Block]:
        """Its memory on devices."""

    def hand_over(self) -> Any:
        """Hand over what was held only until the step is enqueued."""


class DeviceSteps:
    """The steps of a plan over arrays on CUDA devices.

    A graph keeps what it captured: while this object lives, the column of its gradients and the arrays it refers to are
    never written to or freed.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        batches: Sequence[Batch],
        grads: Gradients,
        count: Callable[[], Any],
        order: Streams,
    ) -> None:
        self._tensors, self._grads, self._count, self._order = tensors, grads, count, order
        self._library = order.library
        known = {batch.device: batch.norms for batch in batches if batch.variant.prepared}
        norms = {device: ResidentNorms() for device in known}
        first = next((batch for batch in batches if batch.variant.prepared), None)
        self._residents = [
            Resident(batch, batch.device or 0, norms.get(batch.device), batch is first, order) for batch in batches
        ]
        for resident in self._residents:
            resident.batch.norms.find(resident.batch, resident.scalars.address)
        for device, x in known.items():
            norms[device].settle(x, device or 0, order)
        completions = (norms.complete for norms in known.values())
        self._completions = [complete for complete in completions if complete is not None]
        ends = np.cumsum([len(batch.sizes) for batch in batches]).tolist()
        self._slices = [slice(a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True)]
        self._kept: list[Any] = []  # what graphs have captured
        self._signals = SILENCE
        self._changed = True
        self._calls: list[Callable[[], Any]] = []
        self._streams: dict[int, Any] = {}  # that the calls use

    @property
    def captured(self) -> bool:
        """Has a graph captured a step of this plan?"""
        return bool(self._kept)

    @property
    def scalars(self) -> list[tuple[Batch, Block]]:
        """Each batch with the memory from which its kernels read the scalars."""
        return [(resident.batch, resident.scalars) for resident in self._residents]

    def send(self) -> None:
        """Send changed scalars to where the kernels read them."""
        for resident in self._residents:
            resident.send(self._order)

    def send_tables(self) -> None:
        """Send the tables, whose addresses are unchanged and whose seeds are new."""
        for resident in self._residents:
            with self._order.on(resident.device) as stream:
                self._library.upload(resident.table, resident.batch.table, stream)

    def alone(self, i: int) -> Callable[[], object]:
        """The kernel launches of one batch alone, on the current stream, as last bound."""
        resident = self._residents[i]
        with self._library.device(resident.device):
            calls = resident.launches(self._order.enter(resident.device))
        return lambda: list(map(_call, [partial(self._library.set_device, resident.device), *calls.values()]))

    def bind(self, grads: list[Any], signals: Signals) -> None:
        """Accept the gradients of the next step, in the order of the tensors; all refusals come from here."""
        moved = self._grads.bind(grads)
        self._changed = self._changed or moved or signals.words != self._signals.words
        self._signals = signals

    # Launches

    def launch(self) -> None:
        """Enqueue the bound step, on the current stream of each device."""
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
        except self._library.errors as error:
            self._changed = True
            raise failure(error, {}, None, self._order, self._memory(), self._grads.behind) from error
        except BaseException:
            self._changed = True
            raise
        self._run([*self._grads.before(), *self._calls, *self._grads.after(), self._count])
        for device in self._order.devices:
            self._order.enqueued(device)
        self._grads.hand_over()
        if self._signals.arrays:
            self._signals = self._signals._replace(arrays=())

    def _prepare(self, streams: dict[int, Any]) -> None:
        """Copy odd gradients into dense buffers, and send the columns that changed."""
        self._grads.make_copies(self._order)
        for resident, rows in zip(self._residents, self._slices, strict=True):
            with self._library.device(resident.device):  # the default stream belongs to the current device
                if resident.take(self._words(rows), streams[resident.device], self._order):
                    self._streams = {}  # the calls hold the buffer's address

    def _words(self, rows: slice) -> NDArray:
        """The column of a batch: the addresses of its gradients, then any further arguments of the step."""
        column = self._grads.column[rows]
        return np.append(column, np.array(self._signals.words, np.int64)) if self._signals.asked.told else column

    def _make_calls(self, streams: dict[int, Any]) -> None:
        """All the calls of one step, made without returning to Python in between: Ctrl-C cannot leave it half done.

        All partial sums come first, since each prepare kernel adds up the partial sums of all batches.
        """
        launches = []
        for resident in self._residents:
            with self._library.device(resident.device):
                launches.append((resident.device, resident.launches(streams[resident.device])))
                for block in [*resident.blocks, *self._grads.memory()]:
                    self._library.use(block, resident.device)
        self._calls, current = [], None
        for name in cuda.ORDER:
            if name == "prepare_kernel":
                self._calls += self._completions
            for device, made in launches:
                if name in made:
                    self._calls += [partial(self._library.set_device, device)] * (device != current)
                    self._calls.append(made[name])
                    current = device
        self._streams = streams

    def _run(self, calls: list[Callable[[], Any]]) -> None:
        device = self._library.get_device()
        done: list[Any] = []
        try:
            done.extend(map(_call, [*calls, partial(self._library.restore_device, device)]))
        except Exception as error:  # in cuda.core, CUDA's errors have no common base class
            named = enumerate(getattr(call, "kernel", None) for call in calls)
            kernels = {i: name for i, name in named if name}
            failed = failure(error, kernels, len(done), self._order, self._memory(), self._grads.behind)
            with suppress(*self._library.errors):  # raised if the device is lost
                self._library.restore_device(device)
            raise failed from error

    def _memory(self) -> list[Block]:
        """Everything allocated for it on the devices."""
        return [resident.table for resident in self._residents]

    def _capture(self) -> None:
        """Capture the bound step into a graph; during that, only copies that are part of the step are allowed."""
        if self._signals.numbers:
            raise RuntimeError(
                f"the step is captured in a CUDA graph, which would keep {' and '.join(self._signals.numbers)} at the "
                "value given now; wanted an array of one element on the device"
            )
        for resident, rows in zip(self._residents, self._slices, strict=True):
            copied = not self._grads.lack_memory(rows)
            known = resident.known(self._words(rows)) is not None
            if copied and not known and resident.known_grads(self._grads.column[rows]):
                raise RuntimeError(
                    "the step is captured in a CUDA graph, but the addresses of its grad_scale and found_inf are not "
                    f"on the device; {self._library.warm_up}"
                )
            if not copied or not known:
                labels = ", ".join(t.grad_label for t in self._tensors[rows][:3])
                raise RuntimeError(
                    f"the step is captured in a CUDA graph, but the addresses of its gradients ({labels}, ...) are not "
                    f"on the device; {self._library.warm_up}"
                )
        streams = {device: self._order.enter_captured(device) for device in self._order.devices}
        for resident, rows in zip(self._residents, self._slices, strict=True):
            resident.take(self._words(rows), streams[resident.device], self._order)
            resident.capture()
        self._kept.append((self._grads.hand_over(), self._signals.arrays))
        self._grads.capture_copies()
        self._make_calls(streams)
        self._changed = True
        self._run([*self._grads.before(), *self._calls, *self._grads.after()])
