"""The page of ``python -m benchmarks.scaling``: what was measured, and what the model says of many GPUs."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks import scaling_model as model
from benchmarks.report import duration, table
from benchmarks.scaling_model import EVERYTHING, INFINIBAND, NVLINK, PLAIN, Link, Optimizer
from benchmarks.startup import conditions

GPUS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
ELEMENTS = 1e9  # of the model on them
CARDS = {"H100, by its specification": 3.35e12, "H200, by its specification": 4.8e12}  # bytes/s of memory
OPTIMIZERS = {"plain": PLAIN, "momentum, centered, ema": EVERYTHING}


def page(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    v = result["versions"]
    lines = [
        "# Sharded steps",
        "",
        "What a step of `rmsprop_gpu.distributed` costs: counted and measured on one machine, and by the model of "
        "[`scaling_model.py`](../scaling_model.py) on GPUs, on which it has not run.",
        "",
        *conditions(result),
        f"mpi4py {v['mpi4py']}, mpich {v['mpich']}; load at the end {result['machine']['load_at_end']}, "
        f"{result['date']}: `{result['command']}`.",
        "",
        *measured(result),
        "",
        *one_rank(result["one"]),
        "",
        *predicted(result["measured_memory"]),
    ]
    return "\n".join(lines) + "\n"


# Of this machine


def measured(result: dict[str, Any]) -> list[str]:
    """Times, bytes and memory of 1 to 4 ranks."""
    jobs, cores = result["jobs"], result["machine"]["cores"]
    alone, elements, most = jobs[0], jobs[0]["elements"], max(job["ranks"] for job in jobs)
    memory = PLAIN.moved * elements / float(np.median(alone["sharded"]))
    crowd = f" With more than {cores} ranks they wait for each other's turn on a core." if most > cores else ""
    return [
        f"## One to {most} ranks on {cores} cores",
        "",
        f"Plain RMSProp, {elements:,} elements of float32 in 8 tensors; {result['turns']} jobs of each kind in turns, "
        f"{result['steps']} steps of each, the time of the slowest rank. **All ranks share {cores} cores and one "
        f"memory**: there is nothing to gain here, and the table shows what a step costs beside its update.{crowd}",
        "",
        *table(
            ("ranks", "threads a rank", "a sharded step", "quartiles", "by the model", "all-reduce and a whole step"),
            [times(job, memory) for job in jobs],
        ),
        "",
        "*By the model* is by its formulas, with latency and bandwidth from MPI's collectives alone, which the same "
        f"jobs timed, and the {memory / 1e9:.1f} GB/s of a step of one rank for all that the ranks copy, add and "
        "update in the memory that they share. A sharded step adds up in the order of the ranks, an all-reduce as it "
        "likes.",
        "",
        *table(
            ("ranks", "messages a rank", "bytes a rank sends", "counted", "counted / model"),
            [counts(job) for job in jobs if job["way"] == "TCP"],
        ),
        "",
        "Messages and bytes of a step by the model, of rings for the gathering; a tree sends as many bytes. "
        "Counted are the bytes of the loopback interface, with TCP's headers and acknowledgements, and those of "
        "any other program.",
        "",
        *table(
            ("ranks", "bytes per element that a rank holds", "by the model"),
            [
                (str(job["ranks"]), f"{job['held'] / elements:.3f}", f"{model.held(job['ranks'], elements):.3f}")
                for job in jobs
                if job["way"] != "TCP"
            ],
        ),
        "",
        "Parameters, gradients, state, the reduced gradients and two buckets, on the rank that holds most.",
        "How fast many small tensors are packed and unpacked: [`copies.md`](copies.md).",
    ]


def times(job: dict[str, Any], memory: float) -> tuple[str, ...]:
    """A row of the table of times."""
    q1, median, q3 = np.quantile(job["sharded"], (0.25, 0.5, 0.75))
    shown = (str(job["threads"]), duration(median), f"{duration(q1)} to {duration(q3)}")
    if job["ranks"] == 1:
        return ("1", *shown, "", "")
    others = duration(by_the_model(job, memory)), duration(float(np.median(job["all_reduce"])))
    return (f"{job['ranks']}, over {job['way']}", *shown, *others)


def counts(job: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table of bytes."""
    ranks, size = job["ranks"], 4 * job["elements"]
    wanted = model.sent(ranks, size)
    sent = (f"{wanted / 1e6:.2f} MB", f"{job['sent'] / 1e6:.2f} MB", f"{job['sent'] / wanted:.4f}")
    return (str(ranks), str(model.messages(ranks, size)), *sent)


