"""Fixtures for steps on a device: streams, launches and memory."""

import pytest


@pytest.fixture
def stream():
    import cupy

    return cupy.cuda.Stream(non_blocking=True)


@pytest.fixture
def launched(monkeypatch):
    """The kernels that steps launch, by their descriptions."""
    from rmsprop_gpu.steps import device

    said, run = [], device.DeviceSteps._run

    def spy(self, calls):
        said.extend(call.kernel for call in calls if hasattr(call, "kernel"))
        run(self, calls)

    monkeypatch.setattr(device.DeviceSteps, "_run", spy)
    return said


@pytest.fixture
def pool():
    """CuPy's memory pool, whatever the allocator was: it frees in stream order, wherever the current device is."""
    import cupy

    before = cupy.cuda.get_allocator()
    cupy.cuda.set_allocator(cupy.get_default_memory_pool().malloc)
    yield
    cupy.cuda.set_allocator(before)
