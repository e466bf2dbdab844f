"""Steps on streams: they wait for each other but not for the device, and memory lives as long as it is used."""

import gc
import threading

import numpy as np
import pytest
from on_device import arrays, everything
from variants import bits

from rmsprop_gpu import RMSProp

pytestmark = pytest.mark.gpu
cupy = pytest.importorskip("cupy", exc_type=ImportError)
F4 = np.float32


@pytest.fixture
def streams():
    return [cupy.cuda.Stream.null, *(cupy.cuda.Stream(non_blocking=True) for _ in range(3))]


def test_streams_may_change_between_building_and_steps(streams):
    grads = [arrays(i) for i in range(1, 5)]
    cupy.cuda.Device().synchronize()
    with streams[1]:
        opt = RMSProp(arrays(0), momentum=0.5)
    for i in range(12):
        with streams[i % 4]:
            opt.step(grads[i % 4])
    with streams[2]:
        opt.lr = 0.5
    with streams[3]:
        opt.step(grads[0])
        saved = opt.state_dict()
    with streams[0]:
        opt.step(grads[1])
        opt.load_state_dict(saved)
    with streams[1]:
        opt.step(grads[2])
    want = RMSProp(arrays(0), momentum=0.5)
    for i in range(12):
        want.step(grads[i % 4])
    want.lr = 0.5
    want.step(grads[0])
    saved = want.state_dict()
    want.step(grads[1])
    want.load_state_dict(saved)
    want.step(grads[2])
    for stream in streams:
        stream.synchronize()
    assert everything(opt) == everything(want)


def test_a_step_does_not_wait_for_the_device():
    """A step with new gradients and a new lr returns even though earlier work on the stream has not ended."""
    opt, grads, others = RMSProp(arrays(0)), arrays(1), arrays(2)
    stream, go, began = cupy.cuda.Stream(non_blocking=True), threading.Event(), []
    cupy.cuda.Device().synchronize()
    with stream:
        opt.step(grads)
        opt.step(others)
        stream.synchronize()
        stream.launch_host_func(lambda _: (began.append(1), go.wait(5)), None)
        if go.wait(0.2) or (began and not _is_busy(stream)):
            pytest.skip("this device runs work as soon as it is submitted")
        for x in (grads, others, grads):
            opt.lr = 0.5
            opt.step(x)
        assert _is_busy(stream)
        go.set()
        stream.synchronize()
    assert opt.steps == 5


def _is_busy(stream):
    return not stream.done


@pytest.mark.filterwarnings("ignore:ExternalStream is deprecated:DeprecationWarning")
def test_a_stream_that_others_own_may_be_gone_the_next_time():
    opt, grads, others = RMSProp(arrays(0)), arrays(1), arrays(2)
    for x in (grads, others):
        opt.step(x)
    raw = cupy.cuda.runtime.streamCreateWithFlags(cupy.cuda.runtime.streamNonBlocking)
    cupy.cuda.Device().synchronize()
    with cupy.cuda.ExternalStream(raw):
        opt.step(grads)
    opt.step(others)  # ordered after the other stream's step, though nobody waited for that
    cupy.cuda.get_current_stream().synchronize()
    want = RMSProp(arrays(0))
    for x in (grads, others, grads, others):
        want.step(x)
    assert everything(opt) == everything(want)
    with cupy.cuda.ExternalStream(raw):
        opt.step(grads)
    cupy.cuda.runtime.streamSynchronize(raw)
    cupy.cuda.runtime.streamDestroy(raw)
    opt.step(grads)
    assert opt.steps == 6


def test_parameters_that_only_the_optimizer_holds_are_updated():
    grads = arrays(1)
    opt = RMSProp(arrays(0))
    gc.collect()
    taken = [arrays(i) for i in range(5)]  # would reuse the memory if it had been freed
    for _ in range(3):
        opt.step(grads)
    want = RMSProp(arrays(0))
    for _ in range(3):
        want.step(grads)
    assert everything(opt) == everything(want)
    assert [bits(x) for x in taken[0]] == [bits(x) for x in arrays(0)]


def test_a_thousand_steps_with_changing_gradients_and_streams(streams):
    """Without the pool each array has its own memory, so that a use after free shows."""
    pool = cupy.cuda.get_allocator()
    cupy.cuda.set_allocator(None)
    try:
        rng = np.random.default_rng(3)
        sizes = (300, 7)
        host = [rng.standard_normal(n).astype(F4) for n in sizes]
        opt, want = RMSProp([cupy.asarray(x) for x in host], momentum=0.9), RMSProp(host, momentum=0.9)
        choices = [[rng.standard_normal(n).astype(F4) for n in sizes] for _ in range(7)]
        for i in range(1000):
            grads = choices[i % 7]
            with streams[int(rng.integers(4))] as stream:
                opt.step([cupy.asarray(g) for g in grads])  # freed at once
                if i % 100 == 0:
                    stream.synchronize()
            want.step(grads)
        for stream in streams:
            stream.synchronize()
        assert everything(opt) == everything(want)
    finally:
        cupy.cuda.set_allocator(pool)


def test_an_optimizer_that_goes_leaves_its_memory_to_nobody_too_early(streams):
    """Built on one stream, stepped on another: memory reused on the first has to wait for the second."""
    with streams[1]:
        opt, grads = RMSProp(arrays(0)), arrays(1)
        opt.step(grads)
    held = opt.param_groups[0]["params"]
    streams[1].synchronize()
    with streams[2]:
        opt.step(grads)
    del opt
    with streams[1]:  # allocations of the size of the tables, in their place
        # not more than were freed: allocating new memory would wait
        other = [cupy.full(64, 7, np.int64) for _ in range(5)]
        streams[1].synchronize()
    streams[2].synchronize()
    assert len(other) == 5
    want = RMSProp(arrays(0))
    for _ in range(2):
        want.step(grads)
    assert [bits(x) for x in held] == [bits(x) for x in want.param_groups[0]["params"]]


def test_two_threads_two_optimizers():
    found = {}

    def train(seed):
        with cupy.cuda.Stream(non_blocking=True) as stream:
            opt = RMSProp(arrays(seed))
            for i in range(50):
                opt.step(arrays(i))
            stream.synchronize()
            found[seed] = everything(opt)

    threads = [threading.Thread(target=train, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in (1, 2):
        want = RMSProp(arrays(seed))
        for i in range(50):
            want.step(arrays(i))
        assert found[seed] == everything(want)


def test_a_thread_that_has_not_used_cuda_yet():
    opt, grads = RMSProp(arrays(0)), arrays(1)
    opt.step(grads)
    cupy.cuda.Device().synchronize()
    errors = []

    def step():
        try:
            opt.step(grads)
            cupy.cuda.get_current_stream().synchronize()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=step)
    thread.start()
    thread.join()
    assert errors == []
    assert opt.steps == 2
