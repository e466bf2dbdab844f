"""The cases in PyTorch's test/test_optim.py that concern RMSprop, for torch's class and ours.

One cannot hold for ours: `test_defaults_changed_to_foreach` replaces `_multi_tensor_rmsprop` in the module of the class
and expects the step to call it. What it checks, that ``foreach`` is off by default on the CPU, is torch's. Cases of
numbers, dtypes and schedulers are in test_numbers.py, those of state dicts in test_state_dicts.py.
"""

import inspect
from copy import deepcopy

import pytest

torch = pytest.importorskip("torch")

from torch.nn import Parameter  # noqa: E402
from torch.optim.optimizer import (  # noqa: E402
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch_configurations import CAPTURABLE, CONFIGURATIONS, SCHEDULERS, errors  # noqa: E402
from torch_twins import Run, spread  # noqa: E402

from rmsprop_gpu.torch import RMSprop  # noqa: E402

CLASSES = pytest.mark.parametrize("cls", [torch.optim.RMSprop, RMSprop], ids=["torch's", "ours"])
EACH = pytest.mark.parametrize("given", CONFIGURATIONS.values(), ids=CONFIGURATIONS)


def rosenbrock(x, y):
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


def layer():
    """A small layer, and a closure whose loss decreases if the optimizer goes the right way."""
    weight, bias = (Parameter(spread(i, *shape, low=-1, high=0)) for i, shape in enumerate([(10, 5), (10,)]))
    x = spread(3, 5, low=-1, high=0)

    def loss_of(opt):
        def closure():
            opt.zero_grad()
            loss = (weight @ x + bias).pow(2).sum()
            loss.backward()
            return loss

        return closure

    return weight, bias, loss_of


@CLASSES
@pytest.mark.parametrize("error", list(errors()), ids=lambda error: error[0])
def test_errors(cls, error):
    _, params, given, kind, pattern = error
    params = [Parameter(torch.randn(1, 1))] if params is None else params
    with pytest.warns(kind, match=pattern) if issubclass(kind, Warning) else pytest.raises(kind, match=pattern):
        cls(params, **given)


@CLASSES
@pytest.mark.parametrize("given", [{"lr": -1.0}, {"eps": -1.0}, {"weight_decay": -1.0}, {"alpha": -1.0}], ids=str)
def test_more_errors(cls, given):
    """PyTorch does not test these."""
    with pytest.raises(ValueError, match=r"Invalid .* -1\.0"):
        cls([Parameter(torch.ones(1))], **given)


@CLASSES
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("given", CAPTURABLE.values(), ids=CAPTURABLE)
def test_capturable_is_an_error_on_the_cpu(cls, foreach, given):
    run = Run(cls, foreach=foreach, **given)
    kept = {name: p.detach().clone() for name, p in run.params.items()}
    with pytest.raises(AssertionError, match="If capturable=True, params and state_steps must be on supported devices"):
        run.step()
    assert all(torch.equal(p, kept[name]) for name, p in run.params.items())


@CLASSES
@EACH
@pytest.mark.parametrize("schedulers", [(), *SCHEDULERS], ids=lambda made: f"{len(made)} schedulers")
def test_forloop_goes_right_direction(cls, given, schedulers):
    weight, bias, loss_of = layer()
    opt = cls([weight, bias], **given)
    closure, made = loss_of(opt), [make(opt) for make in schedulers]
    first = closure().item()
    for _ in range(20):
        loss = opt.step(closure)
        for scheduler in made:
            scheduler.step(*[loss.item()] if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) else [])
    assert closure().item() > first if given.get("maximize") else closure().item() < first


@CLASSES
@pytest.mark.parametrize("own", [{"lr": 1e-3}, {"weight_decay": 0.1}], ids=["lr", "weight_decay"])
def test_param_groups(cls, own):
    """PyTorch's test_param_groups_lr and test_param_groups_weight_decay."""
    weight, bias, loss_of = layer()
    opt = cls([{"params": [weight]}, {"params": [bias], **own}], lr=0.01)
    for group, name in ((opt.param_groups[0], None), (opt.param_groups[1], next(iter(own)))):
        assert group["lr"] == (own["lr"] if name == "lr" else 0.01)
        assert group["weight_decay"] == (own["weight_decay"] if name == "weight_decay" else 0)
    closure = loss_of(opt)
    first = closure().item()
    for _ in range(20):
        loss = opt.step(closure)
    assert loss.item() < first


