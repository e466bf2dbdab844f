"""What was measured of a step and its launches, in plain numbers, and what follows from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .units import seconds


@dataclass(frozen=True)
class Times:
    """Seconds: the median and the quartiles of the repeats."""

    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Times:
        """The quartiles of measured times."""
        q1, median, q3 = np.quantile(seconds, (0.25, 0.5, 0.75)).tolist()
        return cls(median, q1, q3)

    def __str__(self) -> str:
        return f"{seconds(self.median)} ({seconds(self.q1)} to {seconds(self.q3)})"


@dataclass(frozen=True)
class Code:
    """What is known of the machine code of a CUDA kernel."""

    registers: int  # a thread
    local_bytes: int  # of local memory a thread: the stack, and what was spilled
    spill_bytes: int | None  # stores and loads of spilled registers; None where ptxas is not installed
    blocks_per_multiprocessor: int
    occupancy: float  # threads that a multiprocessor holds at a time, of those it could
    instructions_of: str
    instructions: Mapping[str, int]


@dataclass(frozen=True)
class Launch:
    """What a step launches over the tensors that share device, dtype and Variant (a second, small kernel with it)."""

    name: str
    device: str  # "cpu", "cuda:0"
    variant: str
    dtype: str  # of parameters and gradients
    compute_dtype: str  # of the state and the arithmetic
    tensors: int  # that have a gradient
    elements: int
    chunks: int
    grid: int | None  # blocks; None on the CPU
    block: int | None  # threads
    bytes_per_element: int  # by the model of traffic.py
    bytes: int
    flops_per_element: int
    seconds: Times
    copy_rate: float  # bytes a second that a copy of as many bytes moved
    code: Code | None  # None on the CPU

    @property
    def rate(self) -> float:
        """Bytes a second."""
        return self.bytes / self.seconds.median

    @property
    def fraction_of_copy(self) -> float:
        """Of the speed of the copy."""
        return self.rate / self.copy_rate

    @property
    def flop_rate(self) -> float:
        """Floating-point operations a second."""
        return self.flops_per_element * self.elements / self.seconds.median

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.flops_per_element / self.bytes_per_element


@dataclass(frozen=True)
class Results:
    """What `profile` measured."""

    optimizer: str
    device: str
    repeats: int
    host: Times
    device_times: Times
    launches: list[Launch]
    memory_rate: float  # bytes a second, of the fastest copy that no cache holds
    flop_rates: dict[str, float]  # operations a second by compute dtype, of fma, at best
    skipped: int  # tensors without a gradient

    @property
    def bytes(self) -> int:
        """That a step moves."""
        return sum(launch.bytes for launch in self.launches)

    @property
    def rate(self) -> float:
        """Bytes a second."""
        return self.bytes / self.device_times.median

    @property
    def fraction_of_copy(self) -> float:
        """How long the copies of all launches take, of what the launches take."""
        copies = sum(launch.bytes / launch.copy_rate for launch in self.launches)
        return copies / sum(launch.seconds.median for launch in self.launches)

    def to_dict(self) -> dict[str, Any]:
        """Everything that was measured, in dicts, lists, strings and numbers."""
        return asdict(self)
