"""Which of torch's parameters our kernels accept, and their state: torch's tensors, made as torch makes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .. import hyper
from ..state.kinds import REMAINDER
from ..state.storage import Kind
from .formats import BASE, CODES, INTEGERS, blocks_of, coded, format_of
from .library import why_no_kernels

# The state besides the counters, and the hyperparameter that needs it.
KEPT = {"square_avg": None, "momentum_buffer": "momentum", "grad_avg": "centered"}
HALVES = (torch.float16, torch.bfloat16)
# The dtype in which each is updated: a complex number is two reals.
REALS = {
    **{torch.float32: torch.float32, torch.float64: torch.float64},
    **{torch.complex64: torch.float32, torch.complex128: torch.float64},
    **{half: half for half in HALVES},
}


def state_dtype(p: torch.Tensor) -> torch.dtype:
    """The dtype of a parameter's state: the parameter's own, but float32 for halves, where torch uses halves."""
    return torch.float32 if p.dtype in HALVES else p.dtype


def kind_of(p: torch.Tensor, name: str) -> Kind:
    """The properties of a parameter that decide which formats it may have."""
    dtype, computed = (str(x).removeprefix("torch.") for x in (p.dtype, state_dtype(p)))
    return Kind(name, dtype, computed, p.layout == torch.strided and p.is_contiguous())


def place(t: torch.Tensor) -> int | None:
    """CUDA's number of the device of this tensor; None for the host."""
    return t.device.index if t.device.type == "cuda" else None


def named(device: int | None) -> str:
    """torch's name for this place."""
    return "cpu" if device is None else f"cuda:{device}"


def is_plain(t: torch.Tensor) -> bool:
    """Is this torch's own kind of tensor, with real memory on the host or on a CUDA device?"""
    own = type(t) in (torch.nn.Parameter, torch.Tensor)
    return own and t.layout == torch.strided and t.device.type in ("cpu", "cuda")


def unusable(p: torch.Tensor) -> str | None:
    """Why our kernels cannot handle this parameter; None if they can."""
    if type(p) not in (torch.nn.Parameter, torch.Tensor):
        return f"it is a {type(p).__qualname__}, not a plain tensor"
    if not is_plain(p):
        return f"it is on {p.device} as {p.layout}"
    if p.dtype not in REALS:
        return f"its dtype is {p.dtype}"
    if not is_dense(p):
        return f"it is not dense: shape {tuple(p.shape)}, strides {p.stride()}"
    if p.is_conj() or p.is_neg():
        return "it is conjugated or negated lazily"
    device = place(p)
    return None if device is None else why_no_kernels(device)


def unusable_grad(p: torch.Tensor, grad: torch.Tensor) -> str | None:
    """Why our kernels cannot handle this gradient of a parameter that they can handle."""
    if type(grad) is not torch.Tensor and type(grad) is not torch.nn.Parameter:
        return f"its gradient is a {type(grad).__qualname__}, not a plain tensor"
    if grad.layout != torch.strided or grad.device != p.device:
        return f"its gradient is on {grad.device} as {grad.layout}"
    if grad.shape != p.shape:
        return f"its gradient has shape {tuple(grad.shape)}"
    if grad.dtype != p.dtype and not (p.dtype == torch.float32 and grad.dtype in HALVES):
        return f"its gradient has dtype {grad.dtype}"
    return None


def extent(t: torch.Tensor) -> tuple[int, int]:
    """The address of the first byte of a plain tensor, and the address after its last."""
    if not t.numel():
        return 0, 0
    reach = 1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + reach * t.element_size()


def has_memory(t: torch.Tensor) -> bool:
    """Is there memory behind each element? A storage may be resized to nothing (FSDP does); torch then segfaults."""
    return not t.numel() or bool(t.untyped_storage().nbytes() > t.storage_offset() * t.element_size())


def memory_of(state: Mapping[str, Any] | None) -> list[torch.Tensor]:
    """The tensors of a state that a step writes, besides its counters."""
    names = (*KEPT, *INTEGERS)
    return [] if state is None else [x for name in names if isinstance(x := state.get(name), torch.Tensor)]


