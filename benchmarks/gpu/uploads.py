"""Part: do uploads behind a running kernel have the data from the time of the call, and did the host wait?"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.gpu.bits import differing
from benchmarks.gpu.measuring import Record, main
from benchmarks.gpu.part import Result, measured
from benchmarks.gpu.timing import Spin
from benchmarks.report import duration, table

SIZES = (8, 1 << 10, 64 << 10, (64 << 10) + 8, 1 << 20, 8 << 20)  # bytes; at 64 KiB CUDA changes its method
BUSY, REHEARSED = 200_000_000, 1000  # cycles of the kernel in front, a tenth of a second
OURS, FIRST = "the package's copy", "the package's copy, the first time"  # when it may allocate pinned memory
PAGEABLE = "CUDA's copy of pageable memory"
STEPS, TENSORS = 3, 1000  # of three elements: 8 kB of addresses


class Busy:
    """A stream with a kernel that runs for a while; `waited` tells whether it ended meanwhile."""

    def __init__(self, rehearse: bool) -> None:
        import cupy

        self.stream, self._spin, self._rehearse = cupy.cuda.Stream(non_blocking=True), Spin(), rehearse
        self._cycles = REHEARSED if rehearse else BUSY
        with self.stream:
            self._spin(1)
        cupy.cuda.Device().synchronize()

    def behind(self, call: Callable[[], object]) -> dict[str, Any]:
        """The seconds of a call whose work comes after the kernel, and whether the host waited for that."""
        with self.stream:
            self._spin(self._cycles)
            runs = not self.stream.done
            start = time.perf_counter()
            call()
            seconds = time.perf_counter() - start
            # Nobody can tell where the kernel has ended before the call, or may end during it, as in a rehearsal.
            return {"seconds": seconds, "waited": self.stream.done if runs and not self._rehearse else None}


def pageable_copy(target: Any, source: np.ndarray, stream: Any) -> None:
    """CUDA's own copy from memory that is not pinned."""
    target.data.copy_from_host_async(source.ctypes.data, source.nbytes, stream)


def copied(busy: Busy, copy: Callable[[Any, np.ndarray, Any], None], nbytes: int) -> dict[str, Any]:
    """Copy, overwrite the source, and see what arrived."""
    import cupy

    source, target = np.arange(nbytes // 8, dtype=np.int64), cupy.empty(nbytes // 8, np.int64)
    want = source.copy()
    cupy.cuda.Device().synchronize()
    found = busy.behind(lambda: copy(target, source, busy.stream))
    source[:] = -1  # the host goes on
    busy.stream.synchronize()
    return {**found, "as_at_the_call": bool((target.get() == want).all())}


def stepped(busy: Busy) -> dict[str, Any]:
    """Steps, each with another lr and new gradients, all after the kernel; checked to be bit-identical to the CPU."""
    import cupy

    from rmsprop_gpu import RMSProp

    draw = np.random.default_rng(2012)
    sets = draw.standard_normal((STEPS, TENSORS, 3)).astype(np.float32)
    here = list(draw.standard_normal((TENSORS, 3)).astype(np.float32))
    there = [cupy.asarray(x) for x in here]
    device_sets = [[cupy.asarray(g) for g in grads] for grads in sets]
    cupy.cuda.Device().synchronize()
    ours, device = RMSProp(here), RMSProp(there)

    def steps(opt: Any, sets: Any) -> None:
        for i, grads in enumerate(sets):
            opt.lr = 0.1 / (1 + i)
            opt.step(list(grads))

    for _ in range(2):  # the first time allocates
        found = busy.behind(lambda: steps(device, device_sets))
        steps(ours, sets)
        busy.stream.synchronize()
    wrong = sum(differing(y.get(), x) for x, y in zip(here, there, strict=True))
    return {**found, "as_at_the_call": wrong == 0}


def measure(record: Record, rehearse: bool) -> None:
    """Measure the package's own method, with copies and with whole steps, and CUDA's for comparison."""
    from rmsprop_gpu.steps.uploads import upload  # how a step sends addresses and numbers

    busy = Busy(rehearse)
    for way, copy in ((FIRST, upload), (OURS, upload), (PAGEABLE, pageable_copy)):
        for nbytes in SIZES:
            record.row({"way": way, "bytes": nbytes}, copied, busy, copy, nbytes)
    record.row({"way": f"{STEPS} steps over {TENSORS:,} tensors, another lr and new gradients each"}, stepped, busy)
    record.failed = record.failed or any(is_wrong(row) for row in record.found["rows"])


def is_wrong(row: dict[str, Any]) -> bool:
    """For the package's rows: is the data wrong, or did the host wait although nothing is allocated?"""
    waited = row.get("waited") is True and row["way"] != FIRST
    return row["way"] != PAGEABLE and (row.get("as_at_the_call") is not True or waited)


def headline(result: Result) -> str:
    """What the package promises: the data of the call, and no wait."""
    rows = result["rows"]
    wrong = [f"{row['way']} ({row.get('bytes', 'few')} bytes)" for row in rows if is_wrong(row)]
    if wrong:
        return f"**not as promised: {'; '.join(wrong)}**"
    known = all(row["waited"] is False for row in rows if row["way"] not in (FIRST, PAGEABLE))
    never = "never waited" if known else "had nothing to wait for: the kernel in front had ended"
    return f"all data is that of its call; the host {never}"


def lines(result: Result) -> list[str]:
    """All of it."""
    words = {True: "yes", False: "no", None: "not known"}
    body = [
        (
            row["way"],
            f"{row['bytes']:,}" if "bytes" in row else "",
            *(
                (f"**failed**: {row['failed']}", "", "")
                if "failed" in row
                else (duration(row["seconds"]), words[row["waited"]], words[row["as_at_the_call"]])
            ),
        )
        for row in result["rows"]
    ]
    head = ("behind a running kernel", "bytes", "the call took", "the host waited", "data as at the call")
    return [*table(head, body), "", "Of CUDA's own copy either is allowed; the package relies on neither."]


PART = measured("uploads", "Uploads behind a running kernel", 20, headline=headline, lines=lines)

if __name__ == "__main__":
    main(measure)
