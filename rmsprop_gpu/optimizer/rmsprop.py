"""RMSProp and AdaGrad: what their arguments are and mean."""

from __future__ import annotations

from functools import partial
from typing import Any

from .. import hyper
from ..conventions.presets import preset_of
from ..hyper import Schedule
from .base import Optimizer


class RMSProp(Optimizer):
    """RMSProp on arrays in host memory or on CUDA devices: in place, all of them in one pass over memory.

    ::

        square_avg = alpha * square_avg + (1 - alpha) * grad**2
        param     -= lr / (sqrt(square_avg) + eps) * grad

    RMSProp replaces AdaGrad's sum of squared gradients by a decaying average, so that the learning rate no longer dies
    (Tieleman and Hinton 2012, lecture 6.5; centered, with momentum: Graves 2013, arXiv:1308.0850).

    Parameters
    ----------
    params : array, sequence of arrays, mapping from name to array, these nested, or list of groups
        NumPy or CuPy arrays, or arrays of other libraries: on a CUDA device with ``__cuda_array_interface__`` or
        DLPack, in host memory with ``__array_interface__`` or DLPack (torch: ``p.detach()``). They are updated in
        place. The dtype is float32, float64, float16 or bfloat16 (``ml_dtypes``). Any shape is fine; each array is one
        dense block of memory, in any order of its dimensions.

        In nested mappings and sequences (flax, optax), names are the keys and positions joined by dots:
        ``params.Dense_0.kernel``, ``layers.0.bias``. Keys are strings or integers.

        A group is a mapping with ``"params"`` and the hyperparameters that differ. Keys that are no hyperparameter (a
        name, what a scheduler needs) are kept and ignored. A list is a list of groups if it holds a mapping with
        ``"params"`` or with a hyperparameter; otherwise it is a list of parameters.
    lr : float or callable
        Learning rate, >= 0. A callable receives `steps`, the number of steps so far, as schedules of optax and Keras
        do. What it returns, like every number here, may be any real number: a Decimal, or a 0-d array of NumPy, JAX,
        torch or CuPy (the host waits for one on a device).
    alpha : float
        Decay of the averages, 0 <= alpha < 1 (Keras and TensorFlow: rho; optax: decay; the definition: beta).
    eps : float
        >= 0, added to the root. With 0 (Hinton's form) an element that never saw a gradient stays where it is.
    weight_decay : float
        Added to the gradient as ``weight_decay * param`` (L2, coupled); see `decoupled_weight_decay`.
    momentum : float
        0 <= momentum <= 1; 0 needs no buffer.
    centered : bool
        Divide by the standard deviation, ``sqrt(square_avg - grad_avg**2)``. The difference is kept from falling below
        0; torch, optax and Keras give NaN for a constant gradient.
    nesterov : bool
        Look ahead by one momentum step (optax).
    eps_in_sqrt : bool
        ``sqrt(square_avg + eps)`` (TensorFlow, Keras, optax's default) instead of ``sqrt(square_avg) + eps`` (torch).
    lr_in_momentum : bool
        The momentum buffer holds steps (TensorFlow, Keras, optax) instead of directions (torch). This makes a
        difference when `lr` changes.
    initial_scale : float
        The initial value of `square_avg`: 1 in TensorFlow 1, 0 elsewhere.
    bias_correction : bool
        Divide `square_avg` (centered: the variance) by ``1 - alpha**t``, tracked as a moving average of ones.
    decoupled_weight_decay : bool
        Decay the parameter itself, ``param -= lr * weight_decay * param``, before the step (Keras, AdamW).
    maximize : bool
        Step up the gradient.
    clipvalue : float, optional
        Clip every element of the gradient to [-clipvalue, clipvalue], before decay. A NaN stays a NaN. None and 0 are
        off. At most one of the three kinds of clipping may be on.
    clipnorm : float, optional
        Scale the gradient of each tensor down to this norm if it is longer (Keras's name). With infinity nothing is
        clipped, but the norm is computed: see `last_grad_norm`. Otherwise a gradient that holds a NaN has no norm and
        becomes NaN. An infinite norm (float64 gradients from 1.3e154 on) turns finite elements into zeros.
    global_clipnorm : float, optional
        The same over the gradients of all tensors together (Keras; ``torch.nn.utils.clip_grad_norm_`` adds 1e-6 to the
        norm). The same in all groups; refused across devices.
    skip_nonfinite : bool
        Skip a step in which any gradient, as given, holds a NaN or infinity. Also skip if, after scaling and
        clipping, an element's square is not finite in the state's dtype, since it would stay in ``square_avg`` for good
        (in float32 from 1.8e19 on; a millionth below that may count too); and if ``grad_scale``, given as an array, has
        a reciprocal that is 0 or not finite in the state's dtype of any parameter. A skipped step changes no byte of
        parameters, state or counters, and adds 1 to `skipped_steps`. Weight decay is not taken into account. The option
        must be the same in all groups, and is refused if parameters are on several devices.
    use_ema, ema_momentum : bool, float
        Keep a moving average of the parameters in the same pass, ``opt.ema[name]`` (Keras's names and its rule: the
        first step sets it, each later one computes ``ema_momentum * ema + (1 - ema_momentum) * param``). For float16
        and bfloat16 it is the float32 average of the parameter before rounding. It costs 8 more bytes per float32
        element.
    square_avg_dtype : {"float32", "uint16", "uint8"}
        How `square_avg` is stored, for parameters whose arithmetic is in float32. ``"uint16"``: 8 bits of exponent and
        8 of mantissa; a plain step moves 16 bytes per element instead of 20. ``"uint8"``: 3 bits of mantissa below the
        largest of 128 neighbours, whose base is kept too: 14.03 bytes. Values below 2^-32 of that largest are stored as
        2^-32 of it, so if neighbours' gradients differ by a factor of more than 2^16, the steps of the small ones are
        too short. Codes are rounded stochastically, by a word made from `seed`, name, step and element, the same on
        every backend. This is unbiased at every `alpha`; rounding to nearest would make a slow average stick. Such a
        step takes two kernel launches. Not with `centered`; `decoded_state` returns the numbers.
    store_param_remainders : bool
        Keep the missing 16 bits of a float32 beside each bfloat16 parameter: every step is bit-identical to that of a
        float32 parameter, for 4 more bytes per element. What you write into a parameter between steps is taken over to
        within half a unit in its last place. `ema` averages the float32 parameter.
    bf16_stochastic_round : bool
        Round bfloat16 parameters stochastically instead of to nearest, which loses steps below half a unit in the last
        place. Not with `store_param_remainders`; both leave float32 parameters alone.
    seed : int
        0 <= seed < 2**64, for stochastic rounding; kept in `state_dict`.
    no_decay : sequence of str, sequence of arrays, or callable, optional
        The parameters without weight decay: by name, as the arrays themselves, or those for which ``no_decay(name,
        array)`` is True (``lambda name, x: x.ndim < 2`` for biases and scales). They become a separate group and keep
        their other hyperparameters.

    Notes
    -----
    State, on the parameter's device and in its dtype, in float32 for halves: ``square_avg``, ``grad_avg`` if centered,
    ``momentum_buffer`` with momentum, ``ema`` with `use_ema`, each of the parameter's size; ``step`` and
    ``bias_weight``, one number each. A plain step moves 20 bytes per float32 element (it reads parameter, gradient and
    state, and writes parameter and state) and 14 per float16 or bfloat16 element. Each further buffer adds 8 bytes;
    `clipnorm`, `global_clipnorm` and `skip_nonfinite` together add 4. Arithmetic is in the state's dtype. A half is
    rounded once, to nearest even. Norms are summed in float64 in a fixed order.

    Results are bit-identical on the CPU, for any number of threads, and on CUDA devices.

    On a device a step takes one kernel launch for all tensors that share device, dtype and switches (two with
    `bias_correction`, `use_ema`, ``grad_scale`` or ``found_inf``, three with norms or `skip_nonfinite`), on CuPy's
    current stream. The host does not wait. A step may be captured in a CUDA graph after a step with the same gradient
    arrays; see `refresh`.

    Any hyperparameter may change between steps (``opt.lr = 1e-4``, ``opt.param_groups[0]["momentum"] = 0.9``), except
    `initial_scale`, `square_avg_dtype` and `store_param_remainders`. A buffer that becomes necessary is allocated in
    the next step, while torch raises KeyError. The defaults are the definition above. Other libraries differ: torch's
    alpha is 0.99; Keras's lr is 1e-3 and its eps 1e-7, inside the root.

    Two threads may step two different optimizers at the same time, but not the same one.

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
        square_avg_dtype: str = "float32",
        store_param_remainders: bool = False,
        bf16_stochastic_round: bool = False,
        seed: int = 0,
        no_decay: Any = None,
    ) -> None:
        arguments = dict(locals())
        super().__init__(params, {name: arguments[name] for name in hyper.RMSPROP}, no_decay)

    @classmethod
    def from_preset(cls, name: str, params: Any, /, *, no_decay: Any = None, **arguments: Any) -> RMSProp:
        """RMSProp as another framework implements it: its argument names, its defaults, its trajectory.

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
            The preset's name; ``rmsprop_gpu.conventions.presets.PRESETS`` has all sources and arguments.
        params
            As in :class:`RMSProp`; a group in it names hyperparameters as `RMSProp` does.
        no_decay
            As in :class:`RMSProp`.
        **arguments
            The framework's, with its names and defaults. In every preset the learning rate may be a callable of the
            step count. An argument without a counterpart here (timm's ``caution``, ...) is accepted only at values that
            do not change the trajectory. Any ``name`` is accepted.

        Returns
        -------
        RMSProp
            Its hyperparameters have our names: ``opt.param_groups[0]["alpha"]`` for every framework.

        Raises
        ------
        TypeError
            For an argument that the framework does not have, listing those it has; for a missing required argument; for
            a value of the wrong type.
        ValueError
            For an unknown preset; a value out of range; an argument without a counterpart, at a value that would change
            the trajectory; optax's ``centered`` with ``bias_correction``, whose first step is 0/0 or up to 1e8 learning
            rates; more than one clip (tf_keras_legacy itself allows ``clipvalue`` beside a norm).

        Notes
        -----
        The trajectories are those of the frameworks up to rounding, as long as theirs are finite. Their NaNs are not
        reproduced (see `centered` and `eps`).

        tf.keras up to 2.10 has eps inside the root with momentum, and outside without. As there, this is decided when
        the optimizer is built. If momentum becomes 0 later, eps stays inside. If it becomes larger than 0 later,
        tf.keras ignores it; here it is momentum with eps outside. As there, an epsilon of None or 0 means 1e-7.
        Its ``decay`` makes `lr` a schedule, ``lr / (1 + decay * steps)``; assigning `lr` later replaces the schedule.

        Keras's ``get_config()`` can be passed to ``"keras"``, that of tf.keras up to 2.10 to ``"tf_keras_legacy"``. For
        a ``LossScaleOptimizer`` pass ``config["inner_optimizer"]["config"]``.

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
    """AdaGrad on arrays, in place: RMSProp with the sum of squared gradients instead of their decaying average.

    ::

        sum    = sum + grad**2
        param -= lr / (sqrt(sum) + eps) * grad

    Duchi, Hazan and Singer, JMLR 12 (2011). Its learning rate dies as 1 / sqrt(t). It is here for comparison, and for
    problems with rare features.

    Parameters
    ----------
    params, lr, eps, weight_decay, initial_scale, eps_in_sqrt, decoupled_weight_decay, maximize, clipvalue
        As in :class:`RMSProp`. `initial_scale` is torch's and Keras's ``initial_accumulator_value`` (0 and 0.1 there);
        Keras and optax have `eps` inside the root.
    clipnorm, global_clipnorm, skip_nonfinite, use_ema, ema_momentum, no_decay
        As in :class:`RMSProp`.
    sum_dtype, store_param_remainders, bf16_stochastic_round, seed
        Like `square_avg_dtype` and the others in :class:`RMSProp`.

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
        sum_dtype: str = "float32",
        store_param_remainders: bool = False,
        bf16_stochastic_round: bool = False,
        seed: int = 0,
        no_decay: Any = None,
    ) -> None:
        arguments = dict(locals())
        super().__init__(params, {name: arguments[name] for name in hyper.ADAGRAD}, no_decay)
