"""Steps on a device: what they launch, copy and allocate, on which stream, and what happens when CUDA fails."""

import ctypes
import functools
import gc
import signal
import threading
import time

import numpy as np
import pytest
from devices import two
from on_device import arrays, everything
from variants import bits

from rmsprop_gpu import AdaGrad, RMSProp, adagrad_update, array_module, rmsprop_update
from rmsprop_gpu.hyper import scalars
from rmsprop_gpu.kernels import compiling, cuda
from rmsprop_gpu.kernels.rule import Variant
from rmsprop_gpu.kernels.table import PARAM, SQUARE_AVG
from rmsprop_gpu.steps import device, resident
from rmsprop_gpu.steps.batch import Norms, make_batch

pytestmark = pytest.mark.gpu
cupy = pytest.importorskip("cupy", exc_type=ImportError)
F4 = np.float32


@pytest.fixture
def launched(monkeypatch):
    """The kernels that steps launch, by what they say of themselves."""
    said, run = [], device.DeviceSteps._run

    def spy(self, calls):
        said.extend(call.kernel for call in calls if hasattr(call, "kernel"))
        run(self, calls)

    monkeypatch.setattr(device.DeviceSteps, "_run", spy)
    return said


@pytest.fixture
def uploads(monkeypatch):
    """The sizes of the copies from the host."""
    sizes, upload = [], resident.upload

    def spy(target, source, stream):
        sizes.append(source.nbytes)
        upload(target, source, stream)

    monkeypatch.setattr(resident, "upload", spy)
    return sizes


class Allocations(cupy.cuda.MemoryHook):
    """What CuPy allocates meanwhile."""

    name = "allocations"

    def __init__(self):
        self.sizes = []

    def malloc_postprocess(self, **given):
        self.sizes.append(given["size"])


# Launches, copies, allocations


def test_one_launch_a_batch_and_two_with_bias_correction(launched):
    grads = arrays(1) * 40  # 160 tensors
    params = [g.copy() for g in grads]
    opt = RMSProp(params)
    opt.step(grads)
    assert len(launched) == 1
    assert launched[0].startswith(
        "update_kernel[float32, plain] over 160 arrays (params[0], params[1], params[2], ...)"
    )
    launched.clear()
    RMSProp([p.copy() for p in params], bias_correction=True).step(grads)
    assert [text.split("[")[0] for text in launched] == ["prepare_kernel", "update_kernel"]
    launched.clear()
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 1.0}, {"params": arrays(0, np.float64)}]
    RMSProp(groups).step([grads[:2], grads[2:], arrays(1, np.float64)])
    assert len(launched) == 2  # numbers share a batch, dtypes do not


def test_a_step_copies_what_changed_and_allocates_nothing(uploads):
    opt, grads, others = RMSProp(arrays(0), momentum=0.5), arrays(1), arrays(2)
    for _ in range(2):
        opt.step(grads)
    uploads.clear()
    with Allocations() as allocations:
        for _ in range(5):
            opt.step(grads)
        assert uploads == []
        opt.step(others)
        assert uploads == [8 * len(grads)]  # the column
        opt.lr = 0.5
        opt.step(others)
        opt.lr = 0.5
        opt.step(others)
        assert uploads == [8 * len(grads), 13 * 4]  # the scalars, once
        opt.param_groups[0]["alpha"] = 0.7
        opt.step(others)
        assert uploads == [8 * len(grads), 13 * 4, 13 * 4]
    assert allocations.sizes == []


def test_lr_is_sent_when_it_is_assigned(uploads):
    opt, grads = RMSProp(arrays(0)), arrays(1)
    opt.step(grads)
    uploads.clear()
    opt.lr = 0.25
    assert uploads == [13 * 4]
    opt.step(grads)
    assert uploads == [13 * 4]


def test_an_odd_gradient_is_copied_into_a_buffer_that_is_kept(rng):
    host = rng.standard_normal((6, 8)).astype(F4)
    params = [cupy.asarray(host.copy()), cupy.asarray(host.copy())]
    odd, opt, plain = cupy.asarray(host.T.copy()).T, RMSProp(params[0]), RMSProp(params[1])
    opt.step(odd)
    plain.step(cupy.asarray(host))
    with Allocations() as allocations:
        for k in range(3):  # the same array with other values: it is copied each time
            odd *= 2
            opt.step(odd)
            plain.step(cupy.asarray(host * 2 ** (k + 1)))
            allocations.sizes and allocations.sizes.pop()  # that of cupy.asarray
    assert allocations.sizes == []
    assert everything(opt) == everything(plain)


