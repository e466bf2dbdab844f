"""What a step is told beside its gradients: which numbers and arrays are refused, in which words."""

import math
from fractions import Fraction

import numpy as np
import pytest
from on_either import F2, F4, refusing

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
    with refusing(opt, TypeError, "grad_scale lies on cuda:0; wanted a number, or an array of one element in host mem"):
        opt.step(np.ones(5, F4), grad_scale=cupy.ones((), F4))
    opt = RMSProp(cupy.ones(5, F4))
    with refusing(opt, TypeError, "found_inf lies in host memory; wanted", "one element on cuda:0"):
        opt.step(cupy.ones(5, F4), found_inf=np.ones((), F4))
    opt.step(cupy.ones(5, F4), found_inf=cupy.ones((), F4))
    assert opt.skipped_steps == 1


@pytest.mark.parametrize("scale", [1e-40, 1e46])
def test_a_scale_whose_reciprocal_the_dtype_cannot_hold_is_refused(scale):
    param = np.ones(3, np.float32)
    with pytest.raises(ValueError, match=r"grad_scale is .*, whose reciprocal is (inf|0.0) in float32"):
        RMSProp(param).step(np.ones(3, np.float32), grad_scale=scale)
    assert np.array_equal(param, np.ones(3, np.float32))
    RMSProp(np.ones(3)).step(np.ones(3), grad_scale=scale)  # float64 holds it


def test_steps_that_take_turns_keep_their_plans():
    opt, grad = RMSProp(np.ones(3)), np.ones(3)
    seen = []
    for i in range(6):
        opt.step(grad, zero_grads=bool(i % 2))
        seen.append(id(opt._planner._plan))
    assert len(set(seen)) == 2


@pytest.mark.parametrize("what", ["step", "bias_weight", "param", "square_avg"])
def test_a_signal_that_the_step_itself_writes_is_refused(xp, what):
    """Its own counter, say: one batch counts before the next reads it, and half of the model is skipped."""
    params = [xp.ones(3, F4), xp.ones(3, np.float64)]
    opt = RMSProp(params, bias_correction=True)
    grads = [xp.ones(3, F4), xp.ones(3, np.float64)]
    opt.step(grads)
    given = params[0][:1] if what == "param" else opt.state[0][what].reshape(-1)[:1]
    label = "params[0]" if what == "param" else f"state[0].{what}"
    name = "found_inf" if what == "step" else "grad_scale"
    with refusing(opt, ValueError, f"{name} overlaps {label} in memory", "apart from what a step writes"):
        opt.step(grads, **{name: given})
