"""What plan, host and device share: a batch, what a step writes, how buffers are allocated."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ..arrays.checks import Tensor
from ..arrays.dtypes import compute_dtype
from ..arrays.layout import Array, Layout, NDArray, address_of, interval_of
from ..hyper import Rates
from ..kernels import table
from ..kernels.codes import BLOCK as CODED
from ..kernels.norms import BLOCK, SUM
from ..kernels.rule import Scalars, Variant
from .library import Block

_LR, _LR_TIMES_DECAY = (Scalars._fields.index(name) for name in Rates._fields)
LINE = 64  # bytes: large buffers start on their own cache line


def allocated(layouts: Sequence[Layout], zeros: Callable[[int], Array]) -> list[Array]:
    """Zeroed arrays with these layouts, as views of one aligned allocation, made by ``zeros(bytes)``."""
    offsets, end = [], 0
    for layout in layouts:
        unit = LINE if layout.nbytes >= LINE else 16
        offsets.append(-(-end // unit) * unit)
        end = offsets[-1] + layout.nbytes
    memory = zeros(end + LINE)
    first = -address_of(memory) % LINE
    return [layout.over(memory, first + offset) for layout, offset in zip(layouts, offsets, strict=True)]


def kernel_name(kernel: str, dtype: np.dtype[Any], grad_dtype: np.dtype[Any], variant: Variant) -> str:
    """The name of a kernel as shown to people."""
    grads = "" if grad_dtype == dtype else f" with {grad_dtype} gradients"
    return f"{kernel}[{dtype}{grads}, {variant}]"


class OtherDtypes(Exception):  # noqa: N818  # no error: the caller uses another plan
    """Gradients are valid, but their dtypes, given here by tensor, are not those that the plan was made for."""

    def __init__(self, of: dict[Tensor, np.dtype[Any]]) -> None:
        super().__init__()
        self.of = of


class Parts(NamedTuple):
    """What a plan needs to know if its tensors are parts of whole ones, whose rest is in other processes.

    Norms cover the whole tensors. Each part starts at a block of the sums.
    """

    sizes: Sequence[int]  # of the whole tensors
    of: Sequence[int]  # the whole tensor to which each part belongs
    blocks: Sequence[int]  # where in the whole tensor the part starts
    likes: Sequence[int]  # for each whole tensor a part here, of it or another, with the same group and dtype
    # From the segments of norms and their partial sums, makes the function that adds the other processes' partial sums.
    completing: Callable[[NDArray, Block], Callable[[], None]]


class Norms:
    """Where the norms of a step are summed, for the tensors of one device in parameter order.

    If other processes make some of the partial sums, `complete` is called between these and the totals.
    """

    complete: Callable[[], None] | None = None

    def __init__(
        self, sizes: Sequence[int], measured: Sequence[bool], outcome: int, *, narrow: bool, parts: Parts | None = None
    ) -> None:
        counts = np.where(measured, -(-np.array(sizes, np.int64) // BLOCK), 0)
        self.segments = np.zeros((len(sizes), table.SEGMENT_COLUMNS), np.int64)
        self.segments[:, table.FIRST] = np.cumsum(counts) - counts
        self.segments[:, table.COUNT] = counts
        self.partials = int(counts.sum())
        self.outcome = outcome  # its address
        self.narrow = narrow  # does any have the compute type float32?
        self._parts = parts
        self.block = np.zeros(table.NORMS_WORDS, np.int64)  # of addresses
        self._memory: tuple[Block, ...] = ()

    @property
    def bytes_of_sums(self) -> tuple[int, int]:
        """The bytes of the partial sums, and of the sums."""
        return self.partials * SUM, (len(self.segments) + 1) * SUM

    def find(self, batch: Batch, scalars: int) -> None:
        """Note where the scalars of a batch's tensors are: at this address, on the host or on a device."""
        numbers, rows = batch.alike
        lines = batch.table[rows, table.SCALARS_ROW]
        self.segments[numbers, table.SCALARS_AT] = scalars + lines * batch.scalars.strides[0]
        self.segments[numbers, table.IS_FLOAT32] = batch.scalars.dtype == np.float32

    def settle(self, partials: Block, segments: Block, sums: Block) -> None:
        """Use this memory, on the host or on a device, for the sums."""
        self._memory = partials, segments, sums  # raw addresses keep nothing alive
        addresses = [block.address for block in self._memory]
        self.block[:] = [*addresses, len(self.segments), self.outcome, self.narrow]
        if self._parts is not None and self.partials:
            self.complete = self._parts.completing(self.segments, partials)


