"""What a sharded step costs, by a model: messages and bytes, ring or tree, latency and bandwidth; memory per rank.

N ranks, S bytes of gradients (4 per element), B bytes/s that a rank sends and receives, A seconds per message:

    ring    (N - 1) A + (N - 1) / N S / B
    tree    log2(N) A + (N - 1) / N S / B

is the time of a reduce-scatter or an all-gather; an all-reduce is one of each. With k buckets the latency counts k
times. Packing and unpacking move 16 bytes per element through memory, and two buckets are in transit, so the slower of
copies and communication counts. An update moves `Optimizer.moved` bytes per element, of which a rank does one N-th.
"""

from __future__ import annotations

import math
from typing import NamedTuple

LEAST, LEAST_A_RANK = 32 << 20, 1 << 20  # bytes per bucket, as in rmsprop_gpu.distributed
GRADIENT = 4  # bytes per element
WHOLE = 8  # bytes per element for parameter and gradient, which every rank has
COPIED = 16  # bytes per element that packing and unpacking move: a read and a write each
GPUS_A_NODE = 8


class Link(NamedTuple):
    """How ranks reach each other."""

    bandwidth: float  # bytes/s that a rank sends, and receives at the same time
    latency: float  # seconds a message


NVLINK = Link(450e9, 3e-6)
INFINIBAND = Link(50e9, 5e-6)


class Optimizer(NamedTuple):
    """Of float32."""

    state: int  # bytes per element that it keeps
    moved: int  # bytes per element that an update moves


PLAIN = Optimizer(4, 20)
EVERYTHING = Optimizer(16, 44)  # momentum, centered and ema


def bucket_bytes(ranks: int) -> int:
    """How large a bucket is where nothing is said of it."""
    return max(LEAST, ranks * LEAST_A_RANK)


def buckets(size: float, ranks: int, times: int = 1) -> int:
    """How many of them so many bytes are, or of some that are several times as large."""
    return max(1, math.ceil(size / (times * bucket_bytes(ranks))))


def hops(ranks: int, *, tree: bool = False) -> int:
    """Messages that follow each other in a reduce-scatter or an all-gather, which a rank sends."""
    return math.ceil(math.log2(ranks)) if tree else ranks - 1


def sent(ranks: int, size: float) -> float:
    """Bytes that a rank sends in both together."""
    return 2 * (ranks - 1) / ranks * size


def messages(ranks: int, size: float, *, tree: bool = False) -> int:
    """Messages that a rank sends in both together, and in the agreement before them."""
    return 2 * buckets(size, ranks) * hops(ranks, tree=tree) + hops(ranks, tree=True)


def collective(ranks: int, size: float, link: Link, count: int = 1, *, tree: bool = False) -> float:
    """Seconds of a reduce-scatter or an all-gather of so many bytes, in so many buckets."""
    return count * hops(ranks, tree=tree) * link.latency + (ranks - 1) / ranks * size / link.bandwidth


def in_nodes(ranks: int) -> Link:
    """Of GPUs in nodes of 8, each with a port of its own.

    Rings that enter and leave a node by different ports share its traffic with other nodes, so that a GPU has up to
    eight ports' worth of it, and no more than NVLink carries to it.
    """
    if ranks <= GPUS_A_NODE:
        return NVLINK
    return Link(min(NVLINK.bandwidth, GPUS_A_NODE * INFINIBAND.bandwidth), INFINIBAND.latency)


class Step(NamedTuple):
    """Seconds of its parts."""

    communication: float
    copies: float
    update: float

    @property
    def seconds(self) -> float:
        """Copies go on while others communicate."""
        return max(self.communication, self.copies) + self.update


def sharded(
    ranks: int,
    elements: float,
    link: Link,
    memory: float,
    optimizer: Optimizer = PLAIN,
    *,
    tree: bool = False,
    times: int = 1,
) -> Step:
    """A step where each of the ranks updates its part; `memory` is the bytes/s of a rank's memory.

    The buckets are so many times as large as they are where nothing is said of them.
    """
    size = GRADIENT * elements
    communication = 2 * collective(ranks, size, link, buckets(size, ranks, times), tree=tree)
    copies = COPIED * elements / memory if ranks > 1 else 0.0
    return Step(communication, copies, optimizer.moved * elements / memory / ranks)


def replicated(
    ranks: int, elements: float, link: Link, memory: float, optimizer: Optimizer = PLAIN, *, tree: bool = False
) -> Step:
    """A step where each rank updates everything behind an all-reduce of the same buckets, which is given its copies."""
    parts = sharded(ranks, elements, link, memory, optimizer, tree=tree)
    return Step(parts.communication, 0.0, parts.update * ranks)


def held(ranks: int, elements: float, optimizer: Optimizer = PLAIN, *, times: int = 1) -> float:
    """Bytes per element that a rank holds: parameters and gradients, its part of gradients and state, two buckets."""
    if ranks == 1:
        return held_replicated(optimizer)
    size = GRADIENT * elements
    bucket = size / buckets(size, ranks, times)
    return WHOLE + (optimizer.state + GRADIENT) / ranks + 2 * bucket / elements


def held_replicated(optimizer: Optimizer = PLAIN) -> float:
    """Bytes per element that each rank holds without sharding, not counting the buckets of an all-reduce."""
    return WHOLE + optimizer.state


def local_bytes(ranks: int, elements: float, optimizer: Optimizer = PLAIN) -> float:
    """What a rank moves through host memory in a step besides sending and receiving it.

    It packs all gradients (8 bytes per element); of its part it copies the first contribution (8) and adds the others
    (12 each), updates it and packs it (8); and unpacks the parts of others (8).
    """
    own = elements / ranks
    return 8 * elements + own * (8 + 12 * (ranks - 1) + optimizer.moved + 8) + 8 * (elements - own)
