"""The profile of a step: what it says, and that it leaves everything as it was. No speed is judged here."""

import json
import sys
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from variants import bits

from rmsprop_gpu import AdaGrad, RMSProp
from rmsprop_gpu.arrays.layout import address_of
from rmsprop_gpu.extras import MissingExtraError
from rmsprop_gpu.kernels.rule import Variant
from rmsprop_gpu.profiling import Launch, Report, Times, annotate, machine_code, profile
from rmsprop_gpu.profiling import host as profile_host
from rmsprop_gpu.profiling.double import PAGE, double_of
from rmsprop_gpu.profiling.host import HostProbe, make_touch
from rmsprop_gpu.profiling.results import Code

MODULES = ["numpy", pytest.param("cupy", marks=pytest.mark.gpu)]
F4 = np.float32


def problem(module):
    """An optimizer of three launches after three steps, and gradients: one is missing, one is strided."""
    xp = pytest.importorskip(module)
    rng = np.random.default_rng(5)

    def array(*shape, dtype=F4):
        return xp.asarray(rng.standard_normal(shape).astype(dtype))

    params = {"w": xp.asfortranarray(array(300, 70)), "b": array(5), "d": array(9, dtype=np.float64)}
    groups = [{"params": params, "momentum": 0.9, "bias_correction": True}, {"params": {"x": array(8)}}]
    opt = RMSProp(groups, lr=lambda step: 0.1 / (1 + step))
    grads = [{"w": array(300, 140)[:, ::2], "b": None, "d": array(9, dtype=np.float64)}, {"x": array(8)}]
    for _ in range(3):
        opt.step(grads)
    return opt, params, grads


def everything(opt, grads):
    arrays = [*opt._tensors, *(x for entry in grads for x in entry.values() if x is not None)]
    state = [x for name in opt.state for x in opt.state[name].values()]
    return [bits(getattr(x, "array", x)) for x in arrays] + [bits(x) for x in state] + [opt.steps]


@pytest.mark.parametrize("module", MODULES)
def test_everything_stays_as_it_was(module):
    opt, _, grads = problem(module)
    twin, _, twin_grads = problem(module)
    before = everything(opt, grads)
    profile(opt, grads, repeats=2)
    assert everything(opt, grads) == before
    opt.step(grads)
    twin.step(twin_grads)
    assert everything(opt, grads) == everything(twin, twin_grads)


@pytest.mark.parametrize("module", MODULES)
def test_the_report_says_what_a_step_launches(module):
    opt, params, grads = problem(module)
    report = profile(opt, grads, repeats=2)
    w, d, x = report.launches
    assert [launch.name for launch in report.launches] == [n for n in opt.kernels() if n.startswith("update")]
    assert (w.variant, w.dtype, w.tensors, w.elements) == ("bias_correction+momentum", "float32", 1, 21_000)
    assert (w.bytes_per_element, w.bytes) == (28, 28 * params["w"].size)
    assert (d.dtype, d.elements, d.bytes_per_element, x.variant, x.bytes) == ("float64", 9, 56, "plain", 160)
    assert (report.optimizer, report.skipped, report.repeats) == ("RMSProp", 1, 2)
    assert report.bytes == w.bytes + d.bytes + x.bytes
    assert set(report.flop_rates) == {"float32", "float64"}
    times = [report.host, report.device_times, *(launch.seconds for launch in report.launches)]
    assert all(0 < t.q1 <= t.median <= t.q3 < 60 for t in times)
    rates = [report.memory_rate, *report.flop_rates.values(), *(launch.copy_rate for launch in report.launches)]
    assert all(0 < rate < np.inf for rate in rates)
    assert json.loads(json.dumps(report.to_dict()))["launches"][0]["bytes"] == w.bytes


def test_chunks_are_those_of_the_launch():
    from rmsprop_gpu.kernels.cpu import CHUNK

    (launch,) = profile(
        AdaGrad([np.ones(2 * CHUNK + 1), np.ones(0)]), [np.ones(2 * CHUNK + 1), None], repeats=1
    ).launches
    assert (launch.chunks, launch.grid, launch.block, launch.code) == (4, None, None, None)


