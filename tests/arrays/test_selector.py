"""The selector: which library an array belongs to, and why CUDA does not work."""

import importlib.machinery
import re
import sys
from importlib.metadata import PackageNotFoundError
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from paths import ROOT

from rmsprop_gpu import RMSProp, array_module, available_backends, backend_of
from rmsprop_gpu.arrays import packages, selector
from rmsprop_gpu.arrays.selector import kind_of
from rmsprop_gpu.extras import command


class CUDARuntimeError(RuntimeError):
    """A stand-in for CuPy's."""

    def __init__(self, status, text):
        super().__init__(text)
        self.status = status


def fake_cupy(count=lambda: 1, memory=lambda: (3 << 30, 4 << 30), zeros=np.zeros, current=0):
    """A CuPy whose runtime gives these answers. A context on any but the current device is an error."""
    runtime = ModuleType("cupy.cuda.runtime")
    runtime.CUDARuntimeError, runtime.errorInsufficientDriver = CUDARuntimeError, 35
    runtime.getDeviceCount, runtime.runtimeGetVersion, runtime.memGetInfo = count, lambda: 13020, memory
    runtime.getDevice = lambda: current
    runtime.getDeviceProperties = lambda i: {"name": b"GPU %d" % i, "major": 9, "minor": 0, "totalGlobalMem": 4 << 30}
    cuda, cupy = ModuleType("cupy.cuda"), ModuleType("cupy")
    cuda.runtime = runtime
    cupy.cuda, cupy.zeros, cupy.ndarray = cuda, zeros, type("ndarray", (), {})
    return {"cupy": cupy, "cupy.cuda": cuda, "cupy.cuda.runtime": runtime, "numba_cuda": SimpleNamespace()}


def raising(error):
    def function(*_):
        raise error

    return function


class Finder:
    """Finds a CuPy that fails on import."""

    def __init__(self, error):
        self.error = error

    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name in ("cupy", "numba_cuda") else None

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        raise self.error


NO_DRIVER = """
================================================================
Failed to import CuPy.

Original error:
  ImportError: libcuda.so.1: cannot open shared object file: No such file or directory
================================================================
"""

CASES = {
    "no CuPy": ({"cupy": None}, "CuPy, which holds the arrays, is not installed; install the extra cuda13 or cuda12"),
    "no numba-cuda": ({**fake_cupy(), "numba_cuda": None}, "numba-cuda, which compiles the kernels, is not installed"),
    "no driver": (Finder(ImportError(NO_DRIVER)), "there is no NVIDIA driver (ImportError: libcuda.so.1: cannot open"),
    "broken CuPy": (Finder(ImportError("undefined symbol: x")), "CuPy does not load (undefined symbol: x); it needs"),
    "CuPy that fails otherwise": (Finder(OSError("")), "CuPy does not load (OSError)"),
    "old driver": (
        fake_cupy(count=raising(CUDARuntimeError(35, "cudaErrorInsufficientDriver: driver version is insufficient"))),
        "the NVIDIA driver is too old for CUDA 13.2 (cudaErrorInsufficientDriver: driver version is insufficient); "
        f"install a newer one, or the extra for an older CUDA ({command('cuda12')})",
    ),
    "no device": (
        fake_cupy(count=raising(CUDARuntimeError(100, "cudaErrorNoDevice: no CUDA-capable device is detected"))),
        "CUDA finds no device (cudaErrorNoDevice: no CUDA-capable device is detected); an NVIDIA GPU",
    ),
    "hidden devices": (fake_cupy(count=lambda: 0), "there is no CUDA device (CUDA_VISIBLE_DEVICES may hide it)"),
    "no memory": (
        fake_cupy(count=lambda: 2, zeros=raising(MemoryError("out of memory allocating 512 bytes"))),
        "device 0 does not work (out of memory allocating 512 bytes); another program may hold its memory (nvidia-smi "
        "shows which); CUDA_VISIBLE_DEVICES may choose another one",
    ),
}


def install(monkeypatch, modules):
    for name in [n for n in sys.modules if n.split(".")[0] in ("cupy", "numba_cuda")]:
        monkeypatch.delitem(sys.modules, name)
    if isinstance(modules, Finder):
        monkeypatch.setattr(sys, "meta_path", [modules, *sys.meta_path])
        return
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("case", CASES)
def test_each_failure_has_its_reason(case, monkeypatch):
    modules, text = CASES[case]
    install(monkeypatch, modules)
    found = available_backends()
    assert found["cuda"].startswith(f"not available: {text}")
    assert found["cpu"].startswith("NumPy arrays, ")
    with pytest.raises(RuntimeError) as info:
        array_module("cuda")
    assert str(info.value).startswith(text)
    assert array_module() is array_module("auto") is array_module("cpu") is np