@CLASSES
@EACH
def test_complex(cls, given):
    """A complex parameter moves like the pairs of reals that it consists of."""
    z = spread(4, 5, 5, dtype=torch.complex128, low=-2, high=0).requires_grad_()
    pairs = torch.view_as_real(z).detach().clone().requires_grad_()
    opts = [cls([p], **given) for p in (z, pairs)]
    for step in range(5):
        z.grad = spread(50 + step, 5, 5, dtype=torch.complex128)
        pairs.grad = torch.view_as_real(z.grad).clone()
        for opt in opts:
            opt.step()
        torch.testing.assert_close(torch.view_as_real(z.detach()), pairs.detach(), rtol=1e-12, atol=1e-14)
    state, wanted = opts[0].state[z], opts[1].state[pairs]
    assert state.keys() == wanted.keys()
    assert state["square_avg"].is_complex()


@CLASSES
@EACH
def test_complex_2d(cls, given):
    """A function of complex numbers, and the same function of their parts."""
    start = torch.tensor([0.3 + 0.7j, -0.4 + 0.2j], dtype=torch.complex128)
    z, x, y = start.clone().requires_grad_(), start.real.clone().requires_grad_(), start.imag.clone().requires_grad_()
    opts = [cls([z], **given), cls([x, y], **given)]
    for _ in range(10):
        for opt in opts:
            opt.zero_grad()
        rosenbrock(*z).abs().backward()
        rosenbrock(*torch.complex(x, y)).abs().backward()
        for opt in opts:
            opt.step()
        torch.testing.assert_close(z.real.detach(), x.detach(), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(z.imag.detach(), y.detach(), rtol=1e-10, atol=1e-12)


@CLASSES
@EACH
@pytest.mark.parametrize("foreach", [False, True])
def test_grads_are_never_inplaced_into(cls, given, foreach):
    run = Run(cls, foreach=foreach, **given)
    for _ in range(3):
        run.step(change=lambda run: run.__dict__.update(kept={n: p.grad.clone() for n, p in run.params.items()}))
        assert all(torch.equal(p.grad, run.kept[name]) for name, p in run.params.items())
        assert all(p.grad._version == 0 for p in run.params.values())


@CLASSES
@EACH
def test_optimizer_can_be_printed(cls, given):
    run = Run(cls, **given)
    said = repr(run.opt)
    assert said.startswith("RMSprop (\nParameter Group 0\n")
    for name, value in given.items():
        assert f"    {name}: {value}\n" in said


@CLASSES
@EACH
def test_deepcopy_copies_all_public_attrs(cls, given):
    run = Run(cls, **given).step(2)
    copy = deepcopy(run.opt)

    def public(opt):
        return {name for name in vars(opt) if not name.startswith("_")}

    assert public(copy) == public(run.opt)
    before = {name: p.detach().clone() for name, p in run.params.items()}
    for p in copy.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    copy.step()
    assert all(torch.equal(p, before[name]) for name, p in run.params.items())
    assert all(state["step"] == 2 for state in run.opt.state.values())
    assert all(state["step"] == 3 for state in copy.state.values())


@CLASSES
@EACH
def test_non_empty_state(cls, given):
    run = Run(cls, **given).step()
    assert all(state for state in run.opt.state.values())


@CLASSES
def test_step_iteration(cls):
    """The count is in the state, one number per parameter, on the CPU."""
    run = Run(cls).step(5)
    for name in run.params:
        step = run.state(name)["step"]
        assert (step.shape, step.dtype, step.device.type, step.item()) == ((), torch.float32, "cpu", 5)


@CLASSES
@pytest.mark.parametrize("lr", [0.05, torch.tensor(0.05), torch.tensor([0.05])], ids=["number", "0-d", "1-d"])
@pytest.mark.parametrize("foreach", [False, True])
def test_tensor_lr(cls, lr, foreach):
    """The steps are the same as with a number, and the group keeps the tensor itself."""
    runs = [Run(cls, lr=x, foreach=foreach).step(3) for x in (lr, float(lr))]
    assert runs[0].group["lr"] is lr
    for name, p in runs[0].params.items():
        torch.testing.assert_close(p, runs[1].params[name], rtol=1e-7, atol=1e-9)


@CLASSES
def test_closures(cls):
    """The closure runs once, with gradients enabled, before anything is written. The step returns its loss."""
    weight, bias, loss_of = layer()
    opt = cls([weight, bias])
    closure, calls = loss_of(opt), []

    def watched():
        calls.append((torch.is_grad_enabled(), weight.detach().clone()))
        return closure()

    before = weight.detach().clone()
    with torch.no_grad():
        loss = opt.step(watched)
    assert [on for on, _ in calls] == [True]
    assert torch.equal(calls[0][1], before)
    assert loss.item() == ((before @ spread(3, 5, low=-1, high=0) + spread(1, 10, low=-1, high=0)) ** 2).sum().item()
    assert opt.step() is None


@CLASSES
def test_step_hooks(cls):
    """PyTorch's test_step_pre_hook, test_step_post_hook and test_step_all_hooks: each fires once, in torch's order."""
    torch.optim.RMSprop([Parameter(torch.ones(1))])  # from now on torch's own step is wrapped
    run, said = Run(cls), []
    handles = [
        register_optimizer_step_pre_hook(lambda opt, args, kwargs: said.append("all before")),
        run.opt.register_step_pre_hook(lambda opt, args, kwargs: said.append("before")),
        run.opt.register_step_post_hook(lambda opt, args, kwargs: said.append("behind")),
        register_optimizer_step_post_hook(lambda opt, args, kwargs: said.append("all behind")),
    ]
    try:
        run.step()
        assert said == ["all before", "before", "behind", "all behind"]
        for handle in handles[1:3]:
            handle.remove()
        run.step()
        assert said[4:] == ["all before", "all behind"]
    finally:
        for handle in handles:
            handle.remove()
    run.step()
    assert len(said) == 6


def test_hooks_fire_once_too_where_torchs_step_takes_a_row():
    torch.optim.RMSprop([Parameter(torch.ones(1))])
    run, said = Run(RMSprop), []
    run.group["alpha"] = 1
    run.opt.register_step_pre_hook(lambda opt, args, kwargs: said.append("before"))
    run.opt.register_step_post_hook(lambda opt, args, kwargs: said.append("behind"))
    run.step()
    assert run.opt.why_not_fused()
    assert said == ["before", "behind"]


@CLASSES
def test_a_pre_hook_may_change_the_closure(cls):
    run = Run(cls)
    run.opt.register_step_pre_hook(lambda opt, args, kwargs: ((*args[:1], lambda: 7), {}))
    run.give()
    assert run.opt.step() == 7


@CLASSES
def test_the_profiler_sees_a_step(cls):
    run = Run(cls).step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run.step()
        run.opt.zero_grad()
    names = [event.key for event in profile.key_averages()]
    assert names.count("Optimizer.step#RMSprop.step") == 1
    assert "Optimizer.zero_grad#RMSprop.zero_grad" in names


@CLASSES
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(cls, set_to_none):
    run = Run(cls).step(2)
    run.opt.zero_grad(set_to_none=set_to_none)
    for p in run.params.values():
        assert p.grad is None if set_to_none else not p.grad.any()
    before = {name: p.detach().clone() for name, p in run.params.items()}
    run.opt.step()
    assert all(torch.equal(p, before[name]) for name, p in run.params.items())
    assert all(state["step"] == (2 if set_to_none else 3) for state in run.opt.state.values())


def test_a_subclass_of_ours_works():
    """PyTorch's _test_derived_optimizers, for a subclass that adds an argument."""

    class Derived(RMSprop):
        def __init__(self, params, note, **given):
            super().__init__(params, **given)
            self.defaults["note"] = note

        def step(self, closure=None):
            self.stepped = getattr(self, "stepped", 0) + 1
            return super().step(closure)

    torchs, ours = Run(torch.optim.RMSprop, lr=0.05), Run(Derived, note="x", lr=0.05)
    for run in (torchs, ours):
        run.step(3)
    assert ours.opt.stepped == 3
    for name, p in torchs.params.items():
        torch.testing.assert_close(ours.params[name], p, rtol=1e-12, atol=1e-14)


def test_the_signature_begins_with_torchs():
    theirs, ours = (list(inspect.signature(cls).parameters.values()) for cls in (torch.optim.RMSprop, RMSprop))
    assert [(p.name, p.default, p.kind) for p in ours[: len(theirs)]] == [(p.name, p.default, p.kind) for p in theirs]
    more = {p.name: p.default for p in ours[len(theirs) :]}
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in ours[len(theirs) :])
    assert more == {
        **dict.fromkeys(("nesterov", "eps_in_sqrt", "lr_in_momentum", "bias_correction"), False),
        **dict.fromkeys(("decoupled_weight_decay", "skip_nonfinite"), False),
        **dict.fromkeys(("fused", "clipvalue", "clipnorm", "global_clipnorm")),
        "initial_scale": 0.0,
        **{"square_avg_dtype": "float32", "store_param_remainders": False, "bf16_stochastic_round": False, "seed": 0},
    }


