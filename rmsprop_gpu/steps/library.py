"""What steps on CUDA devices need from the library that owns the memory there; `on_cupy` has it for CuPy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, Protocol

from ..arrays.layout import NDArray


class Block(NamedTuple):
    """Memory on a device."""

    address: int
    owner: Any  # the library's array, which keeps it alive


class Library(Protocol):
    """Memory, streams and devices of one library; "current" means what is current in that library."""

    errors: tuple[type[Exception], ...]  # what it raises if CUDA fails
    warm_up: str  # what has to be done before a step can be captured in a graph

    def device(self, device: int) -> AbstractContextManager[Any]:
        """Make this the current device for a while."""

    def set_device(self, device: int) -> None: ...

    def get_device(self) -> int: ...

    def restore_device(self, device: int) -> None:
        """Make this the current device again, as it was before; it may never have been used."""

    def current_stream(self, device: int) -> Any:
        """The current stream of a device; its attribute `ptr` is the handle."""

    def is_capturing(self, device: int) -> bool:
        """Is a CUDA graph being captured on the current stream of this device?"""

    def empty(self, nbytes: int) -> Block:
        """Allocate memory on the current device, for work on its current stream."""

    def zeros(self, nbytes: int) -> Block:
        """The same, zeroed."""

    def upload(self, target: Block, source: NDArray, stream: Any) -> None:
        """Enqueue a copy to the current device, on its current stream; `source` may change afterwards."""

    def use(self, block: Block, device: int) -> None:
        """Tell the library that work on the device's current stream uses this memory, maybe from another stream."""

    def fails(self, device: int) -> bool:
        """Does every CUDA call on a device fail? After a kernel has failed there, it does for good."""

    def knows(self, block: Block) -> bool:
        """Is this memory still valid for CUDA?"""


class Streams:
    """The devices of an optimizer, and the current stream of each, to which its work goes.

    Ordering streams is up to the user, as in torch; `order.Order` does it for them.
    """

    def __init__(self, devices: Iterable[int], library: Library) -> None:
        self.library, self.devices = library, list(devices)
        self.broken: str | None = None  # why the optimizer can no longer be used

    def capturing(self) -> bool:
        """Are the current streams of the devices being captured? Some captured and some not is an error."""
        try:
            found = set(map(self.library.is_capturing, self.devices))
        except self.library.errors as error:
            self.broken = (
                f"CUDA fails ({error}): an earlier kernel has failed, from this optimizer or elsewhere; "
                "the device is lost to this process; start a new process"
            )
            raise RuntimeError(self.broken) from error
        if len(found) == 2:
            raise RuntimeError("a CUDA graph is captured on the current stream of one device and not on another's")
        return True in found

    def refuse_broken(self) -> None:
        """Raise if the optimizer can no longer be used."""
        if self.broken:
            raise RuntimeError(self.broken)

    def enter(self, device: int) -> Any:
        """The current stream of the device."""
        return self.library.current_stream(device)

    def enter_captured(self, device: int) -> Any:
        """The current stream of the device, on which a graph is captured."""
        return self.library.current_stream(device)

    def enqueued(self, device: int) -> None:
        """Note that work was enqueued on the stream that was entered last."""

    @contextmanager
    def on(self, device: int) -> Iterator[Any]:
        """Work on this device and its current stream."""
        with self.library.device(device):
            stream = self.enter(device)
            yield stream
            self.enqueued(device)

    @contextmanager
    def allocating(self, device: int) -> Iterator[Any]:
        """Like `on`, for allocating memory that is kept."""
        with self.on(device) as stream:
            yield stream

    def uploaded(self, source: NDArray, stream: Any) -> Block:
        """A copy of this on the current device."""
        made = self.library.empty(source.nbytes)
        if source.nbytes:
            self.library.upload(made, source, stream)
        return made