def test_any_dense_layout_is_updated_where_it_lies(rng):
    host = rng.standard_normal((6, 5, 4)).astype(F4)
    makers = [lambda a: a, lambda a: a.T, lambda a: a.transpose(1, 0, 2), lambda a: a[::-1], lambda a: a[:, ::-1, ::-1]]
    for make in makers:
        p, g = make(host.copy()), make(host * 0.5)
        dp, dg = make(cupy.asarray(host)), make(cupy.asarray(host * F4(0.5)))
        for params, grads in ((p, g), (dp, dg)):
            opt = RMSProp(params, centered=True)
            for x in (grads, grads.copy(), grads):
                opt.step(x)
        assert bits(p) == bits(dp)
        assert bits(opt.state[0]["square_avg"]) == bits(_twin(p, g, "square_avg"))
        assert opt.state[0]["square_avg"].strides == dp.strides


def _twin(p, g, name):
    opt = RMSProp(p.copy(order="K"), centered=True)
    for _ in range(3):
        opt.step(g)
    return opt.state[0][name]


def test_beyond_two_to_the_31_elements(rng):
    """A chunk whose offset needs more than 32 bits: bases moved back so that base plus offset is the memory."""
    for dtype, offset in ((F4, 2**31 + 8192), (np.float64, 2**33), (np.float16, 2**32 + 8)):
        n, size = 1003, np.dtype(dtype).itemsize
        host = [rng.standard_normal(n).astype(dtype) for _ in range(2)]
        p, g = (cupy.asarray(x) for x in host)
        compute = np.float64 if dtype is np.float64 else F4
        v = cupy.zeros(n, compute)
        h = RMSProp(host[0].copy()).param_groups[0].hyper()
        batch = make_batch(Variant(), np.dtype(dtype), 0, [], [], Norms([], [], 0))
        table = np.zeros((1, 8), np.int64)
        table[0, PARAM], table[0, SQUARE_AVG] = p.data.ptr - offset * size, v.data.ptr - offset * v.itemsize
        column, chunks = np.array([g.data.ptr - offset * size]), np.array([[0, offset, offset + n]])
        row = scalars(h, 0.1, np.dtype(compute))
        sent = [cupy.asarray(x) for x in (table, column, chunks, row)]
        at = cuda.Addresses(*[x.data.ptr for x in sent], 0, 0, 0, 0)
        kernels, stream = cuda.kernels(Variant(), np.dtype(dtype), 0), cupy.cuda.get_current_stream()
        cuda.launches(kernels, stream, batch, at, 1, 0, False)["update_kernel"]()
        want = host[0].copy()
        RMSProp(want, lr=0.1).step(host[1])
        assert bits(p) == bits(want)


def test_a_kernel_is_compiled_once_for_all_optimizers_and_devices():
    dtype, variant = np.dtype(F4), Variant(momentum=True)
    first = cuda.kernels(variant, dtype, 0)
    for _ in range(2):
        RMSProp(arrays(0), momentum=0.25).step(arrays(1))
    assert cuda.kernels(variant, dtype, 0) == first
    kernel = compiling.once(cuda._compile, cuda.make_update_kernel, variant, F4)
    assert len(kernel.overloads) == 1


# Ctrl-C