@pytest.mark.gpu
def test_on_a_device_the_code_of_the_kernel_is_known():
    import cupy

    from rmsprop_gpu.kernels.cuda import CHUNK, THREADS, kernels

    opt = RMSProp(cupy.ones(2 * CHUNK + 1, F4))
    (launch,) = profile(opt, cupy.ones(2 * CHUNK + 1, F4), repeats=1).launches
    assert (launch.chunks, launch.grid, launch.block) == (3, 3, THREADS)
    assert 16 <= launch.code.registers <= 255
    kernel = kernels(Variant(), np.dtype(F4), 0)["update_kernel"]
    most = cupy.cuda.Device(0).attributes["MaxThreadsPerMultiProcessor"]
    blocks = kernel.occupancy.max_active_blocks_per_multiprocessor(THREADS, 0)
    assert (launch.code.registers, launch.code.local_bytes) == (kernel.attributes.num_regs, 0)
    assert (launch.code.blocks_per_multiprocessor, launch.code.occupancy) == (blocks, blocks * THREADS / most)
    assert launch.code.spill_bytes == (None if machine_code.why_not() else 0)
    assert launch.code.instructions["float32"] >= 8
    assert launch.code.instructions["memory"] >= 5


@pytest.mark.gpu
def test_without_the_tools_the_instructions_are_those_of_the_ptx(monkeypatch):
    import cupy

    def fail(*_):
        raise RuntimeError("ptxas failed: it is too old")

    monkeypatch.setattr(machine_code, "read", fail)
    (launch,) = profile(RMSProp(cupy.ones(9, F4)), cupy.ones(9, F4), repeats=1).launches
    assert launch.code.spill_bytes is None
    assert launch.code.instructions_of == "the whole kernel in PTX"
    assert launch.code.instructions["float32"] >= 8


@pytest.mark.gpu
def test_a_capture_is_refused():
    import cupy

    opt, grad = RMSProp(cupy.ones(9, F4)), cupy.ones(9, F4)
    with cupy.cuda.Stream(non_blocking=True) as stream:
        opt.step(grad)
        stream.begin_capture()
        with pytest.raises(RuntimeError, match="captured in a CUDA graph, which can hold no measurement"):
            profile(opt, grad)
        opt.step(grad)
        stream.end_capture()


def test_instructions_of_ptx_are_told_apart():
    ptx = "ld.global.f32 %f1, [x];\n fma.rn.f32 a;\n @%p1 bra L;\n cvt.f64.f32 b;\n add.f64 c;\n add.s32 d;\n ret;"
    lines = ptx.replace("\n ", "\n\t")
    assert machine_code.mix_of_ptx(lines) == {
        "branches": 2, "memory": 1, "float32": 1, "conversion": 1, "float64": 1, "others": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("repeats", "error"),
    [(0, "repeats is 0; wanted"), (True, "repeats is True"), (2.5, "repeats is 2.5"), ("3", "repeats is '3'")],
)
def test_a_wrong_count_is_refused(repeats, error):
    with pytest.raises(ValueError, match=error):
        profile(RMSProp(np.ones(3)), np.ones(3), repeats=repeats)


def test_what_is_no_optimizer_is_refused():
    with pytest.raises(TypeError, match="opt is a ndarray; wanted an RMSProp or AdaGrad"):
        profile(np.ones(3), np.ones(3))
    with pytest.raises(TypeError, match="opt is a ndarray; wanted an RMSProp or AdaGrad"), annotate(np.ones(3)):
        pass


def test_gradients_are_refused_as_by_a_step():
    param = np.ones(3, F4)
    opt = RMSProp({"w": param})
    for wrong in (np.ones(4, F4), np.ones(3), param, [1.0, 2.0, 3.0]):
        with pytest.raises((TypeError, ValueError)) as of_step:
            opt.step({"w": wrong})
        with pytest.raises(type(of_step.value)) as of_profile:
            profile(opt, {"w": wrong})
        assert str(of_profile.value) == str(of_step.value)
    assert opt.steps == 0


@pytest.mark.parametrize("grads", [[None, None], [None, np.ones(0, F4)]])
def test_nothing_to_measure_is_refused(grads):
    with pytest.raises(ValueError, match="grads has no element to update a parameter with; wanted at least one"):
        profile(RMSProp([np.ones(3, F4), np.ones(0, F4)]), grads)


def test_what_only_a_frozen_group_would_launch_is_left_out():
    groups = [{"params": [np.ones(3, F4)]}, {"params": [np.ones(3)]}]
    (launch,) = profile(RMSProp(groups), [[np.ones(3, F4)], [None]], repeats=1).launches
    assert launch.dtype == "float32"


def test_gradients_may_come_from_a_generator():
    params = [np.ones(3, F4), np.ones(4, F4)]
    report = profile(RMSProp(params), (np.ones_like(p) for p in params), repeats=1)
    assert report.launches[0].elements == 7


