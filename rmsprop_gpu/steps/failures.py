"""What a CUDA error within a step means: what failed, and whether the optimizer can go on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from .library import Block, Streams

_RESET = "the device was reset (numba.cuda.close() does that)"


def failure(
    error: Exception, kernels: Mapping[int, str], done: int | None, order: Streams, memory: Iterable[Block], behind: str
) -> RuntimeError:
    """One exception that explains everything; an optimizer that cannot go on is marked in its `order`.

    `kernels` are the launches of the step by their position among its calls. `done` is the number of calls made: None
    before the first. `memory` is what the optimizer has allocated, `behind` what a step does after its launches.
    """
    if done is None:
        what, before = "CUDA failed before the first launch of the step", 0
    else:
        failed = next((name for i, name in kernels.items() if i >= done), None)
        what = f"CUDA did not launch {failed}" if failed else f"CUDA did not {behind}"
        launched = [name for i, name in kernels.items() if i < done]
        # Sums of gradients are not state.
        before = len(launched) if any(not name.startswith("partials_kernel") for name in launched) else 0
    if any(map(order.library.fails, order.devices)):
        order.broken = f"{what} ({error}): the device is lost to this process; start a new process"
        return RuntimeError(order.broken)
    if not all(map(order.library.knows, memory)):
        order.broken = f"{what} ({error}): {_RESET}, and all arrays there are gone; start a new process"
        return RuntimeError(order.broken)
    if before:
        half = f"{before} of the step's {len(kernels)} launches were made"
        again = "restore the parameters, then call load_state_dict to make it usable again"
        order.broken = f"{what} ({error}): {half}, the optimizer is between two steps; {again}"
        return RuntimeError(order.broken)
    if _names_a_handle(error):
        return RuntimeError(
            f"{what} ({error}): nothing was updated. Either the current stream was destroyed; then use another one. "
            f"Or {_RESET}, and all kernels there are gone; then start a new process"
        )
    return RuntimeError(f"{what} ({error}): nothing was updated, and the optimizer can still be used")


def _names_a_handle(error: Exception) -> bool:
    """Does it say that a kernel or stream handle is invalid, or belongs to a context that is gone?"""
    said = str(error)
    return any(mark in said for mark in ("INVALID_HANDLE", "InvalidResourceHandle", "CONTEXT"))
