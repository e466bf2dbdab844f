"""The rows in host memory, or those on CUDA devices; a plan cannot mix the two."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import numpy as np
import torch

from .. import hyper
from ..arrays import dtypes
from ..arrays.checks import Tensor
from ..arrays.layout import Layout, NDArray
from ..kernels import table
from ..steps.batch import Batch, Written
from ..steps.library import Streams
from ..steps.plan import MakeSteps, Plan, Settings
from ..steps.signals import SILENCE, Signals, signals
from .arguments import number
from .gradients import Row
from .library import TORCH
from .rows import REALS, named, place
from .steps import TensorSteps

_grad = attrgetter("grad")


class Side:
    """Rows of one side, ready to step."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self._params = [row.param for row in rows]
        self._tensors = [_tensor(row) for row in rows]
        self._states = [_state(row) for row in rows]
        self._seeds = [row.seed or 0 for row in rows]
        self._dtypes = [dtype_of(row.grad_dtype) for row in rows]
        self._computes = {dtypes.compute_dtype(dtype_of(row.param.dtype)) for row in rows}
        self._steps = np.zeros(1, np.int64)
        self.kinds = {(row.group, dtype_of(row.param.dtype)) for row in rows}
        self.plans: dict[hyper.Asked, Plan] = {}

    def bind(self, told: Signals, settings: Callable[[Side, hyper.Asked], Settings]) -> Callable[[], None]:
        """Accept the current gradients and return what launches the step. All refusals come from here."""
        plan = self.plans.get(told.asked)
        if plan is None:
            plan = self.plans[told.asked] = Plan(
                self._tensors,
                [row.group for row in self.rows],
                self._states,
                settings(self, told.asked),
                self._dtypes,
                self._make_steps(),
                self._outcomes(),
                told.asked,
            )
            plan.write_seeds(self._seeds)
        plan.bind(list(map(_grad, self._params)), told)
        return plan.launch

    @property
    def broken(self) -> str | None:
        """Why it cannot go on, or None if it can."""
        return None

    def refuse_numbers(self) -> None:
        """Raise if numbers that differ from those of the last step cannot be used now."""

    def _numbers(self, scale: Any, found: Any) -> Signals:
        made = signals(number(scale), number(found), False, [], self._computes)
        if made.problems:
            made.problems.raise_any()
        return made

    def _make_steps(self) -> MakeSteps:
        raise NotImplementedError

    def _outcomes(self) -> Mapping[int | None, int]:
        raise NotImplementedError

    def told(self, scale: Any, found: Any) -> Signals:
        """What ``GradScaler.step`` left on an optimizer with ``fused=True``."""
        raise NotImplementedError


class HostSide(Side):
    """In host memory."""

    def __init__(self, rows: Sequence[Row]) -> None:
        super().__init__(rows)
        self._outcome = np.zeros(2, np.int64)

    def _outcomes(self) -> Mapping[int | None, int]:
        return {None: self._outcome.ctypes.data}

    def _make_steps(self) -> MakeSteps:
        def make(order: Sequence[int], batches: Sequence[Batch], written: Written) -> TensorSteps:
            return TensorSteps([self.rows[i] for i in order], batches, written, self._steps, self._outcome)

        return make

    def told(self, scale: Any, found: Any) -> Signals:
        return self._numbers(scale, found)


class CudaSide(Side):
    """On CUDA devices: the work goes to torch's current stream on each, and the host does not wait."""

    def __init__(self, rows: Sequence[Row], rates: Mapping[int, tuple[torch.Tensor, float]]) -> None:
        super().__init__(rows)
        self._devices = list(dict.fromkeys(place(row.param) or 0 for row in rows))
        self._streams = Streams(self._devices, TORCH)
        self._rates = rates
        words = {device: torch.zeros(2, dtype=torch.int64, device=named(device)) for device in self._devices}
        self._outcome = words

    def _outcomes(self) -> Mapping[int | None, int]:
        return {device: words.data_ptr() for device, words in self._outcome.items()}

    def _make_steps(self) -> MakeSteps:
        from .cuda_steps import cuda_steps  # it imports Numba's CUDA target

        def make(order: Sequence[int], batches: Sequence[Batch], written: Written) -> Any:
            rows, tensors = [self.rows[i] for i in order], [self._tensors[i] for i in order]
            return cuda_steps(rows, tensors, batches, written, self._outcome, self._rates, self._streams)

        return make

    def bind(self, told: Signals, settings: Callable[[Side, hyper.Asked], Settings]) -> Callable[[], None]:
        if told.asked not in self.plans:
            self.refuse_capture("this kind of step was not taken before")
        return super().bind(told, settings)

    @property
    def broken(self) -> str | None:
        return self._streams.broken

    def refuse_numbers(self) -> None:
        self.refuse_capture("its numbers differ from those of the last step")

    def refuse_capture(self, why: str) -> None:
        if self._streams.capturing():
            raise RuntimeError(f"the step is captured in a CUDA graph, but {why}; {TORCH.warm_up}")

    def told(self, scale: Any, found: Any) -> Signals:
        if len(self._devices) > 1:
            raise RuntimeError(
                f"grad_scale and found_inf need all parameters on one device; they are on "
                f"{', '.join(map(named, self._devices))}. Without fused=True GradScaler unscales the gradients itself"
            )
        words: list[int] = []
        for name, x in (("grad_scale", scale), ("found_inf", found)):
            if x is None:
                words += [table.NOTHING, 0]
                continue
            if not isinstance(x, torch.Tensor) or place(x) is None:
                return self._numbers(scale, found)
            if x.dtype != torch.float32 or x.numel() != 1 or self._devices != [place(x)]:
                raise RuntimeError(
                    f"{name} is a tensor of {x.dtype} with shape {tuple(x.shape)} on {x.device}; wanted one float32 on "
                    f"{named(self._devices[0])}, as the parameters are"
                )
            words += [table.AT_FLOAT32, x.data_ptr()]
        asked = hyper.Asked(told=True, scaled=scale is not None)
        both = ("grad_scale", scale), ("found_inf", found)
        arrays = tuple((name, x, shadow(x).view(np.float32)) for name, x in both if x is not None)
        return SILENCE._replace(asked=asked, words=tuple(words), arrays=arrays)


def dtype_of(dtype: torch.dtype) -> Any:
    """The dtype of the real numbers that a kernel sees for torch's dtype."""
    return dtypes.named(str(REALS[dtype]).removeprefix("torch."))


def _tensor(row: Row) -> Tensor:
    """The parameter in the form of a plan: a flat array of real numbers."""
    p, dtype = row.param, dtype_of(row.param.dtype)
    layout = Layout((p.numel() * (1 + p.is_complex()),), (dtype.itemsize,), dtype, 0)
    labels = row.name, row.name, f"{row.name}.grad", f"state of {row.name}, "
    return Tensor(*labels, p, shadow(p), layout, p.data_ptr(), place(p))


def _state(row: Row) -> dict[str, NDArray]:
    """What a step reads and writes in a parameter's state, under the names used in a table."""
    found = {name: shadow(row.state[name]) for name in row.kept}
    if row.seed is not None:
        step = row.state["step"]
        found[f"step of {str(step.dtype).removeprefix('torch.')}"] = shadow(step)
    return found


def shadow(t: torch.Tensor) -> NDArray:
    """An array at the addresses of a dense tensor, used only to examine them; its elements are not touched."""
    nbytes = t.numel() * t.element_size()
    memory: Any = (ctypes.c_uint8 * nbytes).from_address(t.data_ptr()) if nbytes else b""
    return np.frombuffer(memory, np.uint8)
