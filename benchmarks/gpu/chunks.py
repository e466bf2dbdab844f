"""Part: plain float32 with other chunks and other blocks of threads than the package chooses."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.measuring import Record, main
from benchmarks.gpu.part import Result, measured
from benchmarks.gpu.timing import MI, Clock, normal
from benchmarks.report import digits, table

MEGA = (1, 4, 16, 64)  # times 2^20 elements
LENGTHS = {256: (512, 1024, 2048, 4096, 8192), 128: (512, 1024), 512: (2048, 4096), 1024: (4096, 8192)}
BYTES = 20  # per element
CHOSEN = "as chosen"


def compiled_anew(threads: int) -> None:
    """Have kernels compiled for this many threads, which is a constant in them."""
    from rmsprop_gpu.kernels import compiling, cuda, cuda_code

    theirs = {cuda.__name__, cuda_code.__name__}
    cuda.THREADS = threads
    compiling._compiled = {key: x for key, x in compiling._compiled.items() if key[0].__module__ not in theirs}


def in_chunks_of(length: int) -> None:
    """Give all batches made from now on chunks of this many elements."""
    from rmsprop_gpu.kernels import cuda

    cuda.chunk_of = lambda dtype: length


def step(clock: Clock, size: int, repeats: int) -> dict[str, Any]:
    """The seconds of a step over this many elements."""
    from rmsprop_gpu import RMSProp

    param, grad = normal(size), normal(size)
    opt = RMSProp(param, lr=1e-6)
    return {"seconds": clock.seconds(lambda: opt.step(grad), repeats)}


def measure(record: Record, rehearse: bool) -> None:
    """Measure the package's choice first, then every other one, for each size."""
    from rmsprop_gpu.kernels import cuda

    clock, repeats, unit = Clock(rehearse), 3 if rehearse else 15, MI >> 10 if rehearse else MI
    for mega in MEGA:
        keys = {"threads": cuda.THREADS, "chunk": CHOSEN, "elements": mega * unit}
        record.row(keys, step, clock, mega * unit, repeats)
    for threads, lengths in LENGTHS.items():
        compiled_anew(threads)
        for length in lengths:
            in_chunks_of(length)
            for mega in MEGA:
                keys = {"threads": threads, "chunk": length, "elements": mega * unit}
                record.row(keys, step, clock, mega * unit, repeats)


def rates(result: Result) -> dict[int, dict[tuple[int, Any], float]]:
    """GB/s by elements, then by threads and chunk."""
    found: dict[int, dict[tuple[int, Any], float]] = {}
    for row in result["rows"]:
        if "seconds" in row:
            speed = BYTES * row["elements"] / row["seconds"]["median"] / 1e9
            found.setdefault(row["elements"], {})[row["threads"], row["chunk"]] = speed
    return found


def headline(result: Result) -> str:
    """For each size, how the choice compares with the best."""
    said = []
    for elements, by_way in rates(result).items():
        chosen = next((speed for (_, chunk), speed in by_way.items() if chunk == CHOSEN), None)
        (threads, chunk), best = max(by_way.items(), key=lambda item: item[1])
        compared = "" if chosen is None else f", the package's choice {100 * chosen / best:.0f} % of it"
        said.append(f"{elements:,} elements: best {digits(best)} GB/s with {threads} threads, chunk {chunk}{compared}")
    return "; ".join(said)


def lines(result: Result) -> list[str]:
    """GB/s: one row per way, one column per size, the best for a size in bold."""
    by_size = rates(result)
    ways = list(dict.fromkeys((row["threads"], row["chunk"]) for row in result["rows"]))
    body = [(str(t), str(chunk), *(cell(by_way, (t, chunk)) for by_way in by_size.values())) for t, chunk in ways]
    failed = [f"* {r['threads']} threads, {r['chunk']}: {r['failed']}" for r in result["rows"] if "failed" in r]
    head = ("threads a block", "elements a chunk", *(f"{elements:,} elements" for elements in by_size))
    return ["GB/s of a plain float32 step:", "", *table(head, body), *(["", *failed] if failed else [])]


def cell(by_way: dict[tuple[int, Any], float], way: tuple[int, Any]) -> str:
    """The text of a cell; the best is bold."""
    if way not in by_way:
        return ""
    text = digits(by_way[way])
    return f"**{text}**" if by_way[way] == max(by_way.values()) else text


PART = measured(
    "chunks",
    "Chunks and threads",
    25,
    headline=headline,
    lines=lines,
    environment={"RMSPROP_GPU_CACHE": "0"},  # a kernel's key does not contain threads
)

if __name__ == "__main__":
    main(measure)