def is_dense(t: torch.Tensor) -> bool:
    """Is its memory one block, with each element once, in any order of dimensions?"""
    if t.numel() == 0:
        return True
    expected = 1
    for stride, n in sorted((stride, n) for stride, n in zip(t.stride(), t.shape, strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= n
    return True


def lie_alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Do both have their elements in the same order in memory?"""
    return a.shape == b.shape and (
        a.numel() == 0 or all(n == 1 or s == r for n, s, r in zip(a.shape, a.stride(), b.stride(), strict=True))
    )


def wanted(h: Mapping[str, Any], p: torch.Tensor) -> list[str]:
    """The names of the state that these hyperparameters need for this parameter, besides ``step``."""
    names = [name for name, switch in KEPT.items() if switch is None or h[switch]]
    names += [BASE] * (h["square_avg_dtype"] == "uint8") + [REMAINDER] * keeps_rest(h, p)
    return [*names, "bias_weight"] if h["bias_correction"] else names


def keeps_rest(h: Mapping[str, Any], p: torch.Tensor) -> bool:
    """Is the remainder of this parameter kept?"""
    return bool(h["store_param_remainders"]) and p.dtype == torch.bfloat16


def dithers(h: Mapping[str, Any], p: torch.Tensor) -> bool:
    """Is anything of this parameter rounded stochastically?"""
    return hyper.moment_dtype(h) != "float32" or (bool(h["bf16_stochastic_round"]) and p.dtype == torch.bfloat16)


def _form(p: torch.Tensor, h: Mapping[str, Any], name: str) -> tuple[torch.dtype, torch.Size]:
    """The dtype and the shape of this state of a parameter."""
    if name in INTEGERS:
        return INTEGERS[name], torch.Size([blocks_of(p.numel())]) if name == BASE else p.shape
    if name == "bias_weight":
        return real_state_dtype(p), torch.Size()
    return CODES.get(h["square_avg_dtype"] if name == "square_avg" else "", state_dtype(p)), p.shape


def unusable_state(p: torch.Tensor, state: Mapping[str, Any], h: Mapping[str, Any]) -> str | None:
    """Why our kernels cannot continue with this state."""
    if not state:
        return None
    step: Any = state.get("step")
    if type(step) is not torch.Tensor or step.dtype not in (torch.float32, torch.float64):
        return f"its step is {_described(step)}"
    if not is_plain(step) or step.numel() != 1:  # it may be on any device: `prepare` moves it
        return f"its step is {_described(step)}"
    for name in wanted(h, p):
        x: Any = state.get(name)
        if x is None:
            continue
        dtype, shape = _form(p, h, name)
        if type(x) is not torch.Tensor or x.shape != shape or x.device != p.device or x.layout != torch.strided:
            return f"its {name} is {_described(x)}"
        integers = not dtype.is_floating_point and not dtype.is_complex
        if integers and x.dtype != dtype:
            return f"its {name} has dtype {x.dtype}; wanted {dtype}"
        if not integers and torch.promote_types(x.dtype, state_dtype(p)) != state_dtype(p):
            return f"its {name} has dtype {x.dtype}, which {state_dtype(p)} cannot hold"
    return None


def other_format(state: Mapping[str, Any], h: Mapping[str, Any]) -> str | None:
    """The format of the second moment of a state, if it differs from the one in the hyperparameters."""
    x = state.get("square_avg")
    found = format_of(x) if isinstance(x, torch.Tensor) else h["square_avg_dtype"]
    return None if found == h["square_avg_dtype"] else str(found)


def _described(x: object) -> str:
    if isinstance(x, torch.Tensor):
        return f"a {type(x).__qualname__} of {x.dtype} with shape {tuple(x.shape)} on {x.device}"
    return f"a {type(x).__name__}"


def prepare(p: torch.Tensor, state: dict[str, Any], h: Mapping[str, Any], *, counts_there: bool) -> None:
    """Make what is missing in a usable state, and copy once what has a different memory layout from its parameter.

    The step counter is where the parameter is, or else on the host; a checkpoint may bring it from another device.
    """
    if not state:
        state["step"] = _counter(p if counts_there else None)
    elif place(state["step"]) != (place(p) if counts_there else None):
        state["step"] = _counter(p if counts_there else None).copy_(state["step"])
    for name in wanted(h, p):
        x, (dtype, shape) = state.get(name), _form(p, h, name)
        if name == "bias_weight":
            if x is None or x.dtype != real_state_dtype(p):
                weight = 1.0 - h["alpha"] ** float(state["step"]) if x is None else float(x)
                state[name] = p.new_full((), weight, dtype=real_state_dtype(p), requires_grad=False)
        elif name == BASE:
            if x is None or not x.is_contiguous():
                made = p.new_full(shape, _first(h, name), dtype=dtype, requires_grad=False)
                state[name] = made if x is None else made.copy_(x)
        elif x is None:
            made = torch.empty_like(p, dtype=dtype, memory_format=torch.preserve_format).detach()
            # A complex number is two reals.
            (torch.view_as_real(made) if made.is_complex() else made).fill_(_first(h, name))
            state[name] = made
        elif x.dtype != dtype or x.requires_grad or x.is_conj() or x.is_neg() or not lie_alike(x, p):
            anew = torch.empty_like(p, dtype=dtype, memory_format=torch.preserve_format).detach()
            state[name] = anew.copy_(x.detach())


def _first(h: Mapping[str, Any], name: str) -> float:
    """The initial value of each element of this state."""
    if name not in ("square_avg", BASE):
        return 0.0
    if h["square_avg_dtype"] == "float32":
        return float(h["initial_scale"])
    found = coded(torch.tensor([h["initial_scale"]], dtype=torch.float32, device="cpu"), h["square_avg_dtype"])
    return int(found[name == BASE])  # type: ignore[arg-type]  # 8-bit codes have a base


def _counter(p: torch.Tensor | None) -> torch.Tensor:
    """A step counter at 0, with torch's dtype: where this parameter is, or on the host."""
    dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
    return (
        torch.zeros((), dtype=dtype, device="cpu") if p is None else p.new_zeros((), dtype=dtype, requires_grad=False)
    )


def real_state_dtype(p: torch.Tensor) -> torch.dtype:
    """The dtype of the arithmetic."""
    return torch.float32 if p.dtype in HALVES else REALS[p.dtype]
