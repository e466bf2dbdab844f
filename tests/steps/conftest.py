"""Streams, launches and memory of a device, for the tests of its steps."""

import pytest


@pytest.fixture
def stream():
    import cupy

    return cupy.cuda.Stream(non_blocking=True)


@pytest.fixture
def launched(monkeypatch):
    """The kernels that steps launch, by what they say of themselves."""
    from rmsprop_gpu.steps import device

    said, run = [], device.DeviceSteps._run

    def spy(self, calls):
        said.extend(call.kernel for call in calls if hasattr(call, "kernel"))
        run(self, calls)

    monkeypatch.setattr(device.DeviceSteps, "_run", spy)
    return said


@pytest.fixture
def pool():
    """CuPy's pool in any case: it frees in the order of streams, wherever the current device is."""
    import cupy

    before = cupy.cuda.get_allocator()
    cupy.cuda.set_allocator(cupy.get_default_memory_pool().malloc)
    yield
    cupy.cuda.set_allocator(before)
