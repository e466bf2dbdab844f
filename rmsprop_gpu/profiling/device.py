"""The clock and the ceilings of CUDA devices: events, a device copy, fma; and facts about a kernel's code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import cupy
import numpy as np
from cupyx.profiler import benchmark

from ..kernels import cuda
from ..kernels.compiling import once
from ..kernels.cuda_target import target
from ..kernels.intrinsics import fma
from ..steps.batch import Batch
from . import machine_code
from .results import Code

WARM_UP = 3
COPY = 1 << 28  # the most bytes that a copy moves: larger than the caches
CHAINS, DEPTH = 4, 64  # chains per thread, which hide each other's latency, and fma per chain
LONG_ENOUGH = 2e-4  # seconds, compared with which a launch is negligible


def _make_fma_kernel(T: Any) -> Any:
    half = T(0.5)

    @target.jit
    def fma_kernel(results, rounds):  # type: ignore[no-untyped-def]
        index = target.grid(1)
        a = T(index)
        b, c, d = a + half, a - half, a * half
        for _ in range(rounds):
            for _ in range(DEPTH):
                a, b, c, d = fma(a, half, half), fma(b, half, half), fma(c, half, half), fma(d, half, half)
        if a + b + c + d == half:  # never true, but the compiler must not know that
            results[0] = a

    return fma_kernel


class DeviceProbe:
    """Measures on CUDA devices; with several, the slowest counts, and the ceilings are those of the first."""

    def __init__(self, devices: Sequence[int]) -> None:
        self._devices = tuple(devices)
        properties = [cupy.cuda.runtime.getDeviceProperties(device) for device in devices]
        self.name = ", ".join(p["name"].decode() for p in properties)
        self._capability = {device: (p["major"], p["minor"]) for device, p in zip(devices, properties, strict=True)}

    def step(
        self, bind: Callable[[], Callable[[], object]], repeats: int, within: AbstractContextManager[Any]
    ) -> tuple[list[float], list[float]]:
        """Seconds of the host for ``bind()()``, and of the devices for repeating the call that ``bind()`` returned.

        With the host's work in front, the device's time would include waiting for it.
        """

        def step() -> None:
            with within:
                bind()()

        result = benchmark(step, n_repeat=repeats, n_warmup=WARM_UP, devices=self._devices)
        return result.cpu_times.tolist(), self._seconds(bind(), repeats)

    def launch(
        self, call: Callable[[], object], batch: Batch, moved: int, repeats: int, within: AbstractContextManager[Any]
    ) -> tuple[list[float], list[float], int]:
        """Seconds of a launch over a batch, and of a copy of as many bytes, half of them read; and the copy's bytes."""
        with cupy.cuda.Device(batch.device):
            with within:
                seconds = self._seconds(call, repeats)
            return seconds, *self._copies(moved, repeats)

    def _seconds(self, call: Callable[[], object], repeats: int) -> list[float]:
        """Seconds of the devices for each of many calls."""
        result = benchmark(call, n_repeat=repeats, n_warmup=WARM_UP, devices=self._devices, name="call")
        times: list[float] = result.gpu_times.max(axis=0).tolist()
        return times

    def memory_rate(self, repeats: int) -> tuple[float, float | None]:
        """Bytes per second of a copy too large for any cache; None, since other users of the device are unknown."""
        with cupy.cuda.Device(self._devices[0]):
            seconds, copied = self._copies(COPY, repeats)
        return copied / min(seconds), None

    def _copies(self, moved: int, repeats: int) -> tuple[list[float], int]:
        """Seconds of copies, and the bytes that each one moved."""
        half = min(moved, COPY) // 2
        source, target = cupy.zeros(half, np.uint8), cupy.zeros(half, np.uint8)
        stream = cupy.cuda.get_current_stream()
        copy = lambda: target.data.copy_from_device_async(source.data, half, stream)  # noqa: E731
        return self._seconds(copy, repeats), 2 * half

    def flop_rate(self, T: Any, repeats: int) -> float:
        """Operations per second, for fma of type T on all multiprocessors."""
        kernel, rounds, threads = once(_make_fma_kernel, T), 1, 256
        with cupy.cuda.Device(self._devices[0]) as device:
            blocks = 8 * device.attributes["MultiProcessorCount"]
            results = cupy.zeros(1, T)
            stream = target.external_stream(cupy.cuda.get_current_stream().ptr)
            call = lambda: kernel[blocks, threads, stream](results, rounds)  # noqa: E731
            while (seconds := min(self._seconds(call, 3))) < LONG_ENOUGH:
                rounds *= 2
            rate: float = 2 * CHAINS * DEPTH * rounds * blocks * threads / seconds
        return rate

    def facts(self, batch: Batch) -> dict[str, Any]:
        """How the work of a batch is cut, and facts about its kernel's code."""
        chunks = len(cuda.chunks(batch.sizes, batch.dtype))
        return {"chunks": chunks, "grid": chunks, "block": cuda.THREADS, "code": self._code(batch)}

    def _code(self, batch: Batch) -> Code:
        """Registers and occupancy of the loaded kernel; spills and instructions from ptxas if it is installed."""
        device = batch.device or 0
        made = batch.variant, batch.dtype, batch.grad_dtype
        with cupy.cuda.Device(device) as current:
            kernel = cuda.kernels(*made)["update_kernel"]
            most = current.attributes["MaxThreadsPerMultiProcessor"]
        blocks = kernel.occupancy.max_active_blocks_per_multiprocessor(cuda.THREADS, 0)
        spills: int | None = None
        try:
            (facts,) = machine_code.read([cuda.update_function(*made)], self._capability[device])
            spills, source, mix = facts.spill_bytes, "the vector loop in machine code", facts.mix
        except RuntimeError:  # a tool is not installed, or does not know the device
            with cupy.cuda.Device(device):
                compiled = cuda.functions(*made)["update_kernel"]
            (ptx, *_) = compiled.inspect_asm().values()
            source, mix = "the whole kernel in PTX", machine_code.mix_of_ptx(ptx)
        return Code(
            registers=int(kernel.attributes.num_regs),
            local_bytes=int(kernel.attributes.local_size_bytes),
            spill_bytes=spills,
            blocks_per_multiprocessor=int(blocks),
            occupancy=blocks * cuda.THREADS / most,
            instructions_of=source,
            instructions=mix,
        )
