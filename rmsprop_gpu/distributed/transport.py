"""How elements get to their owners and back: packed into buckets, sent, then added up or unpacked."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..arrays.checks import Tensor
from ..arrays.dtypes import compute_dtype
from ..arrays.layout import Array, Layout, NDArray, address_of
from ..kernels.norms import BLOCK, SUM
from ..kernels.table import COUNT, FIRST, Copying
from ..steps.library import Block
from .cuts import Bucket, Piece, cut

FLOAT64 = np.dtype(np.float64)
LEAST = 32 << 20  # bytes per bucket, by default
LEAST_A_RANK = 1 << 20  # and at least this per rank: with many ranks a small bucket is all latency

Copies = Callable[[NDArray], None]  # called with a column of addresses


class Engine(Protocol):
    """Collectives over arrays with one row per rank; what they return is passed to `wait`."""

    rank: int
    ranks: int
    turns: int  # buckets in transit at a time
    receives: bool  # does a reduction need room for what arrives?

    def reduce(self, whole: Array, received: Array | None, own: Array) -> Any:
        """Start adding up our row over all ranks."""

    def gather(self, whole: Array) -> Any:
        """Start filling in the other ranks' rows."""

    def wait(self, started: Any) -> None:
        """Make sure that it is done before whatever comes next."""


class Memory(Protocol):
    """Memory in the place of the parameters, and copies there."""

    def arrays(self, layouts: Sequence[Layout]) -> list[Array]:
        """Zeroed arrays from one allocation, each on its own cache line."""

    def copies(self, rows: Sequence[tuple[int, int, int, int]], itemsize: int, kind: Copying) -> Copies: ...


class Own(NamedTuple):
    """A piece of this rank, and the place of its gradient."""

    piece: Piece
    grad: Array


class _Bucket(NamedTuple):
    """A bucket of one dtype, and the copies into it and out of it."""

    whole: Array  # one row per rank
    received: Array | None
    own: Array  # our slice of the reduced gradients
    pack: dict[bool, Copies]  # the gradients, with or without zeroing them
    pack_own: Copies  # our parameters
    unpack: Copies  # the other ranks' parameters


def bucket_bytes_of(ranks: int) -> int:
    """The default size of a bucket."""
    return max(LEAST, ranks * LEAST_A_RANK)


