"""torch's RMSprop and ours over equal tensors: step by step from the same start, or through the same program."""

import numpy as np
import torch

# How far two correct ways of rounding may differ, relative to the largest update of a tensor.
PART = {torch.float64: 1e-12, torch.float32: 1e-5, torch.complex128: 1e-12, torch.complex64: 1e-5}


def spread(seed, *shape, dtype=torch.float64, low=-6, high=2):
    """Values of either sign over these decades, so that the root of their average crosses eps."""
    rng = np.random.default_rng(seed)

    def drawn():
        return torch.tensor(rng.standard_normal(shape) * 10.0 ** rng.uniform(low, high, shape))

    return (torch.complex(drawn(), drawn()) if dtype.is_complex else drawn()).to(dtype)


def reals(x):
    """A tensor's values in float64, so that comparing rounds nothing."""
    x = x.detach()
    return (torch.view_as_real(x.resolve_conj()) if x.is_complex() else x.resolve_neg()).to(torch.float64)


def assert_same_update(got, want, before):
    """Two values of a parameter differ by no more than a fraction of the largest update of an element."""
    assert (got.shape, got.dtype, got.device) == (want.shape, want.dtype, want.device)
    got, want, before, dtype = reals(got), reals(want), reals(before), want.dtype
    if want.numel():
        assert torch.isfinite(want).all()
        torch.testing.assert_close(got, want, rtol=0, atol=PART[dtype] * (want - before).abs().max().item())


class Twins:
    """Two optimizers, made by `make(cls, params)`. Ours is set to torch's values before each step.

    Parameters are about as large as an update, so that their own rounding does not hide the step's.
    """

    def __init__(self, ours, make, tensors):
        self.params, self.twins = [[t.clone().requires_grad_() for t in tensors] for _ in range(2)]
        self.ours, self.torchs = make(ours, self.params), make(torch.optim.RMSprop, self.twins)

    def meet(self):
        """Set our parameters and state to torch's values, in place."""
        for p, q in self.pairs():
            p.detach().copy_(q.detach())
            for name, x in self.torchs.state.get(q, {}).items():
                self.ours.state[p][name].copy_(x)

    def pairs(self):
        return zip(self.params, self.twins, strict=True)

    def step(self, grads):
        """Step both from the same start with these gradients. Returns torch's parameters and state from before."""
        self.meet()
        before = [
            {"param": q.detach().clone(), **{name: x.clone() for name, x in self.torchs.state.get(q, {}).items()}}
            for q in self.twins
        ]
        for (p, q), grad in zip(self.pairs(), grads, strict=True):
            p.grad, q.grad = (None, None) if grad is None else (grad.clone(), grad.clone())
        self.torchs.step()
        self.ours.step()
        for (p, q), grad in zip(self.pairs(), grads, strict=True):
            if grad is not None:
                assert torch.equal(p.grad, grad), "the gradient was written to"
            assert self.ours.state.get(p, {}).keys() == self.torchs.state.get(q, {}).keys()
        return before


SHAPES = {"weight": (4, 3), "bias": (3,), "scale": (), "empty": (0, 3)}


class Run:
    """One optimizer over named float64 tensors: a matrix, a vector, a number and an empty one. Runs can be compared.

    Each step has its own gradients, the same in each run. Parameters are about as large as an update.
    """

    def __init__(self, cls, dtype=torch.float64, shapes=SHAPES, **given):
        self.params = {
            name: torch.nn.Parameter(spread(i, *shape, dtype=dtype, low=-2, high=-1))
            for i, (name, shape) in enumerate(shapes.items())
        }
        self.opt = cls(list(self.params.items()), **given)
        self.taken, self.cancels = 0, 0.0

    def grad(self, name):
        """The next gradient of a parameter, dense and new."""
        p = self.params[name]
        seed = 1000 + 10 * self.taken + sorted(self.params).index(name)
        return spread(seed, *p.shape, dtype=p.dtype, low=-2, high=1).to(p.device)

    def give(self):
        """Set gradients for the next step on all parameters that can have one."""
        for name, p in self.params.items():
            p.grad = self.grad(name) if p.requires_grad else None

    def step(self, n=1, change=lambda run: None):
        """Take `n` steps. `change` gets the run between setting gradients and stepping."""
        for _ in range(n):
            self.give()
            change(self)
            self.opt.step()
            self.taken += 1
            self._watch()
        return self

    def _watch(self):
        """Record the worst cancellation of v - m^2: v over it."""
        for state in self.opt.state.values():
            if "grad_avg" in state and state["grad_avg"].numel():
                v, m = reals(state["square_avg"]), reals(state["grad_avg"])
                self.cancels = max(self.cancels, (v / (v - m * m)).abs().max().item())

    @property
    def group(self):
        return self.opt.param_groups[0]

    def state(self, name):
        return self.opt.state[self.params[name]]


def assert_same_run(ours, torchs, part=None):
    """Two runs end alike, in parameters and in all of their state.

    In centered mode, v is off by 6 u, and so is m^2 (see test_numbers.py). The root halves their error in v - m^2.
    """
    lost = 6 * ours.taken * max(ours.cancels, torchs.cancels)
    assert ours.params.keys() == torchs.params.keys()
    for name, want in torchs.params.items():
        got = ours.params[name]
        assert (got.dtype, got.device) == (want.dtype, want.device)
        bound = part or PART[want.dtype] + lost * torch.finfo(want.dtype).eps / 2
        assert_same_numbers(got, want, bound)
        state, wanted = ours.state(name), torchs.state(name)
        assert state.keys() == wanted.keys()
        for key, x in wanted.items():
            assert_same_numbers(state[key], x, bound)


def assert_same_numbers(got, want, part):
    """Two tensors differ by no more than a fraction of the largest element."""
    assert got.shape == want.shape
    got, want = reals(got), reals(want)
    if want.numel():
        assert torch.isfinite(want).all()
        torch.testing.assert_close(got, want, rtol=0, atol=part * want.abs().max().item())
