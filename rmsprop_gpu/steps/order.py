"""Order between the streams on which an optimizer works: by events on the device; the host never waits."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from cupy.cuda import Device, Event, ExternalStream, get_current_stream

from .library import Streams
from .on_cupy import CUPY, is_capturing

_PER_THREAD = 2  # the pointer of the per-thread default stream


def _mark(stream: Any) -> Any:
    """An event after the work on this stream."""
    event = Event(disable_timing=True)
    event.record(stream)
    return event


class _Work:
    """The last work of an optimizer on one stream."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream  # held, so that it is not destroyed while it may be waited for
        self.event: Any = None
        self.eager = False  # has anything been enqueued outside a graph?
        # Other code may destroy its streams, and a thread cannot name the default stream of another thread.
        self.needs_event = isinstance(stream, ExternalStream) or stream.ptr == _PER_THREAD

    def awaited_by(self, stream: Any, replayed: bool) -> None:
        """Make a stream wait for it, and for replays of graphs on its stream if there may be any."""
        event = self.event
        if self.needs_event and not replayed:
            pass
        elif is_capturing(self.stream):
            if self.eager and event is None:
                raise RuntimeError(
                    "the optimizer's last work is on a stream that is being captured, and no other stream can wait for "
                    "that; end the capture before the optimizer works on another stream"
                )
        else:
            event = _mark(self.stream)
        if event is not None:
            stream.wait_event(event)


class _Device:
    """What an optimizer has enqueued on one device, by stream."""

    def __init__(self) -> None:
        self.current: _Work | None = None
        self.busy: dict[Any, _Work] = {}
        self.captured: dict[Any, _Work] = {}  # graphs may be replayed on these at any time, unnoticed
        self.homes: dict[Any, Any] = {}  # streams on which memory was allocated


def _key(stream: Any) -> Any:
    return (stream.ptr, threading.get_ident()) if stream.ptr == _PER_THREAD else stream.ptr


class Order(Streams):
    """On each device, all that an optimizer enqueues runs after what it enqueued before, on whichever stream."""

    def __init__(self, devices: Iterable[int]) -> None:
        super().__init__(devices, CUPY)
        self._devices = {device: _Device() for device in self.devices}
        for device in self._devices:
            with self.on(device):
                pass  # the work that made the parameters precedes all that follows

    def enter(self, device: int) -> Any:
        """The current stream of the device, made to wait for all work enqueued before."""
        here, stream = self._devices[device], get_current_stream(device)
        if here.current and here.current.stream is stream and not here.current.needs_event and not here.captured:
            return stream
        key = _key(stream)
        with Device(device):
            for other, work in here.busy.items():
                if other != key:
                    work.awaited_by(stream, other in here.captured)
        here.current = here.busy.get(key) or _Work(stream)
        here.current.eager = True
        here.busy = {**here.captured, key: here.current}
        return stream

    def enter_captured(self, device: int) -> Any:
        """The current stream of the device, on which a graph is being captured.

        It waits for nothing: inside a graph that would be an error. Ordering is up to the caller who replays the graph.
        """
        here, stream = self._devices[device], get_current_stream(device)
        key = _key(stream)
        here.captured[key] = here.busy[key] = here.busy.get(key) or _Work(stream)
        return stream

    def enqueued(self, device: int) -> None:
        current = self._devices[device].current
        if current is not None and current.needs_event:
            with Device(device):
                current.event = _mark(current.stream)

    @contextmanager
    def allocating(self, device: int) -> Iterator[Any]:
        with super().allocating(device) as stream:
            self._devices[device].homes[_key(stream)] = stream
            yield stream

    def release(self) -> None:
        """Prepare memory for being freed: the streams it came from, which will reuse it, wait for the others' work."""
        if sys.is_finalizing():
            return
        for device, here in self._devices.items():
            for key, home in here.homes.items():
                for other, work in here.busy.items():
                    # It fails for a stream that others have destroyed or are capturing, or if the device is lost.
                    with suppress(RuntimeError), Device(device):
                        if other != key and not is_capturing(home):
                            work.awaited_by(home, other in here.captured)
