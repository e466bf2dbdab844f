"""What reaches a captured step: lr or another hyperparameter, assigned, loaded, or by refresh() from a schedule."""

import numpy as np
import pytest
from on_device import arrays, capture, everything, replay
from variants import bits

from rmsprop_gpu import RMSProp

pytestmark = pytest.mark.gpu
cupy = pytest.importorskip("cupy", exc_type=ImportError)
F4 = np.float32


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


def test_refresh_reaches_every_graph_whatever_its_step_was_told():
    """Two graphs with the same hyperparameters, one zeroing gradients and one not."""
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


def test_refresh_asks_a_schedule_and_counts(stream):
    def schedule(step):
        return 0.1 / (1 + step)

    grads = arrays(1)
    with stream:
        replayed, eager = RMSProp(arrays(0), lr=schedule), RMSProp(arrays(0), lr=schedule)
        for opt in (replayed, eager):
            opt.step(grads)
        graph = capture(replayed, grads, stream)
        for i in range(1, 20):
            replayed.refresh()
            replay(graph, stream)
            eager.step(grads)
            assert replayed.steps == eager.steps == i + 1
        assert everything(replayed) == everything(eager)
        replayed.refresh(100)
        assert replayed.steps == 101


def test_refresh_sends_what_was_assigned_to_groups(stream):
    grads = arrays(1)
    with stream:
        replayed, eager = RMSProp(arrays(0), momentum=0.5), RMSProp(arrays(0), momentum=0.5)
        for opt in (replayed, eager):
            opt.step(grads)
        graph = capture(replayed, grads, stream)
        for opt in (replayed, eager):
            opt.param_groups[0].update(momentum=0.25, alpha=0.5, eps=1e-3)
        before = replayed.steps
        replayed.refresh()
        assert replayed.steps == before
        replay(graph, stream)
        eager.step(grads)
        assert everything(replayed) == everything(eager)


def test_lr_assigned_under_capture_counts_at_the_next_refresh(stream):
    with stream:
        grads = arrays(1)
        opt, eager = RMSProp(arrays(0)), RMSProp(arrays(0))
        for x in (opt, eager):
            x.step(grads)
        stream.begin_capture()
        opt.step(grads)
        opt.lr = 0.5
        graph = stream.end_capture()
        opt.refresh()
        eager.lr = 0.5
        replay(graph, stream)
        eager.step(grads)
        assert everything(opt) == everything(eager)


@pytest.mark.parametrize("name", ["lr", "eps"])
def test_capture_wants_what_was_assigned_to_a_group_to_be_sent_before(name, stream):
    with stream:
        grads, opt = arrays(1), RMSProp(arrays(0))
        opt.step(grads)
        opt.param_groups[0][name] = 0.5
        stream.begin_capture()
        with pytest.raises(RuntimeError, match="hyperparameters were assigned since the last step"):
            opt.step(grads)
        stream.end_capture()
        opt.refresh()
        capture(opt, grads, stream)


@pytest.mark.parametrize("step", [-1, 1.5, True, "1", 2**62])
def test_refresh_wants_a_count(step, stream):
    with stream, pytest.raises(ValueError, match="wanted a count"):
        RMSProp(arrays(0)).refresh(step)


def test_refresh_before_the_first_step_makes_it_ready(stream):
    with stream:
        opt, grads = RMSProp(arrays(0)), arrays(1)
        opt.refresh()
        opt.step(grads)
        assert opt.steps == 1


def other_switches(opt, grads):
    """An eager step with a kernel of its own."""
    opt.param_groups[0]["momentum"] = 0.9
    opt.step(grads)


BEFORE_LR = {
    "a loaded state": lambda opt, saved, grads: opt.load_state_dict(saved),
    "an assignment to a group": lambda opt, saved, grads: opt.param_groups[0].update(eps=1e-3),
    "a switch": lambda opt, saved, grads: opt.param_groups[0].update(momentum=0.5),
    "a step of other switches": lambda opt, saved, grads: other_switches(opt, grads),
}


@pytest.mark.parametrize("before", BEFORE_LR)
def test_lr_reaches_a_graph_whatever_came_before(before, stream):
    """With an lr of 0 nothing moves. The kernel in the graph has no momentum."""
    with stream:
        opt, grads = RMSProp(arrays(0)), arrays(1)
        opt.step(grads)
        saved = opt.state_dict()
        graph = capture(opt, grads, stream)
        BEFORE_LR[before](opt, saved, grads)
        opt.lr = 0.0
        params = [bits(p) for p in opt.param_groups[0]["params"]]
        replay(graph, stream)
        assert [bits(p) for p in opt.param_groups[0]["params"]] == params


def test_loaded_hyperparameters_are_seen_by_the_next_replay(stream):
    with stream:
        opt, grads = RMSProp(arrays(0), lr=0.0), arrays(1)
        opt.step(grads)
        saved = opt.state_dict()
        opt.lr = 0.5
        graph = capture(opt, grads, stream)
        opt.load_state_dict(saved)
        params = [bits(p) for p in opt.param_groups[0]["params"]]
        replay(graph, stream)
        assert [bits(p) for p in opt.param_groups[0]["params"]] == params


def test_the_last_capture_is_the_one_to_refresh(stream):
    with stream:
        opt, grads = RMSProp(arrays(0)), arrays(1)
        for momentum in (0.0, 0.9, 0.0):
            opt.param_groups[0]["momentum"] = momentum
            opt.step(grads)
            capture(opt, grads, stream)
        opt.param_groups[0]["lr"] = 0.5
        opt.refresh()


def test_refresh_asks_a_schedule_once(stream):
    asked = []
    with stream:
        opt, grads = RMSProp(arrays(0), lr=lambda step: asked.append(step) or 0.1), arrays(1)
        opt.step(grads)
        capture(opt, grads, stream)
        opt.refresh()
    assert asked == [0, 1]
