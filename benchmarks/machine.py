"""The machine of a measurement: enough to compare, but nothing that names this machine or a folder on it."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("numpy", "numba", "llvmlite", "torch", "bitsandbytes", "numexpr", "jax", "optax", "keras")
CUDA_PACKAGES = ("numpy", "numba", "numba-cuda", "cuda-core", "cupy-cuda13x", "cupy-cuda12x")


def machine() -> dict[str, Any]:
    """Processor, cores, memory and system; None for what this system does not report."""
    memory = find(r"MemTotal:\s+(\d+) kB", "/proc/meminfo")
    distribution = find(r'PRETTY_NAME="(.+)"', "/etc/os-release")
    return {
        "cpu": find(r"model name\s*:\s*(.+)", "/proc/cpuinfo") or platform.machine(),
        "cores": cores(),
        "memory_gib": None if memory is None else round(int(memory) / 2**20, 1),
        "os": f"{distribution or 'unknown'}, {platform.system()} {platform.release().split('-')[0]}",
        # "madvise" gives huge pages to NumPy, which asks for them, and none to torch and others, which do not
        "transparent_huge_pages": find(r"\[(\w+)\]", "/sys/kernel/mm/transparent_hugepage/enabled"),
        "THP_MEM_ALLOC_ENABLE": os.environ.get("THP_MEM_ALLOC_ENABLE"),  # with 1 torch asks for them too
        "load_at_start": load(),
    }


def package_versions(packages: Sequence[str] = PACKAGES) -> dict[str, str | None]:
    """Of Python and the packages; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def cuda_device() -> str:
    """The current CUDA device, in words."""
    import cupy

    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    return f"{properties['name'].decode()}, compute capability {properties['major']}.{properties['minor']}"


def is_virtual(device: str) -> bool:
    """A device that executes kernels on the CPU has that in its name; its times mean nothing."""
    return "on the CPU" in device


def versions(device: str) -> dict[str, str | None]:
    """Of Python, all packages and gcc, and of CUDA on "cuda"; None for what is not installed."""
    found = package_versions(tuple(dict.fromkeys((*PACKAGES, *CUDA_PACKAGES))))
    if device == "cuda":
        from rmsprop_gpu.arrays.selector import cuda_versions

        found["CUDA"] = cuda_versions()
    try:
        done = subprocess.run(["gcc", "-dumpfullversion"], capture_output=True, text=True, check=True)
        found["gcc"] = done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        found["gcc"] = None
    return found


def find(pattern: str, path: str) -> str | None:
    """The first match in a file of the system, if there is such a file."""
    try:
        found = re.search(pattern, Path(path).read_text())
    except OSError:
        return None
    return found[1].strip() if found else None


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load() -> float | None:
    """Processes that wanted a core in the last minute: if far from 0, the times are from a busy machine."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def without_paths(text: str) -> str:
    """An error message without the folders of this machine: only file names are left."""
    return re.sub(r"(?<!\w)(?:/[\w.+~-]+)+/([\w.+~-]+)", r"\1", text)
