"""From the same start, each step equals torch's within a derived bound, in every configuration that PyTorch tests."""

import pytest

torch = pytest.importorskip("torch")

from torch_configurations import CONFIGURATIONS, SCHEDULERS  # noqa: E402
from torch_twins import PART, Twins, assert_same_numbers, assert_same_update, reals, spread  # noqa: E402

from rmsprop_gpu.torch import RMSprop  # noqa: E402

SHAPES = [(7, 5), (33,), (), (1,), (0,), (3, 2, 4)]
# In addition to PyTorch's configurations: what none of them covers.
MORE = {
    "momentum alone": {"momentum": 0.9},
    "momentum, weight_decay, maximize": {"momentum": 0.5, "weight_decay": 0.1, "maximize": True},
    "alpha 0": {"alpha": 0.0},
    "large eps": {"eps": 0.1, "alpha": 0.9},
    "lr 0": {"lr": 0.0, "momentum": 0.9},
    "lr a tensor": {"lr": torch.tensor(0.02)},
    "lr a tensor of one element": {"lr": torch.tensor([0.02], dtype=torch.float64), "momentum": 0.9},
}
CASES = CONFIGURATIONS | MORE
PLAIN = {name: given for name, given in CASES.items() if not given.get("centered")}
CENTERED = {name: given for name, given in CASES.items() if given.get("centered")}
DTYPES = [torch.float64, torch.float32, torch.complex128, torch.complex64]
STEPS = 6


def start(dtype, shapes=SHAPES):
    """Parameters about as large as an update."""
    return [spread(i, *shape, dtype=dtype, low=-2.5, high=-1.5) for i, shape in enumerate(shapes)]


def grads(step, dtype, shapes=SHAPES):
    """Over eight decades. Single elements stay near 1, or their update would be below their parameter's rounding."""
    drawn = [spread(100 * step + i, *shape, dtype=dtype) for i, shape in enumerate(shapes, 1)]
    return [1 + 1e-3 * g.clamp(-1, 1) if g.numel() == 1 and not dtype.is_complex else g for g in drawn]


def one_group(given):
    return lambda cls, params: cls(params, **given)


def two_groups(given):
    """The second half has options of its own, whose values do not matter to the first half."""
    own = {"lr": 0.003, "weight_decay": 0.2, "alpha": 0.9, "eps": 1e-5}
    return lambda cls, params: cls([{"params": params[:3]}, {"params": params[3:], **own}], **given)


def named(given):
    return lambda cls, params: cls([(f"layer.{i}", p) for i, p in enumerate(params)], **given)


MAKERS = {"one group": one_group, "two groups": two_groups, "named": named}


def assert_same_step(twins, before, bound=None):
    """Parameters are compared by update or bound, state relative to its largest element, counts exactly."""
    for (p, q), old in zip(twins.pairs(), before, strict=True):
        if bound:
            bound(twins, p, q, old)
        else:
            assert_same_update(p, q, old["param"])
        if (state := twins.torchs.state.get(q)) is None:
            continue
        own = twins.ours.state[p]
        assert torch.equal(own["step"], state["step"])
        assert own["step"].dtype == state["step"].dtype
        for name, x in state.items():
            assert (own[name].dtype, own[name].stride()) == (x.dtype, x.stride())
            if not (bound and name == "momentum_buffer"):  # the update's bound covers this buffer
                assert_same_numbers(own[name], x, PART[x.dtype])


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("given", PLAIN.values(), ids=PLAIN)
def test_each_step_is_torchs_within_rounding(given, dtype, make):
    twins = Twins(RMSprop, make(given), start(dtype))
    for step in range(STEPS):
        assert_same_step(twins, twins.step(grads(step, dtype)))
    assert twins.ours.why_not_fused() == {}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("given", CENTERED.values(), ids=CENTERED)
def test_each_centered_step_is_torchs_within_what_cancellation_leaves(given, dtype, make):
    twins = Twins(RMSprop, make(given), start(dtype))
    for step in range(STEPS):
        assert_same_step(twins, twins.step(grads(step, dtype)), assert_within_cancellation)
    assert twins.ours.why_not_fused() == {}


