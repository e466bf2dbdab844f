"""Part: what it runs on: the card, its driver, and everything that compiles for it."""

from __future__ import annotations

import subprocess
from typing import Any

from benchmarks.gpu.measuring import Record, main
from benchmarks.gpu.part import Result, measured
from benchmarks.machine import machine, versions

SMI = (
    "name,driver_version,memory.total,clocks.max.sm,clocks.max.memory,power.limit,mig.mode.current,ecc.mode.current,"
    "pstate,clocks_throttle_reasons.active"
)


def nvidia_smi() -> dict[str, str]:
    """What the driver reports about the first card."""
    print(_said("nvidia-smi"))
    names, values = _said("nvidia-smi", f"--query-gpu={SMI}", "--format=csv").splitlines()[:2]
    return dict(zip(names.split(", "), values.split(", "), strict=True))


def _said(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except FileNotFoundError:
        raise RuntimeError(f"{command[0]} is not installed") from None


def packages() -> dict[str, str | None]:
    """Of Python, and of gcc."""
    return versions("cpu")


def cuda() -> str:
    """Versions of CUDA: the driver's, and that of the runtime that CuPy brings."""
    from rmsprop_gpu.arrays.selector import cuda_versions

    return cuda_versions()


def properties() -> dict[str, Any]:
    """Of the current device."""
    import cupy

    found = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    return {
        "name": found["name"].decode(),
        "compute_capability": f"{found['major']}.{found['minor']}",
        "multiprocessors": found["multiProcessorCount"],
        "l2_mib": found["l2CacheSize"] / 2**20,
        "memory_gib": round(found["totalGlobalMem"] / 2**30, 1),
        "bus_bits": found.get("memoryBusWidth"),
        "reads_pageable_memory": bool(found.get("pageableMemoryAccess")),
    }


def compilers() -> dict[str, str]:
    """What compiles, links and runs kernels."""
    from rmsprop_gpu.kernels.cuda_fit import versions

    return versions()


def links_with_lto() -> bool:
    """Does numba-cuda link with nvJitLink, which optimizes then?"""
    from numba.cuda.cudadrv import driver

    return bool(driver._have_nvjitlink())


def kernel() -> dict[str, Any]:
    """Registers, spills and occupancy of the plain float32 kernel that is loaded."""
    from dataclasses import asdict

    import cupy

    from rmsprop_gpu import RMSProp
    from rmsprop_gpu.profiling import profile

    param = cupy.zeros(1024, "float32")
    return asdict(profile(RMSProp(param), param.copy(), repeats=1).launches[0].code)


def measure(record: Record, rehearse: bool) -> None:
    """Measure each separately: whatever fails is what someone will want to know about."""
    for find in (nvidia_smi, machine, packages, compilers, cuda, properties, links_with_lto, kernel):
        record.fact(find.__name__, find)
        print(find.__name__, record.found[find.__name__], flush=True)
    print(record.found.get("unknown", ""), flush=True)


def headline(result: Result) -> str:
    """The card and its driver."""
    smi, device = result.get("nvidia_smi") or {}, result.get("properties")
    if device is None:
        return f"no device: {result.get('unknown', {}).get('properties', 'not asked')}"
    return (
        f"{device['name']}, compute capability {device['compute_capability']}, driver "
        f"{smi.get('driver_version', 'not known')}"
    )


def lines(result: Result) -> list[str]:
    """Everything, in a list."""
    text = []
    for name, found in result.items():
        if name != "unknown" and found is not None:
            known = {key: x for key, x in found.items() if x is not None} if isinstance(found, dict) else found
            said = ", ".join(f"{key} {x}" for key, x in known.items()) if isinstance(known, dict) else known
            text.append(f"* {name.replace('_', ' ')}: {said}")
    return text + [f"* {name.replace('_', ' ')}: not known: {why}" for name, why in result.get("unknown", {}).items()]


PART = measured("versions", "What it runs on", 30, headline=headline, lines=lines, needs_device=False)

if __name__ == "__main__":
    main(measure)
