"""Norms, skips, zeroing and averages on a device: bit-identical to the CPU. Launches, waits, several devices."""

import math
import threading

import numpy as np
import pytest
from devices import clear, two
from on_device import arrays, same, scalar
from on_either import ALL, everything, flat, mixed, mixed_grads, on
from variants import bits, sprinkle

from rmsprop_gpu import RMSProp
from rmsprop_gpu.kernels import cuda, cuda_prepare
from rmsprop_gpu.steps import device, on_cupy

pytestmark = pytest.mark.gpu
cupy = pytest.importorskip("cupy", exc_type=ImportError)
F4 = np.float32


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that steps launch."""
    said, run = [], device.DeviceSteps._run

    def spy(self, calls):
        said.extend(call.kernel.split("[")[0] for call in calls if hasattr(call, "kernel"))
        run(self, calls)

    monkeypatch.setattr(device.DeviceSteps, "_run", spy)
    return said


# Bit-identical to the CPU


def follow(opt, twin, absent=(3,), specials=False):
    """Take steps with all arguments on both. The last two may have special values in their gradients."""
    rng = np.random.default_rng(5)
    for step in range(4):
        grads = mixed_grads(step, absent)
        if specials and step >= 2:
            for x in flat(grads):
                if x is not None:
                    sprinkle(x, rng)
        here, there = on(np, grads), on(cupy, grads)
        for x, g, xp in ((opt, here, np), (twin, there, cupy)):
            x.step(g, grad_scale=xp.full((), 3.7, F4), found_inf=xp.asarray(step == 1), zero_grads=True)
        same(opt, twin)
        assert [x is None or bits(x) for x in flat(here)] == [x is None or bits(x) for x in flat(there)]
        assert not any(x is not None and any(bits(x)) for x in flat(there))


def test_the_same_bits_as_on_the_cpu():
    opt, twin = mixed(np, 0), mixed(cupy, 0)
    follow(opt, twin)
    follow(opt, twin, specials=True)
    assert opt.skipped_steps == 1 + 3


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_same_bits_where_nothing_is_skipped_and_each_tensor_clipped():
    sizes, rng = (5, 0, 4097, 9000), np.random.default_rng(3)
    opt, twin = (RMSProp([xp.zeros(n, F4) for n in sizes], clipnorm=0.3, weight_decay=0.1) for xp in (np, cupy))
    for step in range(3):
        grads = [rng.standard_normal(n).astype(F4) for n in sizes]
        if step:
            sprinkle(grads[2], rng)
        opt.step([grads[0], None, *grads[2:]])
        twin.step([cupy.asarray(grads[0]), None, *map(cupy.asarray, grads[2:])])
        same(opt, twin)
    assert math.isnan(opt.last_grad_norm)
    assert np.isnan(opt.param_groups[0]["params"][2]).all()
    assert np.isfinite(opt.param_groups[0]["params"][3]).all()


GEOMETRY = [
    {(cuda, "chunk_of"): lambda dtype: 1000, (cuda_prepare, "THREADS"): 32, (cuda_prepare, "SUMMING_THREADS"): 64},
    {
        (cuda, "chunk_of"): lambda dtype: 7,
        (cuda, "THREADS"): 32,
        (cuda_prepare, "THREADS"): 1024,
        (cuda_prepare, "SUMMING_THREADS"): 192,
    },
    {(cuda, "chunk_of"): lambda dtype: 10**9, (cuda, "THREADS"): 1024},
]


@pytest.mark.parametrize("geometry", GEOMETRY, ids=["short", "tiny", "long"])
def test_the_same_bits_whatever_the_chunks_and_the_grid(geometry, monkeypatch):
    opt, twin = (RMSProp([xp.zeros(n, F4) for n in (5, 0, 4097, 9000)], **ALL) for xp in (np, cupy))
    for (module, name), value in geometry.items():
        monkeypatch.setattr(module, name, value)
    clear(cuda, monkeypatch)
    rng = np.random.default_rng(3)
    for step in range(2):
        grads = [rng.standard_normal(n).astype(F4) for n in (5, 0, 4097, 9000)]
        opt.step([g.copy() for g in grads], found_inf=step == 1, zero_grads=True)
        twin.step([cupy.asarray(g) for g in grads], found_inf=step == 1, zero_grads=True)
        same(opt, twin)


# Launches, copies


LAUNCHES = {
    "plain": ({}, {}, ["update_kernel"]),
    "zeros": ({}, {"zero_grads": True}, ["update_kernel"]),
    "told": ({}, {"found_inf": False}, ["prepare_kernel", "update_kernel"]),
    "averages": ({"use_ema": True}, {}, ["prepare_kernel", "update_kernel"]),
    "checked": ({"skip_nonfinite": True}, {}, ["partials_kernel", "prepare_kernel", "update_kernel"]),
    "all": (ALL, {"found_inf": False, "zero_grads": True}, ["partials_kernel", "prepare_kernel", "update_kernel"]),
}


@pytest.mark.parametrize("case", LAUNCHES)
def test_one_launch_or_two_or_three(case, launched):
    given, told, want = LAUNCHES[case]
    opt = RMSProp([x for i in range(20) for x in arrays(i)], **given)
    opt.step([x for i in range(20) for x in arrays(i)], **told)
    assert launched == want


def test_all_sums_come_before_any_counter_and_all_counters_before_any_update(launched):
    opt = mixed(cupy, 0)
    opt.step(on(cupy, mixed_grads(1)), found_inf=False, zero_grads=True)
    batches = 3
    assert launched == [name for name in cuda.ORDER for _ in range(batches)]


def test_signals_at_the_same_place_are_not_sent_again(monkeypatch):
    sizes, upload = [], on_cupy.upload
    monkeypatch.setattr(on_cupy, "upload", lambda *given: (sizes.append(given[1].nbytes), upload(*given)))
    opt, grads, scale, found = RMSProp(arrays(0), **ALL), arrays(1), scalar(2.0), scalar(0)
    for _ in range(2):
        opt.step(grads, grad_scale=scale, found_inf=found)
    sizes.clear()
    for k in range(3):
        scale[...] = 2.0**k
        opt.step(grads, grad_scale=scale, found_inf=found)
    assert sizes == []
    opt.step(grads, grad_scale=scalar(4.0), found_inf=found)
    assert len(sizes) == 1


def test_a_step_with_all_of_it_does_not_wait(stream):
    """It returns even though earlier work on the stream has not ended. Its arguments may still change until it runs."""
    grads, found, scale = arrays(1), scalar(0), scalar(2.0)
    opt, want = RMSProp(arrays(0), **ALL), RMSProp(arrays(0), **ALL)
    go, began, others = threading.Event(), [], arrays(2)
    cupy.cuda.Device().synchronize()
    with stream:
        opt.step(grads, grad_scale=scale, found_inf=found, zero_grads=True)
        stream.synchronize()
        stream.launch_host_func(lambda _: (began.append(1), go.wait(5)), None)
        if go.wait(0.2) or (began and stream.done):
            pytest.skip("this device runs work as soon as it is submitted")
        for x, y in zip(grads, others, strict=True):
            x[...] = y
        found[...] = 1
        opt.step(grads, grad_scale=scale, found_inf=found, zero_grads=True)
        opt.lr = 0.5
        opt.step(grads, grad_scale=scale, found_inf=found, zero_grads=True)
        assert not stream.done
        go.set()
        stream.synchronize()
        assert opt.skipped_steps == 2
    want.step(arrays(1), grad_scale=2.0)
    assert everything(opt) == everything(want)


# Several devices


@two
def test_two_devices_share_no_norm_and_no_check_but_are_told_the_same():
    pool = cupy.cuda.get_allocator()
    cupy.cuda.set_allocator(cupy.get_default_memory_pool().malloc)
    try:
        params = []
        for place in (0, 1):
            with cupy.cuda.Device(place):
                params.append(cupy.ones(5, F4))
        grads = []
        for place in (0, 1):
            with cupy.cuda.Device(place):
                grads.append(cupy.full(5, place + 1, F4))
        for name, value in (("global_clipnorm", 1.0), ("skip_nonfinite", True)):
            with pytest.raises(ValueError, match=rf"{name} is .* on devices \[0, 1\]; wanted one device"):
                RMSProp(params, **{name: value})
        opt = RMSProp(params, clipnorm=math.inf)
        with pytest.raises(ValueError, match=r"found_inf is an array, and the parameters are on devices \[0, 1\]"):
            opt.step(grads, found_inf=scalar(0))
        opt.param_groups[0].update(clipnorm=None, global_clipnorm=1.0)
        with pytest.raises(ValueError, match="wanted one device"):
            opt.step(grads)
        opt.param_groups[0].update(clipnorm=math.inf, global_clipnorm=None)
        opt.step(grads, found_inf=True)
        assert (opt.skipped_steps, opt.steps) == (1, 1)
        opt.step(grads, grad_scale=2.0, found_inf=False, zero_grads=True)
        assert opt.last_grad_norm == pytest.approx(math.sqrt(5 + 20) / 2, rel=1e-12)
        for place in (0, 1):
            with cupy.cuda.Device(place):
                assert int(opt.state[place]["step"]) == 1
                assert not grads[place].any()
        saved = opt.state_dict()
        opt.load_state_dict({**saved, "skipped_steps": 7})
        assert opt.skipped_steps == 7
    finally:
        cupy.cuda.set_allocator(pool)
