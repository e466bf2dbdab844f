"""What a step moves and computes: bytes and operations per element, from just the Variant and the dtypes."""

from __future__ import annotations

from functools import cache
from types import FunctionType, SimpleNamespace
from typing import Any

import numpy as np

from ..arrays.dtypes import compute_dtype
from ..kernels.codes import BLOCK
from ..kernels.rule import Factors, Scalars, Variant, make_rule


def bytes_per_element(variant: Variant, dtype: np.dtype[Any], grad_dtype: np.dtype[Any] | None = None) -> float:
    """Bytes that a step moves between memory and processor per element of a parameter with this dtype.

    The gradients have the same dtype, or `grad_dtype`.

    The gradient is read once; the parameter and each buffer are read and written once. Norms or a finite check read the
    gradient once more, and zeros may be written into it. Tables, numbers and counters are not included: a few hundred
    bytes per tensor, and 24 per chunk of thousands of elements.

    Examples
    --------
    >>> bytes_per_element(Variant(), np.dtype(np.float32))
    20
    >>> bytes_per_element(Variant(), np.dtype(np.float32), np.dtype(np.float16))
    18
    >>> bytes_per_element(Variant(momentum=True, centered=True), np.dtype(np.float16))
    30
    >>> bytes_per_element(Variant(uint16=True), np.dtype(np.float32))
    16
    """
    buffers, compute = variant.centered + variant.momentum + variant.ema, compute_dtype(dtype).itemsize
    grad = (1 + variant.measures + variant.zero_grads) * (grad_dtype or dtype).itemsize
    moment = 2 if variant.uint16 else 1 + 2 / BLOCK if variant.uint8 else compute  # 8-bit codes also have bases
    return grad + 2 * (dtype.itemsize + 2 * variant.remainder + moment + buffers * compute)


@cache
def flops_per_element(variant: Variant) -> int:
    """Floating-point operations of the rule per element: an fma counts as two, a division or a root as one.

    They are counted by running the rule once on expressions; one that occurs twice counts once. Comparisons and choices
    do not count.

    Examples
    --------
    >>> flops_per_element(Variant())
    9
    """
    rule = make_rule(variant, _Expression).py_func
    names = {**rule.__globals__, "fma": lambda a, b, c: a * b + c, "math": SimpleNamespace(sqrt=_Expression.root)}
    counted = FunctionType(rule.__code__, names, closure=rule.__closure__)
    numbers = [kind(*map(_Expression, kind._fields)) for kind in (Scalars, Factors)]
    results = counted(*map(_Expression, "pgvmbe"), *numbers)
    return len(set().union(*(result.operations for result in results)))


class _Expression:
    """A term of the rule, as text, and all operations in it."""

    def __init__(self, text: object, operations: frozenset[str] = frozenset()) -> None:
        self._text, self.operations = str(text), operations

    def _with(self, operation: str, *others: _Expression) -> _Expression:
        text = f"({self._text} {operation} {' '.join(other._text for other in others)})"
        return _Expression(text, self.operations.union({text}, *(other.operations for other in others)))

    def __add__(self, other: _Expression) -> _Expression:
        return self._with("+", other)

    def __sub__(self, other: _Expression) -> _Expression:
        return self._with("-", other)

    def __mul__(self, other: _Expression) -> _Expression:
        return self._with("*", other)

    def __truediv__(self, other: _Expression) -> _Expression:
        return self._with("/", other)

    def root(self) -> _Expression:
        return self._with("root")

    def __neg__(self) -> _Expression:
        return _Expression(f"-{self._text}", self.operations)  # a sign is free: it is part of an fma

    def __lt__(self, other: _Expression) -> bool:
        return False

    __gt__ = __lt__