@pytest.fixture
def ctrl_c():
    """Python's own answer to it, which a process in the background does not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield functools.partial(getattr(ctypes.CDLL(None), "raise"), signal.SIGINT)
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_cannot_leave_a_step_half_done(ctrl_c):
    """It comes between two launches, and is heard after the last."""
    params = [cupy.ones(5, F4), cupy.ones(5, np.float64)]
    grads = [x.copy() for x in params]
    opt, want = RMSProp(params), RMSProp([x.copy() for x in params])
    opt.step(grads)
    opt._planner._plan.steps._calls.insert(2, ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        _step_and_wait(opt, grads)
    opt._planner._plan.steps._calls.remove(ctrl_c)
    for _ in range(2):
        want.step(grads)
    assert opt.steps == 2
    assert everything(opt) == everything(want)


def _step_and_wait(opt, grads):
    opt.step(grads)
    time.sleep(1)  # for a signal that is late


# Streams


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
    """Behind work that does not end, a step with new gradients and a new lr returns all the same."""
    opt, grads, others = RMSProp(arrays(0)), arrays(1), arrays(2)
    stream, go, began = cupy.cuda.Stream(non_blocking=True), threading.Event(), []
    cupy.cuda.Device().synchronize()
    with stream:
        opt.step(grads)
        opt.step(others)
        stream.synchronize()
        stream.launch_host_func(lambda _: (began.append(1), go.wait(5)), None)
        if go.wait(0.2) or (began and not _is_busy(stream)):
            pytest.skip("this device runs work when it is submitted")
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
    opt.step(others)  # after the other's, though nobody waited for that
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
    taken = [arrays(i) for i in range(5)]  # the memory, if it had been freed
    for _ in range(3):
        opt.step(grads)
    want = RMSProp(arrays(0))
    for _ in range(3):
        want.step(grads)
    assert everything(opt) == everything(want)
    assert [bits(x) for x in taken[0]] == [bits(x) for x in arrays(0)]


def test_a_thousand_steps_with_changing_gradients_and_streams(streams):
    """Without the pool, so that each array has memory of its own and a use after free is one."""
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
    """Built on one stream, stepped on another: what the first gets next waits for the second."""
    with streams[1]:
        opt, grads = RMSProp(arrays(0)), arrays(1)
        opt.step(grads)
    held = opt.param_groups[0]["params"]
    streams[1].synchronize()
    with streams[2]:
        opt.step(grads)
    del opt
    with streams[1]:  # the size of the tables, which lay there
        other = [cupy.full(64, 7, np.int64) for _ in range(5)]  # as many: more would be allocated, which waits
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


# Several devices


@pytest.fixture
def pool():
    """CuPy's pool in any case: it frees in the order of streams, wherever the current device is."""
    before = cupy.cuda.get_allocator()
    cupy.cuda.set_allocator(cupy.get_default_memory_pool().malloc)
    yield
    cupy.cuda.set_allocator(before)


@two
@pytest.mark.usefixtures("pool")
def test_parameters_on_two_devices(launched):
    host = [np.random.default_rng(i).standard_normal(n).astype(F4) for i, n in enumerate((9000, 5, 300))]
    places = (0, 1, 0)

    def on_devices(xs):
        made = []
        for place, x in zip(places, xs, strict=True):
            with cupy.cuda.Device(place):
                made.append(cupy.asarray(x))
        return made

    params, want = on_devices(host), [x.copy() for x in host]
    opt, twin = RMSProp(params, bias_correction=True), RMSProp(want, bias_correction=True)
    held = []
    for k in range(4):
        grads = [x * (k + 1) for x in host]
        held.append(on_devices(grads))  # at addresses of their own
        opt.step(held[-1])
        twin.step(grads)
        assert cupy.cuda.runtime.getDevice() == 0
    assert len(launched) == 4 * 4  # prepare and update on each
    for i, (place, p) in enumerate(zip(places, params, strict=True)):
        assert all(x.device.id == place for x in opt.state[i].values())
        with cupy.cuda.Device(place):
            assert bits(p) == bits(want[i])
            for name, x in twin.state[i].items():
                assert bits(opt.state[i][name]) == bits(x)
    saved = opt.state_dict()
    assert [saved["state"][str(i)]["square_avg"].device.id for i in range(3)] == list(places)
    opt.load_state_dict(saved)
    assert repr(opt).splitlines()[0].endswith("of float32 on cuda:0, cuda:1, 37,256 bytes of state, 4 steps)")
    with pytest.raises(TypeError, match=r"grads\[1\] is a cupy.ndarray on cuda:0, but the parameter lies on cuda:1"):
        opt.step([cupy.asarray(x) for x in host])


@two
@pytest.mark.usefixtures("pool")
def test_the_current_device_need_not_be_that_of_the_arrays():
    with cupy.cuda.Device(1):
        params, grads = arrays(0), arrays(1)
    opt = RMSProp(params)
    for _ in range(2):
        opt.step(grads)
    with cupy.cuda.Device(1):
        opt.lr = 0.5
        opt.step(grads)
        square_avg = cupy.zeros(params[0].size, F4)
    rmsprop_update(params[0], grads[0], square_avg, lr=0.1)
    assert cupy.cuda.runtime.getDevice() == 0
    assert opt.steps == 3


def ones_on_two_devices():
    made = []
    for place in (0, 1):
        with cupy.cuda.Device(place):
            made.append(cupy.ones(5, F4))
    return made


