"""The selector: which backend an array belongs to, which backends work here, and why one does not."""

from __future__ import annotations

import os
import sys
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np

from ..extras import command
from .packages import misfits

DLPACK_CUDA = (2, 13)  # device types of DLPack: CUDA's own memory, and managed
DLPACK_HOST = (1, 3)  # the host's own memory, and memory pinned by CUDA


def is_masked(x: object) -> bool:
    """Is this a masked array? There is none unless numpy.ma, which NumPy loads late, is in sys.modules."""
    return "numpy.ma" in sys.modules and isinstance(x, np.ma.MaskedArray)


def is_cuda(x: Any) -> bool:
    """Is this array on a CUDA device? The array is asked, and no library is imported."""
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(x, getattr(cupy, "ndarray", ())):
        return True
    try:
        if getattr(x, "__cuda_array_interface__", None) is not None:
            return not isinstance(x, type)
    except Exception:  # torch raises for a CUDA tensor that requires grad: it has one, but does not hand it out
        return True
    try:
        return not isinstance(x, (type, np.ndarray)) and x.__dlpack_device__()[0] in DLPACK_CUDA
    except Exception:  # no DLPack, or none for such an array
        return False


def is_on_host(x: Any) -> bool:
    """Is this another library's array in host memory? The array is asked, and no library is imported."""
    if isinstance(x, (type, np.ndarray, np.generic)):
        return False
    try:
        return getattr(x, "__array_interface__", None) is not None or x.__dlpack_device__()[0] in DLPACK_HOST
    except Exception:  # no DLPack, or none for such an array
        return False


def kind_of(x: object) -> str | None:
    """``"cpu"``, ``"cuda"``, or None for anything that is not an array that can be updated."""
    if isinstance(x, np.ndarray):
        return None if is_masked(x) else "cpu"
    return "cuda" if is_cuda(x) else "cpu" if is_on_host(x) else None


def backend_of(array: object) -> str:
    """The backend that updates this array: ``"cpu"`` if it is in host memory, ``"cuda"`` if it is on a CUDA device.

    Parameters
    ----------
    array : array
        NumPy's, CuPy's, Numba's, or any with ``__cuda_array_interface__``, ``__array_interface__`` or DLPack. It is
        only inspected; nothing is copied, moved or imported.

    Raises
    ------
    TypeError
        For anything else.

    Examples
    --------
    >>> import numpy as np
    >>> backend_of(np.zeros(3))
    'cpu'
    """
    kind = kind_of(array)
    if kind is None:
        name = f"{type(array).__module__}.{type(array).__qualname__}"
        raise TypeError(f"{name} is not an array that can be updated; wanted NumPy's, or one on a CUDA device")
    return kind


def cuda_missing() -> str | None:
    """What CuPy arrays need that is not installed or does not load; None if nothing is missing."""
    if not _is_installed("cupy"):
        return f"CuPy, which holds the arrays, is not installed; install {_extras()}"
    missing = compiler_missing() or packages_that_do_not_fit()
    if missing:
        return missing
    if "cupy" not in sys.modules:
        try:
            import cupy  # noqa: F401  # only whether it loads
        except Exception as error:  # an ImportError, or whatever a broken driver causes
            return _why_cupy_does_not_load(error)
    return None


def compiler_missing() -> str | None:
    """What CUDA kernels need, for any library's arrays, that is not installed; None if nothing is missing."""
    if not _is_installed("numba_cuda"):
        return f"numba-cuda, which compiles the kernels, is not installed; install {_extras()}"
    return packages_that_do_not_fit("numba-cuda", "cuda-core")


@cache
def packages_that_do_not_fit(*names: str) -> str | None:
    """What to install instead of these packages, or of all for CUDA; None if they fit."""
    return "; ".join(misfits(*names)) or None


def _is_installed(name: str) -> bool:
    if name in sys.modules:
        return sys.modules[name] is not None
    return find_spec(name) is not None