def test_a_subclass_is_profiled():
    class Mine(RMSProp):
        pass

    assert profile(Mine(np.ones(3, F4)), np.ones(3, F4), repeats=1).optimizer == "Mine"


def test_a_schedule_is_not_called():
    asked = []

    def schedule(step):
        asked.append(step)
        return 0.1

    opt = RMSProp(np.ones(3, F4), lr=schedule)
    profile(opt, np.ones(3, F4), repeats=2)
    assert asked == []
    opt.step(np.ones(3, F4))
    assert asked == [0]


def test_what_was_assigned_waits_for_the_next_step():
    opt = RMSProp(np.ones(3, F4))
    opt.step(np.ones(3, F4))
    opt.param_groups[0]["momentum"] = 0.9
    assert "update_kernel[float32, momentum]" in opt.kernels()
    assert profile(opt, np.ones(3, F4), repeats=1).launches[0].variant == "momentum"
    assert "momentum_buffer" not in opt.state[0]


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_profile_changes_nothing(error, monkeypatch):
    opt, _, grads = problem("numpy")
    before = everything(opt, grads)

    def fail(*_):
        raise error

    monkeypatch.setattr(HostProbe, "launch", fail)
    with pytest.raises(error):
        profile(opt, grads, repeats=1)
    assert everything(opt, grads) == before


@pytest.mark.gpu
def test_replays_of_a_graph_are_as_without_a_profile():
    import cupy

    ends = []
    for look in (lambda opt, grad: None, lambda opt, grad: (opt.kernels(), profile(opt, grad, repeats=1))):
        param, grad = cupy.ones(9, F4), cupy.ones(9, F4)
        opt = RMSProp(param, lr=0.1)
        with cupy.cuda.Stream(non_blocking=True) as stream:
            opt.step(grad)
            stream.begin_capture()
            opt.step(grad)
            graph = stream.end_capture()
            opt.param_groups[0]["lr"] = 5.0  # not sent: no step and no refresh comes
            look(opt, grad)
            graph.launch(stream)
            stream.synchronize()
        ends.append(bits(param))
    assert ends[0] == ends[1]


@pytest.mark.gpu
def test_the_double_waits_for_the_steps_before():
    import cupy

    param, grad = cupy.ones(100_000, F4), cupy.ones(100_000, F4)
    first, second = cupy.cuda.Stream(non_blocking=True), cupy.cuda.Stream(non_blocking=True)
    opt = RMSProp(param, lr=0.1)
    with first:
        for _ in range(3):
            opt.step(grad)
    with second:
        double = double_of(opt)
    cupy.cuda.Device().synchronize()
    assert bits(double._tensors[0].array) == bits(param)
    assert bits(double.state[0]["square_avg"]) == bits(opt.state[0]["square_avg"])


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("offset", [0, 4, 12, 40])
def test_the_double_lies_in_memory_as_the_optimizer_does(module, offset):
    xp = pytest.importorskip(module)
    memory = xp.zeros(4 * 60 + offset, np.uint8)
    param = memory[offset:].view(F4).reshape(3, 4, 5).transpose(2, 0, 1)
    memory[:] = xp.asarray(np.arange(len(memory)) % 7, np.uint8)
    opt = RMSProp({"w": param})
    opt.state["w"]["square_avg"][:] = 3
    twin = double_of(opt)
    double = twin._tensors[0].array
    assert bits(double) == bits(param)
    assert bits(twin.state["w"]["square_avg"]) == bits(opt.state["w"]["square_avg"])
    assert double.strides == param.strides
    assert address_of(double) % PAGE == address_of(param) % PAGE
    assert address_of(double) != address_of(param)


# What is measured


class Clock:
    """In the place of time.perf_counter: it stands still but for what `takes` adds."""

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
    assert (host, device) == ([10.0] * 3, [1.0, 2.0, 3.0])  # the first, which warm up, do not count