@pytest.mark.parametrize(("dtype", "noise"), [(torch.float64, 1e-5), (torch.float32, 0.02)], ids=str)
def test_gradients_that_hardly_change_leave_as_much_as_cancellation_does(dtype, noise):
    """Almost all of the average of squares cancels."""
    twins = Twins(RMSprop, one_group({"centered": True, "alpha": 0.5}), [torch.full((1000,), 0.01, dtype=dtype)])
    for step in range(40):
        drawn = torch.randn(1000, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        before = twins.step([(1 + noise * drawn).to(dtype)])
        if step >= 30:
            assert_same_step(twins, before, assert_within_cancellation)
    state = twins.torchs.state[twins.twins[0]]
    assert (state["square_avg"] - state["grad_avg"] ** 2).mean() < 10 * noise**2


def assert_within_cancellation(twins, p, q, old):
    """The bound where v - m^2 cancels. With u the unit roundoff, ours and torch's are off by at most:

    * g (decay is one fma, or a product and a sum): 3 u (|weight_decay p| + |g|), for both together.
    * v: 3 u v each, plus 2 |g| times the error of g.
    * m: torch uses lerp, m + w (g - m): a difference, a product, a sum. We round alpha, a product and an fma; w and
      alpha, both rounded, add up to 1 within u. Together u (3 |m| + 2 |m'| + 2 w |g - m|), plus w times the error of g.
    * d = v - m'^2: the error of v, 2 |m'| times the error of m, torch's square u m'^2, and 2 u d.
    * the root, eps, the quotient and lr round four times each, in total 8 u of the update.

    Where d may be 0, torch's root may be NaN and the quotient anything. Such elements, a minority, are not compared.
    """
    if not q.numel():
        return
    group = next(g for g in twins.torchs.param_groups if any(x is q for x in g["params"]))
    u = torch.finfo(q.dtype).eps / 2
    lr, alpha, eps, decay, momentum = (float(group[n]) for n in ("lr", "alpha", "eps", "weight_decay", "momentum"))
    before = reals(old["param"])
    g = reals(q.grad) * (-1 if group["maximize"] else 1) + decay * before
    g_off = 3 * u * ((decay * before).abs() + g.abs())
    zero = torch.zeros_like(before)
    m_old, b_old = (reals(old[name]) if name in old else zero for name in ("grad_avg", "momentum_buffer"))
    state = {name: reals(x) for name, x in twins.torchs.state[q].items()}
    v, m, w = state["square_avg"], state["grad_avg"], 1 - alpha
    v_off = 6 * u * v + w * (2 * g.abs() + g_off) * g_off
    m_off = u * (3 * m_old.abs() + 2 * m.abs() + 2 * w * (g - m_old).abs()) + w * g_off
    d = v - m * m
    d_off = v_off + (2 * m.abs() + m_off) * m_off + u * m * m + 2 * u * d.abs()

    held = d > 2 * d_off
    assert held.double().mean() >= 0.9 or held.numel() < 10
    least, most = (d - d_off).clamp(min=0).sqrt() + eps, (d + d_off).sqrt() + eps
    update = g.abs() / (d.clamp(min=0).sqrt() + eps)
    update_off = (g.abs() + g_off) / least - g.abs() / most + 8 * u * update
    b = momentum * b_old
    step_off = lr * (update_off + 2 * u * (b.abs() + update))
    # Each side rounds the parameter once.
    bound = step_off + 2 * u * (before.abs() + lr * (b.abs() + update))
    off = (reals(p) - reals(q)).abs()
    assert (off <= bound)[held].all(), f"off by {(off / bound)[held].max():.3g} of the bound"


@pytest.mark.parametrize("foreach", [None, False, True])
@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("given", PLAIN.values(), ids=PLAIN)
def test_foreach_is_accepted_and_means_nothing(given, fused, foreach):
    def make(cls, params):
        return cls(params, foreach=foreach, **given, **({"fused": fused} if cls is RMSprop else {}))

    twins = Twins(RMSprop, make, start(torch.float64))
    for step in range(3):
        assert_same_step(twins, twins.step(grads(step, torch.float64)))
    assert bool(twins.ours.why_not_fused()) == (fused is False)


@pytest.mark.parametrize("given", PLAIN.values(), ids=PLAIN)
def test_some_parameters_have_no_gradient_now_and_then(given):
    twins = Twins(RMSprop, two_groups(given), start(torch.float64))
    for step in range(STEPS):
        drawn = [g if (step + i) % 3 else None for i, g in enumerate(grads(step, torch.float64))]
        assert_same_step(twins, twins.step(drawn))


@pytest.mark.parametrize("given", PLAIN.values(), ids=PLAIN)
def test_all_dtypes_stand_in_one_group(given):
    """PyTorch's test_mixed_device_dtype, except for the devices."""
    tensors = [spread(i, 5, 3, dtype=dtype, low=-2.5, high=-1.5) for i, dtype in enumerate(DTYPES)]
    twins = Twins(RMSprop, one_group(given), tensors)
    for step in range(STEPS):
        drawn = [spread(100 * step + i, 5, 3, dtype=dtype) for i, dtype in enumerate(DTYPES, 1)]
        assert_same_step(twins, twins.step(drawn))


SCHEDULES = {
    **{f"PyTorch's combination {i}": makers for i, makers in enumerate(SCHEDULERS)},
    "warm up, then decay": [
        lambda opt: torch.optim.lr_scheduler.LinearLR(opt, total_iters=3),
        lambda opt: torch.optim.lr_scheduler.ExponentialLR(opt, gamma=0.8),
    ],
    "cosine": [lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=10)],
    "one cycle, of momentum too": [
        lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=STEPS + 1)
    ],
    "of each group": [
        lambda opt: torch.optim.lr_scheduler.LambdaLR(
            opt, [lambda n, i=i: 1 / (1 + n + i) for i in range(len(opt.param_groups))]
        )
    ],
}


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("schedulers", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("given", [{}, {"momentum": 0.9, "weight_decay": 0.1}], ids=["plain", "momentum"])
def test_schedulers_change_what_the_next_step_takes(given, schedulers, tensor_lr):
    """PyTorch's test_param_group_with_lrscheduler_goes_right_direction, with exact values."""
    if any("OneCycle" in str(make.__code__.co_names) for make in schedulers) and not given:
        given = {"momentum": 0.1}  # OneCycleLR cycles momentum
    lr = torch.tensor(0.05, dtype=torch.float64) if tensor_lr else 0.05

    def make(cls, params):  # each optimizer needs its own tensor: schedulers write to it
        return two_groups({**given, "lr": lr.clone() if tensor_lr else lr})(cls, params)

    twins = Twins(RMSprop, make, start(torch.float64))
    made = [[make(opt) for make in schedulers] for opt in (twins.ours, twins.torchs)]
    for step in range(STEPS):
        assert_same_step(twins, twins.step(grads(step, torch.float64)))
        for scheduler in (s for some in made for s in some):
            plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
            scheduler.step(*[1.0] if plateau else [])
        ours, torchs = ([float(g["lr"]) for g in opt.param_groups] for opt in (twins.ours, twins.torchs))
        assert ours == torchs


def test_the_step_is_counted_in_the_default_dtype():
    """PyTorch's test_set_default_dtype_works_with_foreach."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        twins = Twins(RMSprop, one_group({}), start(torch.float32))
        for step in range(2):
            assert_same_step(twins, twins.step(grads(step, torch.float32)))
    finally:
        torch.set_default_dtype(default)
    assert twins.ours.state[twins.params[0]]["step"].dtype == torch.float64


@pytest.mark.parametrize("given", [{"alpha": 1.0}, {"momentum": 1.5}], ids=str)
def test_numbers_that_only_torch_takes_are_its(given):
    twins = Twins(RMSprop, named(given), start(torch.float64))
    for step in range(3):
        assert_same_step(twins, twins.step(grads(step, torch.float64)))
    assert twins.ours.why_not_fused().keys() == {f"layer.{i}" for i in range(len(SHAPES))}


def test_a_step_without_gradients_changes_nothing():
    """PyTorch's test_step_is_noop_when_params_have_no_grad."""
    twins = Twins(RMSprop, one_group({"weight_decay": 0.1}), start(torch.float64))
    before = [p.detach().clone() for p in twins.params]
    twins.ours.step()
    assert all(map(torch.equal, twins.params, before))
    assert not any(twins.ours.state.values())


def test_gradients_of_zero_move_nothing_and_count():
    """PyTorch's test_step_is_noop_for_zero_grads."""
    twins = Twins(RMSprop, one_group({"momentum": 0.9}), start(torch.float64))
    before = [p.detach().clone() for p in twins.params]
    for _ in range(3):
        twins.step([torch.zeros_like(p) for p in twins.params])
    assert all(map(torch.equal, twins.params, before))
    assert all(twins.ours.state[p]["step"] == 3 for p in twins.params)


@pytest.mark.parametrize("lr", [float("nan"), torch.tensor(float("nan"))], ids=["number", "tensor"])
def test_a_rate_that_is_no_number_is_taken_as_torch_takes_it(lr):
    twins = Twins(RMSprop, one_group({}), [torch.ones(3)])
    for opt in (twins.ours, twins.torchs):
        opt.param_groups[0]["lr"] = lr
        for p in opt.param_groups[0]["params"]:
            p.grad = torch.ones(3)
        opt.step()
        opt.step()
    assert twins.params[0].isnan().all()
    assert twins.twins[0].isnan().all()
