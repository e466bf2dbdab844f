"""How a step looks to autograd, threads and memory."""

import gc
import weakref

import pytest

torch = pytest.importorskip("torch")

from processes import run as in_new_process  # noqa: E402
from torch.nn import Parameter  # noqa: E402
from torch_configurations import CONFIGURATIONS  # noqa: E402
from torch_twins import Run, assert_same_numbers, assert_same_run, spread  # noqa: E402

from rmsprop_gpu.kernels import cpu_drive  # noqa: E402
from rmsprop_gpu.torch import RMSprop  # noqa: E402

CLASSES = pytest.mark.parametrize("cls", [torch.optim.RMSprop, RMSprop], ids=["torch's", "ours"])
EACH = pytest.mark.parametrize("given", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
GIVEN = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}


@CLASSES
def test_backward_refuses_a_tensor_that_a_step_has_changed(cls):
    """What autograd saved before the step is stale: without the version count, gradients would be silently wrong."""
    run = Run(cls, **GIVEN).step()
    loss = sum((p * p * p).sum() for p in run.params.values())
    run.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@CLASSES
def test_the_version_counts_what_was_written_alone(cls):
    run = Run(cls, **GIVEN).step()
    before = {name: p._version for name, p in run.params.items()}
    state = {name: run.state(name)["square_avg"]._version for name in run.params}
    run.step(change=lambda run: setattr(run.params["bias"], "grad", None))
    assert run.params["bias"]._version == before["bias"]
    assert run.state("bias")["square_avg"]._version == state["bias"]
    assert all(p._version > before[name] for name, p in run.params.items() if name not in ("bias", "empty"))


def test_a_step_that_is_skipped_leaves_the_version():
    run = Run(RMSprop, skip_nonfinite=True).step()
    before = [p._version for p in run.params.values()]
    run.step(change=lambda run: run.params["bias"].grad.fill_(torch.nan))
    assert [p._version for p in run.params.values()] == before


@CLASSES
def test_a_step_leaves_no_graph(cls):
    run = Run(cls, **GIVEN).step(2)
    for name, p in run.params.items():
        assert p.is_leaf
        assert p.requires_grad
        assert not any(x.requires_grad for x in run.state(name).values())
    with torch.inference_mode(False), torch.enable_grad():
        run.step()
    assert all(p.is_leaf for p in run.params.values())


@EACH
@pytest.mark.parametrize("start", ["with state", "without state"])
def test_a_differentiable_step_is_torchs(given, start, left):
    """PyTorch's TestDifferentiableOptimizer: the updated parameter is a function of gradient and state.

    Its gradients with respect to both equal those of torch's class.
    """
    found = []
    for cls in (torch.optim.RMSprop, RMSprop):
        p, grad = (spread(i, 6, low=-2, high=0).requires_grad_() for i in range(2))
        square_avg = (spread(2, 6, low=-2, high=0).abs() + 1).requires_grad_()
        leaf = p.clone()  # a clone is no leaf, so it can be written in place
        opt = cls([torch.nn.Parameter(p.detach())], differentiable=True, **given)
        opt.param_groups[0]["params"] = [leaf]
        leaf.retain_grad()
        opt.state.clear()
        if start == "with state":
            opt.state[leaf] = {"step": torch.tensor(1.0), "square_avg": square_avg.clone()}
            for name, switch in (("momentum_buffer", "momentum"), ("grad_avg", "centered")):
                if given.get(switch):
                    opt.state[leaf][name] = spread(3, 6, low=-2, high=0)
        leaf.grad = grad
        left.clear()
        opt.step()
        assert left
        wanted = [p, grad, square_avg] if start == "with state" else [p, grad]
        found.append((leaf, *torch.autograd.grad(leaf.sum(), wanted)))
    for want, got in zip(*found, strict=True):
        assert torch.equal(got, want)


def test_a_differentiable_step_needs_torchs_and_says_so():
    run = Run(RMSprop, differentiable=True)
    assert run.opt.why_not_fused().keys() == run.params.keys()
    assert all("differentiable" in why for why in run.opt.why_not_fused().values())


