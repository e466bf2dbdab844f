"""A step's arguments besides gradients: which numbers and arrays are refused, and the errors."""

import gc
import math
import sys
from fractions import Fraction

import numpy as np
import pytest
from on_either import F2, F4, F8, refusing

from rmsprop_gpu import RMSProp

WRONG_SIGNALS = {
    "text": ({"grad_scale": "2"}, TypeError, ["grad_scale is a str", "wanted a number, or an array of one element"]),
    "list": ({"found_inf": [1]}, TypeError, ["found_inf is a list", "wanted a number, or an array of one element"]),
    "complex": ({"grad_scale": 1j}, TypeError, ["grad_scale is a complex"]),
    "bool": ({"grad_scale": True}, ValueError, ["grad_scale is True; wanted a finite number > 0"]),
    "numpy's bool": ({"grad_scale": np.True_}, ValueError, ["grad_scale is ", "wanted a finite number > 0"]),
    "zero": ({"grad_scale": 0}, ValueError, ["grad_scale is 0; wanted a finite number > 0"]),
    "negative": ({"grad_scale": -1.5}, ValueError, ["grad_scale is -1.5; wanted a finite number > 0"]),
    "nan": ({"grad_scale": math.nan}, ValueError, ["grad_scale is nan"]),
    "infinite": ({"grad_scale": math.inf}, ValueError, ["grad_scale is inf"]),
    "too large": ({"grad_scale": 10**400}, ValueError, ["wanted a finite number > 0"]),
    "too small": ({"grad_scale": Fraction(1, 10**400)}, ValueError, ["wanted a finite number > 0"]),
    "zero_grads": ({"zero_grads": 1}, TypeError, ["zero_grads is 1 (an int)", "wanted True or False"]),
    "None": ({"zero_grads": None}, TypeError, ["zero_grads is None (a NoneType)"]),
    "all": (
        {"zero_grads": "no", "grad_scale": "2", "found_inf": "3"},
        TypeError,
        ["3 problems, nothing was changed", "zero_grads is 'no'", "grad_scale is a str", "found_inf is a str"],
    ),
}
WRONG_ARRAYS = {
    "size": (
        "grad_scale",
        lambda xp: xp.ones(2, F4),
        ValueError,
        ["grad_scale has shape (2,); wanted a number, or an"],
    ),
    "none": ("found_inf", lambda xp: xp.ones((1, 0), F4), ValueError, ["found_inf has shape (1, 0)"]),
    "float16": (
        "grad_scale",
        lambda xp: xp.ones((), F2),
        TypeError,
        ["has dtype float16; wanted one of float32, float64"],
    ),
    "int": (
        "grad_scale",
        lambda xp: xp.ones((), np.int64),
        TypeError,
        ["has dtype int64; wanted one of float32, float"],
    ),
    "found": (
        "found_inf",
        lambda xp: xp.ones((), F2),
        TypeError,
        ["has dtype float16; wanted one of", "bool", "int64"],
    ),
    "uint32": ("found_inf", lambda xp: xp.ones((), np.uint32), TypeError, ["found_inf has dtype uint32"]),
}


@pytest.mark.parametrize("case", WRONG_SIGNALS)
def test_wrong_signals_are_refused(case):
    told, kind, texts = WRONG_SIGNALS[case]
    opt = RMSProp(np.ones(5, F4))
    for _ in range(2):
        with refusing(opt, kind, *texts):
            opt.step(np.ones(5, F4), **told)
    opt.step(np.ones(5, F4), grad_scale=2.0)
    assert opt.steps == 1


ALL_WRONG = {"grad_scale": -1, "found_inf": "no", "zero_grads": 1}
WRONG_TEXTS = ["grad_scale is -1", "found_inf is a str", "zero_grads is 1"]


