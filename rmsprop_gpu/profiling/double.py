"""The double of an optimizer, which takes the measured steps: its arrays are copies with the same memory layout."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..arrays.checks import Tensor
from ..arrays.layout import Array, address_of
from ..optimizer.base import Optimizer
from ..optimizer.rmsprop import AdaGrad, RMSProp

PAGE = 4096  # bytes: a copy has the same offset as the array to its page, and so to its cache line and vector


def check_optimizer(opt: object) -> None:
    """Refuse anything of which no double can be made."""
    if not isinstance(opt, Optimizer):
        raise TypeError(f"opt is a {type(opt).__name__}; wanted an RMSProp or AdaGrad")


def double_of(opt: Optimizer) -> Optimizer:
    """The same optimizer over copies with the same memory layout as its arrays."""
    groups = [
        {"params": {t.key: _copy(t, opt._order) for t in tensors}, **group.hyper(), "lr": _rate(group["lr"])}
        for group, tensors in zip(opt.param_groups, opt._groups.members, strict=True)
    ]
    double = (AdaGrad if opt._adagrad else RMSProp)(groups)
    for i, mine in zip(in_groups(opt), double._state.buffers, strict=True):
        tensor, theirs = opt._tensors[i], opt._state.buffers[i]
        for name in mine.keys() & theirs.keys():
            _fill(mine[name], theirs[name], tensor, opt._order)
    return double


def in_groups(opt: Optimizer) -> list[int]:
    """The order of the parameters by groups, which is the order in the double."""
    index = {id(tensor): i for i, tensor in enumerate(opt._tensors)}
    return [index[id(tensor)] for tensors in opt._groups.members for tensor in tensors]


def _rate(lr: Any) -> Any:
    """A number unchanged; for a schedule a stand-in, since the user's own may keep track of its calls."""
    return (lambda step: 0.0) if callable(lr) else lr


def _copy(tensor: Tensor, order: Any) -> Array:
    layout, offset = tensor.layout, tensor.address % PAGE
    size = layout.nbytes + 2 * PAGE
    if tensor.device is None:
        memory: Any = np.zeros(size, np.uint8)
    else:
        import cupy

        with cupy.cuda.Device(tensor.device):
            memory = cupy.zeros(size, np.uint8)
    copy = layout.over(memory, (offset - address_of(memory)) % PAGE)
    _fill(copy, tensor.view, tensor, order)
    return copy


def _fill(copy: Array, original: Array, tensor: Tensor, order: Any) -> None:
    """Copy what belongs to a parameter, on its device, after earlier steps."""
    if tensor.device is None:
        np.copyto(copy, original)
        return
    import cupy

    with order.on(tensor.device):
        cupy.copyto(copy, original)