def by_the_model(job: dict[str, Any], memory: float) -> float:
    """Seconds of a step, with what this job found of its link."""
    ranks, elements = job["ranks"], job["elements"]
    size = 4 * elements
    count, latency = model.buckets(size, ranks), job["small"] / model.hops(ranks)
    waits = 2 * count * model.hops(ranks) * latency
    exchange = max(float(np.median(job["exchange"])) - waits, 1e-9)  # of a busy machine the waits may be longer
    communication = 2 * model.collective(ranks, size, Link(model.sent(ranks, size) / exchange, latency), count)
    return communication + job["agree"] + ranks * model.local_bytes(ranks, elements) / memory


def one_rank(one: dict[str, dict[str, list[float]]]) -> list[str]:
    """A step of one rank beside a plain one."""
    body = []
    for name, ways in one.items():
        plain = np.array(ways["RMSProp"])
        ratios = (np.quantile(np.array(ways[way]) / plain, (0.25, 0.5, 0.75)) for way in ("one rank", "RMSProp, again"))
        shown = (f"{median:.2f} ({q1:.2f} to {q3:.2f})" for q1, median, q3 in ratios)
        body.append((name, duration(float(np.median(ways["one rank"]))), *shown))
    rounds = len(next(iter(one.values()))["RMSProp"])
    return [
        "## One rank beside plain RMSProp",
        "",
        *table(("", "a step of one rank", "of RMSProp's time (quartiles)", "RMSProp again"), body),
        "",
        f"In turns in one process, on the same arrays; ratios round by round, {rounds} rounds. One rank agrees with "
        "nobody, packs nothing and sends nothing.",
    ]


# Of many GPUs


def predicted(memory: float) -> list[str]:
    """Tables, and what they say."""
    nvlink, port = (f"{link.bandwidth / 1e9:.0f} GB/s" for link in (NVLINK, INFINIBAND))
    waits = " and ".join(f"{link.latency * 1e6:.0f} us" for link in (NVLINK, INFINIBAND))
    return [
        "## Two to 4,096 GPUs, by the model",
        "",
        f"**None of this was measured**, but for the speed of one card's memory: an H200 moves {memory / 1e12:.2f} "
        "TB/s in a plain step of 67 M elements ([its record](gpu-nvidia-h200/summary.md)). The model has 1e9 elements "
        f"of float32. NVLink carries {nvlink} a GPU and direction, a port of InfiniBand {port}; a message takes "
        f"{waits}, which is assumed. Nodes have 8 GPUs with a port each, and rings leave a node by all ports together. "
        "Bandwidth is full at every size, nobody is in the way, nothing is hidden behind the backward pass, messages "
        "of one bucket do not overlap those of the next, and the all-reduce, which is of the same buckets, has its "
        "copies for nothing.",
        "",
        "![Time of a step and memory of a GPU, by the number of GPUs](scaling.png)",
        "",
        "What it says:",
        "",
        *where_it_pays(memory),
        "",
        *table(
            ("bytes per element: GPUs", *(f"{o}: {way}" for o in OPTIMIZERS for way in ("whole", "sharded"))), held()
        ),
        "",
        "Parameters and gradients (8) and state; where it is sharded also the reduced gradients and two buckets of "
        "max(32 MiB, N MiB), at most the gradients of the model.",
        "",
        *(line for name, optimizer in OPTIMIZERS.items() for line in (*steps(name, optimizer, memory), "")),
        "*Update* is the part of a sharded step that it takes.",
        "",
        "What `bucket_bytes` does, in nodes of 8 and with plain RMSProp:",
        "",
        *table(("GPUs", "`bucket_bytes`", "sharded, ring", "sharded, tree", "bytes per element"), sizes(memory)),
        "",
        "A step of 8 GPUs over NVLink, plain RMSProp, by their memory:",
        "",
        *table(
            ("memory", "TB/s", "the update of one GPU", "all-reduce and a whole step", "sharded", "saved"),
            [card(name, speed) for name, speed in {**CARDS, "H200, measured": memory}.items()],
        ),
    ]


def held() -> list[tuple[str, ...]]:
    """Rows of the table of memory."""
    rows = []
    for n in GPUS:
        pairs = ((model.held_replicated(o), model.held(n, ELEMENTS, o)) for o in OPTIMIZERS.values())
        rows.append((f"{n:,}", *(f"{x:.2f}" for pair in pairs for x in pair)))
    return rows