def test_a_launch_is_measured_beside_its_copy(monkeypatch):
    clock = Clock(monkeypatch)
    made = []

    def make_launch(batches, steps, make_rule):
        made.append((batches, make_rule))
        return clock.takes(2.0)

    monkeypatch.setattr(profile_host.cpu, "make_launch", make_launch)
    seconds, rate = HostProbe().launch(clock.takes(3.0), "batch", 800, 2, profile_host.nullcontext())
    assert (seconds, rate) == ([3.0, 3.0], 400.0)
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
    copies = [4.0, 2.0, 8.0]
    monkeypatch.setattr(HostProbe, "_beside_a_copy", lambda *_: ([1.0], copies))
    assert HostProbe().memory_rate(1) == 20 * 1000 / 2.0


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
    seconds, rate = probe.launch(lambda: None, SimpleNamespace(device=0), 1000, 2, profile_host.nullcontext())
    assert (seconds, rate) == ([5.0, 4.0], 1000 / 4.5)
    assert probe.memory_rate(2) == profile_device.COPY / 4.0
    threads = 256 * 8 * cupy.cuda.Device(0).attributes["MultiProcessorCount"]
    operations = 2 * profile_device.CHAINS * profile_device.DEPTH * threads
    assert probe.flop_rate(np.float32, 1) == operations / 4.0


# What is shown


LAUNCH = {
    "name": "update_kernel[float32, plain]", "device": "cpu", "variant": "plain", "dtype": "float32",
    "compute_dtype": "float32", "tensors": 2, "elements": 1000, "chunks": 2, "grid": None, "block": None,
    "bytes_per_element": 20, "bytes": 20_000, "flops_per_element": 9, "seconds": Times(2e-6, 1e-6, 3e-6),
    "copy_rate": 8e9, "code": None,
}  # fmt: skip
CODE = Code(40, 8, 4, 6, 0.75, "the vector loop", {"float32": 30, "memory": 5})


def made(launches=({},), **changes):
    given = {
        "optimizer": "RMSProp", "device": "a <processor>", "repeats": 7, "host": Times(1.5e-6, 1e-6, 2e-6),
        "device_times": Times(2.5e-6, 2e-6, 3e-3), "launches": [Launch(**{**LAUNCH, **launch}) for launch in launches],
        "memory_rate": 5e10, "flop_rates": {"float32": 2e11}, "skipped": 0,
    }  # fmt: skip
    return Report(**{**given, **changes})


def test_rates_follow_from_times():
    report = made()
    (launch,) = report.launches
    assert launch.rate == pytest.approx(1e10)
    assert launch.fraction_of_copy == pytest.approx(1.25)
    assert launch.flop_rate == pytest.approx(4.5e9)
    assert report.rate == pytest.approx(8e9)
    assert report.fraction_of_copy == pytest.approx(1.25)
    two = made([{}, {"bytes": 80_000, "seconds": Times(8e-6, 8e-6, 8e-6)}])
    assert two.bytes == 100_000
    assert two.fraction_of_copy == pytest.approx((2.5e-6 + 10e-6) / 10e-6)


def test_times_are_the_median_and_the_quartiles():
    assert Times.of([5.0, 1.0, 2.0, 4.0, 30.0]) == Times(4.0, 2.0, 5.0)


def test_the_terminal_shows_all_of_it():
    text = str(made(skipped=3))
    assert "RMSProp over 2 tensors, 1,000 elements, 3 without a gradient, on a <processor>" in text
    assert "a step: host 1.5 us (1 us to 2 us), kernels 2.5 us (2 us to 3 ms); median (quartiles) of 7 repeats" in text
    assert "moved: 20 kB at 8 GB/s, 125% of a copy's speed" in text
    row = next(line for line in text.splitlines() if "update_kernel[float32, plain]" in line)
    assert row.split()[2:] == ["2", "1,000", "2", "20", "2", "us", "10", "125%"]


def test_the_notebook_shows_the_same():
    class Cells(HTMLParser):
        found = ()

        def handle_data(self, data):
            self.found = (*self.found, data)

    html = made([{"code": CODE, "grid": 2, "block": 256}])._repr_html_()
    parser = Cells()
    parser.feed(html)
    assert {"update_kernel[float32, plain]", "1,000", "125%", "bytes an element"} <= set(parser.found)
    assert {"2 x 256", "40", "4 B", "8 B", "75% (6 blocks)", "30 float32, 5 memory"} <= set(parser.found)
    assert "RMSProp over 2 tensors, 1,000 elements, on a <processor>" in parser.found
    assert "<processor>" not in html
    assert "a&lt;b" in made([{"name": "a<b"}])._repr_html_()


def test_what_is_known_of_the_code_is_shown():
    text = str(made([{"code": CODE, "grid": 2, "block": 256}]))
    rows = [line.split("plain]")[1].split() for line in text.splitlines() if "update_kernel" in line]
    assert rows[1] == ["2", "x", "256", "40", "4", "B", "8", "B", "75%", "(6", "blocks)"]
    assert " ".join(rows[2]) == "30 float32, 5 memory"
    assert "instructions of the vector loop" in text
    unknown = Code(40, 8, None, 6, 0.75, "the vector loop", {})
    assert "not known" in str(made([{"code": unknown, "grid": 2, "block": 256}]))


