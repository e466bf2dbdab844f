"""Other libraries' arrays as NumPy or CuPy arrays, without a copy; and copies from one place to another."""

from __future__ import annotations

from typing import Any

import numpy as np

from .layout import NDArray, reach
from .selector import cuda_missing

FOR_TORCH = "rmsprop_gpu.torch.RMSprop, which steps torch's own parameters"


class UnusableError(TypeError):
    """An array that cannot be used, with the reason."""


def host_array(x: Any) -> NDArray:
    """A NumPy array over the memory of another library's host array, without a copy."""
    try:
        if hasattr(x, "block_until_ready"):  # from JAX, which may still be computing it
            x.block_until_ready()
        if hasattr(x, "is_neg") and x.is_neg():  # from torch; DLPack cannot express it
            raise TypeError("its values are the negatives of its memory; wanted x.resolve_neg()")
        if getattr(x, "__array_interface__", None) is not None:
            return np.asarray(x, copy=False)
        return np.from_dlpack(x)
    except Exception as error:  # whatever another library raises
        raise UnusableError(f"it does not hand out its memory ({error}){_way(x)}") from None


def _way(x: Any) -> str:
    """What to pass instead of an array that does not hand out its memory, if known."""
    if getattr(x, "requires_grad", False):
        return f"; wanted p.detach(), or {FOR_TORCH}"
    if getattr(x, "is_sparse", False):
        return f"; wanted x.to_dense(), or {FOR_TORCH}"
    if str(getattr(x, "dtype", "")) == "torch.bfloat16":
        return "; wanted x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)"
    return "; wanted np.asarray(x)" if hasattr(x, "__array__") and hasattr(x, "block_until_ready") else ""


def cupy_array(x: Any) -> Any:
    """A CuPy array over the memory of any array on a CUDA device: CuPy's own, or made through an interface.

    Nothing is copied. Work that the other library has enqueued on its stream comes first: the current stream waits for
    it, not the host.
    """
    missing = cuda_missing()
    if missing:
        raise UnusableError(missing)
    import cupy

    if isinstance(x, cupy.ndarray):
        return x
    try:
        interface = getattr(x, "__cuda_array_interface__", None)
        return cupy.from_dlpack(x) if interface is None else _over(cupy, x, interface)
    except Exception as error:  # whatever another library raises
        raise UnusableError(f"it does not hand out its memory ({error})") from None


def _over(cupy: Any, x: Any, interface: dict[str, Any]) -> Any:
    """A CuPy array made through the CUDA array interface; ``cupy.asarray`` would make the host wait for a stream."""
    if interface.get("mask") is not None:
        raise TypeError("it has a mask, which would be ignored")
    dtype, shape = np.dtype(interface["typestr"]), tuple(interface["shape"])
    strides = interface.get("strides")
    if strides is None:
        strides = tuple(dtype.itemsize * int(np.prod(shape[i + 1 :], dtype=np.int64)) for i in range(len(shape)))
    low, end = reach(shape, strides, dtype.itemsize)
    address = interface["data"][0]
    if end:
        memory = cupy.cuda.UnownedMemory(address + low, end - low, x)  # it asks CUDA for the device of the address
    else:
        memory = cupy.cuda.UnownedMemory(0, 0, x, cupy.cuda.runtime.getDevice())
    if memory.device_id < 0:
        raise TypeError(f"the address {address:#x} is on no device")
    array = cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(memory, -low), strides)
    producer = interface.get("stream")
    with cupy.cuda.Device(memory.device_id):
        current = cupy.cuda.get_current_stream()
        if producer and producer != current.ptr and not current.is_capturing():
            event = cupy.cuda.Event(disable_timing=True)
            cupy.cuda.runtime.eventRecord(event.ptr, producer)
            current.wait_event(event)
    return array


def copied(x: Any, device: int | None) -> Any:
    """A copy of a NumPy or CuPy array in host memory (None) or on a device."""
    if device is None and isinstance(x, np.ndarray):
        return x.copy(order="K")
    import cupy

    if not isinstance(x, np.ndarray) and device != x.data.device_id:
        with cupy.cuda.Device(x.data.device_id):
            x = x.get(order="A")  # between devices through the host: in order, and without peer access
    if device is None:
        return x
    with cupy.cuda.Device(device):
        return cupy.array(x, order="K", copy=True)
