"""Our own switches and presets: bit-identical to `rmsprop_gpu.RMSProp` on NumPy arrays."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import ml_dtypes  # noqa: E402
from on_host import assert_same_bits  # noqa: E402
from processes import run  # noqa: E402
from torch_configurations import CONFIGURATIONS  # noqa: E402
from torch_twins import spread  # noqa: E402

from rmsprop_gpu import RMSProp  # noqa: E402
from rmsprop_gpu.torch import RMSprop  # noqa: E402

# torch's defaults where our class for arrays has others.
TORCHS = {"lr": 1e-2, "alpha": 0.99, "eps": 1e-8}
SHAPES = [(7, 5), (1100,), (), (0, 2), (3, 1, 2)]
SWITCHES = {
    "nesterov": {"nesterov": True, "momentum": 0.9},
    "eps_in_sqrt": {"eps_in_sqrt": True, "eps": 1e-3},
    "lr_in_momentum": {"lr_in_momentum": True, "momentum": 0.9},
    "initial_scale": {"initial_scale": 1.0},
    "bias_correction": {"bias_correction": True},
    "decoupled_weight_decay": {"decoupled_weight_decay": True, "weight_decay": 0.1},
    "clipvalue": {"clipvalue": 0.5},
    "clipnorm": {"clipnorm": 0.5},
    "global_clipnorm": {"global_clipnorm": 0.5},
    "skip_nonfinite": {"skip_nonfinite": True},
}
ALL = {"momentum": 0.9, "nesterov": True, "centered": True, "weight_decay": 0.1, "bias_correction": True}
ALL |= {"eps_in_sqrt": True, "lr_in_momentum": True, "clipnorm": 0.5, "maximize": True, "initial_scale": 0.5}
DTYPES = [torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128]


def array(t):
    """A tensor's values as an array of reals in new memory."""
    t = t.detach().clone()
    if t.is_complex():
        t = torch.view_as_real(t)
    return t.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if t.dtype == torch.bfloat16 else t.numpy()


def start(dtype):
    return [spread(i, *shape, dtype=dtype, low=-2, high=-1).requires_grad_() for i, shape in enumerate(SHAPES)]


def grads(step, dtype):
    """In every third step, one of them is missing."""
    low, high = (-2, 1) if dtype in (torch.float16, torch.bfloat16) else (-4, 1)
    drawn = [spread(100 * step + i, *s, dtype=dtype, low=low, high=high) for i, s in enumerate(SHAPES, 1)]
    return [None if step % 3 == 1 and i == 1 else g for i, g in enumerate(drawn)]


def assert_same_bits_as_over_arrays(build, twin, params, dtype, steps=4, grads=grads):
    """`build` makes our optimizer over tensors, `twin` the RMSProp over arrays. They must match after each step."""
    arrays = [array(p) for p in params]
    opt, over_arrays = build(params), twin(arrays)
    for step in range(steps):
        given = grads(step, dtype)
        for p, grad in zip(params, given, strict=True):
            p.grad = grad
        opt.step()
        over_arrays.step([None if g is None else array(g) for g in given])
        for i, (p, a) in enumerate(zip(params, arrays, strict=True)):
            assert_same_bits(array(p), a)
            for name, x in opt.state[p].items() if p in opt.state else ():
                want = over_arrays.state[i][name]
                if name == "step":
                    assert x == want
                else:
                    assert_same_bits(array(x), np.asarray(want))
    assert opt.why_not_fused() == {}
    return opt, over_arrays


def compare(given, dtype, **more):
    given = TORCHS | given
    return assert_same_bits_as_over_arrays(
        lambda params: RMSprop(params, **given), lambda arrays: RMSProp(arrays, **given), start(dtype), dtype, **more
    )


CASES = SWITCHES | {"all": ALL}


@pytest.mark.parametrize("given", CASES.values(), ids=CASES)
def test_switches(given):
    compare(given, torch.float32)


