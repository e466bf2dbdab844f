"""What ``repr(opt)`` says: how much is optimized, with which settings, and how much memory it needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..arrays.checks import Tensor
from ..hyper import shown


def summary(
    name: str, steps: int, hypers: Sequence[Mapping[str, Any]], members: Sequence[Sequence[Tensor]], state_bytes: int
) -> str:
    """One line for the optimizer and one per group, with its hyperparameters and the tensors in `members`."""
    tensors = [tensor for group in members for tensor in group]
    dtypes = ", ".join(sorted({str(tensor.layout.dtype) for tensor in tensors}))
    devices = ", ".join(sorted({"the cpu" if t.device is None else f"cuda:{t.device}" for t in tensors}))
    head = f"{name}({_amount(tensors)} of {dtypes} on {devices}, {state_bytes:,} bytes of state"
    lines = [f"{head}, {counted(steps, 'step')})"]
    for i, (h, mine) in enumerate(zip(hypers, members, strict=True)):
        said = (f"{key}={shown(x)}" for key, x in h.items() if _is_said(key, x, h))
        lines.append(f"  group {i}: {_amount(mine)}: {', '.join(said)}")
    return "\n".join(lines)


def _amount(tensors: Sequence[Tensor]) -> str:
    size = sum(tensor.layout.size for tensor in tensors)
    return f"{counted(len(tensors), 'tensor')}, {counted(size, 'parameter')}"


def counted(n: int, what: str) -> str:
    return f"{n:,} {what}" if n == 1 else f"{n:,} {what}s"


def _is_said(name: str, value: Any, h: Mapping[str, Any]) -> bool:
    """Is a hyperparameter worth showing? lr, alpha and eps always are, others if they have an effect."""
    if name == "ema_momentum" and not h["use_ema"]:
        return False
    if value == "float32":  # its own format
        return False
    return name in ("lr", "alpha", "eps") or (value is not None and value is not False and value != 0)
