"""Norms, skips, zeros and averages on a device: the CPU's bits, launches, no wait, CUDA graphs, several devices."""

import math
import threading

import numpy as np
import pytest
from devices import clear, two
from on_device import arrays, capture, refused, replay
from on_either import ALL, everything, flat, mixed, mixed_grads, on
from variants import bits, sprinkle

from rmsprop_gpu import RMSProp
from rmsprop_gpu.kernels import cuda, cuda_prepare
from rmsprop_gpu.steps import device, resident

pytestmark = pytest.mark.gpu
cupy = pytest.importorskip("cupy", exc_type=ImportError)
F4 = np.float32


@pytest.fixture
def stream():
    return cupy.cuda.Stream(non_blocking=True)


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that steps launch."""
    said, run = [], device.DeviceSteps._run

    def spy(self, calls):
        said.extend(call.kernel.split("[")[0] for call in calls if hasattr(call, "kernel"))
        run(self, calls)

    monkeypatch.setattr(device.DeviceSteps, "_run", spy)
    return said


def scalar(x, dtype=F4):
    return cupy.full((), x, dtype)


def same(opt, twin):
    cupy.cuda.get_current_stream().synchronize()
    assert everything(opt) == everything(twin)
    assert opt.skipped_steps == twin.skipped_steps
    norms = opt.last_grad_norm, twin.last_grad_norm
    assert norms[0] == norms[1] or all(map(math.isnan, norms))


# The same bits as on the CPU


def follow(opt, twin, absent=(3,), specials=False):
    """Steps of both that are told everything; the last two perhaps of what is no number."""
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
    {(cuda, "CHUNK"): 1000, (cuda_prepare, "THREADS"): 32, (cuda_prepare, "SUMMING_THREADS"): 32},
    {(cuda, "CHUNK"): 7, (cuda, "THREADS"): 32, (cuda_prepare, "THREADS"): 1024, (cuda_prepare, "SUMMING_THREADS"): 96},
    {(cuda, "CHUNK"): 10**9, (cuda, "THREADS"): 1024},
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
    sizes, upload = [], resident.upload
    monkeypatch.setattr(resident, "upload", lambda *given: (sizes.append(given[1].nbytes), upload(*given)))
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
    """Behind work that does not end it returns all the same; what it is told may still change until it runs."""
    grads, found, scale = arrays(1), scalar(0), scalar(2.0)
    opt, want = RMSProp(arrays(0), **ALL), RMSProp(arrays(0), **ALL)
    go, began, others = threading.Event(), [], arrays(2)
    cupy.cuda.Device().synchronize()
    with stream:
        opt.step(grads, grad_scale=scale, found_inf=found, zero_grads=True)
        stream.synchronize()
        stream.launch_host_func(lambda _: (began.append(1), go.wait(5)), None)
        if go.wait(0.2) or (began and stream.done):
            pytest.skip("this device runs work when it is submitted")
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


# CUDA graphs


def captured(opt, grads, stream, **told):
    """A graph of this step, after the same one as a warm-up."""
    opt.step(grads, **told)
    stream.begin_capture()
    try:
        opt.step(grads, **told)
    finally:
        graph = stream.end_capture()
    return graph


def fill(grads, seed):
    for x, y in zip(grads, arrays(seed), strict=True):
        x[...] = y


def test_replays_are_told_what_stands_there_and_zero_skip_clip_and_average(stream):
    with stream:
        opt, eager = RMSProp(arrays(0), **ALL), RMSProp(arrays(0), **ALL)
        grads, scale, found = arrays(1), scalar(1.0), scalar(0)
        told = {"grad_scale": scale, "found_inf": found, "zero_grads": True}
        graph = captured(opt, grads, stream, **told)
        eager.step(arrays(1), **told)
        for step in range(6):
            fill(grads, step)
            if step == 4:
                grads[0][7] = math.nan
            mine = [x.copy() for x in grads]
            scale[...], found[...] = (1.0, 3.7, 1024.0)[step % 3], step == 2
            if step == 3:
                opt.lr = eager.lr = 0.3
            if step == 5:
                for x in (opt, eager):
                    x.param_groups[0].update(global_clipnorm=0.1, ema_momentum=0.4)
                opt.refresh()
            replay(graph, stream)
            eager.step(mine, **told)
            same(opt, eager)
            assert not any(x.any() for x in grads)
        assert opt.skipped_steps == 2
        assert (opt.steps, eager.steps, int(opt.state[0]["step"])) == (1, 7, 5)


def test_a_captured_odd_gradient_is_zeroed_in_each_replay(stream):
    with stream:
        start = np.arange(12, dtype=F4).reshape(3, 4)
        opt, eager = RMSProp(cupy.asarray(start.copy()), **ALL), RMSProp(cupy.asarray(start.copy()), **ALL)
        odd = cupy.asarray(np.linspace(-1, 1, 12, dtype=F4).reshape(4, 3)).T
        first = odd.copy()
        graph = captured(opt, odd, stream, zero_grads=True)
        assert not odd.any()
        eager.step(first)
        for k in range(2):
            odd[...] = first * (k + 2)
            replay(graph, stream)
            eager.step(first * F4(k + 2))
            same(opt, eager)
            assert not odd.any()


def test_numbers_and_other_arguments_cannot_be_captured(stream):
    with stream:
        opt, grads, found = RMSProp(arrays(0), **ALL), arrays(1), scalar(0)
        opt.step(grads)
        before = everything(opt)
        other = "the last step had other arguments than this; take the same one before"
        refused(lambda: opt.step(grads, found_inf=found), other, stream)
        refused(lambda: opt.step(grads, zero_grads=True), other, stream)
        opt.step(grads, grad_scale=2.0, found_inf=True)
        text = "would keep grad_scale and found_inf as the number it is now; wanted an array of one element on the dev"
        refused(lambda: opt.step(grads, grad_scale=2.0, found_inf=True), text, stream)
        refused(lambda: opt.step(grads, grad_scale=scalar(2.0), found_inf=True), "would keep found_inf as", stream)
        refused(lambda: opt.step(grads, grad_scale=scalar(2.0), found_inf=found), "take the same step once", stream)
        refused(lambda: opt.step(grads), other, stream)
        refused(lambda: opt.skipped_steps, "can hold no answer", stream)
        refused(lambda: opt.last_grad_norm, "can hold no answer", stream)
        assert everything(opt) == before
        assert (opt.skipped_steps, opt.steps) == (1, 2)
        told = {"grad_scale": scalar(2.0), "found_inf": found}
        replay(captured(opt, grads, stream, **told), stream)
        assert int(opt.state[0]["step"]) == 3


def test_a_step_after_another_of_the_same_kernels_can_be_captured(stream):
    """With a clip by the norm, grad_scale asks for no other kernel than found_inf alone."""
    with stream:
        opt, grads, found, scale = RMSProp(arrays(0), **ALL), arrays(1), scalar(0), scalar(2.0)
        opt.step(grads, found_inf=found)
        graph = captured(opt, grads, stream, grad_scale=scale, found_inf=found)
        replay(graph, stream)
        eager = RMSProp(arrays(0), **ALL)
        for number in (None, 2.0, 2.0):
            eager.step(arrays(1), grad_scale=number, found_inf=found)
        same(opt, eager)


def test_a_graph_is_not_disturbed_by_eager_steps_with_other_arguments(stream):
    """Between replays: other signals, zeros, none at all; and what is assigned reaches both."""
    with stream:
        opt, eager = RMSProp(arrays(0), **ALL), RMSProp(arrays(0), **ALL)
        grads, scale, found = arrays(1), scalar(2.0), scalar(0)
        graph = captured(opt, grads, stream, grad_scale=scale, found_inf=found)
        eager.step(arrays(1), grad_scale=2.0, found_inf=False)
        steps = [{}, {"found_inf": True}, {"grad_scale": 8.0}, {"zero_grads": True}, {"grad_scale": scalar(0.5)}]
        for k, told in enumerate(steps):
            others = arrays(k + 2)
            opt.step([x.copy() for x in others], **told)
            eager.step(others, **told)
            if k % 2:
                opt.lr = eager.lr = 0.1 / (k + 1)
            else:
                for x in (opt, eager):
                    x.param_groups[0].update(global_clipnorm=0.5 + k, ema_momentum=0.1 * k)
                opt.refresh()
            replay(graph, stream)
            eager.step(arrays(1), grad_scale=2.0, found_inf=False)
            same(opt, eager)
        assert [bits(x) for x in grads] == [bits(x) for x in arrays(1)]


def test_captured_signals_may_be_freed(stream):
    with stream:
        opt, grads, eager = RMSProp(arrays(0), **ALL), arrays(1), RMSProp(arrays(0), **ALL)
        told = {"grad_scale": scalar(2.0), "found_inf": scalar(0)}
        graph = captured(opt, grads, stream, **told)
        eager.step(grads, grad_scale=2.0, found_inf=False)
        told.clear()
        for x in (opt, eager):
            x.step(grads, grad_scale=scalar(4.0), found_inf=scalar(0))  # what is told now is held in the place of it
        others = [scalar(7.0) for _ in range(50)]  # take the memory if it was given back
        replay(graph, stream, 2)
        for _ in range(2):
            eager.step(grads, grad_scale=2.0, found_inf=False)
        same(opt, eager)
        assert len(others) == 50


def test_loaded_counts_and_averages_are_seen_by_the_next_replay(stream):
    with stream:
        opt, grads, found = RMSProp(arrays(0), **ALL), arrays(1), scalar(1)
        graph = captured(opt, grads, stream, found_inf=found)
        saved = opt.state_dict()
        replay(graph, stream, 3)
        assert opt.skipped_steps == 4
        opt.load_state_dict(saved)
        assert (opt.skipped_steps, int(saved["skipped_steps"])) == (1, 1)
        replay(graph, stream)
        assert opt.skipped_steps == 2


# An lr that is assigned while the groups differ in what they share


def test_lr_reaches_a_graph_while_groups_differ(stream):
    with stream:
        xs = arrays(0)
        opt = RMSProp([{"params": xs[:1]}, {"params": xs[1:]}], global_clipnorm=1.0)
        grads = [arrays(1)[:1], arrays(1)[1:]]
        opt.step(grads)
        graph = capture(opt, grads, stream)
        opt.param_groups[0]["global_clipnorm"] = 2.0
        opt.lr = 0.0
        before = [bits(x) for x in xs]
        replay(graph, stream)
        assert [bits(x) for x in xs] == before
        with pytest.raises(ValueError, match="the groups differ in global_clipnorm"):
            opt.refresh()
        with pytest.raises(ValueError, match="the groups differ in global_clipnorm"):
            opt.step(grads)
        opt.param_groups[1]["global_clipnorm"] = 2.0
        opt.refresh()
        opt.step(grads)


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
        with pytest.raises(ValueError, match=r"found_inf is an array, and the parameters lie on devices \[0, 1\]"):
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


def test_refresh_reaches_every_graph_whatever_its_step_was_told():
    """Two graphs of the same hyperparameters: with zeros written into the gradient, and without."""
    param, grad = cupy.zeros(4, np.float32), cupy.ones(4, np.float32)
    opt = RMSProp(param, lr=lambda step: 1.0 if step < 4 else 0.125, alpha=0.0, eps=0.0)
    stream, graphs = cupy.cuda.Stream(non_blocking=True), []
    with stream:
        for told in ({}, {"zero_grads": True}):
            grad.fill(1)
            opt.step(grad, **told)
            stream.begin_capture()
            opt.step(grad, **told)
            graphs.append(stream.end_capture())
        for graph in graphs:
            grad.fill(1)
            opt.refresh(10)
            before = param.get()
            graph.launch(stream)
            assert np.array_equal(before - param.get(), np.full(4, 0.125, np.float32))
