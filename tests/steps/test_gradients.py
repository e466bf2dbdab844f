"""What a step does with gradients beside the rule: scaled, clipped by norms, checked, zeroed; and parameters averaged.

Each test runs on the CPU and, by the fixture `xp`, on a device. What it wants comes from NumPy and Python alone.
"""

import importlib
import math
from fractions import Fraction

import numba
import numpy as np
import pytest
from norms_by_hand import in_lanes, norm_of, squares_in_lanes, sum_of_squares
from on_either import (
    ALL,
    AVERAGED,
    BF,
    CLIPPED,
    DTYPES,
    F2,
    F4,
    F8,
    SIZES,
    assert_same,
    copies,
    draw,
    everything,
    flat,
    host,
    mixed,
    mixed_grads,
    on,
    params_of,
    refusing,
)
from recorded import CASES, RELATIVE, ROWS, ULPS
from variants import bits

from rmsprop_gpu import AdaGrad, RMSProp
from rmsprop_gpu.arrays.dtypes import compute_dtype
from rmsprop_gpu.kernels import cpu

SEEDS = (1, 6, 12, 16)  # of draws in which the order shows


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
    """Other orders give other bits in some of these draws, and the tests below take them all."""
    draws = [draw(seed, SIZES[-1])[0] for seed in SEEDS]
    norms, others = ([math.sqrt(f(x)) for x in draws] for f in (sum_of_squares, OTHER_ORDERS[order]))
    assert norms != others
    np.testing.assert_allclose(norms, others, rtol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_norm_is_summed_in_the_order_that_is_documented(xp, dtype):
    opt = RMSProp(copies(xp, draw(0, *SIZES, dtype=dtype)), global_clipnorm=math.inf)
    assert opt.last_grad_norm == 0.0
    for seed in {F4: SEEDS, F8: [10]}.get(dtype, [1]):  # of float64 a draw in which the fma shows; the oracle is slow
        grads = draw(seed, *SIZES, dtype=dtype)
        opt.step(copies(xp, grads))
        assert opt.last_grad_norm == norm_of(grads)
    grads[7] = grads[3] = None  # one with several blocks
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
    """Whatever the gradient's own layout, which is copied into the parameter's where they differ."""
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
    assert opt.last_grad_norm == norm_of([None, *grads[1:]])  # that of the last step that took norms


GEOMETRY = [
    {"CHUNK": 7, "BLOCKS": 1, "PARTS": 3, "SERIAL_BELOW": 0},
    {"CHUNK": 1000, "BLOCKS": 3, "PARTS": 1000, "SERIAL_BELOW": 0},
    {"CHUNK": 10**9, "BLOCKS": 10**6, "PARTS": 1, "SERIAL_BELOW": 10**9},
]


@pytest.mark.parametrize("geometry", GEOMETRY, ids=["tiny", "short", "long"])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_bits_whatever_the_chunks_and_threads(geometry, threads, monkeypatch):
    """(On a device: test_device_gradients.py.)"""

    def result():
        opt = mixed(np, 0)
        for step in range(3):
            opt.step(mixed_grads(step, (2,)), grad_scale=3.7, found_inf=step == 1)
        return everything(opt), opt.last_grad_norm, opt.skipped_steps

    want, most = result(), numba.get_num_threads()
    for name, value in geometry.items():
        monkeypatch.setattr(cpu, name, value)
    try:
        numba.set_num_threads(min(threads, most))
        assert result() == want
    finally:
        numba.set_num_threads(most)


# Factors: what a plain optimizer does with gradients that were multiplied before


def times(factor, grads):
    """As the rule multiplies: the factor rounded once to the compute type, the product too."""
    return [g if g is None else (compute_dtype(g.dtype).type(factor) * g).astype(g.dtype) for g in grads]


def shortened(most, norm):
    return 1.0 if norm <= most else most / norm


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_global_clipnorm_multiplies_every_gradient_by_one_factor(xp, scale):
    shapes = [300, 5000, 0, 1]
    clipped, plain = (RMSProp(copies(xp, draw(0, *shapes)), **h) for h in (CLIPPED, {}))
    most = float(F4(0.7))
    for step in range(3):
        grads = [g * F4((1e-5, 1.0, 1e3)[step]) for g in draw(step, *shapes)]
        norm = norm_of(grads) * (1 / scale)
        assert (norm > most) == (step > 0)
        clipped.step(copies(xp, grads), grad_scale=None if scale == 1 else scale)
        plain.step(copies(xp, times((1 / scale) * shortened(most, norm), grads)))
        assert clipped.last_grad_norm == norm
        assert_same(clipped, plain)


def test_clipnorm_shortens_each_tensor_by_itself(xp):
    shapes = [300, 5000, 0, 1]
    clipped, plain = RMSProp(copies(xp, draw(0, *shapes)), clipnorm=0.7), RMSProp(copies(xp, draw(0, *shapes)))
    most = float(F4(0.7))
    for step in range(3):
        grads = draw(step, *shapes)
        grads[0] = grads[0] * F4(1e-4)
        if step == 1:
            grads[1] = None
        clipped.step(copies(xp, grads))
        scaled = [None if g is None else times(shortened(most, norm_of([g])), [g])[0] for g in grads]
        assert (scaled[0] == grads[0]).all()
        plain.step(copies(xp, scaled))
        assert_same(clipped, plain)
        assert clipped.last_grad_norm == norm_of(grads)


def test_grad_scale_comes_before_clipvalue_and_the_sign(xp):
    given = {"clipvalue": 0.5, "maximize": True}
    scaled, plain = RMSProp(xp.array(draw(0, 300)[0]), **given), RMSProp(xp.array(draw(0, 300)[0]), clipvalue=0.5)
    for step in range(2):
        (grad,) = draw(step, 300)
        scaled.step(xp.array(grad), grad_scale=3.0)
        plain.step(xp.array(times(-(1 / 3.0), [grad])[0]))
        assert_same(scaled, plain)


@pytest.mark.parametrize("dtype", [F4, F8])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_grad_scale_may_be_an_array_and_is_read_when_the_step_runs(xp, dtype, shape):
    one, other = RMSProp(xp.array(draw(0, 300)[0])), RMSProp(xp.array(draw(0, 300)[0]))
    scale = xp.zeros(shape, dtype)
    for number in (3.0, 1.7, 1024.0):
        scale[...] = number
        (grad,) = draw(3, 300)
        one.step(xp.array(grad), grad_scale=scale)
        other.step(xp.array(grad), grad_scale=float(dtype(number)))
        assert_same(one, other)
    assert (one.skipped_steps, one.last_grad_norm) == (0, 0.0)  # no norm was taken


@pytest.mark.parametrize("number", [3, F4(3), F2(3), Fraction(3), np.int64(3)], ids=lambda x: type(x).__name__)
def test_any_number_is_a_grad_scale(number):
    one, other = RMSProp(draw(0, 30)[0]), RMSProp(draw(0, 30)[0])
    one.step(draw(1, 30)[0], grad_scale=number)
    other.step(draw(1, 30)[0], grad_scale=3.0)
    assert_same(one, other)


# What must come out the same


SCALED = {
    "plain": {},
    "clipnorm": {"clipnorm": 0.7},
    "global": CLIPPED,
    "all": ALL,
}


@pytest.mark.parametrize("k", [-9, 1, 9])
@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("dtype", [F4, F2])
def test_gradients_and_grad_scale_by_a_power_of_two_change_no_bit(xp, dtype, name, k):
    if dtype is not F4 and name != "all":
        pytest.skip("that of all says it too")
    shapes = [300, 4100, 1]
    one, other = (RMSProp(copies(xp, draw(0, *shapes, dtype=dtype)), **SCALED[name]) for _ in range(2))
    scale = xp.full((), 2.0**k, F4)
    for step in range(2):
        grads = [np.round(g * dtype(1024)) / dtype(1024) for g in draw(step, *shapes, dtype=dtype)]  # no subnormals
        one.step(copies(xp, grads), found_inf=False)
        other.step(copies(xp, [(g * dtype(2.0**k)).astype(dtype) for g in grads]), grad_scale=(2.0**k, scale)[step])
        assert_same(one, other)
        assert one.last_grad_norm == other.last_grad_norm


ADAM = ["torch-adam-plain", "torch-adamw-weight_decay-maximize"]
ADAM += ["torch-adagrad-plain", "torch-adagrad-initial_scale-weight_decay-maximize"]


@pytest.mark.parametrize("name", ADAM)
def test_bias_corrected_it_is_adam_without_its_mean_and_adagrad_is_adagrad(name):
    """As recorded from torch: Adam, AdamW with betas (0, alpha), Adagrad; bounds of recorded.py."""
    case, row = CASES[name], ROWS[name]
    param = row["params"][0].copy()
    make = AdaGrad if case["function"] == "adagrad" else RMSProp
    opt = make(param, **case["keywords"])
    for lr, grad, before, after in zip(row["lrs"], row["grads"], row["params"], row["params"][1:], strict=False):
        param[...] = before
        opt.lr = float(lr)
        opt.step(grad.astype(F8))
        got, want = param - before, after - before
        bound = RELATIVE * np.abs(want).max() + ULPS * np.spacing(np.maximum(np.abs(before), np.abs(after)))
        assert (np.abs(got - want) <= bound).all()


@pytest.mark.parametrize("eps", [1e-8, 1e-3])
def test_bias_corrected_it_is_the_adam_of_torch_that_is_installed(eps):
    torch = pytest.importorskip("torch")
    (param,) = draw(0, 300, dtype=F8)
    theirs = torch.nn.Parameter(torch.tensor(param))
    adam = torch.optim.Adam([theirs], lr=0.013, betas=(0.0, 0.93), eps=eps)
    opt, first = RMSProp(param, lr=0.013, alpha=0.93, eps=eps, bias_correction=True), param.copy()
    for step in range(25):
        (grad,) = draw(step, 300, dtype=F8)
        opt.step(grad)
        theirs.grad = torch.tensor(grad)
        adam.step()
    want = theirs.detach().numpy()
    # 25 steps of at most 20 roundings each on either side, and of the parameter once a step.
    way = 25 * np.abs(want - first).max()
    assert (np.abs(param - want) <= 1000 * 2.0**-53 * way + 25 * np.spacing(np.abs(first) + way)).all()
    assert np.abs(param - first).min() > 0


NOT_NUMBERS = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, -3e38], F4)


