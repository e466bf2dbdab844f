"""The parent: starts the workers of a workload, asks them in turn, and makes numbers of their answers."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks.contenders import CONTENDERS
from benchmarks.contenders_base import Contender
from benchmarks.worker import Conditions, serve
from benchmarks.workloads import COPY, WORKLOADS, Workload

Row = dict[str, Any]

# OpenMP and TBB threads spin for up to 0.2 s after their work (KMP_BLOCKTIME), in the next contender's time. Their
# waiting policy is part of what is measured, so it stays at the default; we wait until they have gone to sleep.
# On a GPU only the host's caches and clocks settle.
PAUSE_SECONDS = {"cpu": 0.3, "cuda": 0.02}
PATIENCE_SECONDS = 120  # for a worker to get ready, and for every answer


class Worker:
    """A worker process and our end of its pipe."""

    def __init__(self, contender: str, workload: str, conditions: Conditions) -> None:
        spawn = multiprocessing.get_context("spawn")  # a fork would inherit what the parent has loaded
        self.contender, self.started = contender, time.monotonic()
        self.connection, theirs = spawn.Pipe()
        self.process = spawn.Process(target=serve, args=(theirs, contender, workload, conditions), daemon=True)
        with interrupts_ignored():  # and so they are in the child: Ctrl-C is for the parent, which ends its workers
            self.process.start()
        theirs.close()  # so that a worker that dies is an EOFError here

    def ready(self) -> Row:
        """{} when it is set up and checked; {"left_out": reason} if it cannot be, or takes too long."""
        answer: Row = self.receive(self.started + PATIENCE_SECONDS - time.monotonic(), "not ready after")
        return answer

    def ask(self, request: str) -> Any:
        """The answer to a request, or {"left_out": reason}."""
        with contextlib.suppress(OSError):  # it has died; receive says how
            self.connection.send(request)
        return self.receive(PATIENCE_SECONDS, "no answer in")

    def receive(self, seconds: float, complaint: str) -> Any:
        """Its next message; {"left_out": reason} if it has died, or none comes and it is killed."""
        try:
            if self.connection.poll(max(0.0, seconds)):
                return self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            return {"left_out": f"the process died (exit code {self.process.exitcode})"}
        self.kill()
        return {"left_out": f"{complaint} {PATIENCE_SECONDS} s"}

    def kill(self) -> None:
        """End it with all that it has started: it keeps nothing that anybody wants."""
        if self.process.is_alive():
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except (AttributeError, OSError):  # no groups here, or it does not lead one yet
                self.process.kill()
            self.process.join()
        self.connection.close()


@contextlib.contextmanager
def interrupts_ignored() -> Iterator[None]:
    """Ctrl-C does nothing inside."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def measure(workload: str, contenders: Sequence[str], conditions: Conditions) -> dict[str, Row]:
    """A row for each contender: statistics, or the reason why it was left out; in a rehearsal, whether it agrees."""
    os.environ.update(environment(conditions.threads))
    rows: dict[str, Row] = {}
    workers: list[Worker] = []
    together = conditions.rehearse or conditions.device == "cuda"
    groups = [contenders] if together else [[contender] for contender in contenders]
    try:
        for group in groups:  # on the CPU one after the other: each finds its burst length on a quiet machine
            workers.extend(Worker(contender, workload, conditions) for contender in group)
            get_ready(workers[-len(group) :], rows, conditions)
        running = [worker for worker in workers if "left_out" not in rows[worker.contender]]
        seconds = run_rounds(running, rows, conditions)
    finally:
        for worker in workers:
            worker.kill()
    if not conditions.rehearse:
        for contender in seconds:
            rows[contender].update(statistics(CONTENDERS[conditions.device][contender], seconds, WORKLOADS[workload]))
    return rows


def environment(threads: int) -> dict[str, str]:
    """What a worker's libraries read when they are loaded."""
    variables = ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "NUMEXPR_NUM_THREADS", "NUMEXPR_MAX_THREADS")
    jax = {"JAX_PLATFORMS": "cpu", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    return {**dict.fromkeys(variables, str(threads)), **jax}


def get_ready(workers: Sequence[Worker], rows: dict[str, Row], conditions: Conditions) -> None:
    """Wait for all, then let each, alone, warm up and see how long its bursts should be."""
    has_rule = {name: bool(contender.rule) for name, contender in CONTENDERS[conditions.device].items()}
    for worker in workers:
        name = worker.contender
        rows[name] = worker.ready()
        agrees = "agrees with the reference" if has_rule[name] else "computes no RMSProp"
        say(f"  {name}: {rows[name].get('left_out', agrees)}")
    for worker in workers:
        name = worker.contender
        if "left_out" in rows[name]:
            continue
        if conditions.rehearse:
            rows[name] = {"agrees": has_rule[name] or None}
        else:
            rows[name] = worker.ask("warm up")
            time.sleep(PAUSE_SECONDS[conditions.device])


def run_rounds(workers: list[Worker], rows: dict[str, Row], conditions: Conditions) -> dict[str, list[float]]:
    """Each worker bursts once a round while the others wait, in an order that is drawn anew for each round.

    Whoever always came behind the same one would always find that one's leavings in the caches.
    """
    seconds: dict[str, list[float]] = {worker.contender: [] for worker in workers}
    draw = random.Random(2012)
    for _ in range(conditions.rounds):
        for worker in draw.sample(workers, len(workers)):
            if worker.contender not in seconds:
                continue
            time.sleep(PAUSE_SECONDS[conditions.device])
            answer = worker.ask("burst")
            if isinstance(answer, float):
                seconds[worker.contender].append(answer)
            else:
                rows[worker.contender] = answer
                del seconds[worker.contender]
    return seconds


def statistics(contender: Contender, seconds: dict[str, list[float]], workload: Workload) -> Row:
    """Of the times of a contender, and of its ratios (its time / the peer's, round by round) to each peer."""
    times = seconds[contender.name]
    limit = seconds.get(COPY)
    moved = workload.moved_by(contender.name)
    useful, fewer = moved * workload.size, moved / workload.bytes_per_element
    return {
        "rounds": len(times),
        "seconds": {**quartiles(times), "min": rounded(min(times))},
        "bytes_per_element": contender.traffic(workload) if contender.traffic else None,
        "gigabytes_per_second": rounded(useful / float(np.median(times)) / 1e9),
        "fraction_of_copy": None if limit is None else rounded(float(np.median(np.divide(limit, times))) * fewer),
        "ratio_to": {
            peer: quartiles(np.divide(times, theirs)) for peer, theirs in seconds.items() if peer != contender.name
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
