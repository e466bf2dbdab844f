"""The libraries to test with, whether there is a CUDA device, and a way to compile kernels again."""

from functools import cache

import pytest

from rmsprop_gpu.arrays.selector import cuda_devices
from rmsprop_gpu.kernels import compiling

# Parametrizes a test to run on both.
MODULES = ["numpy", pytest.param("cupy", marks=pytest.mark.gpu)]


@cache
def why_no_gpu():
    try:
        cuda_devices()
    except RuntimeError as error:
        return str(error)


@cache
def device_count():
    if why_no_gpu():
        return 0
    import cupy

    return cupy.cuda.runtime.getDeviceCount()


# A string is evaluated when the test runs, so devices are not queried if no such test was selected.
two = pytest.mark.skipif("__import__('devices').device_count() < 2", reason="needs two CUDA devices")


def clear(cuda, monkeypatch):
    """Compile the device's kernels again without storing them, and leave existing ones alone."""
    theirs = {cuda.__name__, "rmsprop_gpu.kernels.cuda_code"}
    kept = {key: made for key, made in compiling._compiled.items() if key[0].__module__ not in theirs}
    monkeypatch.setattr(compiling, "_compiled", kept)
    monkeypatch.setenv("RMSPROP_GPU_CACHE", "0")
