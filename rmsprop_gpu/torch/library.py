"""torch as the library that owns the memory on CUDA devices: its caching allocator, its current streams."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch

from ..arrays.layout import NDArray
from ..arrays.selector import compiler_missing
from ..steps.library import Block
from .exchange import DEVICES, current_stream


class Stream(NamedTuple):
    """A CUDA stream by its handle."""

    ptr: int


class Torch:
    """See `steps.library.Library`."""

    errors: tuple[type[Exception], ...] = (torch.AcceleratorError,)  # torch.OutOfMemoryError reaches the user unchanged
    warm_up = (
        "take the same step once before the capture, and keep its gradients where they are "
        "(zero_grad(set_to_none=False))"
    )

    def device(self, device: int) -> AbstractContextManager[Any]:
        made: AbstractContextManager[Any] = torch.cuda.device(device)
        return made

    def set_device(self, device: int) -> None:
        torch.cuda.set_device(device)

    def get_device(self) -> int:
        return int(torch.cuda.current_device())

    def restore_device(self, device: int) -> None:
        # Like torch's own guards: a device that was never used remains unused.
        torch.cuda._maybe_exchange_device(device)

    def current_stream(self, device: int) -> Stream:
        return Stream(current_stream(DEVICES["cuda"], device))

    def is_capturing(self, device: int) -> bool:
        with torch.cuda.device(device):
            return bool(torch.cuda.is_current_stream_capturing())

    def empty(self, nbytes: int) -> Block:
        return _block(torch.empty(nbytes, dtype=torch.uint8, device="cuda"))

    def zeros(self, nbytes: int) -> Block:
        return _block(torch.zeros(nbytes, dtype=torch.uint8, device="cuda"))

    def upload(self, target: Block, source: NDArray, stream: Any) -> None:
        # torch's pinned memory, which it reuses once the copy is done.
        pinned = torch.empty(source.nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)
        pinned.numpy()[:] = np.frombuffer(np.ascontiguousarray(source), np.uint8)
        target.owner[: source.nbytes].copy_(pinned, non_blocking=True)

    def use(self, block: Block, device: int) -> None:
        if not self.is_capturing(device):  # a graph keeps it
            block.owner.record_stream(torch.cuda.current_stream(device))

    def fails(self, device: int) -> bool:
        try:
            torch.cuda.mem_get_info(device)
        except self.errors:
            return True
        return False

    def knows(self, block: Block) -> bool:
        from cuda.bindings import driver

        attribute = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_MEMORY_TYPE
        error, _ = driver.cuPointerGetAttribute(attribute, block.address)
        return block.address == 0 or error == driver.CUresult.CUDA_SUCCESS


TORCH = Torch()


def _block(made: torch.Tensor) -> Block:
    return Block(made.data_ptr(), made)


def is_capturing() -> bool:
    """Is a CUDA graph being captured on the current stream? This does not initialize CUDA."""
    return bool(torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def refuse_capture() -> None:
    """Raise if a graph is being captured: it cannot hold anything that was not prepared before."""
    if is_capturing():
        raise RuntimeError(
            f"the step is captured in a CUDA graph, but its tensors are not those of an earlier step; {TORCH.warm_up}"
        )


@cache
def why_no_kernels(device: int) -> str | None:
    """Why our kernels cannot run over torch's tensors on this device; None if they can."""
    if torch.version.hip is not None:
        return f"its device runs ROCm {torch.version.hip}, and the kernels are for CUDA"
    missing = compiler_missing()
    if missing:
        return missing
    refuse_capture()  # otherwise what cannot be loaded now would be ruled out for good
    try:
        from ..kernels import cuda_code  # it imports Numba's CUDA target

        with torch.cuda.device(device):
            return cuda_code.trial()
    except Exception as error:  # of the import, or of a device that does not work
        return f"no kernel can be compiled for {device}: {error}"
