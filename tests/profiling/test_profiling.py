"""The profile of a step: its content, and that it leaves everything unchanged. Does not judge speed."""

import json

import ml_dtypes
import numpy as np
import pytest
from devices import MODULES
from machine_code_bounds import wanted_accesses
from variants import bits

from rmsprop_gpu import AdaGrad, RMSProp, hyper
from rmsprop_gpu.arrays.layout import address_of
from rmsprop_gpu.kernels import cpu_drive
from rmsprop_gpu.kernels.rule import Variant
from rmsprop_gpu.profiling import annotate, machine_code, profile, read_machine_code
from rmsprop_gpu.profiling.double import PAGE, double_of
from rmsprop_gpu.profiling.host import HostProbe

F4, BF = np.float32, ml_dtypes.bfloat16


def problem(module):
    """An optimizer with three launches after three steps, and gradients: one is missing, one is strided."""
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
    assert all(0 < t.min <= t.q1 <= t.median <= t.q3 <= t.max < 60 for t in times)
    assert {len(t.each) for t in times} == {2}
    rates = [report.memory_rate, *report.flop_rates.values(), *(launch.copy_rate for launch in report.launches)]
    assert all(0 < rate < np.inf for rate in rates)
    assert json.loads(json.dumps(report.to_dict()))["launches"][0]["bytes"] == w.bytes


@pytest.mark.parametrize("module", MODULES)
def test_half_gradients_have_a_launch_of_their_own(module):
    """Each element reads two bytes less, and writes two less if it is zeroed."""
    xp = pytest.importorskip(module)
    opt = RMSProp([xp.ones(50, F4), xp.ones(30, F4)])
    grads = [xp.ones(50, F4), xp.ones(30, np.float16)]
    for _ in range(2):  # before the first step, and after it
        report = profile(opt, grads, repeats=2)
        found = [(x.name, x.dtype, x.grad_dtype, x.compute_dtype, x.bytes_per_element) for x in report.launches]
        assert found == [
            ("update_kernel[float32, plain]", "float32", "float32", "float32", 20),
            ("update_kernel[float32 with float16 gradients, plain]", "float32", "float16", "float32", 18),
        ]
        assert report.bytes == 20 * 50 + 18 * 30
        opt.step(grads)
    assert opt.steps == 2


@pytest.mark.parametrize(("threads", "chunks"), [(1, 2), (3, 4)])
def test_chunks_are_those_of_the_launch(threads, chunks, monkeypatch):
    """On the CPU a kernel is called once per tensor, and once more where two threads share one."""
    monkeypatch.setattr(cpu_drive, "parts_of", lambda size: threads)
    params, grads = [np.ones(40_000), np.ones(0)], [np.ones(40_000), None]
    (launch,) = profile(AdaGrad(params), grads, repeats=1).launches
    assert (launch.chunks, launch.grid, launch.block, launch.code) == (chunks, None, None, None)


@pytest.mark.gpu
def test_on_a_device_the_code_of_the_kernel_is_known():
    import cupy

    from rmsprop_gpu.kernels.cuda import THREADS, chunk_of, kernels

    opt = RMSProp(cupy.ones(2 * chunk_of(np.dtype(F4)) + 1, F4))
    (launch,) = profile(opt, cupy.ones(2 * chunk_of(np.dtype(F4)) + 1, F4), repeats=1).launches
    assert (launch.chunks, launch.grid, launch.block) == (3, 3, THREADS)
    assert 16 <= launch.code.registers <= 255
    kernel = kernels(Variant(), np.dtype(F4), np.dtype(F4))["update_kernel"]
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
def test_on_a_device_the_code_of_fewer_bytes_is_that_of_its_own_kernel(monkeypatch):
    import cupy

    from rmsprop_gpu.kernels import cuda_coded

    def fail(kernels, *_):
        asked.extend(kernels)
        raise RuntimeError("ptxas is not installed")

    asked = []
    monkeypatch.setattr(machine_code, "read", fail)
    profile(RMSProp(cupy.ones(9, F4), square_avg_dtype="uint16"), cupy.ones(9, F4), repeats=1)
    assert [kernel.__module__ for kernel in asked] == [cuda_coded.__name__]


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
            opt.param_groups[0]["lr"] = 5.0  # not sent: neither a step nor a refresh follows
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


