"""Whether what compiles for CUDA fits together: libNVVM, nvJitLink, the driver; what to install where it does not."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from ..extras import command

MISSING = "libNVVM does not load; install it with the extra that fits your driver ({extras})"
LOST = "the device can no longer be used by this process, since a kernel before has failed on it; start it anew"
NOT_TAKEN = (
    "the driver, for CUDA {driver}, does not take what was made for it by nvJitLink ({nvJitLink}); install a newer "
    "driver, or the extra cuda12"
)
# By what an error says: what is the matter, and what helps.
_MEANINGS = (
    (
        "OUTDATED_LIBRARY",
        "nvJitLink ({nvJitLink}) is older than libNVVM ({libNVVM}), whose code it is to link; "
        "install one as new (pip install -U nvidia-nvjitlink)",
    ),
    (
        "UNSUPPORTED_PTX_VERSION",
        "the driver, for CUDA {driver}, is too old for libNVVM ({libNVVM}); install nvJitLink, which links for older "
        "ones (pip install -U nvidia-nvjitlink), a newer driver, or the extra cuda12",
    ),
    (
        "NvvmSupportError",
        "libNVVM is not found; install it with the extra that fits your driver ({extras})",
    ),
    *((mark, MISSING) for mark in ("libNVVM cannot be found", "libNVVM is not available", "libnvvm.so", "nvvm64")),
    (
        "OUT_OF_MEMORY",
        "the device has no memory left for it; wanted less on the device, in CuPy's pool say "
        "(cupy.get_default_memory_pool().free_all_blocks())",
    ),
    *((mark, LOST) for mark in ("ILLEGAL_ADDRESS", "MISALIGNED_ADDRESS", "LAUNCH_FAILED", "CONTEXT_IS_DESTROYED")),
    *((mark, NOT_TAKEN) for mark in ("INVALID_IMAGE", "NO_BINARY_FOR_GPU")),
)


def installed(*names: str) -> str | None:
    """The version of the first of these distributions that is there."""
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def versions() -> dict[str, str]:
    """Of all that takes part, by name; in words where it is not there."""
    return {
        "numpy": installed("numpy") or "not installed",
        "numba": installed("numba") or "not installed",
        "numba-cuda": installed("numba-cuda") or "not installed",
        "cuda-core": installed("cuda-core") or "not installed",
        "libNVVM": installed("nvidia-nvvm", "nvidia-cuda-nvcc-cu12") or "not of a package",
        "nvJitLink": nvjitlink() or "not installed",
        "driver": _driver() or "not known",
    }


def nvjitlink() -> str | None:
    """The version of nvJitLink; None where it does not load."""
    try:
        from cuda.bindings import nvjitlink

        return ".".join(map(str, nvjitlink.version()))
    except Exception:  # the bindings' own errors have no common base
        return None


def driver_version() -> int:
    """The CUDA version that the driver is for, as CUDA numbers it: 13050 is 13.5."""
    from cuda.bindings import driver

    error, number = driver.cuDriverGetVersion()
    if error != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"the driver does not say its version: {error.name}")
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
    return "the driver; nvJitLink, which links for older drivers too, is not there (pip install -U nvidia-nvjitlink)"


def why_not_compiled(error: Exception) -> str:
    """What an error in compiling, linking or loading a kernel means, and what to install."""
    found, said = versions(), f"{type(error).__name__}: {error}"
    meaning = next((text for mark, text in _MEANINGS if mark.lower() in said.lower()), None)
    extras = f"{command('cuda13', upgrade=True)}, or [cuda12] for an older driver"
    what = meaning.format(**found, extras=extras) if meaning else f"versions that fit together come with {extras}"
    have = ", ".join(f"{name} {number}" for name, number in found.items())
    return f"no kernel could be compiled for CUDA: {what}. It said: {' '.join(said.split())}. Here are {have}"
