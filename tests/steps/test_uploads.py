"""Copies from the host that run later: they copy the values at the time of the call."""

import os
import threading
import warnings

import numpy as np
import pytest

pytestmark = pytest.mark.gpu


@pytest.fixture
def uploads(monkeypatch):
    from rmsprop_gpu.steps import uploads

    monkeypatch.setattr(uploads, "_slots", {})
    return uploads


def slots(uploads):
    return [slot for some in uploads._slots.values() for slot in some]


@pytest.mark.parametrize("size", [1, 511, 512, 513, 100_000])
def test_the_source_may_change_at_once(size, uploads):
    import cupy

    stream, copies = cupy.cuda.Stream(non_blocking=True), []
    for k in range(20):
        source, target = np.arange(k, k + size), cupy.empty(size, np.int64)
        with stream:
            uploads.upload(target, source, stream)
        source.fill(-1)
        copies.append(target)
    stream.synchronize()
    for k, target in enumerate(copies):
        assert np.array_equal(target.get(), np.arange(k, k + size))


class Event:
    """An event whose state a test sets."""

    done = False

    def __init__(self, disable_timing):
        pass

    def record(self, stream):
        pass


def test_memory_is_used_again_when_its_copy_was_made(uploads, monkeypatch):
    import cupy

    monkeypatch.setattr(uploads, "Event", Event)
    target, stream = cupy.empty(8, np.int64), cupy.cuda.get_current_stream()
    for count in (1, 2, 3):
        uploads.upload(target, np.zeros(8, np.int64), stream)
        assert len(slots(uploads)) == count  # none of them can be reused yet
    first = slots(uploads)[0]
    monkeypatch.setattr(Event, "done", True)
    for _ in range(6):
        uploads.upload(target, np.ones(8, np.int64), stream)
    assert len(slots(uploads)) == 3
    assert first in slots(uploads)


def test_two_dimensions_and_other_dtypes_are_copied_as_they_lie(uploads):
    import cupy

    source = np.arange(12, dtype=np.float32).reshape(3, 4)
    target = cupy.empty((3, 4), np.float32)
    uploads.upload(target, source, cupy.cuda.get_current_stream())
    assert np.array_equal(target.get(), source)


def test_a_step_uploads_from_pinned_memory(uploads):
    import cupy

    from rmsprop_gpu import RMSProp

    param = cupy.ones(3)
    opt = RMSProp(param)
    opt.step(cupy.ones(3))
    assert slots(uploads)
    used = len(slots(uploads))
    cupy.cuda.Device().synchronize()
    for k in range(50):
        opt.step(cupy.ones(3))
        opt.lr = 0.1 / (k + 1)
        cupy.cuda.Device().synchronize()
    assert len(slots(uploads)) <= used + 2


def test_a_busy_stream_does_not_keep_another_from_memory_that_is_free(uploads, monkeypatch):
    """The first slot waits for a busy stream. The slots after it are reused all the same."""
    import cupy

    monkeypatch.setattr(uploads, "Event", Event)
    target, stream = cupy.empty(8, np.int64), cupy.cuda.get_current_stream()
    uploads.upload(target, np.zeros(8, np.int64), stream)
    (busy,) = slots(uploads)
    busy.event.done = False
    monkeypatch.setattr(Event, "done", True)
    for _ in range(300):
        uploads.upload(target, np.ones(8, np.int64), stream)
    assert len(slots(uploads)) == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_that_was_forked_during_an_upload_does_not_wait_for_ever(uploads):
    taken, go = threading.Event(), threading.Event()

    def hold():
        with uploads._lock:
            taken.set()
            go.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert taken.wait(60)
    threading.Timer(0.2, go.set).start()  # until then, the fork waits for the lock
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python warns about forks beside running threads
        child = os.fork()
    if child == 0:
        os._exit(0 if uploads._lock.acquire(timeout=5) else 1)
    _, status = os.waitpid(child, 0)
    thread.join()
    assert os.waitstatus_to_exitcode(status) == 0


def test_a_handler_may_copy_in_the_middle_of_a_copy(uploads, monkeypatch):
    """Such as a signal handler that steps another optimizer. The thread once deadlocked, waiting for itself."""
    import cupy

    stream, inner = cupy.cuda.get_current_stream(), cupy.empty(8, np.int64)
    outer, handled = cupy.empty(8, np.int64), []

    class Interrupted(Event):
        @property
        def done(self):
            if not handled:
                handled.append(True)
                uploads.upload(inner, np.arange(8), stream)
            return True

    monkeypatch.setattr(uploads, "Event", Interrupted)
    for _ in range(2):  # the second one asks whether the first has finished
        uploads.upload(outer, np.arange(8) + 8, stream)
    stream.synchronize()
    assert handled
    assert np.array_equal(inner.get(), np.arange(8))
    assert np.array_equal(outer.get(), np.arange(8) + 8)
    assert len({slot.address for slot in slots(uploads)}) == len(slots(uploads)) == 2