def test_tools_are_those_of_the_package_else_of_the_toolkit(monkeypatch, tmp_path):
    def absent(name):
        raise machine_code.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(machine_code.metadata, "files", absent)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    file = tmp_path / "bin" / "nvdisasm"
    file.parent.mkdir()
    file.write_text("#!/bin/sh\n")
    file.chmod(0o755)
    assert machine_code.tool.__wrapped__("nvdisasm") == file
    file.unlink()
    monkeypatch.setattr(machine_code, "TOOLKIT", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"nvdisasm, which is not installed; .* and sass: .*pip install .*13,sass"):
        machine_code.tool.__wrapped__("nvdisasm")


@pytest.mark.parametrize("capability", [9.0, (9,), (9, 0.0), "90", None])
def test_a_wrong_compute_capability_is_refused(capability):
    with pytest.raises(ValueError, match=r"compute_capability is .*; wanted two whole numbers, as \(9, 0\)"):
        read_machine_code(RMSProp(np.ones(3)), capability)


def test_machine_code_of_what_is_no_optimizer_is_refused():
    with pytest.raises(TypeError, match="opt is a list; wanted an RMSProp or AdaGrad"):
        read_machine_code([1.0])


def test_without_the_tools_no_machine_code_is_read(monkeypatch):
    monkeypatch.setattr(machine_code, "why_not", lambda: "ptxas is not installed")
    with pytest.raises(RuntimeError, match="ptxas is not installed"):
        read_machine_code(RMSProp(np.ones(3)))


@pytest.mark.sass
@pytest.mark.skipif(machine_code.why_not() is not None, reason=str(machine_code.why_not()))
def test_machine_code_is_that_of_the_kernels_of_an_optimizer():
    from rmsprop_gpu.kernels import cuda

    groups = [{"params": [np.ones(3, F4)], "momentum": 0.9}, {"params": [np.ones(3)]}, {"params": [np.ones(3)]}]
    opt = RMSProp(groups)
    found = read_machine_code(opt, (8, 0))
    assert list(found) == [name for name in opt.kernels() if name.startswith("update")]
    floats, doubles = found.values()
    (want,) = machine_code.read([cuda.make_update_kernel(Variant(momentum=True), F4)], (8, 0))
    assert (floats.registers, floats.loop) == (want.registers, want.loop)
    assert floats.float64 == 0 < doubles.float64
    assert sum(floats.accesses.values()) == 7  # three buffers and the gradient are read, three are written


@pytest.mark.sass
@pytest.mark.skipif(machine_code.why_not() is not None, reason=str(machine_code.why_not()))
@pytest.mark.parametrize(
    ("dtype", "options"),
    [(F4, {"square_avg_dtype": "uint16"}), (F4, {"square_avg_dtype": "uint8"}), (BF, {"store_param_remainders": True})],
    ids=str,
)
def test_machine_code_of_fewer_bytes_is_that_of_its_own_kernel(dtype, options):
    opt = RMSProp(np.ones(300, dtype), **options)
    ((name, facts),) = read_machine_code(opt).items()
    variant = hyper.variant(opt.param_groups[0].hyper(), adagrad=False, dtype=np.dtype(dtype))
    assert name == f"update_kernel[{np.dtype(dtype).name}, {variant}]"
    assert facts.accesses == wanted_accesses(variant, dtype)


def test_a_reduction_over_a_warp_is_no_access():
    loop = {
        "LDG.E.128": 2,
        "STG.E": 1,
        "RED.E.ADD.S32": 1,
        "REDG.E.ADD.S32": 1,
        "REDUX.MAX.S32": 1,
        "CREDUX.MAX.S32": 1,
    }
    facts = machine_code.Facts(*[0] * 8, loop, ptx="", sass="")
    assert facts.accesses == {"LDG.E.128": 2, "STG.E": 1, "RED.E.ADD.S32": 1, "REDG.E.ADD.S32": 1}
    assert facts.mix == {"memory": 5, "others": 2}


def test_whatever_a_linker_raises_is_told_as_one_kind_of_error(monkeypatch):
    """So that a profile falls back to the PTX."""

    def fail(*_):
        raise ValueError("no such architecture")

    monkeypatch.setattr(machine_code, "_linked", fail)
    monkeypatch.setattr(machine_code, "_assembled", fail)
    with pytest.raises(RuntimeError, match=r"no machine code for 13\.7: ValueError: no such architecture"):
        machine_code.read([], (13, 7))
