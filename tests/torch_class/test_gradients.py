"""Gradients and parameters in every form that torch accepts: same result, and no row goes to torch needlessly."""

import pytest

torch = pytest.importorskip("torch")

from torch_twins import Run, assert_same_run, spread  # noqa: E402

from rmsprop_gpu.torch import RMSprop  # noqa: E402

GIVEN = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}
HALVES = (torch.float16, torch.bfloat16)


def both(make, grad_of, left, steps=3, **given):
    """Compare two runs that give the parameter "x" such gradients. Returns the names that torch's step updated."""
    runs = []
    for cls in (torch.optim.RMSprop, RMSprop):
        run = Run(cls, **(GIVEN | given))
        run.params["x"] = p = make()
        run.opt.add_param_group({"params": [("x", p)]})
        left.clear()
        for _ in range(steps):
            run.step(change=lambda run, p=p: grad_of(run, p))
        runs.append(run)
    torchs, ours = runs
    assert_same_run(ours, torchs)
    names = {name for name, p in ours.params.items() if id(p) in left}
    assert names == ours.opt.why_not_fused().keys()
    return names


def matrix(dtype=torch.float64):
    return torch.nn.Parameter(spread(40, 4, 6, dtype=dtype, low=-2, high=-1))


def give(grad):
    """A gradient made from this step's dense one."""

    def change(run, p):
        p.grad = grad(run.grad("x"))

    return change


def _wide(g):
    """The same values in every other element of twice the memory."""
    wide = torch.full((*g.shape[:-1], 2 * g.shape[-1]), torch.nan, dtype=g.dtype)
    wide[..., ::2] = g
    return wide[..., ::2]