def test_a_refused_step_names_all_that_is_wrong(xp):
    """In the other arguments and in every gradient."""
    params = {"w": xp.ones(5, F4), "b": xp.ones(3, F4)}
    opt = RMSProp(params)
    wrong, right = {"w": xp.ones(4, F4), "b": xp.ones(3, F8)}, {name: xp.ones_like(x) for name, x in params.items()}
    texts = ['grads["w"] has shape (4,)', 'grads["b"] has dtype float64']
    for _ in range(2):
        with refusing(opt, TypeError, "5 problems, nothing was changed:", *WRONG_TEXTS, *texts):
            opt.step(wrong, **ALL_WRONG)
        with refusing(opt, TypeError, "3 problems", *WRONG_TEXTS):
            opt.step(right, **ALL_WRONG)
        with refusing(opt, TypeError, "2 problems", *texts):
            opt.step(wrong, grad_scale=2.0)
    opt.step(right)
    assert opt.steps == 1


def test_a_refused_step_names_a_wrong_structure_beside_the_rest(xp):
    opt = RMSProp({"w": xp.ones(5, F4), "b": xp.ones(3, F4)})
    wrong = {"w": xp.ones(5, F4), "c": xp.ones(3, F4)}
    with refusing(opt, TypeError, "5 problems", *WRONG_TEXTS, 'grads["b"] is missing', 'grads["c"]'):
        opt.step(wrong, **ALL_WRONG)


def test_a_refused_step_names_a_parameter_that_was_replaced_beside_the_rest(xp):
    params = [xp.ones(5, F4), xp.ones(3, F4)]
    opt = RMSProp(params)
    params[1] = xp.ones(3, F4)
    texts = ["params[1] is no longer the parameter", "grad_scale is 0", "grads[0] has shape"]
    with refusing(opt, ValueError, "3 problems", *texts):
        opt.step([xp.ones(4, F4), xp.ones(3, F4)], grad_scale=0)


def test_a_refused_step_names_a_wrong_learning_rate_beside_the_gradients(xp):
    asked = []
    opt = RMSProp(xp.ones(5, F4), lr=lambda step: asked.append(step) or (0.1 if step == 0 else -1.0))
    opt.step(xp.ones(5, F4))
    with refusing(opt, ValueError, "2 problems", "lr", "grads has shape (4,)"):
        opt.step(xp.ones(4, F4))
    assert asked == [0, 1]


def test_an_error_of_a_schedule_is_its_own(xp):
    def lr(step):
        raise ValueError("mine")

    opt = RMSProp(xp.ones(5, F4), lr=lr)
    with pytest.raises(ValueError, match=r"^mine$") as info:
        opt.step(xp.ones(5, F4))
    assert info.traceback[-1].name == "lr"


def test_a_refused_step_names_overlaps_beside_the_rest(xp):
    """Between gradients that are zeroed, and between the other arguments and what the step writes."""
    memory, params = xp.ones(9, F4), [xp.ones(5, F4), xp.ones(5, F4), xp.ones(5, F4)]
    opt = RMSProp(params)
    grads = [memory[:5], memory[4:], xp.ones(4, F4)]
    texts = ["grads[1] overlaps grads[0] in memory", "grads[2] has shape (4,)", "grad_scale overlaps params[0]"]
    for _ in range(2):
        with refusing(opt, ValueError, "3 problems", *texts):
            opt.step(grads, zero_grads=True, grad_scale=params[0][:1])
    with refusing(opt, ValueError, "grads[1] overlaps grads[0] in memory"):
        opt.step([*grads[:2], params[2].copy()], zero_grads=True)
    opt.step([x.copy() for x in params], zero_grads=True)
    assert opt.steps == 1


@pytest.fixture
def no_collection():
    """The garbage collector, which would free cycles, does not run."""
    gc.disable()
    yield
    gc.enable()


def test_gradients_beside_wrong_arguments_are_not_kept(xp, no_collection):
    opt = RMSProp(xp.ones(5, F4))
    opt.step(xp.ones(5, F4))
    grad = xp.ones(5, F4)
    before = sys.getrefcount(grad)
    with refusing(opt, ValueError, "grad_scale is 0"):
        opt.step(grad, grad_scale=0)
    assert sys.getrefcount(grad) == before


