"""Gradients that a step zeroes in place, and those that it refuses to zero."""

import numpy as np
import pytest
from on_either import (
    AVERAGED,
    BF,
    F4,
    SIZES,
    assert_same,
    copies,
    draw,
    flat,
    host,
    mixed,
    mixed_grads,
    on,
    params_of,
    refusing,
)
from variants import bits

from rmsprop_gpu import RMSProp


@pytest.mark.parametrize("found", [False, True])
def test_zero_grads_writes_zeros_and_nothing_else_changes(xp, found):
    opt, twin = (mixed(xp, 0) for _ in range(2))
    for step in range(2):
        want = mixed_grads(step, (2,))
        grads, same = on(xp, want), on(xp, want)
        opt.step(grads, zero_grads=True, found_inf=found)
        twin.step(same, found_inf=found)
        assert_same(opt, twin)
        for zeroed, kept, x in zip(flat(grads), flat(same), flat(want), strict=True):
            assert x is None or (bits(kept) == bits(x) and not any(bits(zeroed)))  # +0, bit-exact
    assert opt.skipped_steps == twin.skipped_steps == 2 * found


@pytest.mark.parametrize("dtype", [F4, BF])
def test_a_plain_step_zeroes_too(xp, dtype):
    opt, twin = (RMSProp(copies(xp, draw(0, *SIZES[:5], dtype=dtype))) for _ in range(2))
    grads = copies(xp, draw(1, *SIZES[:5], dtype=dtype))
    twin.step([g.copy() for g in grads])
    opt.step(grads, zero_grads=True)
    assert_same(opt, twin)
    assert not any(any(bits(g)) for g in grads)


def layouts(xp):
    """Gradients of shape (6, 8) whose layout differs from C-ordered parameters', and the whole memory of each."""
    whole = [xp.array(draw(i, shape)[0]) for i, shape in enumerate([(8, 6), (12, 8), (6, 17), (6, 8)])]
    return {
        "transposed": (whole[0].T, whole[0]),
        "every second row": (whole[1][::2], whole[1]),
        "a slice of columns": (whole[2][:, 1::2], whole[2]),
        "reversed": (whole[3][::-1, ::-1], whole[3]),
    }


@pytest.mark.parametrize("name", ["transposed", "every second row", "a slice of columns", "reversed"])
@pytest.mark.parametrize("found", [False, True])
def test_a_gradient_that_is_copied_is_zeroed_where_it_lies(xp, name, found):
    opt, twin = (RMSProp([xp.ones((6, 8), F4), xp.ones(5, F4)]) for _ in range(2))
    for _ in range(3):  # a new copy each time
        odd, whole = layouts(xp)[name]
        was, at = host(whole).copy(), host(odd).copy()
        opt.step([odd, xp.ones(5, F4)], zero_grads=True, found_inf=found)
        twin.step([xp.array(at), xp.ones(5, F4)], found_inf=found)
        assert not host(odd).any()
        odd[...] = 1
        untouched = host(whole) == was
        assert untouched.sum() >= was.size - at.size
        assert_same(opt, twin)


def test_interleaved_gradients_that_do_not_overlap_are_zeroed(xp):
    opt = RMSProp([xp.ones(5, F4), xp.ones(5, F4)])
    both = xp.arange(1, 11, dtype=F4)
    opt.step([both[::2], both[1::2]], zero_grads=True)
    assert not host(both).any()
    assert (host(opt.state[0]["square_avg"]) > 0).all()


def test_gradients_in_one_buffer_side_by_side_are_zeroed(xp):
    opt = RMSProp([xp.ones(3, F4), xp.ones((2, 2), F4), xp.ones(0, F4), xp.ones(0, F4)])
    both = xp.arange(1, 9, dtype=F4)
    for _ in range(2):
        both[...] = 1
        opt.step([both[:3], both[3:7].reshape(2, 2), both[2:2], both[2:2]], zero_grads=True)
        assert host(both).tolist() == [0] * 7 + [1]


TWICE = {
    "the same array": lambda x: [x[:5], x[:5]],
    "one within the other": lambda x: [x[:9:2], x[1:6]],
    "the last element": lambda x: [x[:5], x[4:9]],
}


@pytest.mark.parametrize("case", TWICE)
def test_gradients_that_overlap_cannot_be_zeroed(xp, case):
    opt, twin = (RMSProp({"a": xp.ones(5, F4), "b": xp.ones(5, F4)}) for _ in range(2))
    memory = xp.arange(1, 11, dtype=F4)
    a, b = TWICE[case](memory)
    grads, was = {"a": a, "b": b}, bits(memory)
    for _ in range(2):
        with refusing(opt, ValueError, " overlaps grads[", "wanted gradients that share no memory"):
            opt.step(grads, zero_grads=True)
        assert bits(memory) == was
    for x in (opt, twin):
        x.step(grads)  # fine without zeroing
    good = {"a": xp.ones(5, F4), "b": xp.ones(5, F4)}
    opt.step(good, zero_grads=True)
    assert not host(good["b"]).any()
    twin.step({"a": xp.ones(5, F4), "b": xp.ones(5, F4)})
    assert_same(opt, twin)
    with refusing(opt, ValueError, "overlaps"):  # also after a valid step
        opt.step(grads, zero_grads=True)


def test_gradients_become_the_same_array_from_one_step_to_the_next(xp):
    opt = RMSProp([xp.ones(5, F4), xp.ones(5, F4)])
    a, b = xp.ones(5, F4), xp.ones(5, F4)
    opt.step([a, b], zero_grads=True)
    with refusing(opt, ValueError, "grads[1] overlaps grads[0]"):
        opt.step([a, a], zero_grads=True)
    opt.step([b, a], zero_grads=True)
    opt.step([a, None], zero_grads=True)
    assert opt.steps == 3


def test_what_cannot_be_written_to_cannot_be_zeroed():
    opt = RMSProp({"a": np.ones((), F4), "b": np.ones(5, F4)})
    closed, whole = np.ones(5, F4), np.ones((), F4)
    closed.flags.writeable = False
    for _ in range(2):
        with refusing(opt, ValueError, 'grads["b"] is read-only; wanted an array into which zeros can be written'):
            opt.step({"a": whole, "b": closed}, zero_grads=True)
    with refusing(opt, ValueError, 'grads["b"] is read-only'):
        opt.step({"a": None, "b": np.broadcast_to(F4(1), 5)}, zero_grads=True)
    with refusing(opt, TypeError, 'grads["a"] is a numpy.float32; wanted an array, into which zeros can be written'):
        opt.step({"a": F4(1), "b": np.ones(5, F4)}, zero_grads=True)
    assert whole == 1
    opt.step({"a": F4(1), "b": closed})
    opt.step({"a": whole, "b": np.ones(5, F4)}, zero_grads=True)
    assert (whole, opt.steps) == (0, 2)
    right = np.ones(5, F4)
    opt.step({"a": whole, "b": right}, zero_grads=True)
    right.flags.writeable = False  # the same array, made read-only since
    with refusing(opt, ValueError, "read-only"):
        opt.step({"a": whole, "b": right}, zero_grads=True)


def test_zero_grads_of_a_parameter_or_its_average_is_refused(xp):
    opt = RMSProp(xp.ones(5, F4), **AVERAGED)
    for grad, text in ((params_of(opt)[0], "overlaps params"), (opt.ema[0], "overlaps state"), (opt.ema[0], "ema")):
        with refusing(opt, ValueError, text):
            opt.step(grad, zero_grads=True)
