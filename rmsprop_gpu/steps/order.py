"""Order between the streams on which an optimizer works: events on the device, never a wait of the host."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from cupy.cuda import Device, Event, ExternalStream, get_current_stream

from .library import Streams
from .on_cupy import CUPY, is_capturing

_PER_THREAD = 2  # the pointer of the default stream that each thread has of its own


def _mark(stream: Any) -> Any:
    """An event behind the work on this stream."""
    event = Event(disable_timing=True)
    event.record(stream)
    return event


class _Work:
    """The last work of an optimizer on one stream."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream  # held, so that it is not destroyed while there is something to wait for
        self.event: Any = None
        self.eager = False  # has anything been enqueued that is no part of a graph?
        # Others may destroy their streams, and a thread cannot name the default stream of another one.
        self.needs_event = isinstance(stream, ExternalStream) or stream.ptr == _PER_THREAD

    def awaited_by(self, stream: Any, replayed: bool) -> None:
        """Let a stream wait for it, and for replays of graphs on its stream where there may be some."""
        event = self.event
        if self.needs_event and not replayed:
            pass
        elif is_capturing(self.stream):
            if self.eager and event is None:
                raise RuntimeError(
                    "the optimizer's last work is on a stream that is being captured, where nothing can be waited for; "
                    "end the capture before it works on another stream"
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
        self.captured: dict[Any, _Work] = {}  # graphs may be replayed on these at any time, and nobody tells us
        self.homes: dict[Any, Any] = {}  # streams on which memory was allocated


def _key(stream: Any) -> Any:
    return (stream.ptr, threading.get_ident()) if stream.ptr == _PER_THREAD else stream.ptr


class Order(Streams):
    """On each device, all that an optimizer enqueues comes after what it enqueued before, on whichever stream."""

    def __init__(self, devices: Iterable[int]) -> None:
        super().__init__(devices, CUPY)
        self._devices = {device: _Device() for device in self.devices}
        for device in self._devices:
            with self.on(device):
                pass  # what made the parameters comes before all that follows

    def enter(self, device: int) -> Any:
        """The current stream of the device, which from here on waits for all that was enqueued before."""
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
        """The current stream of the device, on which a graph is captured.

        It waits for nothing: inside a graph that would be an error. Whoever replays the graph orders that.
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
        """Make memory ready to be freed: the streams it came from, which get it again, wait for the others' work."""
        if sys.is_finalizing():
            return
        for device, here in self._devices.items():
            for key, home in here.homes.items():
                for other, work in here.busy.items():
                    # What fails is a stream that others have destroyed or are capturing, or a device that is lost.
                    with suppress(RuntimeError), Device(device):
                        if other != key and not is_capturing(home):
                            work.awaited_by(home, other in here.captured)
