"""CUDA graphs: replaying a captured step equals an eager one, and the graph keeps alive what it captured."""

import numpy as np
import pytest
from on_device import arrays, capture, everything, refused, replay

from rmsprop_gpu import AdaGrad, RMSProp, adagrad_update, rmsprop_update

pytestmark = pytest.mark.gpu
cupy = pytest.importorskip("cupy", exc_type=ImportError)

EVERYTHING_ON = {"momentum": 0.9, "weight_decay": 0.01, "clipvalue": 1.0}
EVERYTHING_ON |= dict.fromkeys(["centered", "nesterov", "bias_correction", "maximize"], True)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("given", [{}, EVERYTHING_ON], ids=["plain", "everything"])
def test_replays_equal_eager_steps(given, dtype, stream):
    grads = arrays(1, dtype)
    with stream:
        replayed, eager = RMSProp(arrays(0, dtype), **given), RMSProp(arrays(0, dtype), **given)
        for opt in (replayed, eager):
            opt.step(grads)  # the warm-up
        graph = capture(replayed, grads, stream)
        for i in range(100):
            if i % 10 == 0:
                replayed.lr = eager.lr = 0.02 / (1 + i)
            replay(graph, stream)
            eager.step(grads)
        assert everything(replayed) == everything(eager)
    assert (replayed.steps, eager.steps) == (1, 101)  # the host counts only calls that run eagerly
    assert int(replayed.state[0]["step"]) == int(eager.state[0]["step"]) == 101


def test_capture_itself_runs_nothing(stream):
    with stream:
        opt, grads = RMSProp(arrays(0)), arrays(1)
        opt.step(grads)
        before = everything(opt)
        capture(opt, grads, stream)
        assert everything(opt) == before
        assert opt.steps == 1


def test_warm_up_on_another_stream(stream):
    grads = arrays(1)
    replayed, eager = RMSProp(arrays(0), momentum=0.5), RMSProp(arrays(0), momentum=0.5)
    for opt in (replayed, eager):
        opt.step(grads)
    cupy.cuda.get_current_stream().synchronize()
    graph = capture(replayed, grads, stream)
    replay(graph, stream, 3)
    for _ in range(3):
        eager.step(grads)
    assert everything(replayed) == everything(eager)
    replayed.step(grads)
    eager.step(grads)
    assert everything(replayed) == everything(eager)


def test_a_graph_keeps_the_gradients_that_it_captured(stream):
    with stream:
        first, second = arrays(1), arrays(2)
        opt, eager = RMSProp(arrays(0)), RMSProp(arrays(0))
        opt.step(first)
        graph = capture(opt, first, stream)
        for _ in range(3):  # rewrites the column each time
            opt.step(second)
            opt.step(arrays(3))
            replay(graph, stream)
        for step in [first, *[second, arrays(3), first] * 3]:
            eager.step(step)
        assert everything(opt) == everything(eager)


def test_captured_gradients_may_be_freed(stream):
    with stream:
        grads = arrays(1)
        opt, eager = RMSProp(arrays(0)), RMSProp(arrays(0))
        opt.step(grads)
        graph = capture(opt, grads, stream)
        del grads
        other = [arrays(i) for i in range(2, 8)]  # would reuse the memory if it had been freed
        replay(graph, stream, 2)
        for _ in range(3):
            eager.step(arrays(1))
        assert everything(opt) == everything(eager)
        assert len(other) == 6


def test_a_captured_odd_gradient_is_copied_in_each_replay(stream):
    with stream:
        params = [cupy.asarray(np.arange(12, dtype=np.float32).reshape(3, 4)) for _ in range(2)]
        grad = cupy.asarray(np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)).T
        opt, eager = RMSProp(params[0]), RMSProp(params[1])
        for x in (opt, eager):
            x.step(grad)
        graph = capture(opt, grad, stream)
        grad *= 3
        replay(graph, stream)
        eager.step(grad)
        assert everything(opt) == everything(eager)
        opt.step(cupy.ones((4, 3), np.float32).T)  # uses the same dense buffer
        eager.step(cupy.ones((4, 3), np.float32).T)
        replay(graph, stream)
        eager.step(grad)
        assert everything(opt) == everything(eager)


def test_an_eager_step_waits_for_replays_that_nobody_told_of(stream):
    first, second, here = arrays(1), arrays(2), cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        opt = RMSProp(arrays(0), momentum=0.5)
        opt.step(first)
        graph = capture(opt, first, stream)
    with here:
        opt.step(second)
    stream.wait_event(here.record())  # ordering the replay is up to the caller
    graph.launch(stream)
    with here:
        opt.step(second)
    here.synchronize()
    stream.synchronize()
    eager = RMSProp(arrays(0), momentum=0.5)
    for grads in (first, second, first, second):
        eager.step(grads)
    assert everything(opt) == everything(eager)


def test_load_state_dict_is_seen_by_the_next_replay(stream):
    with stream:
        grads = arrays(1)
        opt, eager = RMSProp(arrays(0)), RMSProp(arrays(0))
        opt.step(grads)
        saved = opt.state_dict()
        graph = capture(opt, grads, stream)
        replay(graph, stream, 5)
        opt.load_state_dict(saved)
        for p, start in zip(opt.param_groups[0]["params"], arrays(0), strict=True):
            p[...] = start
        replay(graph, stream, 2)
        eager.load_state_dict(saved)
        for _ in range(2):
            eager.step(grads)
        assert everything(opt) == everything(eager)