@pytest.mark.parametrize("clip", ["clipvalue", "clipnorm", "global_clipnorm"])
@pytest.mark.parametrize("odd", [NOT_NUMBERS[1:], NOT_NUMBERS], ids=["infinite", "nan"])
def test_clip_at_infinity_changes_no_bit(xp, clip, odd):
    clipped, free = (RMSProp(copies(xp, draw(0, 307, 20)), **h) for h in ({clip: math.inf}, {}))
    for step in range(2):
        grads = draw(step, 300, 20)
        grads[0] = np.concatenate([grads[0], odd, F4([1] * (7 - len(odd)))])
        clipped.step(copies(xp, grads))
        free.step(copies(xp, grads))
        assert_same(clipped, free)


@pytest.mark.parametrize("clip", ["clipnorm", "global_clipnorm"])
def test_a_gradient_without_a_norm_becomes_nan_where_it_is_clipped(xp, clip):
    grads = [F4([1, np.nan, 2]), F4([3, 4])]
    opt = RMSProp(copies(xp, [np.ones(3, F4), np.ones(2, F4)]), **{clip: 0.7})
    opt.step(copies(xp, grads))
    assert math.isnan(opt.last_grad_norm)
    assert np.isnan(host(params_of(opt)[0])).all()
    assert np.isnan(host(params_of(opt)[1])).all() == (clip == "global_clipnorm")


