"""The profile of a step: what it says, and that it leaves everything as it was. No speed is judged here."""

import json
import sys
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from variants import bits

from rmsprop_gpu import AdaGrad, RMSProp, machine_code, profiling
from rmsprop_gpu.extras import MissingExtraError
from rmsprop_gpu.layout import address_of
from rmsprop_gpu.profiling import Launch, Report, Times, annotate, profile

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
    from rmsprop_gpu.backends.cpu import CHUNK

    (launch,) = profile(
        AdaGrad([np.ones(2 * CHUNK + 1), np.ones(0)]), [np.ones(2 * CHUNK + 1), None], repeats=1
    ).launches
    assert (launch.chunks, launch.grid, launch.block, launch.code) == (4, None, None, None)


@pytest.mark.gpu
def test_on_a_device_the_code_of_the_kernel_is_known():
    import cupy

    from rmsprop_gpu.backends.cuda import CHUNK, THREADS

    opt = RMSProp(cupy.ones(2 * CHUNK + 1, F4))
    (launch,) = profile(opt, cupy.ones(2 * CHUNK + 1, F4), repeats=1).launches
    assert (launch.chunks, launch.grid, launch.block) == (3, 3, THREADS)
    assert 16 <= launch.code.registers <= 255
    assert launch.code.local_bytes == 0
    assert 0 < launch.code.occupancy <= 1
    assert launch.code.spill_bytes == (None if machine_code.why_not() else 0)
    assert launch.code.instructions["float32"] >= 8
    assert launch.code.instructions["memory"] >= 5


@pytest.mark.gpu
def test_without_the_tools_the_instructions_are_those_of_the_ptx(monkeypatch):
    import cupy

    monkeypatch.setattr(machine_code, "why_not", lambda: "not here")
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


def test_gradients_are_refused_as_by_a_step():
    opt = RMSProp({"w": np.ones(3, F4)})
    with pytest.raises(ValueError, match=r'grads\["w"\] has shape \(4,\)'):
        profile(opt, {"w": np.ones(4, F4)})
    assert opt.steps == 0


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("offset", [0, 4, 12, 40])
def test_the_double_lies_in_memory_as_the_optimizer_does(module, offset):
    xp = pytest.importorskip(module)
    memory = xp.zeros(4 * 60 + offset, np.uint8)
    param = memory[offset:].view(F4).reshape(3, 4, 5).transpose(2, 0, 1)
    double = profiling._double(RMSProp({"w": param}))._tensors[0].array
    assert double.strides == param.strides
    assert address_of(double) % profiling.LINE == address_of(param) % profiling.LINE
    assert address_of(double) != address_of(param)


# What is shown


def made(**changes):
    launch = Launch("update_kernel[float32, plain]", "plain", "float32", 2, 1000, 2, None, None, 20, 20_000, 9,
                    Times(2e-6, 1e-6, 3e-6), 8e9, None)  # fmt: skip
    given = {
        "optimizer": "RMSProp", "device": "a <processor>", "repeats": 7, "host": Times(1.5e-6, 1e-6, 2e-6),
        "device_times": Times(2.5e-6, 2e-6, 3e-3), "launches": [launch], "memory_rate": 5e10,
        "flop_rates": {"float32": 2e11}, "skipped": 0,
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

    parser = Cells()
    parser.feed(made()._repr_html_())
    assert {"update_kernel[float32, plain]", "1,000", "125%", "bytes an element"} <= set(parser.found)
    assert "RMSProp over 2 tensors, 1,000 elements, on a <processor>" in parser.found


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
    assert ax.get_title() == "A step moves 8.0 GB/s, 125% of a copy: its limit is memory"
    assert "FLOP/byte" in ax.get_xlabel()
    _, mine = pyplot.subplots()
    assert report.plot(mine) is mine
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
