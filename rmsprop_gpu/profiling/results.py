"""The measurements of a step and its launches, in plain numbers, and what follows from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np

from .units import seconds

Kind = TypeVar("Kind", bound="Results")


@dataclass(frozen=True)
class Times:
    """Times of the repeats.

    Attributes
    ----------
    median, q1, q3, min, max : float
        In seconds: the median, the quartiles and the extremes.
    each : tuple of float
        Every single one, in the order of measurement.

    Examples
    --------
    >>> from timeit import repeat
    >>> times = Times.of(repeat("sum(range(100))", number=1, repeat=5))
    >>> times.min <= times.q1 <= times.median <= times.q3 <= times.max
    True
    """

    median: float
    q1: float
    q3: float
    min: float
    max: float
    each: tuple[float, ...]

    @classmethod
    def of(cls, seconds: Iterable[float]) -> Times:
        """Measured times.

        Examples
        --------
        >>> Times.of([0.3, 0.1, 0.2]).median
        0.2
        """
        each = tuple(map(float, seconds))
        if not each:
            raise ValueError("seconds is empty; wanted the time of at least one repeat")
        low, q1, median, q3, high = np.quantile(each, (0, 0.25, 0.5, 0.75, 1)).tolist()
        return cls(median, q1, q3, low, high, each)

    @property
    def spread(self) -> float:
        """Seconds between the quartiles."""
        return self.q3 - self.q1

    def __str__(self) -> str:
        return f"{seconds(self.median)} ({seconds(self.q1)} to {seconds(self.q3)})"


@dataclass(frozen=True)
class Code:
    """What `profile` says of a kernel as it is loaded on a CUDA device: ``launch.code``, which is None on the CPU.

    Attributes
    ----------
    registers : int
        Per thread.
    local_bytes : int
        Of local memory per thread: the stack, and spilled registers.
    spill_bytes : int or None
        Of spilled registers, per thread: stores and loads together. None if ptxas or nvdisasm is not installed.
    blocks_per_multiprocessor : int
        The most that can be resident at a time.
    occupancy : float
        The threads resident on a multiprocessor, as a fraction of the most possible.
    instructions_of : str
        Where instructions are counted: the loop over vectors in the machine code or, without those tools, all of the
        PTX.
    instructions : mapping from str to int
        Their number by purpose, the most frequent first.

    Examples
    --------
    >>> import numpy as np
    >>> from rmsprop_gpu import RMSProp
    >>> from rmsprop_gpu.profiling import profile
    >>> (launch,) = profile(RMSProp(np.ones(1000)), np.ones(1000), repeats=3).launches
    >>> print(launch.code)
    None
    >>> Code(32, 0, 0, 8, 1.0, "the whole kernel in PTX", {"float32": 30, "memory": 9}).occupancy
    1.0
    """

    registers: int
    local_bytes: int
    spill_bytes: int | None
    blocks_per_multiprocessor: int
    occupancy: float
    instructions_of: str
    instructions: Mapping[str, int]


@dataclass(frozen=True)
class Launch:
    """A step's launch over the tensors that share device, dtypes and Variant (with a second, small kernel if needed).

    Attributes
    ----------
    name : str
        As in ``opt.kernels()``.
    device : str
        ``"cpu"``, or ``"cuda:0"``.
    variant : str
        The switches that are on.
    dtype, grad_dtype, compute_dtype : str
        The dtype of parameters, of gradients, and of the arithmetic.
    tensors, elements : int
        That have a gradient.
    chunks : int
        The pieces into which the elements are cut, each for one thread of the CPU or one block of a device.
    grid, block : int or None
        Blocks, and threads per block; None on the CPU.
    bytes_per_element : float
        Read and written, by the model of the streams that a step cannot do without.
    bytes : int
        Of the whole launch, by this model.
    flops_per_element : int
        Floating-point operations.
    seconds : Times
        Of the launch.
    copies : Times
        Of a copy, measured beside it.
    copied : int
        The bytes that this copy moved: as many as the launch, unless limited by the largest copy.
    code : Code or None
        The kernel's :class:`~rmsprop_gpu.profiling.results.Code`; None on the CPU.

    Examples
    --------
    >>> import numpy as np
    >>> from rmsprop_gpu import RMSProp
    >>> from rmsprop_gpu.profiling import profile
    >>> (launch,) = profile(RMSProp(np.ones(1000)), np.ones(1000), repeats=3).launches
    >>> launch.name, launch.tensors, launch.bytes
    ('update_kernel[float64, plain]', 1, 40000)
    """

    name: str
    device: str
    variant: str
    dtype: str
    grad_dtype: str
    compute_dtype: str
    tensors: int
    elements: int
    chunks: int
    grid: int | None
    block: int | None
    bytes_per_element: float  # by traffic.py
    bytes: int
    flops_per_element: int
    seconds: Times
    copies: Times
    copied: int
    code: Code | None

    @property
    def copy_rate(self) -> float:
        """Bytes per second of the copy."""
        return self.copied / self.copies.median

    @property
    def rate(self) -> float:
        """Bytes per second."""
        return self.bytes / self.seconds.median

    @property
    def fraction_of_copy(self) -> float:
        """The fraction of the copy's speed."""
        return self.rate / self.copy_rate

    @property
    def flop_rate(self) -> float:
        """Floating-point operations per second."""
        return self.flops_per_element * self.elements / self.seconds.median

    @property
    def intensity(self) -> float:
        """Operations per byte."""
        return self.flops_per_element / self.bytes_per_element