def test_launches_on_several_devices_are_told_apart():
    text = str(made([{"device": "cuda:0"}, {"device": "cuda:1"}]))
    assert "plain] on cuda:0" in text
    assert "plain] on cuda:1" in text
    assert "on cuda:0" not in str(made([{"device": "cuda:0"}]))


def test_the_roofline_has_the_ceilings_and_a_point_a_launch():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    report = made()
    ax = report.plot()
    point = next(line for line in ax.lines if line.get_marker() == "o")
    assert point.get_xdata()[0] == pytest.approx(9 / 20)
    assert point.get_ydata()[0] == pytest.approx(4.5)
    roof = ax.lines[0]
    assert roof.get_ydata()[-1] == pytest.approx(200)
    assert roof.get_ydata()[0] == pytest.approx(roof.get_xdata()[0] * 50)
    assert ax.get_title() == "A step moves 8.0 GB/s, 125% of a copy: it is far below both ceilings"
    (label,) = [text.get_text() for text in ax.get_legend().get_texts()]
    assert label == "float32, plain: 125% of a copy"
    assert "FLOP/byte" in ax.get_xlabel()
    _, mine = pyplot.subplots()
    assert report.plot(mine) is mine
    pyplot.close("all")


@pytest.mark.parametrize(
    ("memory_rate", "flop_rates", "said"),
    [
        (1e10, {"float32": 2e11}, "its limit is memory"),
        (1e13, {"float32": 5e9}, "its limit is arithmetic"),
        (1e10, {"float32": 2e11, "float64": 4e9}, "its limit is memory"),
        (1e12, {"float32": 2e11}, "it is far below both ceilings"),
    ],
)
def test_the_title_of_the_roofline_says_what_holds_the_step_back(memory_rate, flop_rates, said):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    title = made(memory_rate=memory_rate, flop_rates=flop_rates).plot().get_title()
    assert title.endswith(said)
    pyplot.close("all")


def test_the_ceiling_that_counts_is_that_of_the_launch():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    rates = {"float32": 2e11, "float64": 4e9}
    title = made([{"compute_dtype": "float64"}], memory_rate=1e10, flop_rates=rates).plot().get_title()
    assert title.endswith("its limit is arithmetic")
    pyplot.close("all")


@pytest.mark.parametrize(("module", "show"), [("rich.console", str), ("matplotlib.pyplot", Report.plot)])
def test_a_missing_library_names_the_extra(module, show, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=r'pip install "rmsprop-gpu\[profile\]"'):
        show(made())


# NVTX


@pytest.fixture
def ranges(monkeypatch):
    """The names of the NVTX ranges, in the order in which they are entered."""
    entered = []

    class Range:
        def __init__(self, name):
            self.name = name

        def __enter__(self):
            entered.append(self.name)

        def __exit__(self, *_):
            entered.append("end")

    monkeypatch.setitem(sys.modules, "nvtx", SimpleNamespace(annotate=Range))
    return entered


def test_measured_steps_and_launches_are_ranges(ranges):
    profile(RMSProp(np.ones(3, F4)), np.ones(3, F4), repeats=2)
    assert ranges.count("RMSProp.step") >= 2
    assert "update_kernel[float32, plain]" in ranges


def test_steps_of_a_training_loop_are_ranges(ranges):
    opt, grad = RMSProp(np.ones(3)), np.ones(3)
    with annotate(opt):
        opt.step(grad)
        with annotate(opt):
            opt.step(grads=grad)
        opt.step(grad)
    assert ranges == ["RMSProp.step", "end", *["RMSProp.step"] * 2, *["end"] * 2, "RMSProp.step", "end"]
    opt.step(grad)
    assert (len(ranges), opt.steps) == (8, 4)
    with pytest.raises(ZeroDivisionError), annotate(opt):
        raise ZeroDivisionError
    assert "step" not in vars(opt)


def test_without_nvtx_a_profile_is_as_good(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvtx", None)
    assert profile(RMSProp(np.ones(3)), np.ones(3), repeats=1).launches
    with pytest.raises(MissingExtraError, match=r'pip install "rmsprop-gpu\[profile\]"'), annotate(RMSProp(np.ones(3))):
        pass
