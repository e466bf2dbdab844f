"""torch.amp.GradScaler: by default as with torch's class, and with ``fused=True`` inside the pass."""

import pytest

torch = pytest.importorskip("torch")

from torch_twins import Run, assert_same_run  # noqa: E402

from rmsprop_gpu.torch import RMSprop  # noqa: E402

GIVEN = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}
WAYS = pytest.mark.parametrize("fused", [None, True])


def scaler(**given):
    """The scale is a power of two, so nothing is rounded."""
    return torch.amp.GradScaler("cpu", **({"init_scale": 2.0**8} | given))


def steps(run, scaled, n=4, spoiled=(), unscale=False, change=lambda run: None):
    """Take steps through a scaler, with gradients as backward leaves them: scaled, and some of them spoiled."""
    for step in range(n):
        run.give()
        for i, p in enumerate(run.params.values()):
            p.grad *= scaled.scale(torch.ones(())).item()
            if step in spoiled and i == 0:
                p.grad[1, 1] = spoiled[step]
        if unscale:
            scaled.unscale_(run.opt)
            change(run)
        scaled.step(run.opt)
        scaled.update()
        run.taken += 1
    return run


@WAYS
def test_scaled_steps_are_torchs(fused, left):
    ours, torchs = Run(RMSprop, fused=fused, **GIVEN), Run(torch.optim.RMSprop, **GIVEN)
    steps(torchs, scaler())
    left.clear()
    steps(ours, scaler())
    assert not left
    assert_same_run(ours, torchs)


@WAYS
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_spoiled_step_is_skipped_and_not_counted(fused, value):
    ours, torchs = Run(RMSprop, fused=fused, **GIVEN), Run(torch.optim.RMSprop, **GIVEN)
    scalers = [scaler(), scaler()]
    for run, scaled in zip((ours, torchs), scalers, strict=True):
        steps(run, scaled, spoiled={0: value, 2: value})
    assert_same_run(ours, torchs)
    assert all(state["step"] == 2 for state in ours.opt.state.values())
    assert scalers[0].get_scale() == scalers[1].get_scale() == 2.0**6


@WAYS
def test_gradients_may_be_unscaled_and_clipped_first(fused):
    def clip(run):
        torch.nn.utils.clip_grad_norm_(run.params.values(), 1.0)

    ours, torchs = Run(RMSprop, fused=fused, **GIVEN), Run(torch.optim.RMSprop, **GIVEN)
    for run in (ours, torchs):
        steps(run, scaler(), spoiled={1: float("inf")}, unscale=True, change=clip)
    assert_same_run(ours, torchs)


def test_only_fused_is_handed_the_scale():
    """As with torch's fused Adam: the attributes exist during the step, and gradients stay scaled."""
    for fused in (None, False, True):
        run, seen = Run(RMSprop, fused=fused, **GIVEN), []

        def look(opt, args, kwargs, seen=seen):
            seen.append((hasattr(opt, "grad_scale"), hasattr(opt, "found_inf")))

        run.opt.register_step_pre_hook(look)
        steps(run, scaler(), 1)
        supports = getattr(run.opt, "_step_supports_amp_scaling", False)
        assert (supports, seen) == (fused is True, [(fused is True,) * 2])
        assert not hasattr(run.opt, "grad_scale")
        assert not hasattr(run.opt, "found_inf")
        run.taken = 0
        given = run.grad("weight")
        scale = 2.0**8 if fused else 1.0
        assert torch.equal(run.params["weight"].grad, given * scale)


def test_the_scale_is_torchs_fused_contract():
    """Set by hand, as trainers without GradScaler do. A found_inf of 1.0 skips whatever the gradients."""
    run = Run(RMSprop, fused=True, **GIVEN).step()
    kept = {name: p.detach().clone() for name, p in run.params.items()}
    run.give()
    run.opt.grad_scale, run.opt.found_inf = torch.tensor(4.0), torch.tensor(1.0)
    run.opt.step()
    assert all(torch.equal(p, kept[name]) for name, p in run.params.items())
    assert all(state["step"] == 1 for state in run.opt.state.values())
    run.opt.found_inf = torch.tensor(0.0)
    for p in run.params.values():
        p.grad *= 4
    run.opt.step()
    del run.opt.grad_scale, run.opt.found_inf
    run.taken += 1
    assert_same_run(run.step(), Run(torch.optim.RMSprop, **GIVEN).step(3))


def test_halves_are_unscaled_in_the_pass():
    """float16 parameters: GradScaler refuses to unscale their gradients, and a fused step does not need it to."""
    run = Run(RMSprop, dtype=torch.float16, fused=True, lr=0.05)
    twin = Run(RMSprop, dtype=torch.float16, fused=True, lr=0.05).step(2)
    for _ in range(2):
        run.give()
        run.opt.grad_scale, run.opt.found_inf = torch.tensor(4.0), torch.tensor(0.0)
        for p in run.params.values():
            p.grad *= 4
        run.opt.step()
        run.taken += 1
    for name, p in twin.params.items():
        assert torch.equal(run.params[name], p)
