"""RMSProp for NumPy and CuPy arrays, in place and in one pass over memory: bit-identical on CPU and GPU."""

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
