"""RMSProp in place on NumPy and CuPy arrays: one pass over memory, the same bits everywhere, every framework's form."""

from .arrays.selector import array_module, available_backends, backend_of
from .optimizer.functional import adagrad_update, rmsprop_update
from .optimizer.rmsprop import AdaGrad, RMSProp

__version__ = "0.1.0"

__all__ = [
    "AdaGrad",
    "RMSProp",
    "adagrad_update",
    "array_module",
    "available_backends",
    "backend_of",
    "rmsprop_update",
]