def test_the_largest_numbers_have_a_norm(xp):
    """Squares of float32 cannot overflow in float64; those of float64 can, and are no reason to skip."""
    largest = np.finfo(F4).max
    opt = RMSProp(xp.zeros(5000, F4), **ALL)
    opt.step(xp.full(5000, largest, F4), found_inf=False)
    assert opt.last_grad_norm == pytest.approx(math.sqrt(5000) * float(largest), rel=1e-12)
    opt = RMSProp(xp.zeros(5, F8), momentum=0.83, **ALL)
    opt.step(xp.full(5, 1e200), found_inf=False)
    assert (opt.last_grad_norm, opt.skipped_steps, int(opt.state[0]["step"])) == (math.inf, 0, 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_average_with_momentum_0_is_the_parameter(xp, dtype):
    if xp is not np and dtype is not F4:
        pytest.skip("a device has the bits of the CPU (test_device_bits.py)")
    params = copies(xp, draw(0, 300, 4100, 0, dtype=dtype))
    opt = RMSProp(params, **AVERAGED, ema_momentum=0.0)
    for step in range(3):
        opt.step(copies(xp, draw(step, 300, 4100, 0, dtype=dtype)))
        for i, p in enumerate(params):
            assert bits(host(opt.ema[i]).astype(dtype)) == bits(p)  # of a half it is of what was rounded


# Averages


@pytest.mark.parametrize("dtype", [F4, F8])
def test_the_average_is_that_of_the_parameters_and_the_first_step_sets_it(xp, dtype):
    """A product and an fma: two roundings of half an ulp, of terms below the largest |p| so far, in each step."""
    param = xp.array(draw(0, 300, dtype=dtype)[0])
    opt = RMSProp(param, **AVERAGED, ema_momentum=0.87, lr=0.3)
    assert bits(opt.ema[0]) == bits(param)
    mu, rest = (float(dtype(x)) for x in (0.87, 1 - 0.87))
    u, want, largest = float(np.finfo(dtype).eps), None, np.zeros(300)
    for step in range(6):
        opt.step(xp.array(draw(step, 300, dtype=dtype)[0]))
        p = host(param).astype(F8)
        want = p if want is None else mu * want + rest * p
        largest = np.maximum(largest, np.abs(p))
        assert (np.abs(host(opt.ema[0]) - want) <= (step + 1) * 2 * u * largest).all()
        assert step or bits(opt.ema[0]) == bits(param)
    assert np.abs(want - p).max() > 0.1


def test_the_first_step_sets_the_average_whatever_stood_there(xp):
    """Parameters that get their values after the optimizer was built: memory that was never written holds NaNs."""
    param = xp.full(300, np.nan, F4)
    opt = RMSProp(param, **AVERAGED, ema_momentum=0.87)
    param[...] = xp.array(draw(0, 300)[0])
    opt.step(xp.array(draw(1, 300)[0]))
    assert bits(opt.ema[0]) == bits(param)
    opt.step(xp.array(draw(2, 300)[0]))
    assert np.isfinite(host(opt.ema[0])).all()


def test_an_average_begins_with_the_first_gradient_of_its_parameter(xp):
    params = copies(xp, draw(0, 30, 40))
    opt = RMSProp(params, **AVERAGED, ema_momentum=0.87)
    first, late = copies(xp, draw(1, 30, 40))
    for _ in range(3):
        opt.step([first, None])
    assert bits(opt.ema[1]) == bits(params[1])
    opt.step([None, late])
    assert bits(opt.ema[1]) == bits(params[1])
    before = bits(opt.ema[0])
    opt.step([None, late])
    assert bits(opt.ema[1]) != bits(params[1])
    assert bits(opt.ema[0]) == before


def test_an_average_that_is_switched_on_later_starts_from_the_parameter(xp):
    opt, twin = (RMSProp({"w": xp.array(draw(0, 300)[0])}, lr=0.3, bias_correction=True) for _ in range(2))
    (w,) = params_of(opt)
    for step in range(2):
        opt.step({"w": xp.array(draw(step, 300)[0])})
        twin.step({"w": xp.array(draw(step, 300)[0])})
    assert (list(opt.ema), len(opt.ema)) == ([], 0)
    opt.param_groups[0].update(use_ema=True, ema_momentum=0.5)
    before = host(w).copy()
    opt.step({"w": xp.array(draw(7, 300)[0])})
    twin.step({"w": xp.array(draw(7, 300)[0])})
    assert bits(w) == bits(params_of(twin)[0])
    assert bits(opt.ema["w"]) == bits(F4(0.5) * before + F4(0.5) * host(w))  # exact products: one rounding each
    kept = bits(opt.ema["w"])
    opt.param_groups[0]["use_ema"] = False
    opt.step({"w": xp.array(draw(8, 300)[0])})
    assert bits(opt.ema["w"]) == kept


def test_averages_go_by_name_and_are_the_state_itself(xp):
    groups = [{"params": {"a": xp.zeros((2, 3), F2)}, "use_ema": True}, {"params": {"b": xp.zeros(3, F4)}}]
    opt = RMSProp(groups)
    assert (list(opt.ema), len(opt.ema), repr(opt.ema)) == (["a"], 1, "<averages of 1 parameters>")
    average = opt.ema["a"]
    assert (average.shape, average.dtype) == ((2, 3), F4)
    average[...] = 7
    assert (host(opt.state[0]["ema"]) == 7).all()
    with pytest.raises(KeyError, match="'b' has no average; wanted a parameter of a group with use_ema=True"):
        opt.ema["b"]
    with pytest.raises(KeyError, match="2 parameters"):
        opt.ema["c"]
    assert "ema" not in opt.state["b"]


# Skipped steps


def skipped_and_then_right(opt, twin, grads, again, **told):
    """A step that is skipped changes no byte, and the next is right."""
    before, count, steps = everything(opt), opt.skipped_steps, opt.steps
    opt.step(grads, **told)
    assert everything(opt) == before
    assert (opt.skipped_steps, opt.steps) == (count + 1, steps + 1)
    for x in (opt, twin):
        x.step(again, found_inf=False)  # by the kernels of the other
    assert_same(opt, twin)
    assert opt.skipped_steps == count + 1
    assert everything(opt) != before


FOUND = [True, 1, 2.5, -1, np.True_, math.nan, math.inf, 1e-300, F4(1), 10**400]


def test_found_inf_skips_as_any_number_but_0(xp):
    opt, twin = (mixed(xp, 0) for _ in range(2))
    grads = on(xp, mixed_grads(1))
    for found in FOUND:
        skipped_and_then_right(opt, twin, grads, grads, found_inf=found)
    for found in (False, 0, 0.0, -0.0, np.False_):
        opt.step(grads, found_inf=found)
        twin.step(grads, found_inf=False)
    assert_same(opt, twin)
    assert (opt.skipped_steps, twin.skipped_steps) == (len(FOUND), 0)


KINDS = ["float32", "float64", "bool", "uint8", "int8", "int32", "int64"]


@pytest.mark.parametrize("kind", KINDS)
def test_found_inf_may_be_an_array_of_any_of_these(xp, kind):
    opt, twin = (RMSProp(copies(xp, draw(0, 300, 1))) for _ in range(2))
    grads, found = copies(xp, draw(1, 300, 1)), xp.zeros((1,), kind)
    values = {"float32": [1, np.nan, -np.inf, 1e-45], "float64": [1, np.nan, 1e-320], "bool": [True]}
    wide = {"int32": [1, -1, 256, 2**31 - 1], "int64": [1, 2**32, 2**62, -(2**63)]}
    for value in {**values, **wide}.get(kind, [1, 127]):
        found[...] = value
        skipped_and_then_right(opt, twin, grads, grads, found_inf=found)
    found[...] = 0
    opt.step(grads, found_inf=found)
    twin.step(grads)
    assert_same(opt, twin)


def test_neighbours_of_an_array_of_one_byte_are_not_read(xp):
    opt = RMSProp(xp.zeros(3, F4))
    flags = xp.array([1, 0, 1], np.uint8)
    opt.step(xp.ones(3, F4), found_inf=flags[1:2])
    assert opt.skipped_steps == 0
    opt.step(xp.ones(3, F4), found_inf=flags[2:])
    assert opt.skipped_steps == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_skip_nonfinite_finds_one_element_anywhere(xp, value):
    opt, twin = (mixed(xp, 0) for _ in range(2))
    right = mixed_grads(1)
    for k, grad in enumerate(flat(right)):
        for at in {0, grad.size // 2, grad.size - 1} if grad.size else ():
            wrong = flat(mixed_grads(1))
            wrong[k][at] = value
            groups = [wrong[:4], wrong[4:7], wrong[7:]]
            before, count = everything(opt), opt.skipped_steps
            opt.step(on(xp, groups), found_inf=False)
            assert everything(opt) == before
            assert opt.skipped_steps == count + 1
    for x in (opt, twin):
        x.step(on(xp, right), found_inf=False)
    assert_same(opt, twin)


def test_the_first_step_may_be_skipped(xp):
    """Counters, bias correction and averages begin with the first step that is taken."""
    opt, twin = (mixed(xp, 0) for _ in range(2))
    grads = on(xp, mixed_grads(1))
    skipped_and_then_right(opt, twin, grads, grads, found_inf=True)
    assert int(opt.state[0]["step"]) == 1
    assert bits(opt.ema[2]) == bits(params_of(opt)[2])


def test_a_gradient_that_is_not_there_cannot_stop_a_step(xp):
    opt = RMSProp(copies(xp, draw(0, 30, 40)), skip_nonfinite=True)
    bad, good = xp.full(30, math.nan, F4), xp.ones(40, F4)
    opt.step([bad, good])
    opt.step([None, good])
    opt.step([None, None])
    assert (opt.skipped_steps, opt.steps) == (1, 3)
    assert [int(opt.state[i]["step"]) for i in (0, 1)] == [0, 1]


@pytest.mark.parametrize("scale", [0.0, -0.0, -2.0, math.nan, math.inf, -math.inf])
def test_a_scale_that_is_no_scale_is_as_a_gradient_that_is_not_finite(xp, scale):
    """Such a number is refused; in an array it is seen where the step runs, by skip_nonfinite."""
    opt = RMSProp(xp.array(draw(0, 30)[0]), skip_nonfinite=True)
    before = everything(opt)
    opt.step(xp.ones(30, F4), grad_scale=xp.full((), scale, F4))
    assert everything(opt) == before
    assert opt.skipped_steps == 1
    opt.step(xp.ones(30, F4), grad_scale=xp.full((), 2.0, F4))
    assert opt.skipped_steps == 1


def test_a_schedule_is_given_the_count_of_calls_skipped_ones_too(xp):
    asked = []
    opt = RMSProp(xp.zeros(3, F4), lr=lambda step: asked.append(step) or 0.1, skip_nonfinite=True)
    good, bad = xp.ones(3, F4), xp.full(3, math.inf, F4)
    for grad, found in ((good, False), (bad, False), (good, True), (good, False)):
        opt.step(grad, found_inf=found)
    assert asked == [0, 1, 2, 3]
    assert (opt.steps, opt.skipped_steps, int(opt.state[0]["step"])) == (4, 2, 2)


# Gradients that are zeroed


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
            assert x is None or (bits(kept) == bits(x) and not any(bits(zeroed)))  # +0, to the bit
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
    """Gradients of shape (6, 8) that lie as no parameter of C's order does, and the whole memory of each."""
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
    for _ in range(3):  # the copy is another each time
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
        with refusing(opt, ValueError, " overlaps grads[", "wanted gradients apart from each other"):
            opt.step(grads, zero_grads=True)
        assert bits(memory) == was
    for x in (opt, twin):
        x.step(grads)  # which is right without
    good = {"a": xp.ones(5, F4), "b": xp.ones(5, F4)}
    opt.step(good, zero_grads=True)
    assert not host(good["b"]).any()
    twin.step({"a": xp.ones(5, F4), "b": xp.ones(5, F4)})
    assert_same(opt, twin)
    with refusing(opt, ValueError, "overlaps"):  # after a right one too
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
    right.flags.writeable = False  # the same array, closed since
    with refusing(opt, ValueError, "read-only"):
        opt.step({"a": whole, "b": right}, zero_grads=True)


def test_zero_grads_of_a_parameter_or_its_average_is_refused(xp):
    opt = RMSProp(xp.ones(5, F4), **AVERAGED)
    for grad, text in ((params_of(opt)[0], "overlaps params"), (opt.ema[0], "overlaps state"), (opt.ema[0], "ema")):
        with refusing(opt, ValueError, text):
            opt.step(grad, zero_grads=True)


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


CLIPS = ["clipvalue", "clipnorm", "global_clipnorm"]


@pytest.mark.parametrize(("one", "other"), [(a, b) for a in CLIPS for b in CLIPS if a < b])
@pytest.mark.parametrize("make", [RMSProp, AdaGrad])
def test_two_clips_are_refused(make, one, other):
    with pytest.raises(ValueError, match=f"{one}=.* and {other}=|{other}=.* and {one}=") as error:
        make(np.ones(3), **{one: 1.0, other: math.inf})
    assert "wanted at most one of clipvalue, clipnorm, global_clipnorm" in str(error.value)
    opt = make(np.ones(3), **{one: 1.0})
    with refusing(opt, ValueError, "wanted at most one of"):
        opt.param_groups[0][other] = 1.0
    opt.param_groups[0].update({one: None, other: 1.0})


@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize("value", [-1, math.nan, "1", True, 1j, np.ones(1)], ids=repr)
def test_wrong_clips_are_refused(name, value):
    with pytest.raises((TypeError, ValueError), match=f"{name} is .*wanted None or a number >= 0"):
        RMSProp(np.ones(3), **{name: value})
    if isinstance(value, int):
        with pytest.raises(ValueError, match="which is 0 in float32"):
            RMSProp(np.ones(3, F4), **{name: 1e-60})


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, None, "1", False])
def test_wrong_momentum_of_the_average_is_refused(value):
    with pytest.raises((TypeError, ValueError), match=r"ema_momentum is .*wanted a number with 0 <= ema_momentum <= 1"):
        RMSProp(np.ones(3), use_ema=True, ema_momentum=value)
    for name in ("use_ema", "skip_nonfinite"):
        with pytest.raises(TypeError, match=f"{name} is 1 .*wanted True or False"):
            RMSProp(np.ones(3), **{name: 1})


