"""A step is atomic: what a handler, a thread or a schedule does during it does not affect it."""

import signal
import sys
import threading
from contextlib import nullcontext

import numpy as np
import pytest
from devices import MODULES
from on_host import assert_same, random

from rmsprop_gpu import RMSProp
from rmsprop_gpu.optimizer import turn

INSIDE = r"was requested inside a step, load or save of the same optimizer"
SIZES = 4, 5


def problem(**given):
    params = random(1, *SIZES)
    return RMSProp(params, **given), params


def asks(opt, act, answer=0.1):
    """A schedule that calls `act` at step 1."""

    def lr(step):
        if step == 1:
            act(opt[0])
        return answer

    return lr


def lines_of_a_step():
    """How many lines of this package a step runs."""
    opt, _ = problem(lr=lambda step: 0.1)
    opt.step(random(2, *SIZES))
    seen = []
    at_line(lambda: seen.append(1), None, lambda: opt.step(random(3, *SIZES)))
    return len(seen)


def at_line(handler, number, call):
    """Make a call, and run a signal handler at one line of this package, or at each."""
    count = 0

    def trace(frame, event, _):
        nonlocal count
        if "rmsprop_gpu" not in frame.f_code.co_filename or frame.f_code.co_filename == turn.__file__:
            return None
        if event == "line":
            count += 1
            if number in (None, count):
                handler()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)


def steps(opt):
    opt.step(random(9, *SIZES))


def loads(opt):
    twin, _ = problem()
    opt.load_state_dict({**twin.state_dict(), "param_groups": opt.state_dict()["param_groups"]})


def assigns(opt):
    opt.param_groups[0]["momentum"] = 0.9


@pytest.mark.parametrize("act", [steps, loads, assigns])
def test_wherever_a_handler_runs_in_a_step_that_step_is_whole(act):
    """Before and after the turn it may do anything. Inside it is refused, and reads the state of a whole step."""
    refused = 0
    for number in range(1, lines_of_a_step() + 1):
        said = []
        (opt, _), (twin, _) = problem(lr=lambda step: 0.1), problem(lr=lambda step: 0.1)
        for o in (opt, twin):
            o.step(random(2, *SIZES))

        def handler(opt=opt, said=said):
            found = opt.state_dict()
            assert found["steps"] == found["state"]["0"]["step"]
            inside = opt._groups.changes.turn
            allowed = act is assigns and inside.asking  # allowed like in the schedule, for the next step
            with pytest.raises(RuntimeError, match=INSIDE) if inside and not allowed else nullcontext():
                act(opt)
            said.append("allowed" if allowed else "refused" if inside else "outside")

        at_line(handler, number, lambda opt=opt: opt.step(random(3, *SIZES)))
        if said in (["refused"], ["allowed"]):
            refused += said == ["refused"]
            twin.step(random(3, *SIZES))
            if said == ["allowed"]:
                assigns(twin)
            assert_same(opt, twin)
    assert refused > 20


def test_a_signal_handler_that_steps_is_refused():
    said = []

    def handler(*_):
        try:
            opt.step(random(9, *SIZES))
        except RuntimeError as error:
            said.append(str(error))

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        box = []
        opt, _ = problem(lr=asks(box, lambda _: signal.raise_signal(signal.SIGUSR1)))
        box.append(opt)
        for _ in range(3):
            opt.step(random(2, *SIZES))
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert len(said) == 1
    assert "inside a step" in said[0]
    assert opt.steps == 3


@pytest.mark.parametrize("act", [steps, loads, assigns])
def test_another_thread_waits_for_its_own_turn(act):
    entered, go, errors = threading.Event(), threading.Event(), []

    def lr(step):
        if step == 1:
            entered.set()
            assert go.wait(60)
        return 0.1

    (opt, _), (twin, _) = problem(lr=lr), problem(lr=lambda step: 0.1)
    for o in (opt, twin):
        o.step(random(2, *SIZES))
    twin.step(random(3, *SIZES))
    thread = threading.Thread(target=lambda: opt.step(random(3, *SIZES)))
    thread.start()
    assert entered.wait(60)
    try:
        with pytest.raises(RuntimeError, match=INSIDE):
            act(opt)
    except BaseException as error:
        errors.append(error)
    go.set()
    thread.join()
    assert not errors
    assert_same(opt, twin)


@pytest.mark.parametrize("act", [steps, loads], ids=["step", "load"])
def test_a_schedule_may_not_step_or_load(act):
    box = []
    opt, _ = problem(lr=asks(box, act))
    box.append(opt)
    opt.step(random(2, *SIZES))
    with pytest.raises(RuntimeError, match=INSIDE):
        opt.step(random(2, *SIZES))
    assert opt.steps == 1
    opt._groups.changes.turn.clear()


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize(
    "changes",
    [{"momentum": 0.0}, {"momentum": 0.5, "use_ema": True}, {"lr": 0.7}, {"centered": True, "lr": 0.2}],
    ids=str,
)
def test_what_a_schedule_assigns_counts_from_the_next_step_on(module, changes):
    xp = pytest.importorskip(module)

    def params():
        return [xp.asarray(x) for x in random(1, *SIZES)]

    box, twin = [], RMSProp(params(), lr=0.1, momentum=0.9)
    opt = RMSProp(params(), lr=asks(box, lambda o: o.param_groups[0].update(changes)), momentum=0.9)
    box.append(opt)
    for step in range(4):
        grads = [xp.asarray(x) for x in random(10 + step, *SIZES)]
        opt.step(grads)
        twin.step(grads)
        if step == 1:
            twin.param_groups[0].update(changes)
    for ours, theirs in zip(opt.param_groups[0]["params"], twin.param_groups[0]["params"], strict=True):
        assert ours.tobytes() == theirs.tobytes()


def test_a_turn_that_was_not_given_back_is_taken_over():
    """Ctrl-C may come just before the turn is given back."""
    opt, _ = problem()
    opt._groups.changes.turn[0] = object()
    opt.lr = 0.3
    opt._groups.changes.turn[0] = object()
    opt.step(random(2, *SIZES))
    assert opt.steps == 1
    assert not opt._groups.changes.turn
    assert np.isfinite(opt.param_groups[0]["params"][0]).all()
