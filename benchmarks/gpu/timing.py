"""The time that a device takes, without the host's, and arrays to measure with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.measure import quartiles

WARM_UP = 3
MI = 1 << 20
SPIN = """extern "C" __global__ void spin(long long cycles, int* out) {
    long long start = clock64();
    while (clock64() - start < cycles) {}
    *out = 1;
}"""


class Spin:
    """A kernel that keeps a device busy for this many clock cycles, about 2,000 per microsecond."""

    def __init__(self) -> None:
        import cupy

        self._kernel, self._out = cupy.RawKernel(SPIN, "spin"), cupy.zeros(1, np.int32)

    def __call__(self, cycles: int) -> None:
        self._kernel((1,), (1,), (np.int64(cycles), self._out))


class Clock:
    """Times by events. What is timed is enqueued after a kernel that spins until the host has enqueued everything.

    Otherwise the time of a launch of a few microseconds would include the time that the host needs for it.
    """

    def __init__(self, rehearse: bool) -> None:
        self._spin = Spin()
        self._cycles, self._most = (1000, 1000) if rehearse else (1 << 19, 1 << 27)

    def seconds(self, call: Callable[[], object], repeats: int) -> dict[str, float]:
        """Median and quartiles of what a device takes for all that a call enqueues on the current stream."""
        from cupy.cuda import Event, get_elapsed_time

        for _ in range(WARM_UP):
            call()
        found: list[float] = []
        while len(found) < repeats:
            start, end = Event(), Event()
            self._spin(self._cycles)
            start.record()
            call()
            end.record()
            late = start.done  # the device may have waited for the host
            end.synchronize()
            if late and self._cycles < self._most:
                self._cycles *= 2
            else:
                found.append(get_elapsed_time(start, end) / 1e3)
        return quartiles(found)


def normal(size: int, dtype: str = "float32") -> Any:
    """Normal random numbers on the device: a million of them, repeated."""
    import cupy

    numbers = np.random.default_rng(1).standard_normal(min(size, MI)).astype(np.float32)
    pattern, made = cupy.asarray(numbers.astype(dtype)), cupy.empty(size, dtype)
    for i in range(0, size, pattern.size):
        made[i : i + pattern.size] = pattern[: size - i]
    return made