SHARED = {"global_clipnorm": (0.5, 1.5), "skip_nonfinite": (True, False)}


@pytest.mark.parametrize("name", SHARED)
def test_groups_cannot_differ_in_what_is_decided_for_the_step(xp, name):
    own = SHARED[name]
    arrays = copies(xp, [np.ones(3, F4), np.ones(4, F4)])
    groups = [{"params": [x], name: value} for x, value in zip(arrays, own, strict=True)]
    with pytest.raises(ValueError, match=f"the groups differ in {name}: .*wanted the same in all"):
        RMSProp(groups)
    opt = RMSProp([{"params": [x]} for x in arrays], **{name: own[0]})
    grads = [[xp.ones(3, F4)], [xp.ones(4, F4)]]
    opt.step(grads)
    opt.param_groups[0][name] = own[1]
    for _ in range(2):
        with refusing(opt, ValueError, f"the groups differ in {name}"):
            opt.step(grads)
    opt.lr = 0.5  # of another matter
    assert opt.lr == 0.5
    opt.param_groups[1][name] = own[1]
    opt.step(grads)
    assert opt.steps == 2


def test_a_state_whose_groups_differ_in_it_is_not_loaded(xp):
    def make():
        return RMSProp([{"params": [xp.ones(3, F4)]}, {"params": [xp.ones(4, F4)]}], skip_nonfinite=True)

    opt, grads = make(), [[xp.ones(3, F4)], [xp.ones(4, F4)]]
    opt.step(grads)
    saved = opt.state_dict()
    saved["param_groups"][1]["skip_nonfinite"] = False
    twin = make()
    with refusing(twin, ValueError, "the groups differ in skip_nonfinite: [True, None]"):
        twin.load_state_dict(saved)
    twin.step(grads)
    assert_same(opt, twin)


