"""CUDA graphs of steps with arguments besides gradients: each replay reads them in place."""

import math

import numpy as np
import pytest
from on_device import arrays, refused, replay, same, scalar
from on_either import ALL, everything
from variants import bits

from rmsprop_gpu import RMSProp

pytestmark = pytest.mark.gpu
cupy = pytest.importorskip("cupy", exc_type=ImportError)
F4 = np.float32


def captured(opt, grads, stream, **told):
    """A graph of this step, after the same step as a warm-up."""
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
        other = "the last step had other arguments; take the same step first"
        refused(lambda: opt.step(grads, found_inf=found), other, stream)
        refused(lambda: opt.step(grads, zero_grads=True), other, stream)
        opt.step(grads, grad_scale=2.0, found_inf=True)
        text = "would keep grad_scale and found_inf at the value given now; wanted an array of one element on the dev"
        refused(lambda: opt.step(grads, grad_scale=2.0, found_inf=True), text, stream)
        refused(lambda: opt.step(grads, grad_scale=scalar(2.0), found_inf=True), "would keep found_inf at", stream)
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
    """With a clip by the norm, grad_scale needs no other kernel than found_inf alone."""
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
    """Between replays come other signals, zeroing, or no arguments at all. Assignments reach both optimizers."""
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
            x.step(grads, grad_scale=scalar(4.0), found_inf=scalar(0))  # the optimizer now holds these signals instead
        others = [scalar(7.0) for _ in range(50)]  # would reuse the memory if it had been freed
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
