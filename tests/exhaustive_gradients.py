"""One step for every float32 gradient, on the CPU and on a CUDA device: are param and square_avg bit-identical?

    python tests/exhaustive_gradients.py --log gradients.txt

A pass covers all 2^32 bit patterns. Each is combined with one of the pairs of parameter and average below: neighbours
get different pairs, and --shift changes them. --start and --stop (0x... or decimal) divide a pass, or resume it. Any
NaN equals any NaN. The exit status is 1 if anything differs.
"""

import argparse
import platform
import sys
import time
from importlib.metadata import version
from itertools import product

import numpy as np
from rich.progress import Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rmsprop_gpu import RMSProp, __version__
from rmsprop_gpu.arrays.selector import cuda_devices, cuda_versions

EVERY = 2**32
# An odd number of pairs, so that they keep changing along the powers of two in the bit patterns. Apart from 0, none is
# exact in binary, and every average meets gradients whose square is about as large, so that roundings show.
PARAMS = [1.1, -0.6, 3e38, 1e-40, -0.0]
AVERAGES = [0.0, 1e-45, 1e-39, 1e-30, 1e-12, 1e-4, 0.7, 1e30, np.inf]
PAIRS = np.array(list(product(PARAMS, AVERAGES)), np.float64).astype(np.float32)
GIVEN = {"lr": 0.013, "alpha": 0.93, "eps": 1e-8}


class Blocks:
    """Steps over consecutive blocks of gradients, on both backends."""

    def __init__(self, size, shift):
        import cupy

        repeats = -(-(size + len(PAIRS)) // len(PAIRS))
        self._params, self._averages = (np.tile(column, repeats) for column in PAIRS.T)
        self._shift = shift
        self._count = np.arange(size, dtype=np.uint32)
        self.grad = np.empty_like(self._count)
        self.here = [np.empty(size, np.float32) for _ in range(2)]
        self.there = [np.empty(size, np.float32) for _ in range(2)]
        self._device_grad = cupy.empty(size, np.float32)
        self._device = [cupy.empty(size, np.float32) for _ in range(2)]
        self._cpu = RMSProp(self.here[0], **GIVEN)
        self._gpu = RMSProp(self._device[0], **GIVEN)

    def start_of(self, first):
        """The parameters and averages for the gradients from `first` on."""
        at = (first + self._shift) % len(PAIRS)
        return [column[at : at + self.grad.size] for column in (self._params, self._averages)]

    def run(self, first):
        """Step a block on both backends. Returns the positions that differ."""
        np.add(self._count, np.uint32(first), out=self.grad)
        grad = self.grad.view(np.float32)
        param, average = self.start_of(first)
        # The device has its own memory: inputs are copied before the step, and results fetched after it.
        self._device_grad.set(grad)
        for target, x in zip((self._device[0], self._gpu.state[0]["square_avg"]), (param, average), strict=True):
            target.set(x)
        self._gpu.step(self._device_grad)
        self.here[0][:], self._cpu.state[0]["square_avg"][:] = param, average
        self._cpu.step(grad)
        self.here[1] = self._cpu.state[0]["square_avg"]
        for got, x in zip(self.there, (self._device[0], self._gpu.state[0]["square_avg"]), strict=True):
            x.get(out=got)
        return np.unique(np.concatenate([differing(g, w) for g, w in zip(self.there, self.here, strict=True)]))


def differing(got, want):
    """Where the bits differ, except for two NaNs."""
    at = (got.view(np.uint32) != want.view(np.uint32)).nonzero()[0]
    return at[~(np.isnan(got[at]) & np.isnan(want[at]))] if at.size else at


def described(blocks, first, k):
    def both(x):
        return f"{x} ({x.view(np.uint32):#010x})"

    param, average = blocks.start_of(first)
    lines = [f"gradient {both(blocks.grad.view(np.float32)[k])}, param {both(param[k])}, square_avg {both(average[k])}"]
    for name, got, want in zip(("param", "square_avg"), blocks.there, blocks.here, strict=True):
        lines.append(f"    {name}: {both(got[k])} on the device, {both(want[k])} on the CPU")
    return lines


def device():
    import cupy

    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    return f"{properties['name'].decode()}, compute capability {properties['major']}.{properties['minor']}"


def versions():
    import cupy
    import numba_cuda

    found = {
        "rmsprop_gpu": __version__,
        "Python": platform.python_version(),
        "NumPy": np.__version__,
        "Numba": version("numba"),
        "CuPy": cupy.__version__,
        "numba-cuda": numba_cuda.__version__,
        "CUDA": cuda_versions(),
    }
    return ", ".join(f"{name} {x}" for name, x in found.items())


def integer(text):
    return int(text, 0)


def parsed(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--start", type=integer, default=0, help="the first bit pattern (0)")
    parser.add_argument("--stop", type=integer, default=EVERY, help="the one after the last (2**32)")
    parser.add_argument("--shift", type=integer, default=0, help=f"which pairs they get, 0 to {len(PAIRS) - 1} (0)")
    parser.add_argument("--block", type=integer, default=2**22, help="patterns per step (2**22)")
    parser.add_argument("--log", help="a file to which the summary is appended")
    given = parser.parse_args(argv)
    if not 0 <= given.start < given.stop <= EVERY or given.block < 1:
        parser.error(f"wanted 0 <= start < stop <= {EVERY} and a block of at least 1")
    return given


def main(argv=None):
    given = parsed(argv)
    try:
        cuda_devices()
    except RuntimeError as error:
        sys.exit(str(error))
    size = min(given.block, given.stop - given.start)
    blocks = Blocks(size, given.shift)
    blocks.run(given.start)  # compile
    differ, examples, done = 0, [], given.start
    began = time.perf_counter()
    columns = [*Progress.get_default_columns()[:3], TimeElapsedColumn(), TimeRemainingColumn()]
    columns.append(TextColumn("{task.fields[at]}"))
    try:
        with Progress(*columns) as progress:
            task = progress.add_task("gradients", total=given.stop - given.start, at="")
            while done < given.stop:
                first = min(done, given.stop - size)  # the last block repeats the end of the previous one
                wrong = blocks.run(first)
                wrong = wrong[first + wrong >= done]
                differ += wrong.size
                examples += ["\n".join(described(blocks, first, k)) for k in wrong[: 5 - len(examples)]]
                progress.update(task, advance=first + size - done, at=f"from {first:#010x}, {differ:,} differ")
                done = first + size
    except KeyboardInterrupt:
        pass  # report what was done and where to resume
    seconds = time.perf_counter() - began
    summary = [
        f"{time.strftime('%Y-%m-%d')} gradients {given.start:#010x} to {done - 1:#010x}, shift {given.shift}: "
        f"{done - given.start:,} compared, {differ:,} differ, {seconds:.0f} s",
        *examples,
        device(),
        versions(),
        *([f"interrupted; go on with --start {done:#x} --stop {given.stop:#x}"] if done < given.stop else []),
    ]
    print("\n".join(summary))
    if given.log:
        with open(given.log, "a") as log:
            log.write("\n".join(summary) + "\n\n")
    return 1 if differ or done < given.stop else 0


if __name__ == "__main__":
    sys.exit(main())