# State that goes out and comes in


def trained(xp, **given):
    opt = mixed(xp, 0, **given)
    for step, found in enumerate((False, True, False, True)):
        opt.step(on(xp, mixed_grads(step)), found_inf=found)
    return opt


def fresh_like(opt, xp):
    twin = mixed(xp, 9, lr=7.0)
    for p, q in zip(params_of(twin), params_of(opt), strict=True):
        p[...] = xp.asarray(host(q))
    return twin


def test_skipped_steps_and_averages_go_out_and_come_in(xp):
    opt = trained(xp)
    saved = opt.state_dict()
    assert int(saved["skipped_steps"]) == opt.skipped_steps == 2
    twin = fresh_like(opt, xp)
    assert twin.load_state_dict(saved) == ([], [])
    assert (twin.skipped_steps, twin.steps) == (2, 4)
    for x in (opt, twin):
        x.step(on(xp, mixed_grads(5)), found_inf=False)
        x.step(on(xp, mixed_grads(6)), found_inf=True)
    assert_same(opt, twin)
    assert (twin.skipped_steps, int(saved["skipped_steps"])) == (3, 2)  # a snapshot
    assert [bits(twin.ema[key]) for key in twin.ema] == [bits(opt.ema[key]) for key in opt.ema]


def as_numpy(saved):
    state = {key: {name: host(x) for name, x in entry.items()} for key, entry in saved["state"].items()}
    return {**saved, "skipped_steps": int(saved["skipped_steps"]), "state": state}


