"""RMSProp and AdaGrad in float64 NumPy, one line per equation.

This is the mathematics, written to be read; the kernels are tested against it. It imports nothing from this package,
changes nothing in place, and ignores speed. Tieleman and Hinton, lecture 6.5 (2012); Graves, arXiv:1308.0850 (2013);
Duchi, Hazan and Singer, JMLR 12 (2011).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array: TypeAlias = NDArray[np.float64]
State: TypeAlias = dict[str, Array]


def effective_gradient(
    grad: Array, param: Array, maximize: bool = False, clipvalue: float | None = None, weight_decay: float = 0.0
) -> Array:
    """What the averages see: the gradient with its sign, clipped, with coupled decay added.

    Examples
    --------
    >>> effective_gradient(np.array([3.0, -0.5]), np.array([1.0, 2.0]), clipvalue=1.0, weight_decay=0.25)
    array([1.25, 0.  ])
    """
    g = -grad if maximize else grad
    g = np.clip(g, -clipvalue, clipvalue) if clipvalue else g
    return g + weight_decay * param if weight_decay else g


def clip_factor(grads: Sequence[Array], most: float = np.inf) -> float:
    """The factor that shortens these gradients, taken together, to a norm of `most`.

    Examples
    --------
    >>> clip_factor([np.array([3.0]), np.array([4.0])], most=1.0)  # their norm is 5
    0.2
    """
    norm = float(np.sqrt(sum(np.sum(g**2) for g in grads)))
    return 1.0 if norm <= most else most / norm


def moving_average(average: Array, value: Array, alpha: float, one_minus_alpha: float) -> Array:
    """The decaying average: of g^2 for square_avg, of g for grad_avg, of 1 for bias_weight, of p for ema.

    Examples
    --------
    >>> moving_average(np.array([1.0]), np.array([5.0]), 0.75, 0.25)
    array([2.])
    """
    return alpha * average + one_minus_alpha * value


def second_moment(square_avg: Array, grad_avg: Array | None = None, bias_weight: Array | float = 1.0) -> Array:
    """The value under the root, without eps: v, or centered v - m^2 (never below 0), divided by the bias weight.

    Examples
    --------
    >>> second_moment(np.array([5.0]), grad_avg=np.array([1.0]), bias_weight=0.5)
    array([8.])
    """
    d = square_avg if grad_avg is None else np.maximum(square_avg - grad_avg**2, 0.0)
    return d / bias_weight


def denominator(d: Array, eps: float, eps_in_sqrt: bool = False) -> Array:
    """sqrt(d) + eps, or sqrt(d + eps).

    Examples
    --------
    >>> denominator(np.array([4.0]), 5.0), denominator(np.array([4.0]), 5.0, eps_in_sqrt=True)
    (array([7.]), array([3.]))
    """
    return np.sqrt(d + eps) if eps_in_sqrt else np.sqrt(d) + eps


def ratio(g: Array, r: Array) -> Array:
    """G / r; 0 where r is 0 (only without eps: nothing was seen yet, so nothing moves).

    Examples
    --------
    >>> ratio(np.array([1.0, 0.0]), np.array([2.0, 0.0]))
    array([0.5, 0. ])
    """
    return np.divide(g, r, out=np.zeros_like(g), where=r != 0)


def rmsprop(
    param: ArrayLike,
    grad: ArrayLike,
    state: Mapping[str, Array] | None = None,
    *,
    lr: float,
    alpha: float = 0.9,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    centered: bool = False,
    nesterov: bool = False,
    eps_in_sqrt: bool = False,
    lr_in_momentum: bool = False,
    initial_scale: float = 0.0,
    bias_correction: bool = False,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
    clipvalue: float | None = None,
    one_minus_alpha: float | None = None,
) -> tuple[Array, State]:
    """One RMSProp step: the new parameter and the new state; nothing is changed in place.

    Parameters
    ----------
    param, grad : array_like
        Of one shape; computed with as float64.
    state : mapping, optional
        ``square_avg``, ``grad_avg``, ``momentum_buffer``, ``bias_weight``, as this function returned them;
        what is absent starts at zero (``square_avg`` at `initial_scale`).
    one_minus_alpha : float, optional
        ``1 - alpha`` where that was rounded by itself, as float32 kernels do.
    lr, alpha, eps, ... : float or bool
        As in :class:`rmsprop_gpu.RMSProp`.

    Returns
    -------
    param : ndarray
    state : dict

    Examples
    --------
    >>> p, state = rmsprop([1.0, 2.0], [0.5, -0.5], lr=0.1)
    >>> p.round(6), state["square_avg"]
    (array([0.683772, 2.316228]), array([0.025, 0.025]))
    """
    p, grad, state = np.asarray(param, np.float64), np.asarray(grad, np.float64), dict(state or {})
    beta = 1.0 - alpha if one_minus_alpha is None else one_minus_alpha
    v = state.get("square_avg", np.full_like(p, initial_scale))
    m = state.get("grad_avg", np.zeros_like(p))
    b = state.get("momentum_buffer", np.zeros_like(p))
    w = state.get("bias_weight", np.zeros(()))

    g = effective_gradient(grad, p, maximize, clipvalue, 0.0 if decoupled_weight_decay else weight_decay)
    v = moving_average(v, g**2, alpha, beta)
    m = moving_average(m, g, alpha, beta) if centered else m
    w = moving_average(w, np.ones(()), alpha, beta)
    d = second_moment(v, m if centered else None, w if bias_correction else 1.0)
    u = ratio(g, denominator(d, eps, eps_in_sqrt))
    p = p - lr * weight_decay * p if decoupled_weight_decay else p
    b = momentum * b + (lr * u if lr_in_momentum else u)
    s = momentum * b + (lr * u if lr_in_momentum else u) if nesterov else b
    p = p - s if lr_in_momentum else p - lr * s

    new = {"square_avg": v, "bias_weight": w}
    if centered:
        new["grad_avg"] = m
    if momentum:
        new["momentum_buffer"] = b
    return p, {**state, **new}


def adagrad(
    param: ArrayLike,
    grad: ArrayLike,
    state: Mapping[str, Array] | None = None,
    *,
    lr: float,
    eps: float = 1e-10,
    weight_decay: float = 0.0,
    initial_scale: float = 0.0,
    eps_in_sqrt: bool = False,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
    clipvalue: float | None = None,
) -> tuple[Array, State]:
    """One AdaGrad step: the average of RMSProp replaced by the sum; nothing is changed in place.

    Parameters
    ----------
    param, grad : array_like
        Of one shape; computed with as float64.
    state : mapping, optional
        ``sum``, as this function returned it; without it, the sum starts at `initial_scale`.
    lr, eps, ... : float or bool
        As in :class:`rmsprop_gpu.AdaGrad`.

    Returns
    -------
    param : ndarray
    state : dict

    Examples
    --------
    >>> p, state = adagrad([1.0, 2.0], [0.5, -0.5], lr=0.1)
    >>> p.round(6), state["sum"]
    (array([0.9, 2.1]), array([0.25, 0.25]))
    """
    p, grad, state = np.asarray(param, np.float64), np.asarray(grad, np.float64), dict(state or {})
    v = state.get("sum", np.full_like(p, initial_scale))

    g = effective_gradient(grad, p, maximize, clipvalue, 0.0 if decoupled_weight_decay else weight_decay)
    v = v + g**2
    u = ratio(g, denominator(v, eps, eps_in_sqrt))
    p = p - lr * weight_decay * p if decoupled_weight_decay else p
    p = p - lr * u

    return p, {**state, "sum": v}
