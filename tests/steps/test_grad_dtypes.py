"""Gradients with other dtypes than in the last step: they need another plan, made once, and change nothing else."""

import importlib

import ml_dtypes
import numpy as np
import pytest
from devices import MODULES
from on_either import ALL, F2, F4, F8, assert_same, copies, draw, mixed, mixed_grads, on, refusing, seeds

from rmsprop_gpu import RMSProp
from rmsprop_gpu.kernels import compiling
from rmsprop_gpu.optimizer import planner
from rmsprop_gpu.steps.host_gradients import HostGradients

BF = ml_dtypes.bfloat16
SIZES = [7, 300, 1025]
either = pytest.mark.parametrize("module", MODULES)
PATTERNS = [[F4, F2, F4], [F2, F2, BF]]


@pytest.fixture
def made(monkeypatch):
    """The gradient dtypes of each plan that is made."""
    plans = []

    class Counted(planner.Plan):
        def __init__(self, *args, **given):
            super().__init__(*args, **given)
            plans.append([d.type for d in self.grad_dtypes])

    monkeypatch.setattr(planner, "Plan", Counted)
    return plans


def grads_of(seed, dtypes):
    pairs = zip(draw(seeds(seed, 1), *SIZES), dtypes, strict=True)
    return [None if dtype is None else g.astype(dtype) for g, dtype in pairs]


def wide(grads):
    return [None if g is None else g.astype(F4) for g in grads]


def pair(xp, **given):
    return RMSProp(copies(xp, draw(0, *SIZES)), **given), RMSProp(draw(0, *SIZES), **given)


@either
@pytest.mark.parametrize("given", [{}, ALL], ids=["plain", "all"])
def test_patterns_that_alternate_have_a_plan_each(module, given, made):
    """Whatever was assigned in between. A schedule is called once per step."""
    xp = importlib.import_module(module)
    asked = []

    def lr(step):
        asked.append(step)
        return 0.1 / (step + 1)

    opt, twin = pair(xp, lr=lr, **given)
    for step in range(9):
        grads = grads_of(step, PATTERNS[step % 2])
        if step == 6:
            asked.clear()
        opt.step(copies(xp, grads))
        if step >= 6:
            assert asked == [step]
        twin.step(wide(grads))
        asked.clear()
        assert_same(opt, twin)
        for o in (opt, twin):
            if step == 4:
                o.param_groups[0]["weight_decay"] = 0.0
                o.param_groups[0]["alpha"] = 0.7
    assert made[: made.index([F4] * 3)] + made[made.index([F4] * 3) + 1 :] == PATTERNS  # and the twin's plan


@either
def test_assigned_rates_follow_into_the_other_plan(module):
    xp = importlib.import_module(module)
    opt, twin = pair(xp, lr=0.1)
    for step in range(6):
        opt.lr = twin.lr = 0.1 / (step // 2 + 1)  # also reaches the plan that is not used next
        grads = grads_of(step, PATTERNS[step % 2])
        opt.step(copies(xp, grads))
        twin.step(wide(grads))
        assert_same(opt, twin)


@either
def test_a_first_step_compiles_for_what_comes(module, made, monkeypatch):
    """It makes no plan or kernel for gradients in the parameters' own dtype."""
    xp = importlib.import_module(module)
    opt = RMSProp(copies(xp, draw(0, *SIZES)))
    monkeypatch.setattr(compiling, "_compiled", {})
    opt.step(copies(xp, grads_of(1, [F2] * 3)))
    assert made == [[F2] * 3]
    taken = [key for key in compiling._compiled if "make_update_kernel" in repr(key)]
    assert taken
    assert all("float16" in repr(key) for key in taken)


@either
def test_none_is_of_no_dtype(module, made):
    xp = importlib.import_module(module)
    opt, twin = pair(xp)
    for dtypes in ([F2, None, F2], [F2, F2, None], [None, None, F2], [F2, F2, F2], [None] * 3):
        grads = grads_of(len(made), dtypes)
        opt.step(copies(xp, grads))
        twin.step(wide(grads))
    assert_same(opt, twin)
    assert [x for x in made if x != [F4] * 3] == [[F2, F4, F2], [F2] * 3]


def test_the_compiled_check_knows_them(monkeypatch):
    """A step over halves with their parameters' layout is checked in Python once, not in every step."""
    examined, examine = [], HostGradients._examine

    def counted(self, grads, odd):
        examined.append(len(odd))
        return examine(self, grads, odd)

    monkeypatch.setattr(HostGradients, "_examine", counted)
    params = [np.ones(shape, F4) for shape in ((3, 4), (5,), ())] + [np.ones((4, 3), F4).T[::-1]]
    grads = [np.ones(shape, F2) for shape in ((3, 4), (5,), ())] + [np.ones((4, 3), F2).T[::-1]]
    opt = RMSProp(params)
    opt.step(grads)
    examined.clear()
    for _ in range(3):
        opt.step([g.copy(order="K") if g.flags.c_contiguous else g for g in grads])
    assert not examined
    grads[0] = grads[0].astype(F4)
    opt.step(grads)
    assert len(examined) == 1


@either
def test_a_refusal_after_the_change_of_plans_changes_nothing(module):
    """The plan that would zero the gradients finds those that share memory."""
    xp = importlib.import_module(module)
    opt, twin = pair(xp)
    grads = grads_of(0, [F4] * 3)
    opt.step(copies(xp, grads), zero_grads=True)
    twin.step(wide(grads), zero_grads=True)
    shared = xp.ones(300, F2)
    with refusing(opt, ValueError, "grads[1] overlaps grads[0] in memory"):
        opt.step([shared[:7], shared, None], zero_grads=True)
    with refusing(opt, TypeError, "grads[1] has dtype float64"):
        opt.step([xp.ones(7, F2), xp.ones(300, F8), None])
    for dtypes in PATTERNS:
        grads = grads_of(1, dtypes)
        opt.step(copies(xp, grads))
        twin.step(wide(grads))
    assert_same(opt, twin)


@either
def test_an_overlap_with_what_a_step_writes_is_found(module):
    """A half gradient has half the bytes of its parameter, and must be checked at its own length."""
    xp = importlib.import_module(module)
    memory = xp.zeros(1024 + 512, xp.uint8)
    param, grad = memory[512:].view(F4), memory[: 512 + 2].view(F2)[-256:]
    opt = RMSProp(param)
    with refusing(opt, ValueError, "grads overlaps params in memory"):
        opt.step(grad)
    opt.step(memory[:512].view(F2))
    param[0] = 1
    with refusing(opt, ValueError, "grads overlaps params in memory"):
        opt.step(grad)


@either
def test_groups_of_many_dtypes(module):
    """With halves and float64 in between: only float32 parameters can have gradients of another dtype."""
    xp = importlib.import_module(module)
    opt, twin = mixed(xp, 0), mixed(np, 0)
    for seed in range(3):
        grads = mixed_grads(seed)
        halves = [[g.astype(BF) if g.dtype == F4 and (i + seed) % 2 else g for i, g in enumerate(x)] for x in grads]
        opt.step(on(xp, halves))
        twin.step(
            [
                [g.astype(F4) if h is not g else g for g, h in zip(h_, g_, strict=True)]
                for h_, g_ in zip(halves, grads, strict=True)
            ]
        )
        assert_same(opt, twin)
