"""How a step is measured: the parts of each number, with a fake clock."""

from types import SimpleNamespace

import numpy as np
import pytest
from devices import MODULES
from variants import bits

from rmsprop_gpu import RMSProp
from rmsprop_gpu.profiling import host as profile_host
from rmsprop_gpu.profiling import profile
from rmsprop_gpu.profiling.host import HostProbe, make_touch

F4 = np.float32


class Clock:
    """Replaces time.perf_counter with a clock that only `takes` advances."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(profile_host.time, "perf_counter", lambda: self.now)

    def takes(self, seconds, result=None):
        def call(*_, **__):
            self.now += seconds() if callable(seconds) else seconds
            return result

        return call


def test_host_and_kernels_are_told_apart(monkeypatch):
    clock, lengths = Clock(monkeypatch), iter([100.0, 100.0, 100.0, 1.0, 2.0, 3.0])
    launch = clock.takes(lambda: next(lengths))
    host, device = HostProbe().step(clock.takes(10.0, launch), 3, profile_host.nullcontext())
    assert (host, device) == ([10.0] * 3, [1.0, 2.0, 3.0])  # the first ones are warm-up and do not count


def test_a_launch_is_measured_beside_its_copy(monkeypatch):
    clock = Clock(monkeypatch)
    made = []

    def make_launch(batches, steps, make_rule):
        made.append((batches, make_rule))
        return clock.takes(2.0)

    monkeypatch.setattr(profile_host.cpu, "make_launch", make_launch)
    found = HostProbe().launch(clock.takes(3.0), "batch", 800, 2, profile_host.nullcontext())
    assert found == ([3.0, 3.0], [2.0, 2.0], 800)
    assert made == [(["batch"], make_touch)]


def test_the_copy_touches_every_stream_once():
    from rmsprop_gpu.kernels import cpu

    opt = RMSProp(np.full(40, 1.0, F4), momentum=0.9, centered=True)
    plan, grad = opt._planner.plan(), np.full(40, 10.0, F4)
    plan.bind([grad])
    for name, value in (("square_avg", 2.0), ("grad_avg", 3.0), ("momentum_buffer", 4.0)):
        opt.state[0][name][:] = value
    cpu.make_launch(plan.batches, np.zeros(1, np.int64), make_touch)()
    found = [opt._tensors[0].array, *(opt.state[0][x] for x in ("square_avg", "grad_avg", "momentum_buffer"))]
    assert [set(x.tolist()) for x in found] == [{11.0}, {12.0}, {13.0}, {14.0}]


@pytest.mark.parametrize("T", [np.float32, np.float64])
def test_ceilings_follow_from_the_clock(T, monkeypatch):
    x = np.zeros((2, 5), T)
    loop = profile_host._make_fma_loop(T, False)
    loop(x, 1, T(0.5), T(0.5))
    assert (x == 1 - 0.5**profile_host.DEPTH).all()  # so many fma were done
    clock = Clock(monkeypatch)
    monkeypatch.setattr(profile_host, "once", lambda make, *key: clock.takes(2.0) if key[0] is T else None)
    per_call = 2 * profile_host.DEPTH * 20 * profile_host.PARTS * profile_host.WIDTH
    assert HostProbe().flop_rate(T, 1) == per_call / 2.0


def test_the_memory_ceiling_follows_from_the_clock(monkeypatch):
    monkeypatch.setattr(profile_host, "BIG", 1000)
    monkeypatch.setattr(profile_host.cpu_drive, "parts_of", lambda size: 4)
    clock, used = Clock(monkeypatch), iter([100.0, 130.0])
    monkeypatch.setattr(profile_host.time, "process_time", lambda: next(used))
    monkeypatch.setattr(HostProbe, "_beside_a_copy", clock.takes(10.0, ([1.0], [4.0, 2.0, 8.0])))
    rate, processors = HostProbe().memory_rate(1)
    assert rate == 20 * 1000 / 2.0
    assert processors == 0.75  # 30 s of processor time, in 10 s of four threads


def test_ceilings_are_measured_before_and_after_the_steps(monkeypatch):
    done = []

    def spy(name):
        real = getattr(HostProbe, name)

        def call(self, *args):
            done.append((name, args[-1]))
            return real(self, *args)

        return call

    monkeypatch.setattr(profile_host, "BIG", 1000)
    for name in ("memory_rate", "flop_rate", "launch"):
        monkeypatch.setattr(HostProbe, name, spy(name))
    profile(RMSProp(np.ones(5, F4)), np.ones(5, F4), repeats=5)
    assert [name for name, _ in done] == ["memory_rate", "flop_rate", "launch", "memory_rate", "flop_rate"]
    assert done[0] == ("memory_rate", 3)  # half of the repeats, before and after


@pytest.mark.parametrize("module", MODULES)
def test_a_batch_is_launched_alone(module):
    xp = pytest.importorskip(module)
    params, grads = [xp.ones(3, F4), xp.ones(3)], [xp.ones(3, F4), xp.ones(3)]
    opt = RMSProp(params)
    plan = opt._planner.plan()
    plan.bind(grads)
    plan.launch()
    before = [bits(p) for p in params]
    plan.steps.alone(1)()
    assert bits(params[0]) == before[0]
    assert bits(params[1]) != before[1]
    assert opt.steps == 1


@pytest.mark.gpu
def test_device_times_follow_from_the_events(monkeypatch):
    import cupy

    from rmsprop_gpu.profiling import device as profile_device

    called = []

    def benchmark(call, n_repeat, n_warmup, devices, name=None):
        for _ in range(n_warmup + n_repeat):
            call()
        called.append((n_repeat, n_warmup > 0, devices))
        return SimpleNamespace(cpu_times=np.array([1.0, 2.0]), gpu_times=np.array([[3.0, 4.0], [5.0, 1.0]]))

    monkeypatch.setattr(profile_device, "benchmark", benchmark)
    probe, steps = profile_device.DeviceProbe([0]), []
    host, device = probe.step(lambda: lambda: steps.append(1), 2, profile_host.nullcontext())
    assert (host, device) == ([1.0, 2.0], [5.0, 4.0])  # the slower device counts
    assert called == [(2, True, (0,))] * 2
    found = probe.launch(lambda: None, SimpleNamespace(device=0), 1000, 2, profile_host.nullcontext())
    assert found == ([5.0, 4.0], [5.0, 4.0], 1000)
    assert probe.memory_rate(2) == (profile_device.COPY / 4.0, None)
    threads = 256 * 8 * cupy.cuda.Device(0).attributes["MultiProcessorCount"]
    operations = 2 * profile_device.CHAINS * profile_device.DEPTH * threads
    assert probe.flop_rate(np.float32, 1) == operations / 4.0