@pytest.mark.gpu
@pytest.mark.parametrize("way", [("numpy", "cupy"), ("cupy", "numpy")])
@pytest.mark.parametrize("form", [lambda saved: saved, as_numpy], ids=["as it is", "on the host"])
def test_they_go_from_host_to_device_and_back(way, form):
    there, here = map(importlib.import_module, way)
    opt = trained(there)
    twin = fresh_like(opt, here)
    twin.load_state_dict(form(opt.state_dict()))
    opt.step(on(there, mixed_grads(5)), found_inf=True)
    twin.step(on(here, mixed_grads(5)), found_inf=True)
    opt.step(on(there, mixed_grads(6)), found_inf=False)
    twin.step(on(here, mixed_grads(6)), found_inf=False)
    assert_same(opt, twin)
    assert twin.skipped_steps == opt.skipped_steps == 3


@pytest.mark.parametrize(
    "count", [-1, 1.0, "2", None, True, 2**62, [1], np.ones(1, np.int64), np.ones((), F4)], ids=repr
)
def test_a_count_of_skipped_steps_that_is_none_is_refused(count):
    opt = trained(np)
    with refusing(opt, TypeError, 'state_dict["skipped_steps"] is ', "wanted a count >= 0"):
        opt.load_state_dict({**opt.state_dict(), "skipped_steps": count})
    opt.load_state_dict({**opt.state_dict(), "skipped_steps": np.array(5)})
    assert opt.skipped_steps == 5


