"""RMSProp and AdaGrad: what their arguments are and mean."""

from __future__ import annotations

from functools import partial
from typing import Any

from .. import hyper
from ..conventions.presets import preset_of
from ..hyper import Schedule
from .base import Optimizer


class RMSProp(Optimizer):
    """RMSProp, in place on arrays of the CPU or of CUDA devices, all of them in one pass.

    ::

        square_avg = alpha * square_avg + (1 - alpha) * grad**2
        param     -= lr / (sqrt(square_avg) + eps) * grad

    AdaGrad's sum of squared gradients is replaced by a decaying average, so that the learning rate no longer dies
    (Tieleman and Hinton 2012, lecture 6.5; centered, with momentum: Graves 2013, arXiv:1308.0850).

    Parameters
    ----------
    params : array, sequence of arrays, mapping from name to array, these nested, or list of groups
        NumPy arrays, or arrays on CUDA devices: CuPy's, or any with ``__cuda_array_interface__`` or DLPack, in place;
        in host memory too arrays of others, with ``__array_interface__`` or DLPack (of torch ``p.detach()``).
        Of float32, float64, float16 or bfloat16 (``ml_dtypes``), any shape, each one dense block of memory in any order
        of its dimensions. Of nested mappings and sequences (flax, optax) a name is all keys and places on the way,
        joined by dots: ``params.Dense_0.kernel``, ``layers.0.bias``; keys are strings or integers. A group is a mapping
        with ``"params"`` and the hyperparameters that differ; a key that is none anywhere (a name, what a scheduler
        needs) is kept and ignored. A list at the top that holds a mapping with ``"params"`` or with a hyperparameter is
        one of groups; any other is a list of parameters, also of mappings.
    lr : float or callable
        Learning rate, >= 0. A callable is given `steps`, the count of steps so far, as the schedules of optax and Keras
        are. What it returns, and every number here, may be any one real number: a 0-d array of NumPy, JAX, torch or
        CuPy (for one on a device the host waits), a Decimal.
    alpha : float
        Decay of the averages, 0 <= alpha < 1 (Keras and TensorFlow: rho; optax: decay; the definition: beta).
    eps : float
        >= 0, added to the root; 0 is Hinton's form, in which an element that never saw a gradient stays.
    weight_decay : float
        Added to the gradient as ``weight_decay * param`` (L2, coupled); see `decoupled_weight_decay`.
    momentum : float
        0 <= momentum <= 1; 0 needs no buffer.
    centered : bool
        Divide by the standard deviation, ``sqrt(square_avg - grad_avg**2)``. The difference is kept from going below 0:
        torch, optax and Keras yield NaN on a constant gradient.
    nesterov : bool
        Look ahead by one momentum step (optax).
    eps_in_sqrt : bool
        ``sqrt(square_avg + eps)`` (TensorFlow, Keras, optax's default) instead of ``sqrt(square_avg) + eps`` (torch).
    lr_in_momentum : bool
        The momentum buffer holds steps (TensorFlow, Keras, optax) instead of directions (torch): it differs when `lr`
        changes.
    initial_scale : float
        What `square_avg` starts from: 1 in TensorFlow 1, 0 elsewhere.
    bias_correction : bool
        Divide `square_avg` (centered: the variance) by ``1 - alpha**t``, tracked as a moving average of ones.
    decoupled_weight_decay : bool
        Decay the parameter itself, ``param -= lr * weight_decay * param``, before the step (Keras, AdamW).
    maximize : bool
        Step up the gradient.
    clipvalue : float, optional
        Clip every element of the gradient to [-clipvalue, clipvalue], before decay; a NaN stays a NaN. None and 0 are
        off; at most one of the three clips may be on.
    clipnorm : float, optional
        Shorten the gradient of each tensor to this norm where it is longer (Keras's name). Infinity takes the norm and
        changes nothing, see `last_grad_norm`; else a gradient that holds a NaN, and so has no norm, becomes NaN, and a
        norm that is infinite, of float64 from 1.3e154 on, leaves zeros of what is finite.
    global_clipnorm : float, optional
        The same over the gradients of all tensors together (Keras; ``torch.nn.utils.clip_grad_norm_`` adds 1e-6 to the
        norm). The same in all groups; refused across devices.
    skip_nonfinite : bool
        Skip a step in which any gradient, as it is given, holds a NaN or infinity; or, after scale and clip, an element
        whose square is not finite in the state's dtype (in float32 from 1.8e19 on, and a millionth below that may count
        as such), which would stay in ``square_avg`` for good; or whose ``grad_scale``, in an array, has a reciprocal
        that is 0 or not finite in the state's dtype of any parameter. No byte of parameters, state or counters changes,
        `skipped_steps` counts. Weight decay is not looked at. The same in all groups; refused across devices.
    use_ema, ema_momentum : bool, float
        Keep a moving average of the parameters in the same pass, ``opt.ema[name]`` (Keras's names and its rule: the
        first step sets it, each later one takes ``ema_momentum * ema + (1 - ema_momentum) * param``). Of a half it is
        the average, in float32, of the parameter before it is rounded. 8 bytes more an element of float32.
    no_decay : sequence of str, sequence of arrays, or callable, optional
        The parameters without weight decay: by name, as the arrays themselves, or where ``no_decay(name, array)`` is
        True (``lambda name, x: x.ndim < 2`` for biases and scales). They become a group of their own, with the other
        hyperparameters of theirs.

    Notes
    -----
    State, on the parameter's device and in its dtype, in float32 for halves: ``square_avg``, ``grad_avg`` if centered,
    ``momentum_buffer`` with momentum, ``ema`` with `use_ema`, each of the parameter's size; ``step`` and
    ``bias_weight``, one number each. A plain step reads three and writes two streams of the model's size, 20 bytes an
    element of float32, 14 of a half; each further buffer adds two (8 bytes), `clipnorm`, `global_clipnorm` and
    `skip_nonfinite` together one (4). Arithmetic is in the state's dtype; a half is rounded once, to nearest even.
    Norms are summed in float64 in one order, whatever divides the work.
    Results are the same to the last bit on the CPU, for any number of threads, and on CUDA devices.

    On a device a step is one launch for all tensors that share device, dtype and switches (two with `bias_correction`,
    `use_ema`, ``grad_scale`` or ``found_inf``, three with norms or `skip_nonfinite`), on the stream that is current in
    CuPy; the host waits for nothing. A step may be captured in a CUDA graph after a step with the same gradient arrays;
    see `refresh`.

    Any hyperparameter but `initial_scale` may change between steps (``opt.lr = 1e-4``,
    ``opt.param_groups[0]["momentum"] = 0.9``): a buffer that becomes necessary is made then, where torch raises
    KeyError. The defaults are the definition above; torch's alpha is 0.99 by default, and its lr 1e-2, Keras's lr 1e-3
    and eps 1e-7 inside the root.

    Two threads may step two optimizers at a time, not one and the same.

    Examples
    --------
    >>> import numpy as np
    >>> weights = {"w": np.ones((2, 3), np.float32), "b": np.zeros(3, np.float32)}
    >>> opt = RMSProp(weights, lr=0.1)
    >>> opt.step({"w": np.full((2, 3), 0.5, np.float32), "b": None})
    >>> weights["w"][0].round(4)
    array([0.6838, 0.6838, 0.6838], dtype=float32)
    >>> opt
    RMSProp(2 tensors, 9 parameters of float32 on the cpu, 60 bytes of state, 1 step)
      group 0: 2 tensors, 9 parameters: lr=0.1, alpha=0.9, eps=1e-08

    Nested parameters, and their gradients nested or by name:

    >>> opt = RMSProp({"params": {"Dense_0": {"kernel": np.ones((2, 3)), "bias": np.ones(3)}}})
    >>> list(opt.state)
    ['params.Dense_0.kernel', 'params.Dense_0.bias']
    >>> opt.step({"params": {"Dense_0": {"bias": np.ones(3), "kernel": None}}})
    >>> opt.step({"params.Dense_0.bias": np.ones(3), "params.Dense_0.kernel": None})
    """

    _adagrad = False

    def __init__(
        self,
        params: Any,
        lr: float | Schedule = 1e-2,
        alpha: float = 0.9,
        eps: float = 1e-8,
        weight_decay: float | None = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        *,
        nesterov: bool = False,
        eps_in_sqrt: bool = False,
        lr_in_momentum: bool = False,
        initial_scale: float = 0.0,
        bias_correction: bool = False,
        decoupled_weight_decay: bool = False,
        maximize: bool = False,
        clipvalue: float | None = None,
        clipnorm: float | None = None,
        global_clipnorm: float | None = None,
        skip_nonfinite: bool = False,
        use_ema: bool = False,
        ema_momentum: float = 0.99,
        no_decay: Any = None,
    ) -> None:
        arguments = dict(locals())
        super().__init__(params, {name: arguments[name] for name in hyper.RMSPROP}, no_decay)

    @classmethod
    def from_preset(cls, name: str, params: Any, /, *, no_decay: Any = None, **arguments: Any) -> RMSProp:
        """RMSProp as another framework has it: its names, its defaults, its trajectory.

        ======================= ============================================================ =========================
        name                    what it is                                                   needs
        ======================= ============================================================ =========================
        ``"hinton"``            lecture 6e (2012): eps 0                                     ``lr``
        ``"graves"``            arXiv:1308.0850 (2013): centered, with momentum
        ``"torch"``             ``torch.optim.RMSprop``
        ``"keras"``             ``keras.optimizers.RMSprop`` of Keras 3
        ``"tf_keras_legacy"``   ``tf.keras.optimizers.legacy.RMSprop``, tf.keras up to 2.10
        ``"tf1"``               ``tf.compat.v1.train.RMSPropOptimizer``                      ``learning_rate``
        ``"optax"``             ``optax.rmsprop``                                            ``learning_rate``
        ``"timm"``              ``timm.optim.RMSpropTF``
        ``"chainer"``           ``chainer.optimizers.RMSprop``
        ``"bitsandbytes"``      ``bitsandbytes.optim.RMSprop``, 32 bits
        ======================= ============================================================ =========================

        Parameters
        ----------
        name : str
            Of a preset; ``rmsprop_gpu.conventions.presets.PRESETS`` has their sources and all their arguments.
        params
            As in :class:`RMSProp`; a group in it names hyperparameters as `RMSProp` does.
        no_decay
            As in :class:`RMSProp`.
        **arguments
            The framework's, by its names; what is not given has its default. A learning rate may be a callable of the
            step count in every preset. What has no counterpart here (timm's ``caution``, ...) is taken at the
            values that leave the trajectory as it is; any ``name`` does.

        Returns
        -------
        RMSProp
            Its hyperparameters have our names from then on: ``opt.param_groups[0]["alpha"]`` for every framework.

        Raises
        ------
        TypeError
            An argument that the framework does not have, listing those that it has; one that it requires and that is
            missing; a value of the wrong type.
        ValueError
            An unknown preset; a value out of range; an argument without counterpart at another value than the neutral
            one; optax's ``centered`` with ``bias_correction``, whose first step is 0/0 or up to 1e8 learning rates;
            more than one clip: tf_keras_legacy takes ``clipvalue`` beside a norm, the others take one too.

        Notes
        -----
        The trajectories are the frameworks' up to rounding, wherever theirs are finite: we do not follow them into a
        NaN (see `centered` and `eps`).

        tf.keras up to 2.10 has eps inside the root with momentum and outside it without, as decided when the optimizer
        is built, here as there. Momentum that becomes 0 later leaves eps inside; that becomes larger than 0 later is
        ignored there, and here is momentum with eps outside. An epsilon of None or 0 is 1e-7 there, and in this preset.
        Its ``decay`` makes `lr` a schedule, ``lr / (1 + decay * steps)``; an `lr` that is assigned later replaces it.

        Keras's ``get_config()`` is arguments of ``"keras"``, that of tf.keras up to 2.10 of ``"tf_keras_legacy"``; of a
        ``LossScaleOptimizer``'s take ``config["inner_optimizer"]["config"]``.

        Examples
        --------
        >>> import numpy as np
        >>> weight = np.ones(3)
        >>> RMSProp.from_preset("keras", weight, rho=0.95, momentum=0.5)
        RMSProp(1 tensor, 3 parameters of float64 on the cpu, 64 bytes of state, 0 steps)
          group 0: 1 tensor, 3 parameters: lr=0.001, alpha=0.95, eps=1e-07, momentum=0.5, eps_in_sqrt=True, \
lr_in_momentum=True, decoupled_weight_decay=True
        >>> RMSProp.from_preset("keras", weight, alpha=0.95)
        Traceback (most recent call last):
        TypeError: keras has no argument 'alpha'; it has learning_rate, rho, momentum, epsilon, centered, \
weight_decay, clipnorm, clipvalue, global_clipnorm, use_ema, ema_momentum, ema_overwrite_frequency, \
loss_scale_factor, gradient_accumulation_steps, name
        """
        return preset_of(name).built(name, arguments, partial(cls, params, no_decay=no_decay))