def test_none_and_late_gradients_have_counters_of_their_own(stream):
    with stream:
        opt, eager = RMSProp(arrays(0), bias_correction=True), RMSProp(arrays(0), bias_correction=True)
        grads = arrays(1)
        part = [grads[0], None, grads[2], None]
        for x in (opt, eager):
            x.step(part)
        graph = capture(opt, part, stream)
        replay(graph, stream, 3)
        opt.step(grads)
        for step in [part] * 3 + [grads]:
            eager.step(step)
        assert everything(opt) == everything(eager)
        assert [int(opt.state[i]["step"]) for i in range(4)] == [5, 1, 5, 1]


def test_several_captures_and_switches_between(stream):
    with stream:
        grads = arrays(1)
        opt, eager = RMSProp(arrays(0)), RMSProp(arrays(0))
        opt.step(grads)
        plain = capture(opt, grads, stream)
        opt.param_groups[0]["momentum"] = 0.9
        with pytest.raises(RuntimeError, match="switch"):
            opt.refresh()
        opt.step(grads)  # eager, with another kernel
        heavy = capture(opt, grads, stream)
        replay(heavy, stream)
        opt.param_groups[0]["momentum"] = 0.0
        opt.step(grads)
        replay(plain, stream)
        for momentum in (0.0, 0.9, 0.9, 0.0, 0.0):
            eager.param_groups[0]["momentum"] = momentum
            eager.step(grads)
        assert everything(opt) == everything(eager)


def test_what_a_capture_cannot_hold_is_refused(stream):
    with stream:
        grads, other = arrays(1), arrays(2)
        opt = RMSProp(arrays(0))
        refused(lambda: opt.step(grads), "has not taken a step yet", stream)
        opt.step(grads)
        before = everything(opt)
        refused(lambda: opt.step(other), r"grads\[0\].*take the same step once before", stream)
        refused(lambda: opt.step([*grads[:3], None]), "take the same step once before", stream)
        refused(lambda: opt.step([cupy.repeat(g, 2)[::2] if g.size else g for g in grads]), "take the same", stream)
        refused(opt.state_dict, "can hold no state_dict", stream)
        refused(lambda: opt.load_state_dict({}), "can hold no load_state_dict", stream)
        refused(opt.refresh, "can hold no refresh", stream)
        refused(lambda: RMSProp(other), "build the optimizer before", stream)
        refused(lambda: AdaGrad(other), "build the optimizer before", stream)
        square = cupy.zeros(5, np.float32)
        refused(lambda: rmsprop_update(other[1], grads[1], square, lr=0.1), "cannot be captured", stream)
        refused(lambda: adagrad_update(other[1], grads[1], square, lr=0.1), "cannot be captured", stream)
        opt.param_groups[0]["lr"] = 0.5
        refused(lambda: opt.step(grads), "hyperparameters were assigned", stream)
        opt.refresh()
        assert everything(opt) == before
        replay(capture(opt, grads, stream), stream)
        assert everything(opt) != before


@pytest.mark.filterwarnings("ignore:ExternalStream is deprecated:DeprecationWarning")
def test_replays_on_a_stream_that_others_own_are_awaited_too(stream):
    here = cupy.cuda.Stream(non_blocking=True)
    theirs = cupy.cuda.ExternalStream(stream.ptr)
    grads = arrays(1)
    with theirs:
        opt = RMSProp(arrays(0))
        opt.step(grads)
        theirs.begin_capture()
        opt.step(grads)
        graph = theirs.end_capture()
    stream.synchronize()
    graph.launch(theirs)
    with here:
        assert int(opt.state[0]["step"].get(stream=here)) == 2


def test_work_on_a_stream_that_is_captured_now_cannot_be_waited_for(stream):
    here, grads = cupy.cuda.Stream(non_blocking=True), arrays(1)
    with stream:
        opt = RMSProp(arrays(0))
        opt.step(grads)
        stream.begin_capture()
    with here, pytest.raises(RuntimeError, match="on a stream that is being captured"):
        opt.step(grads)
    with stream:
        stream.end_capture()
    with here:
        opt.step(grads)
    assert opt.steps == 2


def test_another_layout_at_an_address_that_is_known_is_refused_too(stream):
    with stream:
        opt, grad = RMSProp(cupy.ones((3, 3), np.float32)), cupy.ones((3, 3), np.float32)
        opt.step(grad)
        refused(lambda: opt.step(grad.T), "take the same step once before", stream)
        opt.step(grad.T)
        assert opt.steps == 2


def test_gradients_of_other_dtypes_are_warmed_up_by_themselves(stream):
    """A graph keeps the plan for its dtypes. Eager steps with other dtypes, and assignments, still work."""
    with stream:
        halves = arrays(1, np.float16)
        singles = [x.astype(np.float32) for x in halves]
        replayed, eager = RMSProp(arrays(0), momentum=0.5), RMSProp(arrays(0), momentum=0.5)
        for opt in (replayed, eager):
            opt.step(singles)
        text = "the gradients of the last step had other dtypes; take the same step first"
        before = everything(replayed)
        refused(lambda: replayed.step(halves), text, stream)
        assert everything(replayed) == before
        for opt in (replayed, eager):
            opt.step(halves)
        graph = capture(replayed, halves, stream)
        for i in range(4):
            replayed.lr = eager.lr = 0.1 / (i + 1)
            if i == 2:
                for opt in (replayed, eager):
                    opt.param_groups[0]["alpha"] = 0.7
                replayed.refresh()
            replay(graph, stream)
            replayed.step(singles)
            eager.step(halves)
            eager.step(singles)
            assert everything(replayed) == everything(eager)
