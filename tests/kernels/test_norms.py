"""The norm of gradients is summed in the documented order, whatever the layout, the batches and the threads."""

import math

import numba
import numpy as np
import pytest
from norms_by_hand import in_lanes, norm_of, squares_in_lanes, sum_of_squares
from on_either import ALL, DTYPES, F4, F8, SIZES, copies, draw, everything, flat, mixed, mixed_grads, on

from rmsprop_gpu import RMSProp
from rmsprop_gpu.kernels import cpu_drive

SEEDS = (1, 6, 12, 16)  # draws in which the order shows

OTHER_ORDERS = {
    "NumPy's": lambda x: float(np.sum(x.astype(F8) ** 2)),
    "exact": lambda x: math.fsum(x.astype(F8) ** 2),
    "from the end": lambda x: sum_of_squares(x[::-1]),
    "one block": squares_in_lanes,
    "blocks of 2,048": lambda x: in_lanes([squares_in_lanes(x[i : i + 2048]) for i in range(0, len(x), 2048)]),
    "blocks added one by one": lambda x: sum(squares_in_lanes(x[i : i + 4096]) for i in range(0, len(x), 4096)),
}


@pytest.mark.parametrize("order", OTHER_ORDERS)
def test_the_order_matters_here(order):
    """Other orders give other bits in at least one of these draws, and the tests below use them all."""
    draws = [draw(seed, SIZES[-1])[0] for seed in SEEDS]
    norms, others = ([math.sqrt(f(x)) for x in draws] for f in (sum_of_squares, OTHER_ORDERS[order]))
    assert norms != others
    np.testing.assert_allclose(norms, others, rtol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_norm_is_summed_in_the_order_that_is_documented(xp, dtype):
    opt = RMSProp(copies(xp, draw(0, *SIZES, dtype=dtype)), global_clipnorm=math.inf)
    assert opt.last_grad_norm == 0.0
    for seed in {F4: SEEDS, F8: [10]}.get(dtype, [1]):  # the float64 draw shows a missing fma; the oracle is slow
        grads = draw(seed, *SIZES, dtype=dtype)
        opt.step(copies(xp, grads))
        assert opt.last_grad_norm == norm_of(grads)
    grads[7] = grads[3] = None  # gradient 7 has several blocks
    opt.step(copies(xp, grads))
    assert opt.last_grad_norm == norm_of(grads)
    opt.step([None] * len(grads))
    assert opt.last_grad_norm == 0.0


def test_a_tensor_of_more_blocks_than_lanes(xp):
    (grad,) = draw(1, 130 * 4096 + 5)
    opt = RMSProp(xp.zeros(grad.size, F4), global_clipnorm=math.inf)
    opt.step(xp.array(grad))
    assert opt.last_grad_norm == norm_of([grad])


def test_more_tensors_than_lanes_and_warps(xp):
    grads = draw(1, *[i % 5 for i in range(300)])
    opt = RMSProp([xp.zeros(g.size, F4) for g in grads], global_clipnorm=math.inf)
    opt.step(copies(xp, grads))
    assert opt.last_grad_norm == norm_of(grads)


def test_the_order_is_that_of_the_parameter_in_memory(xp):
    """A gradient with another layout is copied into its parameter's."""
    params = [xp.zeros((90, 70), F4).T, xp.zeros((60, 4, 50), F4).transpose(1, 2, 0), xp.zeros((), F4)]
    opt, norms, others = RMSProp(params, global_clipnorm=math.inf), [], []
    for seed in range(1, 6):
        a, b, c = draw(seed, (70, 90), (4, 50, 60), ())
        odd = [xp.array(a), xp.array(b[:, ::-1])[:, ::-1], xp.array(c)]
        like = [xp.array(a.T.copy()).T, xp.array(b.transpose(2, 0, 1).copy()).transpose(1, 2, 0), xp.array(c)]
        norms.append(norm_of([a.T.ravel(), b.transpose(2, 0, 1).ravel(), c.ravel()]))
        others.append(norm_of([a.ravel(), b.ravel(), c.ravel()]))
        for grads in (odd, like):
            opt.step(grads)
            assert opt.last_grad_norm == norms[-1]
    assert norms != others


@pytest.mark.parametrize("absent", [(), (3, 5)])
def test_tensors_are_added_in_the_order_of_the_parameters_whatever_the_batches(xp, absent):
    opt, norms, others = mixed(xp, 0), [], []
    for seed in (4, 9):
        grads = mixed_grads(seed, absent)
        opt.step(on(xp, grads), grad_scale=2.0)
        norms.append(norm_of(flat(grads)) / 2)
        assert opt.last_grad_norm == norms[-1]
        by_dtype = sorted((g for g in flat(grads) if g is not None), key=lambda g: str(g.dtype))
        others.append(norm_of(by_dtype) / 2)
    assert norms != others


def test_the_norm_is_of_the_tensors_in_groups_that_clip_by_one(xp):
    grads = draw(1, 300, 5000, 7)
    params = copies(xp, draw(0, 300, 5000, 7))
    opt = RMSProp([{"params": params[:1]}, {"params": params[1:], "clipnorm": 2.0}])
    opt.step([copies(xp, grads[:1]), copies(xp, grads[1:])])
    assert opt.last_grad_norm == norm_of([None, *grads[1:]])
    opt.param_groups[1]["clipnorm"] = None
    opt.step([copies(xp, grads[:1]), copies(xp, grads[1:])])
    assert opt.last_grad_norm == norm_of([None, *grads[1:]])  # from the last step that took norms


GEOMETRY = [
    {"UNIT": 7, "parts_of": lambda size: 3},
    {"UNIT": 1000, "parts_of": lambda size: 1000},
    {"SERIAL_BELOW": 10**9},
]


@pytest.mark.parametrize("geometry", GEOMETRY, ids=["tiny", "short", "long"])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_bits_whatever_the_chunks_and_threads(geometry, threads, monkeypatch):
    """On the CPU. For devices, see test_device_gradients.py."""

    def result():
        opt = mixed(np, 0)
        for step in range(3):
            opt.step(mixed_grads(step, (2,)), grad_scale=3.7, found_inf=step == 1)
        return everything(opt), opt.last_grad_norm, opt.skipped_steps

    want, most = result(), numba.get_num_threads()
    for name, value in geometry.items():
        monkeypatch.setattr(cpu_drive, name, value)
    try:
        numba.set_num_threads(min(threads, most))
        assert result() == want
    finally:
        numba.set_num_threads(most)


def test_the_largest_numbers_have_a_norm(xp):
    """Squares of float32 cannot overflow in float64. Those of float64 can, and that does not skip the step."""
    largest = np.finfo(F4).max
    opt = RMSProp(xp.zeros(5000, F4), **ALL)
    opt.step(xp.full(5000, largest, F4), found_inf=False)
    assert opt.last_grad_norm == pytest.approx(math.sqrt(5000) * float(largest), rel=1e-12)
    opt = RMSProp(xp.zeros(5, F8), momentum=0.83, **ALL)
    opt.step(xp.full(5, 1e200), found_inf=False)
    assert (opt.last_grad_norm, opt.skipped_steps, int(opt.state[0]["step"])) == (math.inf, 0, 1)


def test_a_norm_whose_square_is_too_large_is_said():
    opt = RMSProp(np.ones(3), clipnorm=np.inf)
    opt.step(np.full(3, 1e150), grad_scale=1e-10)
    assert opt.last_grad_norm == pytest.approx(np.sqrt(3) * 1e160, rel=1e-12)
