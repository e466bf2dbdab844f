"""A step checked line by line against the oracle, each line from the values that it read, with derived bounds.

Every bound counts roundings. One rounding moves a result by at most u = 2^-24 (float32) or 2^-53 (float64) of itself,
or by half the smallest subnormal. For float64, the oracle's own roundings in the same line count too, since it computes
in float64: everything doubles, and it also rounds each product that is inside an fma in the kernel (`product`). The
small excess of (1 + u)^n over 1 + n u is in SLACK.

Averages and momentum are stored, so whatever reads them is judged from the stored values, and errors do not accumulate.
"""

import numpy as np

from rmsprop_gpu import reference
from rmsprop_gpu.hyper import scalars
from rmsprop_gpu.kernels.rule import Scalars

SLACK = 1 + 1e-5


def snapshot(opt, params):
    """Everything a step may change, as float64 copies."""
    return [
        {"param": np.array(p, np.float64), **{name: np.array(x, np.float64) for name, x in opt.state[i].items()}}
        for i, p in enumerate(params)
    ]


def judge(variant, opt, dtype, before, after, grads):
    """Check every line of the rule for every tensor."""
    h = opt.param_groups[0].hyper()
    s = Scalars(*scalars(h, h["lr"], np.dtype(dtype)).astype(np.float64).tolist())
    scale = reference.clip_factor([grad.astype(np.float64) for grad in grads], s.global_clipnorm)
    for old, new, grad in zip(before, after, grads, strict=True):
        _judge_tensor(variant, s, dtype, old, new, grad.astype(np.float64), scale)


def _judge_tensor(variant, s, dtype, old, new, grad, scale):
    own = 2 if dtype == np.float64 else 1
    u = np.finfo(dtype).eps / 2 * own * SLACK
    tiny = float(np.finfo(dtype).smallest_subnormal) * own
    p, lr = old["param"], s.lr

    def product(x):
        """The error of the oracle's rounding of a product."""
        return u * np.abs(x) if dtype == np.float64 else 0.0

    def close(what, got, want, error):
        worst = np.max(np.abs(got - want) - error, initial=-1)
        assert worst <= 0, f"{what} is off by {worst:.3g} more than its bound"

    assert new["step"] == old["step"] + 1

    # g: the sign and the clip by value are exact. The factor from a norm is rounded, and so is its product. The norm is
    # a float64 sum in which no lane adds more than 32 + 7 terms on any of three levels: under a root, its error is 60 u
    # of float64, and the oracle's is as large. The decay is one fma.
    coupled = s.weight_decay if variant.weight_decay else 0.0
    sign = variant.scale and not variant.norm
    scaled = scale * grad
    scaled_error = (2 * u + 120 * 2.0**-53) * np.abs(scaled) + tiny if variant.norm else np.zeros_like(grad)
    g = reference.effective_gradient(scaled, p, sign, s.clipvalue if variant.clipvalue else None, coupled)
    g_error = scaled_error
    if variant.weight_decay:
        g_error = g_error + u * np.abs(g) + product(coupled * p)

    # v: two products and an fma, all of one sign; AdaGrad one fma. Both square g.
    v_name = "sum" if variant.adagrad else "square_avg"
    if variant.adagrad:
        v, n_v, share = old["sum"] + g**2, 1, 1.0
    else:
        v, n_v = reference.moving_average(old["square_avg"], g**2, s.alpha, s.one_minus_alpha), 3
        share = s.one_minus_alpha
        w = reference.moving_average(old["bias_weight"], 1.0, s.alpha, s.one_minus_alpha)
        close("bias_weight", new["bias_weight"], w, u * w + tiny)
    close(v_name, new[v_name], v, n_v * u * v + share * (2 * np.abs(g) + g_error) * g_error + 2 * tiny)

    # m: a product and an fma, which may cancel.
    if variant.centered:
        m = reference.moving_average(old["grad_avg"], g, s.alpha, s.one_minus_alpha)
        error = s.one_minus_alpha * (u * np.abs(g) + g_error) + product(s.alpha * old["grad_avg"])
        close("grad_avg", new["grad_avg"], m, u * np.abs(m) + error + 2 * tiny)

    # d, from the stored v and m: one fma. In float64 the oracle's square is rounded too, which needs an absolute bound.
    v, m = new[v_name], new.get("grad_avg") if variant.centered else None
    w = new["bias_weight"] if variant.bias_correction else 1.0
    d = reference.second_moment(v, m, w)
    d_error = (u * d + tiny) if variant.centered else np.zeros_like(d)
    if variant.centered:
        d_error += product(v + m**2) / w

    # r and u: correction and its product (2), the sum with eps (1), the root (1, and it halves errors before it), the
    # quotient (1), lr (1), plus the error of g. A correction inside the fma with eps counts 2 as well.
    n_d = 2 if variant.bias_correction else 0
    if variant.eps_in_sqrt:
        n_r = 0.5 * (n_d + (0 if variant.bias_correction else 1)) + 1
    else:
        n_r = 0.5 * n_d + 1 + (1 if variant.eps else 0)
    n_u = n_r + 1 + (1 if variant.lr_in_momentum else 0)
    factor = lr if variant.lr_in_momentum else 1.0
    roots = [reference.denominator(x, s.eps, variant.eps_in_sqrt) for x in (d, d + d_error, np.maximum(d - d_error, 0))]
    ends = [factor * reference.ratio(g, r) for r in roots]
    step = ends[0]
    u_error = np.max(np.abs(np.array(ends) - step), axis=0) + n_u * u * np.max(np.abs(ends), axis=0) + tiny
    u_error += factor * reference.ratio(g_error, roots[2])
    if not variant.eps:
        u_error[(d <= d_error) & (d_error > 0)] = np.inf  # 0 or not 0: the quotient may be anything

    # b and s: one fma each.
    if variant.momentum:
        b = s.momentum * old["momentum_buffer"] + step
        error = u_error + product(s.momentum * old["momentum_buffer"]) + tiny
        close("momentum_buffer", new["momentum_buffer"], b, u * np.abs(b) + error)
        b, error = new["momentum_buffer"], 0.0
        if variant.nesterov:
            error = product(s.momentum * b)
            b = s.momentum * b + step
            error = error + u * np.abs(b) + u_error + tiny
        step, u_error = b, error

    # p: the decay and the step, one rounding each.
    decayed = p - s.lr_times_decay * p if variant.decoupled_weight_decay else p
    error = u * np.abs(decayed) + product(s.lr_times_decay * p) if variant.decoupled_weight_decay else 0.0
    factor = 1.0 if variant.lr_in_momentum else lr
    want = decayed - factor * step
    error += product(factor * step)
    close("param", new["param"], want, u * np.abs(want) + factor * u_error + error + tiny)

    # The average: a product and an fma; the first step sets it.
    if variant.ema:
        mu, rest = (s.ema_momentum, s.one_minus_ema_momentum) if old["step"] else (0.0, 1.0)
        want = reference.moving_average(old["ema"], new["param"], mu, rest)
        error = u * np.abs(rest * new["param"]) + product(mu * old["ema"])
        close("ema", new["ema"], want, u * np.abs(want) + error + 2 * tiny)
