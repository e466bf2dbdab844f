"""Part: a step of the class for torch beside torch's own, eager and replayed from a CUDA graph."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from benchmarks.gpu.measuring import Record, main
from benchmarks.gpu.part import Result, measured
from benchmarks.measure import quartiles
from benchmarks.report import digits, duration, table
from benchmarks.workloads import RESNET50

OURS, FOREACH, LOOP = "rmsprop_gpu.torch", "torch foreach", "torch for-loop"
EAGER, REPLAYED = "eager", "graph"
WAYS = ((OURS, EAGER), (FOREACH, EAGER), (LOOP, EAGER), (OURS, REPLAYED), (FOREACH, REPLAYED))
SIZES: dict[str, list[int]] = {
    "ResNet-50's 161 tensors": [math.prod(shape) for shape in RESNET50.shapes],
    "300 tensors of 256": [256] * 300,
    "one of 25 M": [25_000_000],
    "one of 1,000": [1_000],
}
WARM_UP = 3
HOST_REPEATS, DEVICE_REPEATS = 50, 15
MOST_CYCLES = 1 << 25  # about 17 ms: more than any step takes on the host
PATIENCE = 60  # seconds


def why_not() -> str | None:
    """Why torch's classes cannot be measured here. A separate process asks: nothing is loaded here."""
    if not find_spec("torch"):
        return "torch is not installed"
    ask = [sys.executable, "-c", "import torch; print(torch.cuda.is_available())"]
    try:
        said = subprocess.run(ask, capture_output=True, text=True, timeout=PATIENCE).stdout
    except subprocess.TimeoutExpired:
        return f"torch does not say in {PATIENCE} s whether it finds a CUDA device"
    return None if said.split()[-1:] == ["True"] else "torch finds no CUDA device"


class Clock:
    """Times of a call: on the host, and on the device alone, with torch's events after a kernel that spins.

    Like timing.Clock, but with torch's own tools, so that no second library is loaded.
    """

    def __init__(self) -> None:
        self._cycles = 1 << 19

    def host_seconds(self, call: Callable[[], object]) -> dict[str, float]:
        """Median and quartiles of the time until a call returns, with nothing left to do on the device before it."""
        import torch

        found = []
        for _ in range(HOST_REPEATS):
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            found.append(time.perf_counter() - start)
        return quartiles(found)

    def device_seconds(self, call: Callable[[], object]) -> dict[str, float]:
        """Median and quartiles of what the device takes for all that a call enqueues."""
        import torch

        found: list[float] = []
        while len(found) < DEVICE_REPEATS:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            torch.cuda._sleep(self._cycles)
            start.record()
            call()
            end.record()
            late = start.query()  # the device may have waited for the host
            end.synchronize()
            if late and self._cycles < MOST_CYCLES:
                self._cycles *= 2
            else:
                found.append(start.elapsed_time(end) / 1e3)
        return quartiles(found)


def step_of(who: str, how: str, sizes: list[int]) -> Callable[[], object]:
    """A step over tensors of these sizes on the card, after some warm-up steps."""
    import torch

    from rmsprop_gpu.torch import RMSprop

    params = [torch.nn.Parameter(torch.randn(size, device="cuda")) for size in sizes]
    for p in params:
        p.grad = torch.randn_like(p)
    given: dict[str, Any] = {"lr": 1e-6, "capturable": how == REPLAYED}
    opt = RMSprop(params, **given) if who == OURS else torch.optim.RMSprop(params, foreach=who == FOREACH, **given)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # as torch requires before a capture
        for _ in range(WARM_UP):
            opt.step()
    torch.cuda.current_stream().wait_stream(stream)
    if who == OURS and (why := opt.why_not_fused()):
        raise RuntimeError(f"torch's step would be measured: {next(iter(why.values()))}")
    if how == EAGER:
        call: Callable[[], object] = opt.step
    else:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            opt.step()

        def call(opt: Any = opt) -> object:  # the graph reads memory that the optimizer holds
            return graph.replay()

    for _ in range(WARM_UP):
        call()
    torch.cuda.synchronize()
    return call


def one(clock: Clock, who: str, how: str, sizes: list[int]) -> dict[str, Any]:
    """Both times of one step."""
    call = step_of(who, how, sizes)
    return {"host_seconds": clock.host_seconds(call), "device_seconds": clock.device_seconds(call)}


def known() -> dict[str, str]:
    """Of torch."""
    import torch

    return {"torch": torch.__version__, "cuda": str(torch.version.cuda), "device": torch.cuda.get_device_name()}


def measure(record: Record, rehearse: bool) -> None:
    """All ways over the tensors of one workload, then those of the next."""
    record.fact("versions", known)
    clock = Clock()
    for what, sizes in SIZES.items():
        for who, how in WAYS:
            record.row({"what": what, "who": who, "how": how}, one, clock, who, how, [1] * 9 if rehearse else sizes)


def times_ours(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, float]:
    """This step's time as a multiple of our step of the same kind: on the host, and on the device."""
    same = {"what": row["what"], "who": OURS, "how": row["how"]}
    ours = next((x for x in rows if "failed" not in x and all(x[key] == same[key] for key in same)), None)
    if ours is None or "failed" in row:
        return {}
    keys = ("host_seconds", "device_seconds")
    return {key: row[key]["median"] / ours[key]["median"] for key in keys}


def headline(result: Result) -> str:
    """Each workload's times, and torch's foreach form beside them."""
    said = []
    rows = result["rows"]
    for row in rows:
        if (row["who"], row["how"]) != (OURS, EAGER):
            continue
        if "failed" in row:
            said.append(f"{row['what']}: **failed**")
            continue
        times = [duration(row[key]["median"]) for key in ("host_seconds", "device_seconds")]
        text = f"{row['what']}: host {times[0]}, device {times[1]}"
        rival = next((x for x in rows if x["what"] == row["what"] and (x["who"], x["how"]) == (FOREACH, EAGER)), row)
        if rival is not row and (ratios := times_ours(rival, rows)):
            text += f" ({FOREACH} {' and '.join(map(digits, ratios.values()))} times as long)"
        said.append(text)
    return "; ".join(said) or "**nothing was measured**"


def lines(result: Result) -> list[str]:
    """All of it."""
    body = []
    for row in result["rows"]:
        name = row["what"], row["who"], row["how"]
        if "failed" in row:
            body.append((*name, f"**failed**: {row['failed']}", *[""] * 3))
            continue
        host, device = (duration(row[key]["median"]) for key in ("host_seconds", "device_seconds"))
        ratios = times_ours(row, result["rows"])
        body.append((*name, host, device, *([*map(digits, ratios.values())] or [""] * 2)))
    head = ("tensors", "class", "step", "host", "device", "host, ours = 1", "device, ours = 1")
    return [
        "Medians. Host: until the call returns, the device idle before it. Device: by events, behind a kernel that",
        "spins until the host is through; where a step is more than 1,000 launches it is not, and the device waits.",
        "",
        *table(head, body),
    ]


PART = measured("torch", "The class for torch, beside torch's own", 40, headline=headline, lines=lines, missing=why_not)

if __name__ == "__main__":
    main(measure)
