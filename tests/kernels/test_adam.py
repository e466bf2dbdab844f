"""With bias correction the rule is Adam without its mean. AdaGrad is AdaGrad. Both against torch, recorded and live."""

import numpy as np
import pytest
from on_either import F8, draw
from recorded import CASES, RELATIVE, ROWS, ULPS

from rmsprop_gpu import AdaGrad, RMSProp

ADAM = ["torch-adam-plain", "torch-adamw-weight_decay-maximize"]
ADAM += ["torch-adagrad-plain", "torch-adagrad-initial_scale-weight_decay-maximize"]


@pytest.mark.parametrize("name", ADAM)
def test_bias_corrected_it_is_adam_without_its_mean_and_adagrad_is_adagrad(name):
    """Recorded from torch: Adam and AdamW with betas (0, alpha), and Adagrad. The bounds are those of recorded.py."""
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
    # 25 steps of at most 20 roundings each on either side, and one rounding of the parameter per step.
    way = 25 * np.abs(want - first).max()
    assert (np.abs(param - want) <= 1000 * 2.0**-53 * way + 25 * np.spacing(np.abs(first) + way)).all()
    assert np.abs(param - first).min() > 0