LATER = ["clipnorm", "global_clipnorm", "skip_nonfinite", "use_ema", "ema_momentum"]


def test_a_state_from_before_there_was_any_of_this_is_loaded():
    opt, twin = RMSProp(np.ones(5, F4)), RMSProp(np.ones(5, F4), skip_nonfinite=True)
    opt.step(np.ones(5, F4))
    saved = opt.state_dict()
    del saved["skipped_steps"]
    twin.step(np.full(5, np.nan, F4))
    twin.load_state_dict(saved)
    assert (twin.skipped_steps, twin.steps) == (0, 1)


def test_loading_without_strict_takes_averages_and_leaves_hyperparameters():
    def make(names, **given):
        return RMSProp({name: np.full(3, 2, F4) for name in names}, **AVERAGED, **given)

    opt = make("ab", ema_momentum=0.5)
    for found in (False, True, False):
        opt.step({name: np.ones(3, F4) for name in "ab"}, found_inf=found)
    twin = make("bc", ema_momentum=0.25)
    assert twin.load_state_dict(opt.state_dict(), strict=False) == (["c"], ["a"])
    assert bits(twin.ema["b"]) == bits(opt.ema["b"])
    assert (twin.ema["c"] == 2).all()
    assert (twin.param_groups[0]["ema_momentum"], twin.skipped_steps) == (0.25, 1)


