from functools import cache

import numpy as np
import pytest

from rmsprop_gpu.backends import cuda_devices


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
    if item.get_closest_marker("gpu") and why_no_gpu():
        pytest.skip(why_no_gpu())
