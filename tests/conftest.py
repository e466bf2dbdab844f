"""What every test may use. The other helpers are in helpers/."""

import importlib
import os
import signal

import numpy as np
import pytest

pytest.register_assert_rewrite(
    "foreign_runs", "given_arrays", "judge", "on_device", "on_either", "on_host", "torch_twins"
)

from devices import MODULES, why_no_gpu  # noqa: E402


def pytest_configure(config):
    """Keep compiled kernels in pytest's cache, for all its processes and for the next run."""
    if config.pluginmanager.hasplugin("cacheprovider"):
        os.environ.setdefault("RMSPROP_GPU_CACHE_DIR", str(config.cache.mkdir("kernels")))


def pytest_addoption(parser):
    text = "switch CuPy's memory pool off: each array has an allocation of its own, so that a use after free shows"
    parser.addoption("--no-pool", action="store_true", help=text)


@pytest.fixture
def rng():
    return np.random.default_rng(2012)


@pytest.fixture
def answers_ctrl_c():
    """Handle Ctrl-C like Python, here and in child processes. In the background (`&`, nohup) it would be ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(params=MODULES)
def xp(request):
    """Each library in turn."""
    return importlib.import_module(request.param)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu"):
        if why_no_gpu():
            pytest.skip(why_no_gpu())
        if item.config.getoption("--no-pool"):
            import cupy

            cupy.cuda.set_allocator(None)
