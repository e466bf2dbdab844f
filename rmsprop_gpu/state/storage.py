"""Which parameters may use a format with fewer bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ..arrays.checks import Tensor
from ..arrays.dtypes import compute_dtype


class Kind(NamedTuple):
    """The properties of a parameter that decide which formats it may have."""

    label: str
    dtype: str
    compute: str
    in_order: bool  # is it in C order?


def kinds_of(tensors: Iterable[Tensor]) -> list[Kind]:
    """The different kinds of tensor in a group."""
    found: dict[tuple[Any, ...], Kind] = {}
    for tensor in tensors:
        dtype, in_order = tensor.layout.dtype, bool(tensor.view.flags.c_contiguous)
        kind = Kind(tensor.label, dtype.name, compute_dtype(dtype).name, in_order)
        found.setdefault(kind[1:], kind)
    return list(found.values())


def check_storage(values: Mapping[str, Any], kinds: Sequence[Kind]) -> None:
    """Refuse a format for parameters that cannot have it; a ValueError names one of them, and what is allowed."""
    name = "square_avg_dtype" if "square_avg_dtype" in values else "sum_dtype"
    moment = values.get(name, "float32")
    rests, rounds = values.get("store_param_remainders", False), values.get("bf16_stochastic_round", False)
    if moment != "float32" and values.get("centered"):
        raise ValueError(
            f"{name} is {moment!r} and centered is True; wanted float32 with centered: the difference of a rounded "
            "square_avg and the square of grad_avg goes to 0, and the step to g / eps"
        )
    if rests and rounds:
        raise ValueError("store_param_remainders and bf16_stochastic_round are True; wanted one of them")
    for kind in kinds:
        if moment != "float32" and kind.compute != "float32":
            raise ValueError(f"{name} is {moment!r} and {kind.label} is {kind.dtype}; wanted 'float32', its own format")
        if moment == "uint8" and not kind.in_order:
            raise ValueError(
                f"{name} is 'uint8' and {kind.label} is not C-contiguous; wanted C order, since neighbours share a "
                "base, or 'uint16'"
            )
        for option in ("store_param_remainders", "bf16_stochastic_round"):
            if values.get(option) and kind.dtype == "float16":
                raise ValueError(f"{option} is True and {kind.label} is float16; wanted bfloat16 or float32 parameters")