def steps(name: str, optimizer: Optimizer, memory: float) -> list[str]:
    """The table of times, for every number of GPUs."""
    ways = ("all-reduce, ring", "sharded, ring", "sharded, tree", "update")
    places = [f"{place}: {way}" for place in ("nodes of 8", "a port each, no NVLink") for way in ways]
    body = []
    for n in GPUS:
        cells = [f"{n:,}", *(f"{model.messages(n, 4 * ELEMENTS, tree=tree):,}" for tree in (False, True))]
        for link in (model.in_nodes(n), INFINIBAND):
            whole = model.replicated(n, ELEMENTS, link, memory, optimizer)
            ring, tree = (model.sharded(n, ELEMENTS, link, memory, optimizer, tree=tree) for tree in (False, True))
            cells += [*(duration(x.seconds) for x in (whole, ring, tree)), f"{100 * ring.update / ring.seconds:.2g} %"]
        body.append(tuple(cells))
    return table((f"{name}: GPUs", "messages a GPU, ring", "tree", *places), body)


def sizes(memory: float) -> list[tuple[str, ...]]:
    """Rows of the table of bucket sizes."""
    rows = []
    for n in (8, 32, 256):
        link = model.in_nodes(n)
        for times in (1, 4, 16):
            ways = (model.sharded(n, ELEMENTS, link, memory, tree=tree, times=times) for tree in (False, True))
            said = f"{times * model.bucket_bytes(n) >> 20:,} MiB{', the default' if times == 1 else ''}"
            kept = model.held(n, ELEMENTS, times=times)
            rows.append((str(n), said, *(duration(x.seconds) for x in ways), f"{kept:.2f}"))
    return rows


def card(name: str, memory: float) -> tuple[str, ...]:
    """A row of the table of memories."""
    whole, ours = (step(8, ELEMENTS, NVLINK, memory) for step in (model.replicated, model.sharded))
    shown = (duration(x) for x in (whole.update, whole.seconds, ours.seconds))
    return (name, f"{memory / 1e12:.2f}", *shown, f"{1 - ours.seconds / whole.seconds:.0%}")


def saved_time(gpus: int, memory: float, optimizer: Optimizer = PLAIN) -> float:
    """Which part of a step with an all-reduce a sharded one does not take, in nodes of 8."""
    link = model.in_nodes(gpus)
    whole, ours = (step(gpus, ELEMENTS, link, memory, optimizer) for step in (model.replicated, model.sharded))
    return 1 - ours.seconds / whole.seconds


def where_it_pays(memory: float) -> list[str]:
    """And where it stops."""
    lines = []
    for name, optimizer in OPTIMIZERS.items():
        parts = {n: model.held(n, ELEMENTS, optimizer) / model.held_replicated(optimizer) for n in GPUS}
        least, more = min(parts, key=parts.__getitem__), [n for n in GPUS if n > 2 and round(parts[n], 2) > 1]
        lost = f"; from {more[0]:,} on a GPU holds more than without sharding" if more else ""
        lines.append(
            f"* **Memory, {name}**: {of_less(parts[2])} on 2 GPUs, {of_less(parts[8])} on 8, {of_less(parts[least])} "
            f"on {least}, the most. With more of them the buckets take it back, which grow with the ranks{lost}. A "
            "smaller `bucket_bytes` gives memory for messages."
        )
    for name, optimizer in OPTIMIZERS.items():
        saved = {n: saved_time(n, memory, optimizer) for n in GPUS}
        ours = {n: model.sharded(n, ELEMENTS, model.in_nodes(n), memory, optimizer) for n in GPUS}
        end = next(n for n in GPUS if ours[n].update < 0.01 * ours[n].seconds)
        lines.append(
            f"* **Time, {name}**: in nodes of 8 a step takes {saved[2]:.0%} less on 2 GPUs, {saved[8]:.0%} on 8, "
            f"{saved[64]:.0%} on 64, {saved[GPUS[-1]]:.0%} on {GPUS[-1]:,}. Communication is that of an all-reduce; "
            f"the update is divided, and there is no more to gain than that: from {end} GPUs on it takes less than 1% "
            "of a step."
        )
    waits = [
        f"{duration(ring)} and {duration(tree)} on {n:,}"
        for n in (256, 1024, GPUS[-1])
        for ring, tree in [
            [model.sharded(n, ELEMENTS, model.in_nodes(n), memory, tree=t).seconds for t in (False, True)]
        ]
    ]
    lines.append(
        f"* **Latency**: in rings and in trees a plain step takes {', '.join(waits)} GPUs; an all-reduce grows alike."
    )
    return lines


def of_less(part: float) -> str:
    """How much less than the whole a part is, or more."""
    return f"{1 - part:.0%} less" if round(part, 2) < 1 else f"{part - 1:.0%} more" if round(part, 2) > 1 else "nothing"