@pytest.mark.gpu
def test_under_capture_too_a_refused_step_names_all_that_is_wrong(stream):
    import cupy

    opt, grad = RMSProp(cupy.ones(5, F4)), cupy.ones(5, F4)
    scale = cupy.ones((), F4)
    with stream:
        opt.step(grad, grad_scale=scale)
        stream.begin_capture()
        with pytest.raises(TypeError, match="2 problems") as info:
            opt.step(cupy.ones_like(grad)[:4], grad_scale="2")
        with pytest.raises(TypeError, match="found_inf is a str"):  # the previous step had other arguments
            opt.step(grad, found_inf="2")
        opt.step(grad, grad_scale=scale)
        graph = stream.end_capture()
    assert "grads has shape (4,)" in str(info.value)
    graph.launch(stream)
    stream.synchronize()
    assert int(opt.state[0]["step"]) == 2


@pytest.mark.parametrize("case", WRONG_ARRAYS)
def test_wrong_arrays_as_signals_are_refused(xp, case):
    name, make, kind, texts = WRONG_ARRAYS[case]
    opt = RMSProp(xp.ones(5, F4))
    with refusing(opt, kind, name, *texts):
        opt.step(xp.ones(5, F4), **{name: make(xp)})
    opt.step(xp.ones(5, F4), **{name: xp.ones((), F4)})
    assert opt.steps == 1


def test_signals_of_foreign_bytes_or_off_their_alignment_are_refused():
    opt = RMSProp(np.ones(5, F4))
    skewed = np.frombuffer(bytes(9), np.uint8)[1:].view(F4)[:1]
    for x in (np.ones((), ">f4"), skewed):
        with refusing(opt, TypeError, "grad_scale has dtype", "wanted one of float32, float64, native, aligned"):
            opt.step(np.ones(5, F4), grad_scale=x)


@pytest.mark.gpu
def test_signals_in_the_other_place_are_refused():
    import cupy

    opt = RMSProp(np.ones(5, F4))
    with refusing(opt, TypeError, "grad_scale is on cuda:0; wanted a number, or an array of one element in host mem"):
        opt.step(np.ones(5, F4), grad_scale=cupy.ones((), F4))
    opt = RMSProp(cupy.ones(5, F4))
    with refusing(opt, TypeError, "found_inf is in host memory; wanted", "one element on cuda:0"):
        opt.step(cupy.ones(5, F4), found_inf=np.ones((), F4))
    opt.step(cupy.ones(5, F4), found_inf=cupy.ones((), F4))
    assert opt.skipped_steps == 1


@pytest.mark.parametrize("scale", [1e-40, 1e46])
def test_a_scale_whose_reciprocal_the_dtype_cannot_hold_is_refused(scale):
    param = np.ones(3, np.float32)
    with pytest.raises(ValueError, match=r"grad_scale is .*, whose reciprocal is (inf|0.0) in float32"):
        RMSProp(param).step(np.ones(3, np.float32), grad_scale=scale)
    assert np.array_equal(param, np.ones(3, np.float32))
    RMSProp(np.ones(3)).step(np.ones(3), grad_scale=scale)  # float64 can hold it


def test_steps_that_take_turns_keep_their_plans():
    opt, grad = RMSProp(np.ones(3)), np.ones(3)
    seen = []
    for i in range(6):
        opt.step(grad, zero_grads=bool(i % 2))
        seen.append(id(opt._planner._plan))
    assert len(set(seen)) == 2


@pytest.mark.parametrize("what", ["step", "bias_weight", "param", "square_avg"])
def test_a_signal_that_the_step_itself_writes_is_refused(xp, what):
    """Take its own counter: one batch advances it before the next reads it, so half of the model would be skipped."""
    params = [xp.ones(3, F4), xp.ones(3, np.float64)]
    opt = RMSProp(params, bias_correction=True)
    grads = [xp.ones(3, F4), xp.ones(3, np.float64)]
    opt.step(grads)
    given = params[0][:1] if what == "param" else opt.state[0][what].reshape(-1)[:1]
    label = "params[0]" if what == "param" else f"state[0].{what}"
    name = "found_inf" if what == "step" else "grad_scale"
    with refusing(opt, ValueError, f"{name} overlaps {label} in memory", "apart from what a step writes"):
        opt.step(grads, **{name: given})
