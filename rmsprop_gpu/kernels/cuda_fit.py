"""Do libNVVM, nvJitLink and the driver fit together? If not, what to install."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from ..extras import command

MISSING = "libNVVM does not load; install it with the extra that fits your driver ({extras})"
LOST = "this process can no longer use the device, since an earlier kernel failed on it; restart the process"
NOT_TAKEN = (
    "the driver, for CUDA {driver}, does not accept what nvJitLink ({nvJitLink}) made for it; install a newer "
    "driver, or the extra cuda12"
)
# A fragment of an error's text, then what is wrong and what helps.
_MEANINGS = (
    (
        "OUTDATED_LIBRARY",
        "nvJitLink ({nvJitLink}) is older than libNVVM ({libNVVM}), whose code it has to link; "
        "install one that is as new (pip install -U nvidia-nvjitlink)",
    ),
    (
        "UNSUPPORTED_PTX_VERSION",
        "the driver, for CUDA {driver}, is too old for libNVVM ({libNVVM}); install nvJitLink, which links for older "
        "ones (pip install -U nvidia-nvjitlink), a newer driver, or the extra cuda12",
    ),
    (
        "NvvmSupportError",
        "libNVVM was not found; install it with the extra that fits your driver ({extras})",
    ),
    *((mark, MISSING) for mark in ("libNVVM cannot be found", "libNVVM is not available", "libnvvm.so", "nvvm64")),
    (
        "OUT_OF_MEMORY",
        "the device has no memory left for it; free some on the device, in CuPy's pool for example "
        "(cupy.get_default_memory_pool().free_all_blocks())",
    ),
    *((mark, LOST) for mark in ("ILLEGAL_ADDRESS", "MISALIGNED_ADDRESS", "LAUNCH_FAILED", "CONTEXT_IS_DESTROYED")),
    *((mark, NOT_TAKEN) for mark in ("INVALID_IMAGE", "NO_BINARY_FOR_GPU")),
)


def installed(*names: str) -> str | None:
    """The version of the first of these distributions that is installed."""
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def versions() -> dict[str, str]:
    """The versions of everything involved, by name; in words if something is absent."""
    return {
        "numpy": installed("numpy") or "not installed",
        "numba": installed("numba") or "not installed",
        "numba-cuda": installed("numba-cuda") or "not installed",
        "cuda-core": installed("cuda-core") or "not installed",
        "libNVVM": installed("nvidia-nvvm", "nvidia-cuda-nvcc-cu12") or "not from a package",
        "nvJitLink": nvjitlink() or "not installed",
        "driver": _driver() or "unknown",
    }


def nvjitlink() -> str | None:
    """The version of nvJitLink; None if it does not load."""
    try:
        from cuda.bindings import nvjitlink

        return ".".join(map(str, nvjitlink.version()))
    except Exception:  # the bindings' own errors have no common base
        return None


def driver_version() -> int:
    """The CUDA version that the driver supports, as CUDA numbers it: 13050 is 13.5."""
    from cuda.bindings import driver

    error, number = driver.cuDriverGetVersion()
    if error != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"the driver does not report its version: {error.name}")
    return int(number)


def _driver() -> str | None:
    try:
        number = driver_version()
    except Exception:  # the bindings' own errors have no common base
        return None
    return f"{number // 1000}.{number % 1000 // 10}"


def linker() -> str:
    """What links kernels here, in words."""
    found = nvjitlink()
    if found:
        return f"nvJitLink {found}, which optimizes what it links"
    return "the driver; nvJitLink, which also links for older drivers, is missing (pip install -U nvidia-nvjitlink)"


def why_not_compiled(error: Exception) -> str:
    """What an error while compiling, linking or loading a kernel means, and what to install."""
    found, said = versions(), f"{type(error).__name__}: {error}"
    meaning = next((text for mark, text in _MEANINGS if mark.lower() in said.lower()), None)
    extras = f"{command('cuda13', upgrade=True)}, or [cuda12] for an older driver"
    what = meaning.format(**found, extras=extras) if meaning else f"versions that fit together come with {extras}"
    have = ", ".join(f"{name} {number}" for name, number in found.items())
    return f"no kernel could be compiled for CUDA: {what}. The error: {' '.join(said.split())}. Found: {have}"
