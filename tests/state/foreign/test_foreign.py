"""States of any other framework: what is refused, averages that start anew, and runs that continue on a device."""

import warnings

import numpy as np
import pytest
from foreign_runs import (
    LIKE_OPTAX,
    SHAPES,
    SWITCH,
    TORCH,
    EmptyState,
    Oracle,
    ScaleByRmsState,
    TraceState,
    gradient,
    here,
    optax_state,
    rates,
    start,
    torch_state,
    two_groups,
)
from on_host import assert_same_bits, refused

from rmsprop_gpu import RMSProp
from rmsprop_gpu.state.foreign import READERS


@pytest.mark.parametrize("framework", ["jax", "Torch", None, ["torch"]])
def test_another_framework_is_refused(framework):
    opt = RMSProp(start())
    with refused(
        ValueError, f"framework is {framework!r}; wanted 'torch', 'keras', 'tf_keras_legacy', 'tf1'", of=[opt]
    ):
        opt.load_foreign(framework, {})
    with refused(ValueError, f"framework is {framework!r}; wanted 'torch'", of=[opt]):
        opt.to_foreign(framework)


@pytest.mark.parametrize("framework", READERS)
@pytest.mark.parametrize("state", [None, 5, "state", np.ones(3)], ids=["None", "5", "text", "array"])
def test_what_is_no_state_is_refused(framework, state):
    opt = RMSProp(start())
    with refused(TypeError, "state is a", of=[opt]):
        opt.load_foreign(framework, state)


@pytest.mark.parametrize("match", ["index", None, True, ["name"]])
def test_match_is_one_of_two_words(match):
    half = Oracle(alpha=0.9).run(range(2))
    opt = RMSProp(two_groups(half.params))
    with refused(ValueError, f"match is {match!r}; wanted 'name' or 'order'", of=[opt]):
        opt.load_foreign("torch", torch_state(half), match=match)


@pytest.mark.parametrize("steps", [-1, 1.0, True, "x"])
def test_steps_is_a_count(steps):
    half = Oracle(alpha=0.9).run(range(2))
    opt = RMSProp(two_groups(half.params))
    with refused(TypeError, f"steps is {steps!r}; wanted None or a count", of=[opt]):
        opt.load_foreign("torch", torch_state(half), steps=steps)


@pytest.mark.parametrize("late", [False, True], ids=["", "late"])
@pytest.mark.parametrize("framework", ["torch", "optax"])
def test_averages_that_the_framework_lacks_start_anew(framework, late):
    """They start from the current parameters. The average of a late parameter starts at its first step."""
    given = LIKE_OPTAX if framework == "optax" else {"alpha": 0.9}
    half = Oracle(**given).run(range(SWITCH), late=late and framework == "torch")
    opt = here(RMSProp(two_groups(half.params), **given, use_ema=True, ema_momentum=0.75), range(3))
    opt.load_foreign(framework, torch_state(half) if framework == "torch" else optax_state(half))
    begun = {name: half.params[name].copy() for name in SHAPES}
    for name in SHAPES:
        assert_same_bits(opt.ema[name], begun[name])
    here(opt, [SWITCH])
    for name in SHAPES:
        first = framework == "optax" or (late and name == "b")  # the optax state here has no count
        want = half.params[name] if first else 0.75 * begun[name] + 0.25 * half.params[name]
        np.testing.assert_allclose(opt.ema[name], want, rtol=1e-15, atol=1e-16)


# On a device


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["host", "device"])
def test_a_run_of_torch_continues_on_a_device(where):
    cupy = pytest.importorskip("cupy", exc_type=ImportError)
    given = {"alpha": 0.97, **TORCH["all"]}
    half = Oracle(**given).run(range(SWITCH), lr=rates)
    saved = torch_state(half)
    host = RMSProp(two_groups({name: p.copy() for name, p in half.params.items()}))
    host.load_foreign("torch", saved)
    params = {name: cupy.asarray(p) for name, p in half.params.items()}
    opt = RMSProp(two_groups(params))
    if where == "device":
        for entry in saved["state"].values():
            entry.update({name: cupy.asarray(x) for name, x in entry.items()})
    opt.load_foreign("torch", saved)
    for step in range(SWITCH, SWITCH + 3):
        host.step([{name: g} for name, g in gradient(step).items()])
        opt.step([{name: cupy.asarray(g)} for name, g in gradient(step).items()])
    for name in SHAPES:
        for buffer, want in host.state[name].items():
            assert_same_bits(opt.state[name][buffer].get(), want)


@pytest.mark.gpu
def test_a_negated_trace_and_a_widened_average_on_a_device():
    cupy = pytest.importorskip("cupy", exc_type=ImportError)
    trace, average = cupy.full(3, 0.5), cupy.full(3, 0.25, cupy.float32)
    opt = RMSProp(cupy.ones(3), momentum=0.9, lr_in_momentum=True)
    opt.load_foreign("optax", (ScaleByRmsState(average), EmptyState(), TraceState(trace)))
    state = opt.state[0]
    assert (state["momentum_buffer"].get().tolist(), state["square_avg"].get().tolist()) == ([-0.5] * 3, [0.25] * 3)
    assert state["square_avg"].dtype == np.float64
    assert trace.get().tolist() == [0.5] * 3


@pytest.mark.gpu
def test_averages_start_anew_on_a_device_after_the_steps_before():
    cupy = pytest.importorskip("cupy", exc_type=ImportError)
    half = Oracle(alpha=0.9).run(range(SWITCH))
    params = {name: cupy.asarray(p) for name, p in half.params.items()}
    opt = RMSProp(two_groups(params), use_ema=True)
    with cupy.cuda.Stream(non_blocking=True):
        opt.step([{name: cupy.asarray(g)} for name, g in gradient(0).items()])
    opt.load_foreign("torch", torch_state(half))
    for name in SHAPES:
        assert_same_bits(opt.ema[name].get(), params[name].get())


@pytest.mark.gpu
def test_no_state_is_loaded_into_a_graph():
    cupy = pytest.importorskip("cupy", exc_type=ImportError)
    opt, grad, stream = RMSProp(cupy.ones(3)), cupy.ones(3), cupy.cuda.Stream(non_blocking=True)
    with stream:
        opt.step(grad)
        stream.begin_capture()
        try:
            with pytest.raises(RuntimeError, match="load_foreign"):
                opt.load_foreign("torch", {})
        finally:
            stream.end_capture()


@pytest.mark.parametrize("use_ema", [False, True])
def test_a_parameter_that_was_reshaped_in_place_takes_nothing(use_ema):
    """New averages are copies of the parameters: the first would load before the second is refused."""
    params = [np.ones((2, 3)), np.ones((2, 2))]
    opt = RMSProp(params, use_ema=use_ema)
    state = {i: {"step": 3.0, "square_avg": np.full(x.shape, 0.25)} for i, x in enumerate(params)}
    group = {
        "lr": 0.1,
        "alpha": 0.99,
        "eps": 1e-8,
        "weight_decay": 0,
        "momentum": 0,
        "centered": False,
        "params": [0, 1],
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy deprecates setting the shape
        params[1].shape = (4,)
    with refused(ValueError, "params[1] was changed in place: it has shape (4,)", of=[opt, *params]):
        opt.load_foreign("torch", {"state": state, "param_groups": [{**group, "params": [0, 1]}]})
    assert opt.steps == 0
