"""rmsprop_update and adagrad_update: for one tensor, with state owned by the caller."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import hyper
from ..arrays.checks import Problems, Tensor, a, check_disjoint, check_grad, check_param, make_tensor, place
from ..arrays.dtypes import compute_dtype
from ..arrays.layout import Array, address_of, device_of
from ..steps.plan import Plan, array_steps, settings_of


def rmsprop_update(
    param: Array,
    grad: Array,
    square_avg: Array,
    *,
    lr: float,
    alpha: float = 0.9,
    eps: float = 1e-8,
    weight_decay: float | None = 0.0,
    momentum: float = 0.0,
    momentum_buffer: Array | None = None,
    centered: bool = False,
    grad_avg: Array | None = None,
    nesterov: bool = False,
    eps_in_sqrt: bool = False,
    lr_in_momentum: bool = False,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
) -> None:
    """One RMSProp step on one array, in place; the caller owns the state.

    Parameters
    ----------
    param : array
        Updated in place, like a parameter of :class:`RMSProp`: any shape, one dense block of memory, on the host or a
        CUDA device.
    grad : array
        Same shape and dtype (for float32 also float16 or bfloat16), any memory layout, in the same place; only read.
    square_avg, momentum_buffer, grad_avg : array
        State with the memory layout of `param`, on the same device or host, updated in place; its dtype is the
        parameter's, or float32 for halves. `momentum` needs the buffer, `centered` the average. Start them at zero.
    lr : float
        Learning rate; not a callable here, since there is no count of steps.
    alpha, eps, weight_decay, momentum, centered, nesterov, eps_in_sqrt, lr_in_momentum
        As in :class:`RMSProp`.
    decoupled_weight_decay, maximize
        As in :class:`RMSProp`.

    Raises
    ------
    TypeError, ValueError
        Naming everything that is wrong; nothing was written then.
    RuntimeError
        While the current stream is being captured in a CUDA graph, which needs an optimizer.

    Examples
    --------
    >>> import numpy as np
    >>> param, square_avg = np.ones(3), np.zeros(3)
    >>> rmsprop_update(param, np.full(3, 0.5), square_avg, lr=0.1)
    >>> param.round(6), square_avg
    (array([0.683772, 0.683772, 0.683772]), array([0.025, 0.025, 0.025]))
    """
    arguments = dict(locals())
    h = _checked(arguments, hyper.RMSPROP)
    state = {"square_avg": square_avg}
    if h["centered"]:
        state["grad_avg"] = grad_avg
    if h["momentum"]:
        state["momentum_buffer"] = momentum_buffer
    _update(param, grad, state, h, adagrad=False)


def adagrad_update(
    param: Array,
    grad: Array,
    sum: Array,
    *,
    lr: float,
    eps: float = 1e-10,
    weight_decay: float | None = 0.0,
    eps_in_sqrt: bool = False,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
) -> None:
    """One AdaGrad step on one array, in place; `sum`, owned by the caller, adds up the squared gradients.

    Parameters and errors are as in :func:`rmsprop_update`.

    Examples
    --------
    >>> import numpy as np
    >>> param, total = np.ones(3), np.zeros(3)
    >>> adagrad_update(param, np.full(3, 0.5), total, lr=0.1)
    >>> param.round(6), total
    (array([0.9, 0.9, 0.9]), array([0.25, 0.25, 0.25]))
    """
    arguments = dict(locals())
    _update(param, grad, {"sum": sum}, _checked(arguments, hyper.ADAGRAD), adagrad=True)


_NEEDED_BY = {"grad_avg": "centered", "momentum_buffer": "momentum"}


def _checked(arguments: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """The hyperparameters among the arguments, validated; those that a single update does not have are off."""
    if callable(arguments["lr"]):
        raise TypeError("lr is a callable; wanted a number, since a single update has no count of steps")
    return {name: hyper.checked(name, arguments.get(name, hyper.NEUTRAL.get(name))) for name in names}


def _update(param: Any, grad: Any, state: dict[str, Any], h: dict[str, Any], *, adagrad: bool) -> None:
    problems = Problems()
    tensor = make_tensor(param, problems, key="param", label="param", grad_label="grad", state_label="")
    buffers = {}
    for name, x in state.items():
        if x is None and name in _NEEDED_BY:
            problems.add(TypeError, f"{name} is None; {_NEEDED_BY[name]} needs it, an array that starts at zero")
            continue
        array = check_param(x, name, problems)
        if array is None or tensor is None:
            continue
        _check_state(name, x, array, tensor, problems)
        buffers[name] = array
    if tensor is not None:
        checked = check_grad(grad, tensor, problems)
        all_arrays = [("param", tensor.address, tensor.layout.nbytes)]
        all_arrays += [(name, address_of(array), array.nbytes) for name, array in buffers.items()]
        check_disjoint(all_arrays, problems)
    problems.raise_any()
    assert tensor is not None  # otherwise there were problems
    assert checked is not None
    dtype = tensor.layout.dtype
    settings = settings_of([(0, dtype)], [h], [h["lr"]], adagrad=adagrad)
    order = None
    if tensor.device is not None:
        from ..steps.order import Order  # it imports CuPy

        order = Order([tensor.device])
        if order.capturing():
            raise RuntimeError("a single update makes a new plan and cannot be captured in a CUDA graph; use RMSProp")
    steps = array_steps([tensor], [checked.dtype], np.zeros(1, np.int64), order)
    plan = Plan([tensor], [0], [buffers], settings, [checked.dtype], steps, {tensor.device: 0})
    plan.bind([grad])
    plan.launch()
    if order is not None:
        order.release()


def _check_state(name: str, x: object, array: Array, tensor: Tensor, problems: Problems) -> None:
    """Check that a state array has the layout and place of the parameter, and the dtype of its arithmetic."""
    want = tensor.layout.of(compute_dtype(tensor.layout.dtype))
    if device_of(array) != tensor.device:
        found = f"{name} is {a(type(x))} {place(device_of(array))}, but param is {place(tensor.device)}"
        problems.add(TypeError, f"{found}; wanted both in the same place")
    if array.dtype != want.dtype:
        wanted = "" if want.dtype == tensor.layout.dtype else f"; wanted {want.dtype}"
        problems.add(TypeError, f"{name} has dtype {array.dtype}, but param has {tensor.layout.dtype}{wanted}")
    elif not want.matches(array):
        problems.add(
            ValueError,
            f"{name} has shape {array.shape} and strides {array.strides}, "
            f"but param has {tensor.layout.shape} and {tensor.layout.strides}; wanted the same",
        )
