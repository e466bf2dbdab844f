"""Part: GB/s of a step beside a copy of as many bytes, by size and by what the step does."""

from __future__ import annotations

import functools
import math
from typing import Any

from benchmarks.gpu.measuring import Record, main
from benchmarks.gpu.part import Result, measured
from benchmarks.gpu.timing import MI, Clock, normal
from benchmarks.report import digits, duration, table
from benchmarks.workloads import RESNET50

MEGA = (1, 2, 4, 8, 16, 64, 256)  # times 2^20 elements
LARGE = 64
PLAIN = "plain float32"
# Besides plain float32 of each size: extra elements, the arguments, the bytes per element.
OTHERS: dict[str, tuple[int, dict[str, Any], int]] = {
    "plain float32, one element more": (1, {}, 20),
    "momentum, centered": (0, {"momentum": 0.9, "centered": True}, 36),
    "clipped by the norm": (0, {"global_clipnorm": 1.0}, 24),
    "clipped and checked": (0, {"global_clipnorm": 1.0, "skip_nonfinite": True}, 24),
    "averaged parameters": (0, {"use_ema": True}, 28),
}


class Speed:
    """Measures steps of one clock."""

    def __init__(self, rehearse: bool) -> None:
        self._clock, self._repeats, self._rehearse = Clock(rehearse), 3 if rehearse else 20, rehearse

    def size(self, mega: int) -> int:
        """Elements: this many times 2^20, or 2^10 in a rehearsal."""
        return mega * (MI >> 10 if self._rehearse else MI)

    def step(self, params: list[Any], grads: list[Any], bytes_per_element: int, **given: Any) -> dict[str, Any]:
        """A step over these arrays, and beside it a copy that moves as many bytes, half read and half written."""
        from rmsprop_gpu import RMSProp

        opt = RMSProp(params, lr=1e-6, **given)
        seconds = self._clock.seconds(lambda: opt.step(grads), self._repeats)
        elements = sum(param.size for param in params)
        half = elements * bytes_per_element // 2
        return {"elements": elements, "bytes": 2 * half, "seconds": seconds, "copy_seconds": self._copy(half)}

    def _copy(self, nbytes: int) -> dict[str, float]:
        """The seconds of a copy of this many bytes by the driver."""
        import cupy

        source, target = cupy.zeros(nbytes, "uint8"), cupy.zeros(nbytes, "uint8")
        stream = cupy.cuda.get_current_stream()
        copy = functools.partial(target.data.copy_from_device_async, source.data, nbytes, stream)
        return self._clock.seconds(copy, self._repeats)

    def one(self, size: int, bytes_per_element: int, dtype: str = "float32", **given: Any) -> dict[str, Any]:
        """One tensor."""
        return self.step([normal(size, dtype)], [normal(size, dtype)], bytes_per_element, **given)

    def misaligned(self, size: int) -> dict[str, Any]:
        """Measure a parameter whose address is not aligned for vectors."""
        return self.step([normal(size + 1)[1:]], [normal(size)], 20)

    def zeros(self, size: int) -> dict[str, Any]:
        """Measure with all gradients and averages 0: the slow paths of root and division."""
        return self.step([normal(size)], [normal(size) * 0], 20)

    def many(self, sizes: list[int]) -> dict[str, Any]:
        """Many tensors in one step."""
        return self.step([normal(n) for n in sizes], [normal(n) for n in sizes], 20)


def measure(record: Record, rehearse: bool) -> None:
    """By size, then the other rows, the most telling first."""
    speed = Speed(rehearse)
    for mega in MEGA:
        record.row({"what": PLAIN}, speed.one, speed.size(mega), 20)
    large = speed.size(LARGE)
    for what, (more, given, nbytes) in OTHERS.items():
        record.row({"what": what}, speed.one, large + more, nbytes, **given)
    record.row({"what": "plain float16"}, speed.one, large, 14, "float16")
    record.row({"what": "plain float64"}, speed.one, large // 2, 40, "float64")
    record.row({"what": f"{PLAIN}, zeros"}, speed.zeros, large)
    record.row({"what": f"{PLAIN}, parameter off by 4 bytes"}, speed.misaligned, large)
    sizes = [1] * 161 if rehearse else [math.prod(shape) for shape in RESNET50.shapes]
    record.row({"what": "ResNet-50's 161 tensors" + ", of one element each" * rehearse}, speed.many, sizes)
    for count in (30, 300) if rehearse else (300, 3000):
        record.row({"what": f"{count:,} tensors of 256"}, speed.many, [256] * count)


def rate(row: dict[str, Any]) -> float:
    """GB/s of the step."""
    return float(row["bytes"] / row["seconds"]["median"] / 1e9)


def of_copy(row: dict[str, Any]) -> float:
    """Percent of the copy's speed."""
    return float(100 * row["copy_seconds"]["median"] / row["seconds"]["median"])


def headline(result: Result) -> str:
    """Plain float32: the largest, and the one that is farthest from a copy."""
    rows = [row for row in result["rows"] if row["what"] == PLAIN and "seconds" in row]
    if not rows:
        return "**no size was measured**"
    last = max(rows, key=lambda row: row["elements"])
    slowest = min(rows, key=of_copy)
    return (
        f"plain float32, {last['elements']:,} elements: {digits(rate(last))} GB/s, {of_copy(last):.0f} % of a copy; "
        f"of all sizes at least {of_copy(slowest):.0f} %, with {slowest['elements']:,}"
    )


def lines(result: Result) -> list[str]:
    """All of it."""
    body = []
    for row in result["rows"]:
        if "failed" in row:
            body.append((row["what"], f"**failed**: {row['failed']}", *[""] * 6))
            continue
        q, copy = row["seconds"], row["bytes"] / row["copy_seconds"]["median"] / 1e9
        body.append(
            (
                row["what"],
                f"{row['elements']:,}",
                f"{digits(row['bytes'] / 1e6)} MB",
                duration(q["median"]),
                f"{duration(q['q1'])} to {duration(q['q3'])}",
                digits(rate(row)),
                digits(copy),
                f"{of_copy(row):.0f} %",
            )
        )
    head = ("step", "elements", "moved", "time", "quartiles", "GB/s", "a copy's GB/s", "of a copy")
    return [
        "Times of the device alone, by events: each step is enqueued behind a kernel that spins until the host is",
        "through. What fits in a cache is measured in it, the copy too.",
        "",
        *table(head, body),
    ]


PART = measured("speed", "Speed beside a copy", 30, headline=headline, lines=lines)

if __name__ == "__main__":
    main(measure)