@pytest.mark.parametrize("name", ["step", "zero_grad", "add_param_group", "state_dict", "load_state_dict"])
def test_methods_may_be_called_by_keyword(name):
    """Distributed checkpoints call load_state_dict(state_dict=...)."""
    theirs, ours = (inspect.signature(getattr(cls, name)).parameters for cls in (torch.optim.RMSprop, RMSprop))
    assert [(p.name, p.default) for p in ours.values()] == [(p.name, p.default) for p in theirs.values()]


@pytest.mark.parametrize("words", [{"differentiable": True}, {"foreach": True}], ids=str)
def test_fused_excludes_what_torchs_fused_classes_exclude(words):
    """With the messages of torch's Adam."""
    said = []
    for cls in (torch.optim.Adam, RMSprop):
        with pytest.raises(RuntimeError) as error:
            cls([Parameter(torch.ones(1))], fused=True, **words)
        said.append(str(error.value))
    assert said[0] == said[1]


def test_fused_true_names_every_parameter_that_it_cannot_take(left):
    """Before it writes to any. This covers torch's test_fused_error_on_params_on_meta."""
    dense, away, strided = Parameter(torch.ones(2)), Parameter(torch.ones(2, device="meta")), torch.ones(4)[::2]

    def step():
        opt = RMSprop([("first", dense), ("second", away), ("third", strided.requires_grad_())], fused=True)
        for p in (dense, away, strided):
            p.grad = torch.ones_like(p)
        opt.step()

    with pytest.raises(RuntimeError) as error:
        step()
    assert all(name in str(error.value) for name in ("second", "third"))
    assert "first" not in str(error.value)
    assert torch.equal(dense, torch.ones(2))
    assert not left


def test_fused_false_is_torchs_step(left):
    torchs, ours = Run(torch.optim.RMSprop, momentum=0.9), Run(RMSprop, momentum=0.9, fused=False)
    torchs.step(2)
    left.clear()
    ours.step(2)
    assert left == set(map(id, ours.params.values()))
    assert ours.opt.why_not_fused().keys() == ours.params.keys()
    for name, p in torchs.params.items():
        assert torch.equal(ours.params[name], p)


@pytest.mark.parametrize("fused", [None, True])
def test_nothing_goes_to_torchs_step_that_need_not(left, fused):
    run = Run(RMSprop, momentum=0.9, centered=True, fused=fused).step(3)
    assert not left
    assert run.opt.why_not_fused() == {}