@dataclass(frozen=True)
class Ceilings:
    """The best that memory and arithmetic allow.

    Attributes
    ----------
    memory_rate : float
        Bytes per second of the fastest copy that is too large for any cache.
    flop_rates : dict from str to float
        Operations per second of fused multiply-adds, by compute dtype.
    processors : float or None
        The fraction of the threads' time in which they had a processor; None on devices.

    Examples
    --------
    >>> import numpy as np
    >>> from rmsprop_gpu import RMSProp
    >>> from rmsprop_gpu.profiling import profile
    >>> report = profile(RMSProp(np.ones(1000)), np.ones(1000), repeats=3)
    >>> report.before.memory_rate > 0, list(report.before.flop_rates)
    (True, ['float64'])
    """

    memory_rate: float
    flop_rates: dict[str, float]
    processors: float | None


@dataclass(frozen=True)
class Results:
    """What `profile` measured."""

    optimizer: str
    device: str
    repeats: int
    host: Times
    device_times: Times
    launches: list[Launch]
    before: Ceilings
    after: Ceilings
    skipped: int

    @property
    def memory_rate(self) -> float:
        """Bytes per second of the fastest copy that is too large for any cache."""
        return max(self.before.memory_rate, self.after.memory_rate)

    @property
    def flop_rates(self) -> dict[str, float]:
        """The best operations per second of fma, by compute dtype."""
        return {dtype: max(rate, self.after.flop_rates[dtype]) for dtype, rate in self.before.flop_rates.items()}

    @property
    def step(self) -> Times:
        """Times of a whole step: on the CPU host plus kernels, on a device the longer of the two, which overlap."""
        host, kernels = self.host, self.device_times
        if any(launch.device != "cpu" for launch in self.launches):
            return max(host, kernels, key=lambda times: times.median)
        return Times.of(a + b for a, b in zip(host.each, kernels.each, strict=True))

    @property
    def flops(self) -> int:
        """Floating-point operations of a step."""
        return sum(launch.flops_per_element * launch.elements for launch in self.launches)

    @property
    def bytes(self) -> int:
        """The bytes that a step moves."""
        return sum(launch.bytes for launch in self.launches)

    @property
    def rate(self) -> float:
        """Bytes per second."""
        return self.bytes / self.device_times.median

    @property
    def fraction_of_copy(self) -> float:
        """The time of the copies for all launches, as a fraction of the time of the launches."""
        copies = sum(launch.bytes / launch.copy_rate for launch in self.launches)
        return copies / sum(launch.seconds.median for launch in self.launches)

    def to_dict(self) -> dict[str, Any]:
        """Everything that was measured, as dicts, lists, strings and numbers, which `from_dict` can read.

        Examples
        --------
        >>> import json
        >>> import numpy as np
        >>> from rmsprop_gpu import RMSProp
        >>> from rmsprop_gpu.profiling import profile
        >>> report = profile(RMSProp(np.ones(1000)), np.ones(1000), repeats=3)
        >>> json.loads(json.dumps(report.to_dict()))["optimizer"]
        'RMSProp'
        """
        return asdict(self)

    @classmethod
    def from_dict(cls: type[Kind], data: Mapping[str, Any]) -> Kind:
        """Read what `to_dict` returned, also by way of JSON: to compare with measurements made before or elsewhere.

        Raises
        ------
        ValueError
            For anything else.

        Examples
        --------
        >>> import numpy as np
        >>> from rmsprop_gpu import RMSProp
        >>> from rmsprop_gpu.profiling import Report, profile
        >>> report = profile(RMSProp(np.ones(1000)), np.ones(1000), repeats=3)
        >>> Report.from_dict(report.to_dict()) == report
        True
        """
        try:
            launches = [
                Launch(**{**x, **_times(x, "seconds", "copies"), "code": x["code"] and Code(**x["code"])})
                for x in data["launches"]
            ]
            ceilings = {name: Ceilings(**data[name]) for name in ("before", "after")}
            return cls(**{**data, **_times(data, "host", "device_times"), **ceilings, "launches": launches})
        except (KeyError, TypeError) as error:
            raise ValueError(f"data is not a report: {error}; wanted what to_dict of one returned") from None


def _times(data: Mapping[str, Any], *names: str) -> dict[str, Times]:
    return {name: Times(**{**data[name], "each": tuple(data[name]["each"])}) for name in names}