@dataclass(eq=False)
class Batch:
    """What one kernel launch updates: the tensors that share device, dtypes and Variant."""

    variant: Variant
    dtype: np.dtype[Any]  # of the parameters
    grad_dtype: np.dtype[Any]
    device: int | None
    labels: list[str]
    sizes: list[int]
    groups: list[int]  # the group of each of its rows of scalars
    table: NDArray
    scalars: NDArray
    factors: NDArray
    numbers: NDArray  # its tensors, by number among those that norms cover
    firsts: NDArray  # the first partial sum of each of its tensors
    alike: tuple[NDArray, NDArray]  # tensors that norms cover, by number, and a row here with the scalars of each
    norms: Norms
    told: NDArray = field(default_factory=lambda: np.zeros(table.TOLD_WORDS, np.int64))
    grads: NDArray = field(default_factory=lambda: np.empty(0, np.int64))  # the gradient column, on the host

    def write_rates(self, rates: Sequence[Rates]) -> None:
        """Write the learning rates of all groups for the next steps; each is rounded once."""
        # Through a memoryview: NumPy takes a microsecond per number, and may be set to raise when one underflows.
        scalars: Any = memoryview(self.scalars)  # type: ignore[arg-type]  # NumPy's C code makes it a buffer
        for row, group in enumerate(self.groups):
            scalars[row, _LR], scalars[row, _LR_TIMES_DECAY] = rates[group]

    def title(self, kernel: str) -> str:
        """The name of a kernel over this batch as shown to people."""
        return kernel_name(kernel, self.dtype, self.grad_dtype, self.variant)


def make_batch(
    variant: Variant,
    dtype: np.dtype[Any],
    grad_dtype: np.dtype[Any],
    device: int | None,
    members: Sequence[tuple[Tensor, int, Mapping[str, Array]]],
    own: Sequence[tuple[int, int]],
    alike: Sequence[tuple[int, int]],
    norms: Norms,
) -> Batch:
    """The batch for these tensors, each with its group and its state.

    `own` gives, for each tensor, its number among the tensors that norms cover and the block there at which it starts;
    `alike` gives numbers of such tensors, and for each a row of the batch with its scalars.
    """
    groups = list(dict.fromkeys(group for _, group, _ in members))
    rows = np.zeros((len(members), table.COLUMNS), np.int64)
    columns = {**table.BUFFERS, **table.COUNTERS, **table.COUNTS}
    for row, (tensor, group, buffers) in zip(rows, members, strict=True):
        row[table.PARAM], row[table.SCALARS_ROW] = tensor.address, groups.index(group)
        row[table.BLOCKS_BEFORE] = tensor.start // CODED
        for name, buffer in buffers.items():
            row[columns[name]] = address_of(buffer)
    compute = compute_dtype(dtype)
    scalars = np.zeros((len(groups), len(Scalars._fields)), compute)
    tensors = [tensor for tensor, _, _ in members]
    labels, sizes = [t.label for t in tensors], [t.layout.size for t in tensors]
    factors = np.zeros((len(members), table.FACTOR_COLUMNS), compute)
    numbers, blocks = np.array(own, np.int64).reshape(-1, 2).T.copy()
    firsts = norms.segments[numbers, table.FIRST] + blocks
    theirs, like = np.array(alike, np.int64).reshape(-1, 2).T
    return Batch(
        *(variant, dtype, grad_dtype, device, labels, sizes, groups, rows, scalars, factors),
        *(numbers, firsts, (theirs, like), norms),
    )


class Written:
    """Everything a step writes, as intervals of memory; they were checked to be disjoint when they were made."""

    def __init__(self, tensors: Sequence[Tensor], buffers: Sequence[Mapping[str, Array]]) -> None:
        intervals = sorted(_intervals(tensors, buffers), key=lambda interval: interval[0])
        self._named = [(label, array) for _, _, label, array in intervals]
        self._starts, self._ends = [i[0] for i in intervals], [i[1] for i in intervals]
        self.lowest, self.highest = np.array(self._starts, np.int64), np.array(self._ends, np.int64)
        self._lowest_or_none = np.append(self.lowest, np.iinfo(np.int64).max)

    def near(self, array: Array) -> Iterator[tuple[str, Array]]:
        """(label, array) of everything a step writes within the memory bounds of this array."""
        if array.size == 0:
            return
        low, end = interval_of(array)
        for k in range(bisect_right(self._ends, low), len(self._ends)):
            if self._starts[k] >= end:
                return
            yield self._named[k]

    def hit(self, starts: NDArray, sizes: NDArray) -> NDArray:
        """The indices of those given intervals (first addresses, sizes in bytes) that overlap a written one."""
        lowest = self._lowest_or_none[np.searchsorted(self.highest, starts, side="right")]
        return ((lowest < starts + sizes) & (sizes > 0)).nonzero()[0]


def _intervals(
    tensors: Sequence[Tensor], buffers: Sequence[Mapping[str, Array]]
) -> Iterator[tuple[int, int, str, Array]]:
    """(lowest address, end, label, array)."""
    for tensor, state in zip(tensors, buffers, strict=True):
        written = [(tensor.label, tensor.view, tensor.address, tensor.layout.nbytes)]
        written += [(tensor.state_label + name, x, address_of(x), x.nbytes) for name, x in state.items()]
        for label, array, start, nbytes in written:
            if nbytes:
                yield start, start + nbytes, label, array