class AdaGrad(Optimizer):
    """AdaGrad, in place on arrays: RMSProp with the sum of squared gradients instead of their decaying average.

    ::

        sum    = sum + grad**2
        param -= lr / (sqrt(sum) + eps) * grad

    Duchi, Hazan and Singer, JMLR 12 (2011). Its learning rate dies as 1 / sqrt(t); it is here for comparison and for
    sparse problems.

    Parameters
    ----------
    params, lr, eps, weight_decay, initial_scale, eps_in_sqrt, decoupled_weight_decay, maximize, clipvalue
        As in :class:`RMSProp`. `initial_scale` is torch's and Keras's ``initial_accumulator_value`` (0 and 0.1 there);
        Keras and optax have `eps` inside the root.
    clipnorm, global_clipnorm, skip_nonfinite, use_ema, ema_momentum, no_decay
        As in :class:`RMSProp`.

    Examples
    --------
    >>> import numpy as np
    >>> weight = np.ones(3)
    >>> opt = AdaGrad(weight, lr=0.1)
    >>> opt.step(np.full(3, 0.5))
    >>> weight.round(6), opt.state[0]["sum"]
    (array([0.9, 0.9, 0.9]), array([0.25, 0.25, 0.25]))
    """

    _adagrad = True

    def __init__(
        self,
        params: Any,
        lr: float | Schedule = 1e-2,
        eps: float = 1e-10,
        weight_decay: float | None = 0.0,
        *,
        initial_scale: float = 0.0,
        eps_in_sqrt: bool = False,
        decoupled_weight_decay: bool = False,
        maximize: bool = False,
        clipvalue: float | None = None,
        clipnorm: float | None = None,
        global_clipnorm: float | None = None,
        skip_nonfinite: bool = False,
        use_ema: bool = False,
        ema_momentum: float = 0.99,
        no_decay: Any = None,
    ) -> None:
        arguments = dict(locals())
        super().__init__(params, {name: arguments[name] for name in hyper.ADAGRAD}, no_decay)
