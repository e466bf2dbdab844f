"""The parent: starts the workers of a workload, asks them in turn, and makes numbers of their answers."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.contenders import CONTENDERS
from benchmarks.worker import serve
from benchmarks.workloads import WORKLOADS

Row = dict[str, Any]

# OpenMP and TBB threads spin for up to 0.2 s after their work (KMP_BLOCKTIME), in the next contender's time. Their
# waiting policy is part of what is measured, so it stays at the default; we wait until they have gone to sleep.
PAUSE_SECONDS = 0.3


class Worker:
    """A worker process and our end of its pipe."""

    def __init__(self, contender: str, workload: str, threads: int) -> None:
        spawn = multiprocessing.get_context("spawn")  # a fork would inherit what the parent has loaded
        self.contender = contender
        self.connection, theirs = spawn.Pipe()
        self.process = spawn.Process(target=serve, args=(theirs, contender, workload, threads), daemon=True)
        self.process.start()
        theirs.close()  # so that a worker that dies is an EOFError here

    def receive(self) -> Any:
        """Its next message; {"left_out": reason} if it has died."""
        try:
            return self.connection.recv()
        except EOFError:
            self.process.join()
            return {"left_out": f"the process died (exit code {self.process.exitcode})"}

    def burst(self) -> Any:
        """Seconds a step of one burst, or {"left_out": reason}."""
        with contextlib.suppress(OSError):  # it has died; receive says how
            self.connection.send("burst")
        return self.receive()

    def close(self) -> None:
        """Let it end by itself, then make sure."""
        self.connection.close()
        self.process.join(timeout=10)
        self.process.kill()


def measure(workload: str, contenders: Sequence[str], rounds: int, threads: int) -> dict[str, Row]:
    """A row for each contender: statistics, or the reason why it was left out."""
    for variable in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ[variable] = str(threads)  # read when the worker loads its library
    rows: dict[str, Row] = {}
    workers = []
    for contender in contenders:  # one after the other: each finds its burst length on a quiet machine
        worker = Worker(contender, workload, threads)
        workers.append(worker)
        rows[contender] = worker.receive()
        say(f"  {contender}: {rows[contender].get('left_out', 'agrees with the reference')}")
        time.sleep(PAUSE_SECONDS)
    try:
        seconds = run_rounds([w for w in workers if "left_out" not in rows[w.contender]], rounds, rows)
    finally:
        for worker in workers:
            worker.close()
    for contender in seconds:
        rows[contender].update(statistics(contender, seconds, WORKLOADS[workload].size))
    return rows


def run_rounds(workers: list[Worker], rounds: int, rows: dict[str, Row]) -> dict[str, list[float]]:
    """Each worker bursts once a round while the others wait; who begins changes from round to round."""
    seconds: dict[str, list[float]] = {worker.contender: [] for worker in workers}
    for number in range(rounds):
        first = number % max(1, len(workers))
        for worker in workers[first:] + workers[:first]:
            if worker.contender not in seconds:
                continue
            time.sleep(PAUSE_SECONDS)
            answer = worker.burst()
            if isinstance(answer, float):
                seconds[worker.contender].append(answer)
            else:
                rows[worker.contender] = answer
                del seconds[worker.contender]
    return seconds


def statistics(contender: str, seconds: dict[str, list[float]], size: int) -> Row:
    """Of the times of a contender, and of its ratios (its time / the peer's, round by round) to each peer."""
    times = seconds[contender]
    traffic = CONTENDERS[contender].bytes_per_element
    return {
        "rounds": len(times),
        "seconds": {**quartiles(times), "min": rounded(min(times))},
        "gigabytes_per_second": None if traffic is None else rounded(traffic * size / float(np.median(times)) / 1e9),
        "ratio_to": {
            peer: quartiles(np.divide(times, theirs)) for peer, theirs in seconds.items() if peer != contender
        },
        "seconds_by_round": rounded(times),
    }


def quartiles(values: Sequence[float] | np.ndarray) -> Row:
    """Median and quartiles."""
    q1, median, q3 = np.quantile(values, (0.25, 0.5, 0.75))
    return {"median": rounded(median), "q1": rounded(q1), "q3": rounded(q3)}


def rounded(value: Any) -> Any:
    """To four significant digits, which is more than any of these times has."""
    return [rounded(one) for one in value] if isinstance(value, list) else float(f"{value:.4g}")


def say(text: str) -> None:
    """Progress goes to stderr; stdout is for the report."""
    print(text, file=sys.stderr, flush=True)
