"""Order between the streams on which an optimizer works: events on the device, never a wait of the host."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from cupy.cuda import Device, Event, ExternalStream, get_current_stream, runtime

_LEGACY, _PER_THREAD = 0, 2  # the pointers of CUDA's default streams


def is_capturing(stream: Any) -> bool:
    """Is a CUDA graph being captured on this stream? The legacy default stream cannot be, and asking is an error."""
    return bool(stream.ptr != _LEGACY and stream.is_capturing())


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


class Order:
    """On each device, all that an optimizer enqueues comes after what it enqueued before, on whichever stream."""

    def __init__(self, devices: Iterable[int]) -> None:
        self._devices = {device: _Device() for device in devices}
        self.broken: str | None = None  # why the optimizer cannot be used any more
        for device in self._devices:
            with self.on(device):
                pass  # what made the parameters comes before all that follows

    @property
    def devices(self) -> list[int]:
        return list(self._devices)

    def capturing(self) -> bool:
        """Is the current stream of any of the devices being captured? Of one and not of another is an error."""
        try:
            found = {is_capturing(get_current_stream(device)) for device in self._devices}
        except runtime.CUDARuntimeError as error:
            self.broken = (
                f"CUDA fails ({error}): a kernel that was launched before has failed, this optimizer's or another; "
                "the device is lost to this process, start a new one"
            )
            raise RuntimeError(self.broken) from error
        if len(found) == 2:
            raise RuntimeError("a CUDA graph is captured on the current stream of one device and not on another's")
        return True in found

    def refuse_broken(self) -> None:
        """Raise if the optimizer cannot be used any more."""
        if self.broken:
            raise RuntimeError(self.broken)

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
        """Say that work was enqueued on the stream that was entered last."""
        current = self._devices[device].current
        if current is not None and current.needs_event:
            with Device(device):
                current.event = _mark(current.stream)

    @contextmanager
    def on(self, device: int) -> Iterator[Any]:
        """Work on this device and its current stream, after what was enqueued before."""
        with Device(device):
            stream = self.enter(device)
            yield stream
            self.enqueued(device)

    @contextmanager
    def allocating(self, device: int) -> Iterator[Any]:
        """As `on`, for memory that is kept."""
        with self.on(device) as stream:
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