def _why_cupy_does_not_load(error: Exception) -> str:
    said = [line.strip() for line in str(error).splitlines() if line.strip(" =")]
    reason = said[-1] if said else type(error).__name__
    if "libcuda" in reason:
        return f"there is no NVIDIA driver ({reason}); install one; CuPy and Numba bring the rest"
    return f"CuPy does not load ({reason}); it needs the wheel that fits your CUDA version: {_extras()}"


def _extras() -> str:
    return f"the extra cuda13 or cuda12, as fits your driver ({command('cuda13')})"


def cuda_devices() -> list[str]:
    """A line for every CUDA device; the current one has been tested.

    Raises
    ------
    RuntimeError
        If it does not work, with the reason and what to install.
    """
    missing = cuda_missing()
    if missing:
        raise RuntimeError(missing)
    import cupy
    from cupy.cuda import runtime

    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        raise RuntimeError(_why_no_device(runtime, error)) from None
    if not count:
        raise RuntimeError("there is no CUDA device (CUDA_VISIBLE_DEVICES may hide it)")
    # Memory is requested only on the current device: that opens a context of a few hundred MiB, and is slow.
    current = runtime.getDevice()
    try:
        free, _ = runtime.memGetInfo()
        cupy.zeros(1, np.uint8)  # a device may exist but have no memory left
        return [_described(runtime, i, free if i == current else None) for i in range(count)]
    except Exception as error:  # CUDA's errors and CuPy's OutOfMemoryError have no common base
        others = "; CUDA_VISIBLE_DEVICES may choose another one" * (count > 1)
        raise RuntimeError(
            f"device {current} does not work ({error}); another program may hold its memory (nvidia-smi shows which)"
            + others
        ) from None


def _described(runtime: ModuleType, i: int, free: int | None) -> str:
    """A device's properties, and its free memory if that is known."""
    properties = runtime.getDeviceProperties(i)
    name, total = properties["name"].decode(), properties["totalGlobalMem"] / 2**30
    memory = f"{total:.1f} GiB" if free is None else f"{free / 2**30:.1f} of {total:.1f} GiB free"
    return f"{name} (device {i}), compute capability {properties['major']}.{properties['minor']}, {memory}"


def _why_no_device(runtime: ModuleType, error: Any) -> str:
    if error.status == runtime.errorInsufficientDriver:
        return (
            f"the NVIDIA driver is too old for CUDA {_version(runtime.runtimeGetVersion())} ({error}); "
            f"install a newer one, or the extra for an older CUDA ({command('cuda12')})"
        )
    return f"CUDA finds no device ({error}); an NVIDIA GPU and its driver are needed"


def cuda_versions() -> str:
    """The CUDA versions of the driver and of CuPy's runtime; CUDA has to work."""
    from cupy.cuda import runtime

    return f"driver for {_version(runtime.driverGetVersion())}, runtime {_version(runtime.runtimeGetVersion())}"


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def available_backends() -> dict[str, str]:
    """What works here: ``{"cpu": "...", "cuda": "..."}``; if one does not, why not and what to install.

    It imports CuPy if that is installed, and opens a context on the current device; other devices are only described.

    Examples
    --------
    >>> available_backends()["cpu"]  # doctest: +ELLIPSIS
    'NumPy arrays, ... cores'
    """
    try:
        cuda = f"CuPy arrays, {'; '.join(cuda_devices())}"
    except RuntimeError as error:
        cuda = f"not available: {error}"
    return {"cpu": f"NumPy arrays, {_cores()} cores", "cuda": cuda}


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def array_module(device: str = "auto") -> ModuleType:
    """The module to make arrays with: CuPy if a CUDA device works, else NumPy.

    Parameters
    ----------
    device : {"auto", "cpu", "cuda"}
        ``"cpu"`` and ``"cuda"`` force the choice.

    Raises
    ------
    RuntimeError
        For ``"cuda"`` if it does not work, with the reason and what to install.

    Examples
    --------
    >>> array_module("cpu").__name__
    'numpy'
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f'device is {device!r}; wanted "auto", "cpu" or "cuda"')
    if device == "cpu":
        return np
    try:
        cuda_devices()
    except RuntimeError:
        if device == "cuda":
            raise
        return np
    import cupy

    return cupy  # type: ignore[no-any-return]  # CuPy has no stubs