def test_the_current_device_is_asked_and_the_others_described(monkeypatch):
    asked = []
    install(monkeypatch, fake_cupy(lambda: 3, lambda: asked.append("memory") or (3 << 30, 4 << 30), current=1))
    said = "GPU {0} (device {0}), compute capability 9.0, {1}"
    lines = [said.format(0, "4.0 GiB"), said.format(1, "3.0 of 4.0 GiB free"), said.format(2, "4.0 GiB")]
    assert available_backends()["cuda"] == f"CuPy arrays, {'; '.join(lines)}"
    assert asked == ["memory"]
    assert array_module() is array_module("cuda") is sys.modules["cupy"]


@pytest.mark.parametrize(
    ("name", "here", "wanted"),
    [
        ("numba-cuda", "0.30.0", 'numba-cuda 0.30.0 does not fit; wanted >=0.30.4,<0.31 (pip install "numba-cuda>=0.3'),
        ("numba-cuda", "0.31.0", "numba-cuda 0.31.0 does not fit; wanted >=0.30.4,<0.31"),
        ("cuda-core", "0.7.0", 'cuda-core 0.7.0 does not fit; wanted >=1.0 (pip install "cuda-core>=1.0")'),
        ("cupy-cuda13x", "13.6.0", "cupy-cuda13x 13.6.0 does not fit; wanted >=14"),
    ],
)
def test_a_package_that_does_not_fit_is_named(name, here, wanted, monkeypatch):
    def version(package):
        if package != name:
            raise PackageNotFoundError
        return here

    install(monkeypatch, fake_cupy())
    monkeypatch.setattr(packages, "version", version)
    selector.packages_that_do_not_fit.cache_clear()
    try:
        assert available_backends()["cuda"].startswith(f"not available: {wanted}")
        with pytest.raises(TypeError, match=re.escape(wanted)):
            RMSProp(Interface())
    finally:
        selector.packages_that_do_not_fit.cache_clear()


@pytest.mark.parametrize("fitting", ["0.30.4", "0.30.12", "0.30.4.post1"])
def test_a_package_that_fits_is_taken(fitting, monkeypatch):
    monkeypatch.setattr(packages, "version", lambda name: fitting if name == "numba-cuda" else "14.0.0")
    assert packages.misfits() == []


def test_what_fits_is_what_the_extras_ask_for():
    text = (ROOT / "pyproject.toml").read_text()
    for name, (low, high) in packages.FITTING.items():
        wanted = f">={packages._text(low)}" + (f",<{packages._text(high)}" if high else "")
        assert re.search(rf'"{name}(\[cu1\d\])?{re.escape(wanted)}"', text), name


@pytest.mark.parametrize("device", ["gpu", "CUDA", None, 0])
def test_array_module_knows_three_devices(device):
    with pytest.raises(ValueError, match='wanted "auto", "cpu" or "cuda"'):
        array_module(device)


class Interface:
    """A device array with the CUDA array interface."""

    __cuda_array_interface__ = {"shape": (3,)}  # noqa: RUF012


class DLPack:
    """A DLPack array on some device."""

    def __init__(self, kind):
        self.kind = kind

    def __dlpack_device__(self):
        return (self.kind, 0)


def test_arrays_are_asked_what_they_are():
    assert backend_of(np.zeros(3)) == "cpu"
    for x in (Interface(), DLPack(2), DLPack(13)):
        assert backend_of(x) == "cuda"
    for x in (np.ma.zeros(3), [1.0], 1.5, None, "text", Interface, np.float32(1), DLPack(7)):
        assert kind_of(x) is None
        with pytest.raises(TypeError, match="is not an array that can be updated; wanted NumPy's, or one on a CUDA"):
            backend_of(x)


def test_a_device_array_without_cupy_says_what_to_install(monkeypatch):
    install(monkeypatch, {"cupy": None})
    with pytest.raises(
        TypeError, match=rf"params is a {Interface.__module__}.Interface on a CUDA device: CuPy, .* install"
    ):
        RMSProp(Interface())
