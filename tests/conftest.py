from functools import cache

import numpy as np
import pytest

from rmsprop_gpu.arrays.selector import cuda_devices


def pytest_addoption(parser):
    text = "switch CuPy's memory pool off: each array has an allocation of its own, so that a use after free shows"
    parser.addoption("--no-pool", action="store_true", help=text)


@pytest.fixture
def rng():
    return np.random.default_rng(2012)


@cache
def why_no_gpu():
    try:
        cuda_devices()
    except RuntimeError as error:
        return str(error)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu"):
        if why_no_gpu():
            pytest.skip(why_no_gpu())
        if item.config.getoption("--no-pool"):
            import cupy

            cupy.cuda.set_allocator(None)


@cache
def device_count():
    if why_no_gpu():
        return 0
    import cupy

    return cupy.cuda.runtime.getDeviceCount()