@CLASSES
def test_steps_inside_inference_mode_are_torchs(cls):
    """Parameters made there are inference tensors, which have no version."""
    with torch.inference_mode():
        p = torch.ones(3, dtype=torch.float64)
        opt = cls([p], lr=0.5, alpha=0.75)
        for _ in range(2):
            p.grad = torch.full((3,), 2.0, dtype=torch.float64)
            opt.step()
    want = 1 - 0.5 * 2 / (1 + 1e-8) - 0.5 * 2 / (1.75**0.5 + 1e-8)
    assert p.tolist() == pytest.approx([want] * 3, rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads_gives_the_same(threads):
    before = torch.get_num_threads()
    runs = []
    try:
        for n in (1, threads):
            torch.set_num_threads(n)
            runs.append(Run(RMSprop, shapes={"large": (600, 1000), "small": (7,)}, **GIVEN).step(2))
    finally:
        torch.set_num_threads(before)
    for name, p in runs[0].params.items():
        assert torch.equal(runs[1].params[name], p)


def test_a_step_is_shared_among_as_many_threads_as_torch_has_at_that_moment(monkeypatch):
    """Workers call torch.set_num_threads(1), and a model may be loaded under another number."""
    asked, shares, before = [], cpu_drive.shares, torch.get_num_threads()
    monkeypatch.setattr(cpu_drive, "shares", lambda *a: asked.append(a[1]) or shares(*a))
    run = Run(RMSprop, dtype=torch.float32, shapes={"large": (cpu_drive.SERIAL_BELOW,)}, **GIVEN)
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            run.step(2)
    finally:
        torch.set_num_threads(before)
    assert asked == [1, 2]


@pytest.mark.parametrize("n", [1, 200])
@pytest.mark.parametrize("given", [{}, {"momentum": 0.9, "centered": True}], ids=["plain", "all"])
def test_no_step_allocates_as_much_as_a_mebibyte(given, n):
    """8 MiB of parameters in one tensor or many. torch's foreach form needs a temporary that large."""
    size = (1 << 21) // n
    params = [Parameter(torch.ones(size)) for _ in range(n)]
    opt = RMSprop(params, **given)
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        opt.step()
    allocated = sum(max(e.self_cpu_memory_usage, 0) for e in profile.key_averages())
    assert allocated < 1 << 20
    assert opt.why_not_fused() == {}


def test_the_bytes_of_the_process_do_not_grow_by_a_mebibyte_in_a_step():
    """Counts all allocators, NumPy's too."""
    code = """
import resource, tracemalloc
import torch
from rmsprop_gpu.torch import RMSprop

params = [torch.ones(1 << 21, requires_grad=True) for _ in range(4)]
opt = RMSprop(params, momentum=0.9, global_clipnorm=1.0)
for p in params:
    p.grad = torch.ones_like(p)
opt.step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
tracemalloc.start()
for _ in range(3):
    opt.step()
print(tracemalloc.get_traced_memory()[1] < 1 << 20, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1024)
"""
    assert in_new_process(code) == "True True"


@CLASSES
def test_nothing_is_kept_alive(cls):
    """As in PyTorch's leak tests: an optimizer, its parameters and gradients are freed with the last reference."""
    run = Run(cls, **GIVEN).step(3)
    run.opt.zero_grad()
    grads = [weakref.ref(p.grad) for p in run.params.values() if p.grad is not None]
    gone = [weakref.ref(x) for x in (run.opt, *run.params.values())]
    del run
    gc.collect()
    assert all(ref() is None for ref in (*gone, *grads))


@CLASSES
def test_gradients_are_let_go(cls):
    run = Run(cls, **GIVEN).step(2)
    refs = [weakref.ref(p.grad) for p in run.params.values()]
    run.opt.zero_grad(set_to_none=True)
    gc.collect()
    assert all(ref() is None for ref in refs)


def test_two_optimizers_may_take_turns_over_the_same_parameters():
    runs = []
    for cls in (torch.optim.RMSprop, RMSprop):
        run = Run(cls, **GIVEN)
        first, second = run.opt, cls(list(run.params.items()), lr=0.01)
        for step in range(4):
            run.opt = (first, second)[step % 2]
            run.step()
        runs.append(run)
    assert_same_run(runs[1], runs[0])


def test_a_model_that_trains_takes_the_same_course():
    """30 steps of a small network. Gradients from autograd accumulate, and come at new addresses."""
    ends = []
    for cls in (torch.optim.RMSprop, RMSprop):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3)).double()
        opt = cls(model.parameters(), lr=1e-3, momentum=0.9)
        x, y = torch.randn(32, 8, dtype=torch.float64), torch.randint(3, (32,))
        for step in range(30):
            opt.zero_grad(set_to_none=step % 3 > 0)
            for half in (slice(16), slice(16, 32)):
                torch.nn.functional.cross_entropy(model(x[half]), y[half]).backward()
            opt.step()
        ends.append(list(model.parameters()))
    for got, want in zip(ends[1], ends[0], strict=True):
        assert_same_numbers(got, want, 1e-9)  # rounding in one step affects the next gradient