@two
@pytest.mark.usefixtures("pool")
def test_a_failure_on_the_second_device_leaves_the_current_device():
    params, grads = ones_on_two_devices(), ones_on_two_devices()
    opt = RMSProp(params)
    opt.step(grads)

    def fail():
        raise RuntimeError("out of resources")

    fail.kernel = "update_kernel"
    opt._planner._plan.steps._calls[-1] = fail
    with pytest.raises(RuntimeError, match="between two steps"):
        opt.step(grads)
    assert cupy.cuda.runtime.getDevice() == 0


@two
@pytest.mark.usefixtures("pool")
def test_a_capture_on_one_device_of_two_is_refused():
    params, grads = ones_on_two_devices(), ones_on_two_devices()
    opt = RMSProp(params)
    opt.step(grads)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        with pytest.raises(RuntimeError, match="on the current stream of one device and not on another's"):
            opt.step(grads)
        stream.end_capture()
    opt.step(grads)
    assert [int(opt.state[i]["step"]) for i in (0, 1)] == [2, 2]


# Failures


def test_a_launch_that_fails_is_one_error_and_nothing_happened(monkeypatch):
    opt, grads = RMSProp({"w": arrays(0)[0]}), {"w": arrays(1)[0]}
    opt.step(grads)
    before = everything(opt)
    with monkeypatch.context() as patch:
        patch.setattr(cuda, "THREADS", 4096)  # a block so large that no device takes it
        other = cupy.cuda.Stream()
        with other, pytest.raises(RuntimeError) as info:
            opt.step(grads)
    text = str(info.value)
    assert text.startswith('CUDA did not launch update_kernel[float32, plain] over 1 arrays (params["w"])')
    assert text.endswith("nothing was updated, the optimizer is usable as it was before the step")
    assert everything(opt) == before
    with other:
        opt._planner._plan.steps._streams = {}  # the calls with the impossible block are kept for this stream
        opt.step(grads)
    assert opt.steps == 2


def test_a_step_that_ends_between_two_launches_says_so_until_the_state_is_loaded():
    params = [cupy.ones(5, F4), cupy.ones(5, np.float64)]
    grads = [x.copy() for x in params]
    opt = RMSProp(params)
    opt.step(grads)
    saved, calls = opt.state_dict(), opt._planner._plan.steps._calls

    class Failing:
        kernel = calls[2].kernel

        def __call__(self):
            raise RuntimeError("CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES")

    working, calls[2] = calls[2], Failing()
    with pytest.raises(RuntimeError, match="1 of the step's 2 launches were made, the optimizer is between two steps"):
        opt.step(grads)
    calls[2] = working
    with pytest.raises(RuntimeError, match=r"float64.*between two steps; restore the parameters"):
        opt.step(grads)
    assert opt.steps == 1
    opt.load_state_dict(saved)
    opt.step(grads)
    assert opt.steps == 2


# One tensor


@pytest.mark.parametrize("dtype", [F4, np.float64, np.float16])
def test_functions_on_device_arrays(dtype, rng):
    host = [rng.standard_normal((40, 3)).astype(dtype) for _ in range(2)]
    compute = np.float64 if dtype is np.float64 else F4
    results = []
    for xp in (np, cupy):
        p, g = (xp.asarray(x.copy()) for x in host)
        v, m, b, s = (xp.zeros((40, 3), compute) for _ in range(4))
        for _ in range(2):
            rmsprop_update(p, g, v, lr=0.1, momentum=0.9, momentum_buffer=b, centered=True, grad_avg=m)
            adagrad_update(p, g, s, lr=0.1)
        results.append([bits(x) for x in (p, v, m, b, s)])
    assert results[0] == results[1]


def test_array_module_and_adagrad():
    assert array_module() is cupy
    assert array_module("cuda") is cupy
    assert array_module("cpu") is np
    opt = AdaGrad(cupy.ones(3))
    opt.step(cupy.ones(3))
    assert opt.state[0]["sum"].get().tolist() == [1, 1, 1]


def test_kernels_are_what_a_step_launches(launched):
    opt = RMSProp(arrays(0), bias_correction=True, eps=0)
    kernels = opt.kernels()
    assert list(kernels) == [
        "prepare_kernel[float32, bias_correction+no eps]",
        "update_kernel[float32, bias_correction+no eps]",
    ]
    assert all(".entry" in ptx for kernel in kernels.values() for ptx in kernel.inspect_asm().values())
    assert not launched
    opt.step(arrays(1))
    assert [text.split(" over")[0] for text in launched] == list(kernels)
