"""What steps on CUDA devices ask of the library that owns the memory there: CuPy's maker is in `on_cupy`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, Protocol

from ..arrays.layout import NDArray


class Block(NamedTuple):
    """Memory on a device."""

    address: int
    owner: Any  # the library's array of it, which keeps it


class Library(Protocol):
    """Memory, streams and devices as one library has them; "current" is what is current there."""

    errors: tuple[type[Exception], ...]  # what it raises where CUDA fails
    warm_up: str  # what is to be done before a step can be captured in a graph

    def device(self, device: int) -> AbstractContextManager[Any]:
        """Make this the current device for a while."""

    def set_device(self, device: int) -> None: ...

    def get_device(self) -> int: ...

    def restore_device(self, device: int) -> None:
        """Make this the current device again, which it was before; it need not have been used."""

    def current_stream(self, device: int) -> Any:
        """The current stream of a device; its handle is its `ptr`."""

    def is_capturing(self, device: int) -> bool:
        """Is a CUDA graph being captured on the current stream of this device?"""

    def empty(self, nbytes: int) -> Block:
        """Memory on the current device, for work on its current stream."""

    def zeros(self, nbytes: int) -> Block:
        """The same, zeroed."""

    def upload(self, target: Block, source: NDArray, stream: Any) -> None:
        """Enqueue a copy to the current device, on its current stream; `source` may change afterwards."""

    def use(self, block: Block, device: int) -> None:
        """Say that work on the current stream of the device uses this memory, which may come from another one."""

    def fails(self, device: int) -> bool:
        """Does CUDA fail whatever it is asked on a device? It does for good after a kernel has failed there."""

    def knows(self, block: Block) -> bool:
        """Is this still memory that CUDA knows?"""


class Streams:
    """The devices of an optimizer, and the current stream of each, to which its work goes.

    Order between streams is the user's, as it is in torch; `order.Order` keeps it.
    """

    def __init__(self, devices: Iterable[int], library: Library) -> None:
        self.library, self.devices = library, list(devices)
        self.broken: str | None = None  # why the optimizer cannot be used any more

    def capturing(self) -> bool:
        """Is the current stream of any of the devices being captured? Of one and not of another is an error."""
        try:
            found = set(map(self.library.is_capturing, self.devices))
        except self.library.errors as error:
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
        """The current stream of the device."""
        return self.library.current_stream(device)

    def enter_captured(self, device: int) -> Any:
        """The current stream of the device, on which a graph is captured."""
        return self.library.current_stream(device)

    def enqueued(self, device: int) -> None:
        """Say that work was enqueued on the stream that was entered last."""

    @contextmanager
    def on(self, device: int) -> Iterator[Any]:
        """Work on this device and its current stream."""
        with self.library.device(device):
            stream = self.enter(device)
            yield stream
            self.enqueued(device)

    @contextmanager
    def allocating(self, device: int) -> Iterator[Any]:
        """As `on`, for memory that is kept."""
        with self.on(device) as stream:
            yield stream

    def uploaded(self, source: NDArray, stream: Any) -> Block:
        """A copy of this on the current device."""
        made = self.library.empty(source.nbytes)
        if source.nbytes:
            self.library.upload(made, source, stream)
        return made
