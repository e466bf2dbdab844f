"""Where operations are traced or go to a mode, torch updates all rows: our kernels would leave no trace."""

import pytest

torch = pytest.importorskip("torch")

from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch_twins import Run, assert_same_run, spread  # noqa: E402

from rmsprop_gpu.torch import RMSprop  # noqa: E402

GIVEN = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}
CLASSES = pytest.mark.parametrize("cls", [torch.optim.RMSprop, RMSprop], ids=["torch's", "ours"])


def test_make_fx_sees_the_update(left):
    """One step in functional form, as functional trainers write it. The graph alone then makes the update."""

    def update_of(cls):
        def update(p, grad, square_avg):
            opt = cls([torch.ones(3)], lr=0.05)
            opt.param_groups[0]["params"] = [p]
            p.grad = grad
            opt.state[p] = {"step": torch.tensor(1.0), "square_avg": square_avg}
            opt.step()
            return p

        return update

    graphs = []
    for cls in (torch.optim.RMSprop, RMSprop):
        start = [spread(i, 3, low=-2, high=0).abs() for i in range(3)]
        left.clear()
        graph = make_fx(update_of(cls))(*(x.clone() for x in start))
        assert left
        graphs.append((graph, graph(*(x.clone() for x in start))))
    (torchs, want), (ours, got) = graphs
    assert [n.target for n in ours.graph.nodes] == [n.target for n in torchs.graph.nodes]
    assert torch.equal(got, want)


class Counting(TorchDispatchMode):
    """Records every operation."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_a_mode_sees_every_operation(left):
    runs, seen = [], []
    for cls in (torch.optim.RMSprop, RMSprop):
        run = Run(cls, **GIVEN).step(2)
        run.give()
        left.clear()
        with Counting() as mode:
            run.opt.step()
        run.taken += 1
        seen.append([f for f in mode.seen if "detach" not in str(f)])
        assert len(left) == len(run.params)
        left.clear()
        run.step(2)
        assert bool(left) == (cls is not RMSprop)
        runs.append(run)
    assert seen[0] == seen[1]
    assert_same_run(runs[1], runs[0])


@CLASSES
def test_fake_tensors_take_steps(cls):
    """Tools do this to find out how much memory a training step takes. Nothing real is read or written."""
    with FakeTensorMode():
        p = torch.nn.Parameter(torch.ones(4, 3))
        opt = cls([p], momentum=0.9)
        for _ in range(2):
            p.grad = torch.ones_like(p)
            opt.step()
    assert opt.state[p]["square_avg"].shape == (4, 3)
    assert type(opt.state[p]["square_avg"]).__name__ == "FakeTensor"


@CLASSES
def test_fake_tensors_take_steps_outside_their_mode(cls, left):
    """Their address is not valid."""
    with FakeTensorMode():
        p = torch.nn.Parameter(torch.ones(4, 3))
        p.grad = torch.ones_like(p)
    opt = cls([("p", p)], momentum=0.9)
    opt.step()
    assert left == {id(p)}
    assert cls is not RMSprop or opt.why_not_fused().keys() == {"p"}


def compiled(run, backend):
    """Take two compiled steps between two others."""
    step = torch.compile(run.opt.step, backend=backend)
    run.step()
    for _ in range(2):
        run.give()
        step()
        run.taken += 1
    return run.step()


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns about its own work
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_step_is_torchs(backend, left):
    torch._dynamo.reset()
    runs = []
    for cls in (torch.optim.RMSprop, RMSprop):
        runs.append(compiled(Run(cls, **GIVEN), backend))
        torch._dynamo.reset()
    assert_same_run(runs[1], runs[0])


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_step_leaves_nothing_out_of_its_graph(left):
    """The graphs that a backend gets contain the update of the parameters."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    run = compiled(Run(RMSprop, **GIVEN), backend)
    torch._dynamo.reset()
    targets = {str(node.target) for graph in graphs for node in graph.graph.nodes}
    assert any("addcdiv" in target for target in targets), targets
    assert_same_run(run, Run(torch.optim.RMSprop, **GIVEN).step(4))


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_training_step_runs_our_step_between_its_graphs(left):
    """The usual way: model and loss are compiled, but not the optimizer's step."""
    torch._dynamo.reset()
    ends = []
    for cls in (torch.optim.RMSprop, RMSprop):
        torch.manual_seed(0)
        model = torch.nn.Linear(5, 3).double()
        opt, x = cls(model.parameters(), lr=1e-3), torch.randn(7, 5, dtype=torch.float64)
        loss = torch.compile(lambda x, model=model: model(x).square().mean(), backend="aot_eager")
        left.clear()
        for _ in range(3):
            opt.zero_grad()
            loss(x).backward()
            opt.step()
        ends.append(model)
    torch._dynamo.reset()
    assert not left
    torch.testing.assert_close(ends[1].weight, ends[0].weight, rtol=1e-11, atol=1e-13)


def test_vmap_and_grad_are_left_alone():
    """A step inside them is not supported by torch's class. A step beside them works as always."""
    run, torchs = Run(RMSprop, **GIVEN), Run(torch.optim.RMSprop, **GIVEN)
    for r in (run, torchs):
        r.step()
        torch.func.grad(lambda w: (w * w).sum())(r.params["weight"].detach())
        torch.vmap(lambda w: w * 2)(r.params["weight"].detach())
        r.step()
    assert_same_run(run, torchs)