@pytest.mark.parametrize("given", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_torchs_configurations(given):
    compare(given, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("given", [{}, ALL], ids=["plain", "all"])
def test_dtypes(given, dtype):
    """Complex numbers are pairs of reals. Halves have float32 state."""
    opt, _ = compare(given, dtype)
    state_dtype = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    for state in opt.state.values():
        assert {x.dtype for name, x in state.items() if name not in ("step", "bias_weight")} == {state_dtype}


def test_groups_have_switches_of_their_own():
    words = [{"nesterov": True, "momentum": 0.9}, {"clipvalue": 0.5, "eps_in_sqrt": True}]

    def groups(tensors):
        return [{"params": part, **own} for part, own in zip((tensors[:2], tensors[2:]), words, strict=True)]

    params = start(torch.float32)
    arrays = [array(p) for p in params]
    opt, over_arrays = RMSprop(groups(params), **TORCHS), RMSProp(groups(arrays), **TORCHS)
    for step in range(4):
        given = grads(step, torch.float32)
        for p, grad in zip(params, given, strict=True):
            p.grad = grad
        opt.step()
        given = [None if g is None else array(g) for g in given]
        over_arrays.step([given[:2], given[2:]])
        for p, a in zip(params, arrays, strict=True):
            assert_same_bits(array(p), a)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_skipped_changes_and_counts_nothing(value):
    params = start(torch.float32)
    opt = RMSprop(params, skip_nonfinite=True, momentum=0.9)
    for step in range(4):
        for p, grad in zip(params, grads(3 * step, torch.float32), strict=True):
            p.grad = grad
        if step == 2:
            params[0].grad[3, 2] = value
        kept = [p.detach().clone() for p in params]
        state = [{name: x.clone() for name, x in opt.state[p].items()} for p in params]
        opt.step()
        if step == 2:
            assert all(map(torch.equal, params, kept))
            assert all(
                torch.equal(opt.state[p][name], x) for p, s in zip(params, state, strict=True) for name, x in s.items()
            )
    assert all(opt.state[p]["step"] == 3 for p in params)


# Each preset with arguments that matter to it, under its framework's names.
PRESETS = {
    "hinton": [{"lr": 0.01}, {"lr": 0.01, "alpha": 0.8}],
    "graves": [{}, {"lr": 1e-3, "momentum": 0.5}],
    "torch": [{}, {"momentum": 0.9, "centered": True, "weight_decay": 0.1, "maximize": True}],
    "keras": [{}, {"rho": 0.8, "momentum": 0.9, "weight_decay": 0.01}, {"centered": True, "clipnorm": 0.5}],
    "tf_keras_legacy": [{}, {"momentum": 0.9, "epsilon": 1e-3}],
    "tf1": [{"learning_rate": 0.01}, {"learning_rate": 0.01, "decay": 0.8, "momentum": 0.9, "centered": True}],
    "optax": [
        {"learning_rate": 0.01},
        {"learning_rate": 0.01, "momentum": 0.9, "nesterov": True, "initial_scale": 1.0},
    ],
    "timm": [
        {},
        {"momentum": 0.9, "weight_decay": 1e-5, "eps": 1e-3},
        {"momentum": 0.9, "weight_decay": 1e-5, "decoupled_decay": True, "lr_in_momentum": False},
        {"centered": True, "alpha": 0.95},
    ],
    "chainer": [{}, {"eps_inside_sqrt": True, "eps": 1e-3}],
    "bitsandbytes": [{}, {"alpha": 0.9, "weight_decay": 0.1}],
}
EACH = [(name, given) for name, cases in PRESETS.items() for given in cases]


@pytest.mark.parametrize(("name", "given"), EACH, ids=[f"{name} {' '.join(given)}" for name, given in EACH])
def test_presets(name, given):
    opt, over_arrays = assert_same_bits_as_over_arrays(
        lambda params: RMSprop.from_preset(name, params, **given),
        lambda arrays: RMSProp.from_preset(name, arrays, **given),
        start(torch.float32),
        torch.float32,
    )
    assert type(opt) is RMSprop
    group, want = opt.param_groups[0], over_arrays.param_groups[0]
    assert all(group[key] == want[key] for key in want if key in group and key != "params")


def test_presets_say_what_they_do_not_know():
    """With the messages of `rmsprop_gpu.RMSProp`."""
    cases = [("nobody", {}), ("torch", {"learning_rate": 1}), ("hinton", {}), ("timm", {"caution": True})]
    for name, given in cases:
        said = []
        for cls, params in ((RMSProp, [np.ones(2)]), (RMSprop, [torch.ones(2)])):
            with pytest.raises((TypeError, ValueError)) as error:
                cls.from_preset(name, params, **given)
            said.append((error.type, str(error.value)))
        assert said[0] == said[1]


class FromStableBaselines:
    """RMSpropTFLike from common/sb2_compat/rmsprop_tf_like.py of Stable-Baselines3, in its order of operations."""

    def __init__(self, params, lr=1e-2, alpha=0.99, eps=1e-8, weight_decay=0, momentum=0, centered=False):
        self.params, self.h = params, (lr, alpha, eps, weight_decay, momentum, centered)
        self.state = [[torch.ones_like(p), torch.zeros_like(p), torch.zeros_like(p)] for p in params]

    @torch.no_grad()
    def step(self):
        lr, alpha, eps, decay, momentum, centered = self.h
        for p, (square_avg, grad_avg, buffer) in zip(self.params, self.state, strict=True):
            grad = p.grad + decay * p
            square_avg.mul_(alpha).addcmul_(grad, grad, value=1 - alpha)
            avg = square_avg.clone()
            if centered:
                grad_avg.mul_(alpha).add_(grad, alpha=1 - alpha)
                avg.addcmul_(grad_avg, grad_avg, value=-1)
            avg.add_(eps).sqrt_()
            buffer.mul_(momentum).addcdiv_(grad, avg)
            p.sub_(lr * buffer)


@pytest.mark.parametrize(
    "given", [{}, {"alpha": 0.9, "eps": 1e-3}, {"momentum": 0.9, "weight_decay": 0.1}, {"centered": True}], ids=str
)
def test_stable_baselines3_is_timm_with_lr_out_of_momentum(given):
    """With defaults of 0.99 for alpha and 1e-8 for eps. Eps is inside the root, as in timm."""
    params = start(torch.float64)
    twins = [p.detach().clone() for p in params]
    theirs = FromStableBaselines(twins, **given)
    opt = RMSprop.from_preset("timm", params, **({"lr_in_momentum": False, "alpha": 0.99, "eps": 1e-8} | given))
    for step in range(5):
        for p, q, grad in zip(params, twins, grads(3 * step, torch.float64), strict=True):
            p.grad, q.grad = grad, grad.clone()
        opt.step(), theirs.step()
        for p, q in zip(params, twins, strict=True):
            torch.testing.assert_close(p.detach(), q, rtol=1e-12, atol=1e-13)
    assert opt.why_not_fused() == {}


BAD = {
    "nesterov": ({"nesterov": 1}, TypeError),
    "initial_scale": ({"initial_scale": -1.0}, ValueError),
    "clipvalue": ({"clipvalue": -1.0}, ValueError),
    "clipnorm": ({"clipnorm": "a"}, TypeError),
    "skip_nonfinite": ({"skip_nonfinite": None}, TypeError),
    "fused": ({"fused": 1}, TypeError),
}


@pytest.mark.parametrize("where", ["argument", "group", "added group"])
@pytest.mark.parametrize("name", BAD)
def test_bad_values_are_refused_where_they_come(name, where):
    given, kind = BAD[name]
    p, q = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    opt = RMSprop([p])
    build = {
        "argument": lambda: RMSprop([q], **given),
        "group": lambda: RMSprop([{"params": [q], **given}]),
        "added group": lambda: opt.add_param_group({"params": [q], **given}),
    }
    with pytest.raises(kind, match=name):
        build[where]()
    assert len(opt.param_groups) == 1


@pytest.mark.parametrize("where", ["argument", "group", "added group"])
def test_at_most_one_clip(where):
    p, q = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    opt = RMSprop([p], clipvalue=1.0)
    build = {
        "argument": lambda: RMSprop([q], clipvalue=1.0, clipnorm=1.0),
        "group": lambda: RMSprop([{"params": [q], "clipnorm": 1.0}], clipvalue=1.0),
        "added group": lambda: opt.add_param_group({"params": [q], "clipnorm": 1.0}),
    }
    with pytest.raises(ValueError, match="clip"):
        build[where]()


@pytest.mark.parametrize("own", [{"global_clipnorm": 1.0}, {"skip_nonfinite": True}], ids=str)
def test_what_decides_for_the_whole_step_is_the_same_in_all_groups(own):
    p, q = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    name = next(iter(own))

    def step():
        opt = RMSprop([{"params": [p]}, {"params": [q], **own}])
        p.grad, q.grad = torch.ones(2), torch.ones(2)
        opt.step()

    with pytest.raises(ValueError, match=name):
        step()
    assert torch.equal(p, torch.ones(2))


@pytest.mark.parametrize("given", [case for name, case in SWITCHES.items() if name != "initial_scale"], ids=str)
def test_a_row_that_only_torch_could_take_is_refused_with_a_switch_on(given, left):
    """torch's step has no such switches. Nothing is written, and the error names the switch and the parameter."""
    good, strided = torch.ones(3, requires_grad=True), torch.ones(6)[::2].requires_grad_()
    opt = RMSprop([("good", good), ("strided", strided)], **given)
    good.grad, strided.grad = torch.ones(3), torch.ones(3)
    with pytest.raises(RuntimeError, match="strided") as error:
        opt.step()
    assert any(name in str(error.value) for name in given)
    assert torch.equal(good, torch.ones(3))
    assert torch.equal(strided, torch.ones(3))
    assert not left


def test_switches_turned_on_between_steps():
    params = start(torch.float32)
    arrays = [array(p) for p in params]
    opt, over_arrays = RMSprop(params, **TORCHS), RMSProp(arrays, **TORCHS)
    changes = [
        {},
        {"momentum": 0.9, "nesterov": True},
        {"clipnorm": 0.5},
        {"eps_in_sqrt": True, "eps": 1e-3},
        {"centered": True},
    ]
    for step, change in enumerate(changes):
        opt.param_groups[0].update(change)
        over_arrays.param_groups[0].update(change)
        for p, grad in zip(params, grads(3 * step, torch.float32), strict=True):
            p.grad = grad
        opt.step()
        over_arrays.step([array(p.grad) for p in params])
        for p, a in zip(params, arrays, strict=True):
            assert_same_bits(array(p), a)


def test_bfloat16_works_without_ml_dtypes():
    code = """
import sys
sys.modules["ml_dtypes"] = None
import torch
from rmsprop_gpu.torch import RMSprop

p = torch.ones(40, dtype=torch.bfloat16, requires_grad=True)
opt = RMSprop([p], lr=0.5, alpha=0.75)
p.grad = torch.full_like(p, 2.0)
opt.step()
print(p.dtype, p[0].item(), opt.state[p]["square_avg"].dtype, opt.why_not_fused())
"""
    assert run(code) == "torch.bfloat16 0.0 torch.float32 {}"