def test_an_average_that_a_state_lacks_starts_from_the_parameter():
    opt, twin = (RMSProp({"w": np.full(3, 2, F4)}, **h) for h in ({"bias_correction": True}, AVERAGED))
    for x in (opt, twin):
        x.step({"w": np.ones(3, F4)})
    saved = opt.state_dict()
    with refusing(twin, ValueError, "state[\"w\"] lacks 'ema', which its hyperparameters need"):
        twin.load_state_dict(saved, strict=False)
    params_of(twin)[0][...] = 5
    twin.load_state_dict(saved)
    assert twin.param_groups[0]["use_ema"] is False  # so it was saved
    assert (twin.ema["w"] == 5).all()


WRONG_AVERAGES = {
    "shape": (np.zeros(4, F4), ValueError, ['state["w"]["ema"] has shape (4,); wanted (3,)']),
    "dtype": (np.zeros(3), TypeError, ['state["w"]["ema"] has dtype float64; wanted float32']),
    "list": ([0.0] * 3, TypeError, ['state["w"]["ema"] is a list']),
}


@pytest.mark.parametrize("case", WRONG_AVERAGES)
def test_a_wrong_average_is_refused(case):
    value, kind, texts = WRONG_AVERAGES[case]
    opt = RMSProp({"w": np.ones(3, F4)}, **AVERAGED)
    opt.step({"w": np.ones(3, F4)})
    saved = opt.state_dict()
    saved["state"]["w"]["ema"] = value
    with refusing(opt, kind, *texts):
        opt.load_state_dict(saved)


@pytest.mark.parametrize("scale", [1e-40, 1e46])
def test_a_scale_whose_reciprocal_the_dtype_cannot_hold_is_refused(scale):
    param = np.ones(3, np.float32)
    with pytest.raises(ValueError, match=r"grad_scale is .*, whose reciprocal is (inf|0.0) in float32"):
        RMSProp(param).step(np.ones(3, np.float32), grad_scale=scale)
    assert np.array_equal(param, np.ones(3, np.float32))
    RMSProp(np.ones(3)).step(np.ones(3), grad_scale=scale)  # float64 holds it


def test_a_norm_whose_square_is_too_large_is_said():
    opt = RMSProp(np.ones(3), clipnorm=np.inf)
    opt.step(np.full(3, 1e150), grad_scale=1e-10)
    assert opt.last_grad_norm == pytest.approx(np.sqrt(3) * 1e160, rel=1e-12)


def test_steps_that_take_turns_keep_their_plans():
    opt, grad = RMSProp(np.ones(3)), np.ones(3)
    seen = []
    for i in range(6):
        opt.step(grad, zero_grads=bool(i % 2))
        seen.append(id(opt._planner._plan))
    assert len(set(seen)) == 2


def test_a_state_dict_from_before_there_were_averages_loads():
    opt = RMSProp(np.ones(3), lr=0.5)
    opt.step(np.ones(3))
    saved = opt.state_dict()
    for name in ("use_ema", "ema_momentum"):
        del saved["param_groups"][0][name]
    del saved["skipped_steps"]
    twin = RMSProp(np.ones(3))
    twin.load_state_dict(saved)
    assert twin.lr == 0.5
    assert not twin.param_groups[0]["use_ema"]