LAYOUTS = {
    "transposed": lambda g: g.t().contiguous().t(),
    "strided": _wide,
    "expanded along one dimension": lambda g: g[:, :1].expand(4, 6),
    "expanded from one number": lambda g: g[0, 0].expand(4, 6),
    "a part of a larger one": lambda g: torch.cat([g, g])[2:6],
    "flipped twice": lambda g: g.flip(0).flip(0),
    "it requires a gradient": lambda g: g.requires_grad_(),
    "a result of autograd": lambda g: g.requires_grad_() * 1.5,
    "a Parameter": torch.nn.Parameter,
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_gradient_may_lie_in_any_way(name, left):
    assert both(matrix, give(LAYOUTS[name]), left) == set()


PARAMETERS = {
    "transposed": lambda: torch.nn.Parameter(matrix().detach().t()),
    "channels last": lambda: torch.nn.Parameter(
        spread(41, 2, 3, 4, 5, low=-2, high=-1).to(memory_format=torch.channels_last)
    ),
    "a part of a larger one": lambda: torch.nn.Parameter(matrix().detach()[1:3]),
    "of no elements": lambda: torch.nn.Parameter(torch.zeros(3, 0, 2, dtype=torch.float64)),
    "no Parameter": lambda: matrix().detach().requires_grad_(),
    "with a gradient but frozen": lambda: matrix().requires_grad_(False),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_parameter_may_lie_in_any_dense_way(name, left):
    assert both(PARAMETERS[name], give(lambda g: g), left) == set()


NOT_DENSE = {
    "strided": lambda: torch.nn.Parameter(_wide(matrix().detach())),
    "a column": lambda: torch.nn.Parameter(matrix().detach()[:, 1]),
    "a negated view": lambda: matrix(torch.complex128).detach()[0, :1].conj().imag.requires_grad_(True),
}


@pytest.mark.parametrize("name", NOT_DENSE)
def test_a_parameter_that_is_not_dense_is_torchs(name, left):
    assert both(NOT_DENSE[name], give(lambda g: g), left) == {"x"}


# The gradient is memory that the step writes. Its values before the step count.
OVERLAPS = {
    "its parameter": lambda run, p: p.detach(),
    "its parameter in another order": lambda run, p: p.detach().flatten()[: p.numel()].view(6, 4).t(),
    "its parameter, expanded": lambda run, p: p.detach()[:1].expand_as(p),
    "another's gradient": lambda run, p: run.params["weight"].grad.view(-1)[:1].expand_as(p),
}


@pytest.mark.parametrize("name", OVERLAPS)
def test_a_gradient_may_be_its_parameter_or_another_gradient(name, left):
    def change(run, p):
        p.grad = OVERLAPS[name](run, p)

    assert both(matrix, change, left, weight_decay=0) == set()


OTHERS_MEMORY = {
    "its state": lambda run: run.state("weight")["square_avg"],
    "a parameter before it": lambda run: run.params["first"].detach(),
    "a parameter behind it": lambda run: run.params["last"].detach(),
    "the state of another": lambda run: run.state("last")["momentum_buffer"],
}


@pytest.mark.parametrize("name", OTHERS_MEMORY)
def test_a_gradient_may_be_what_the_step_writes_at_another_time(name):
    """torch reads it in its turn, which differs between the forms of a step. Here its values before the step count."""

    def run_of(copy):
        run = Run(RMSprop, shapes=dict.fromkeys(("first", "weight", "last"), (4, 3)), **GIVEN).step()
        p = run.params["weight"]
        return run.step(3, lambda run: setattr(p, "grad", copy(OTHERS_MEMORY[name](run))))

    assert_same_run(run_of(lambda x: x), run_of(torch.clone))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_gradients_may_be_conjugated_and_negated_lazily(dtype, left):
    def lazy(g):
        grad = g.conj()
        assert grad.is_conj()
        return grad

    assert both(lambda: matrix(dtype), give(lazy), left) == set()
    assert both(lambda: matrix(dtype), give(torch._neg_view), left) == set()


@pytest.mark.parametrize("shape", [(1,), (), (1, 1, 1)], ids=str)
def test_the_imaginary_part_of_a_conjugate_is_dense_and_negated(shape, left):
    def change(run, p):
        z = torch.complex(torch.zeros(shape, dtype=torch.float64), run.grad("x"))
        p.grad = z.conj().imag
        assert p.grad.is_neg()

    assert both(lambda: torch.nn.Parameter(spread(43, *shape, low=-2, high=-1)), change, left) == set()


def test_negated_gradients_of_many_elements(left):
    def change(run, p):
        p.grad = torch.complex(torch.zeros_like(p.detach()), run.grad("x")).conj().imag
        assert p.grad.is_neg()

    assert both(matrix, change, left) == set()


def with_grad_dtype(dtype):
    """A parameter whose gradients may have any dtype."""
    p = matrix(dtype)
    p.grad_dtype = None
    return p


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_halves_may_be_gradients_of_float32(half, left):
    assert both(lambda: with_grad_dtype(torch.float32), give(lambda g: g.to(half)), left, dtype=torch.float32) == set()


OTHERS = [(torch.float64, torch.float32), (torch.float32, torch.float64), (torch.float64, torch.bfloat16)]


@pytest.mark.parametrize(("dtype", "other"), OTHERS, ids=str)
def test_gradients_of_other_dtypes_are_torchs(dtype, other, left):
    assert both(lambda: with_grad_dtype(dtype), give(lambda g: g.to(other)), left) == {"x"}


def test_the_dtype_of_gradients_may_change(left):
    runs = []
    for cls in (torch.optim.RMSprop, RMSprop):
        run = Run(cls, **GIVEN)
        p = run.params["weight"]
        p.grad_dtype = None
        for dtype in (torch.float64, torch.float32, torch.float64):
            left.clear()
            run.step(change=lambda run, p=p, dtype=dtype: setattr(p, "grad", run.grad("weight").to(dtype)))
            if cls is RMSprop:
                assert (id(p) in left) == (dtype == torch.float32)
        runs.append(run)
    assert_same_run(runs[1], runs[0])


@pytest.mark.parametrize("which", ["weight", "bias"])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_sparse_gradient_is_torchs_error_before_anything_is_written(steps, which):
    run = Run(RMSprop, shapes={"first": (2,), "weight": (4, 3), "bias": (3,)}, **GIVEN).step(steps)
    kept = {name: p.detach().clone() for name, p in run.params.items()}
    state = {name: {key: x.clone() for key, x in run.opt.state.get(p, {}).items()} for name, p in run.params.items()}

    def sparse(run):
        run.params[which].grad = run.grad(which).to_sparse()

    with pytest.raises(RuntimeError, match="RMSprop does not support sparse gradients"):
        run.step(change=sparse)
    for name, p in run.params.items():
        assert torch.equal(p, kept[name])
        for key, x in state[name].items():
            assert torch.equal(run.state(name)[key], x)
    torchs = Run(torch.optim.RMSprop, shapes={"first": (2,), "weight": (4, 3), "bias": (3,)}, **GIVEN).step(steps + 1)
    assert_same_run(run.step(), torchs)


class Own(torch.Tensor):
    """A user's subclass that overrides nothing."""


def test_a_parameter_of_a_class_of_its_own_is_torchs(left):
    assert both(lambda: torch.nn.Parameter(matrix().detach().as_subclass(Own)), give(lambda g: g), left) == {"x"}


def test_a_gradient_of_a_class_of_its_own_is_torchs(left):
    assert both(matrix, give(lambda g: g.as_subclass(Own)), left) == {"x"}


@pytest.mark.parametrize("given", [{}, {"momentum": 0.9, "centered": True}], ids=["plain", "all"])
def test_parameters_on_the_meta_device_take_torchs_step(given, left):
    runs = []
    for cls in (torch.optim.RMSprop, RMSprop):
        p, q = torch.nn.Parameter(torch.empty(3, 2, device="meta")), torch.nn.Parameter(spread(44, 2))
        opt = cls([("p", p), ("q", q)], **given)
        for _ in range(2):
            p.grad, q.grad = torch.empty_like(p), spread(45, 2)
            opt.step()
        runs.append((opt.state[p], q))
    torchs, ours = runs
    assert ours[0].keys() == torchs[0].keys()
    assert all(
        (x.device, x.shape, x.dtype) == (y.device, y.shape, y.dtype)
        for x, y in zip(ours[0].values(), torchs[0].values(), strict=True)
    )
    assert ours[0]["step"] == 2
    torch.testing.assert_close(ours[1], torchs[1], rtol=1e-6, atol=0)
    assert opt.why_not_fused().keys() == {"p"}
    assert id(q) not in left


def test_new_addresses_at_each_step_are_seen(left):
    """zero_grad() drops gradients, so the next ones are at new addresses, or at those of earlier ones."""
    runs = []
    for cls in (torch.optim.RMSprop, RMSprop):
        run = Run(cls, **GIVEN)
        run.kept = []
        left.clear()
        for step in range(6):
            run.step(change=lambda run: run.kept.extend(p.grad for p in run.params.values()))
            run.opt.zero_grad(set_to_none=step % 2 == 0)
        runs.append(run)
    assert_same_run(runs[1], runs[0])
    assert not left


def test_gradients_may_change_places():
    """Each gets an address that was another's in the step before."""
    runs = []
    for cls in (torch.optim.RMSprop, RMSprop):
        run = Run(cls, shapes={"a": (5,), "b": (5,)}, **GIVEN).step()
        a, b = run.params.values()
        for _ in range(3):
            a.grad, b.grad = b.grad, a.grad
            run.opt.step()
        runs.append(run)
    assert_same_run(runs[1], runs[0])