class Transport:
    """The buckets of an optimizer. Their memory is allocated once: reduced gradients have fixed addresses.

    Besides the slice of reduced gradients there are two buckets, whatever the number of dtypes: one to send and one to
    receive, or two in transit.
    """

    def __init__(self, tensors: Sequence[Tensor], bucket_bytes: int, engine: Engine, memory: Memory) -> None:
        self._tensors, self._engine, self._memory = tensors, engine, memory
        self._where = np.array([tensor.address for tensor in tensors], np.int64)
        self._buckets: list[tuple[np.dtype[Any], Bucket]] = []
        for dtype in dict.fromkeys(tensor.layout.dtype for tensor in tensors):
            members = [i for i, tensor in enumerate(tensors) if tensor.layout.dtype == dtype]
            sizes = [tensors[i].layout.size for i in members]
            most = -(-sum(sizes) // (engine.ranks * BLOCK))  # with more, some slices of a bucket would be empty
            count = max(1, min(most, -(-sum(sizes) * dtype.itemsize // bucket_bytes)))
            for pieces, length in cut(sizes, engine.ranks, count):
                named = [[piece._replace(tensor=members[piece.tensor]) for piece in some] for some in pieces]
                self._buckets.append((dtype, Bucket(named, length)))
        self._packed = self._make()
        self._flags: list[Array] = []  # made when they are needed
        self._scale: list[Array] = []
        self.own = [
            Own(piece, bucket.own[piece.at : piece.at + piece.stop - piece.start])
            for (_, cuts), bucket in zip(self._buckets, self._packed, strict=True)
            for piece in cuts.pieces[engine.rank]
        ]

    def _make(self) -> list[_Bucket]:
        rank, ranks = self._engine.rank, self._engine.ranks
        slices = self._memory.arrays([_line(length, dtype) for dtype, (_, length) in self._buckets])
        largest = max(ranks * length * dtype.itemsize for dtype, (_, length) in self._buckets)
        byte = np.dtype(np.uint8)
        rooms = self._memory.arrays([_line(largest, byte)] * (self._engine.turns + self._engine.receives))
        made = []
        for k, ((dtype, (pieces, length)), own) in enumerate(zip(self._buckets, slices, strict=True)):
            size = dtype.itemsize
            layout = _lines(ranks, length, dtype)
            whole = layout.over(rooms[k % self._engine.turns], 0)
            received = layout.over(rooms[-1], 0) if self._engine.receives else None
            start = address_of(whole)
            rows = [
                [(p.tensor, p.start * size, start + (r * length + p.at) * size, p.stop - p.start) for p in some]
                for r, some in enumerate(pieces)
            ]
            everyone = [row for some in rows for row in some]
            others = [row for r, some in enumerate(rows) if r != rank for row in some]
            copies = self._memory.copies
            pack = {False: copies(everyone, size, "pack"), True: copies(everyone, size, "pack and zero")}
            unpack = copies(others, size, "unpack")
            made.append(_Bucket(whole, received, own, pack, copies(rows[rank], size, "pack"), unpack))
        return made

    @property
    def nbytes(self) -> int:
        """The bytes it holds besides parameters and state: the reduced gradients and the buckets."""
        rooms = {address_of(x): x.nbytes for b in self._packed for x in (b.whole, b.received) if x is not None}
        largest = max((b.whole.nbytes for b in self._packed), default=0)
        return int(sum(b.own.nbytes for b in self._packed) + len(rooms) * largest)

    # In a step

    def reduce(self, column: NDArray, *, zeros: bool) -> None:
        """Add up the gradients at these addresses over all ranks, into ours; an address of 0 stands for zeros."""

        def start(bucket: _Bucket) -> Any:
            bucket.pack[zeros](column)
            return self._engine.reduce(bucket.whole, bucket.received, bucket.own)

        self._run(start, lambda bucket: None)

    def gather(self) -> None:
        """All-gather: give every parameter the values that its owner has."""

        def start(bucket: _Bucket) -> Any:
            bucket.pack_own(self._where)
            return self._engine.gather(bucket.whole)

        self._run(start, lambda bucket: bucket.unpack(self._where))

    def _run(self, start: Callable[[_Bucket], Any], end: Callable[[_Bucket], None]) -> None:
        """Go bucket by bucket, with as many in transit as there is memory for."""
        under_way: list[tuple[_Bucket, Any]] = []

        def finish() -> None:
            bucket, started = under_way.pop(0)
            self._engine.wait(started)
            end(bucket)

        for bucket in self._packed:
            if len(under_way) == self._engine.turns:
                finish()
            under_way.append((bucket, start(bucket)))
        while under_way:
            finish()

    # Norms

    def completing(self, segments: NDArray, partials: Block) -> Callable[[], None]:
        """The function that fills in the partial sums of the other ranks: 16 bytes per block of elements."""
        ranks, rank = self._engine.ranks, self._engine.rank
        blocks = [
            [
                (int(segments[p.tensor, FIRST]) + p.start // BLOCK, -(-(p.stop - p.start) // BLOCK))
                for _, cuts in self._buckets
                for p in cuts.pieces[r]
                if segments[p.tensor, COUNT]
            ]
            for r in range(ranks)
        ]
        length = max(sum(count for _, count in some) for some in blocks)
        words = SUM // 8
        (sums,) = self._memory.arrays([_lines(ranks, length * words, FLOAT64)])
        rows = [
            [
                (0, first * SUM, address_of(sums) + (r * length + at) * SUM, count * words)
                for (first, count), at in zip(some, accumulate((n for _, n in some), initial=0), strict=False)
            ]
            for r, some in enumerate(blocks)
        ]
        pack = self._memory.copies(rows[rank], 8, "pack")
        unpack = self._memory.copies([row for r, some in enumerate(rows) if r != rank for row in some], 8, "unpack")
        column = np.array([partials.address], np.int64)

        def complete() -> None:
            pack(column)
            self._engine.wait(self._engine.gather(sums))
            unpack(column)

        return complete

    def any_of(self, found: Any) -> Array:
        """Is a number, on the host or beside the parameters, other than 0 on any rank? The answer is beside these.

        It is always at the same address, so that a column of addresses does not change.
        """
        if not self._flags:
            self._flags = self._memory.arrays([_lines(self._engine.ranks, 1, FLOAT64), _number(np.dtype(np.bool_))])
        flags, any_flag = self._flags
        flags[self._engine.rank] = found != 0
        self._engine.wait(self._engine.gather(flags))
        flags.any(out=any_flag)
        return any_flag

    def times_ranks(self, scale: Array) -> Array:
        """A number beside the parameters, times the number of ranks; also there, at the same address in every step."""
        if not self._scale:
            self._scale = self._memory.arrays([_number(FLOAT64)])
        (product,) = self._scale
        product[...] = scale.reshape(())  # float32 may not be able to hold it
        product *= self._engine.ranks
        return product

    # State

    def whole(self, parts: Mapping[Piece, Array], tensors: Collection[int]) -> dict[int, Array]:
        """Whole arrays in the compute type for these tensors, by number, put together from every rank's own parts."""
        layouts = {i: self._tensors[i].layout.of(compute_dtype(self._tensors[i].layout.dtype)) for i in tensors}
        made = dict(zip(layouts, self._memory.arrays(list(layouts.values())), strict=True))
        ranks, rank = self._engine.ranks, self._engine.rank
        for dtype, (pieces, length) in self._buckets:
            (whole,) = self._memory.arrays([_lines(ranks, length, compute_dtype(dtype))])
            for p in pieces[rank]:
                if p.tensor in made:
                    whole[rank, p.at : p.at + p.stop - p.start] = parts[p]
            self._engine.wait(self._engine.gather(whole))
            for line, some in zip(whole, pieces, strict=True):
                for p in some:
                    if p.tensor in made:
                        made[p.tensor].reshape(-1)[p.start : p.stop] = line[p.at : p.at + p.stop - p.start]
        return made


def _number(dtype: np.dtype[Any]) -> Layout:
    return Layout((), (), dtype, 0)


def _line(length: int, dtype: np.dtype[Any]) -> Layout:
    return Layout((length,), (dtype.itemsize,), dtype, 0)


def _lines(ranks: int, length: int, dtype: np.dtype[Any]) -> Layout:
    return Layout((ranks, length), (length * dtype.itemsize, dtype.itemsize), dtype, 0)
