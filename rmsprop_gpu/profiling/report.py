"""What a profile says: in plain numbers, as tables in a terminal and in a notebook, as a roofline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any, TypeAlias

import numpy as np

from ..extras import extra
from ..optimizer.summary import counted

Table: TypeAlias = tuple[tuple[str, ...], list[tuple[str, ...]]]  # head and rows
WIDTH = 120  # where the report is not printed to a terminal
LAUNCHES = ("launch", "tensors", "elements", "chunks", "bytes an element", "time", "GB/s", "of a copy")
CODES = ("launch", "grid x block", "registers", "spilled", "local memory", "occupancy")


@dataclass(frozen=True)
class Times:
    """Seconds: the median and the quartiles of the repeats."""

    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Times:
        """The quartiles of measured times."""
        q1, median, q3 = np.quantile(seconds, (0.25, 0.5, 0.75)).tolist()
        return cls(median, q1, q3)

    def __str__(self) -> str:
        return f"{seconds(self.median)} ({seconds(self.q1)} to {seconds(self.q3)})"


@dataclass(frozen=True)
class Code:
    """What is known of the machine code of a CUDA kernel."""

    registers: int  # a thread
    local_bytes: int  # of local memory a thread: the stack, and what was spilled
    spill_bytes: int | None  # stores and loads of spilled registers; None where ptxas is not installed
    blocks_per_multiprocessor: int
    occupancy: float  # threads that a multiprocessor holds at a time, of those it could
    instructions_of: str
    instructions: Mapping[str, int]


@dataclass(frozen=True)
class Launch:
    """What a step launches over the tensors that share device, dtype and Variant (a second, small kernel with it)."""

    name: str
    device: str  # "cpu", "cuda:0"
    variant: str
    dtype: str  # of parameters and gradients
    compute_dtype: str  # of the state and the arithmetic
    tensors: int  # that have a gradient
    elements: int
    chunks: int
    grid: int | None  # blocks; None on the CPU
    block: int | None  # threads
    bytes_per_element: int  # by the model of traffic.py
    bytes: int
    flops_per_element: int
    seconds: Times
    copy_rate: float  # bytes a second that a copy of as many bytes moved
    code: Code | None  # None on the CPU

    @property
    def rate(self) -> float:
        """Bytes a second."""
        return self.bytes / self.seconds.median

    @property
    def fraction_of_copy(self) -> float:
        """Of the speed of the copy."""
        return self.rate / self.copy_rate

    @property
    def flop_rate(self) -> float:
        """Floating-point operations a second."""
        return self.flops_per_element * self.elements / self.seconds.median

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.flops_per_element / self.bytes_per_element


@dataclass(frozen=True)
class Report:
    """What `profile` measured."""

    optimizer: str
    device: str
    repeats: int
    host: Times
    device_times: Times
    launches: list[Launch]
    memory_rate: float  # bytes a second, of the fastest copy that no cache holds
    flop_rates: dict[str, float]  # operations a second by compute dtype, of fma, at best
    skipped: int  # tensors without a gradient

    @property
    def bytes(self) -> int:
        """That a step moves."""
        return sum(launch.bytes for launch in self.launches)

    @property
    def rate(self) -> float:
        """Bytes a second."""
        return self.bytes / self.device_times.median

    @property
    def fraction_of_copy(self) -> float:
        """How long the copies of all launches take, of what the launches take."""
        copies = sum(launch.bytes / launch.copy_rate for launch in self.launches)
        return copies / sum(launch.seconds.median for launch in self.launches)

    def to_dict(self) -> dict[str, Any]:
        """Everything that was measured, in dicts, lists, strings and numbers."""
        return asdict(self)

    def __str__(self) -> str:
        with extra("profile"):
            from rich.console import Console
        console = Console(highlight=False)
        console.width = console.width if console.is_terminal else WIDTH
        with console.capture() as captured:
            console.print(self)
        return captured.get().rstrip("\n")

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table as RichTable
        from rich.text import Text

        yield from map(Text, _lines(self))
        for head, rows in _tables(self):
            table = RichTable(box=SIMPLE_HEAD)
            for i, name in enumerate(head):
                if i == 0:  # of all columns this one may break, within its many switches
                    table.add_column(name, overflow="fold")
                else:
                    table.add_column(name, justify="right", no_wrap=True)
            for row in rows:
                table.add_row(*map(Text, row))
            yield table

    def _repr_html_(self) -> str:
        lines = "<br>".join(map(escape, _lines(self)))
        return f"<p>{lines}</p>" + "".join(_html(head, rows) for head, rows in _tables(self))

    def plot(self, ax: Any = None) -> Any:
        """Draw the roofline: the ceilings of this machine as measured, each launch a point.

        Parameters
        ----------
        ax : matplotlib.axes.Axes, optional
            Where to draw; by default on a new figure of pyplot.

        Returns
        -------
        matplotlib.axes.Axes
        """
        from .plot import roofline

        return roofline(self, ax)


def _lines(report: Report) -> list[str]:
    """What is true of the step as a whole."""
    tensors, elements = (sum(getattr(x, name) for x in report.launches) for name in ("tensors", "elements"))
    without = f", {report.skipped} without a gradient" if report.skipped else ""
    return [
        f"{report.optimizer} over {counted(tensors, 'tensor')}, {counted(elements, 'element')}{without}, "
        f"on {report.device}",
        f"a step: host {report.host}, kernels {report.device_times}; median (quartiles) of {report.repeats} repeats",
        f"moved: {_bytes(report.bytes)} at {_rate(report.rate)}, {report.fraction_of_copy:.0%} of a copy's speed",
    ]


def _tables(report: Report) -> list[Table]:
    """A row for each launch; where it is known, what its machine code holds."""
    rows: list[tuple[str, ...]] = [
        (
            _shown_name(report, x),
            f"{x.tensors:,}",
            f"{x.elements:,}",
            f"{x.chunks:,}",
            str(x.bytes_per_element),
            seconds(x.seconds.median),
            f"{x.rate / 1e9:.3g}",
            f"{x.fraction_of_copy:.0%}",
        )
        for x in report.launches
    ]
    tables: list[Table] = [(LAUNCHES, rows)]
    codes = [(x, x.code) for x in report.launches if x.code]
    if codes:
        tables.append(
            (CODES, [(_shown_name(report, x), f"{x.grid:,} x {x.block}", *_cells(code)) for x, code in codes])
        )
        head = ("launch", f"instructions of {codes[0][1].instructions_of}")
        tables.append((head, [(_shown_name(report, x), _mix(code)) for x, code in codes]))
    return tables


def _shown_name(report: Report, launch: Launch) -> str:
    """With the device, where launches are on several."""
    several = len({x.device for x in report.launches}) > 1
    return f"{launch.name} on {launch.device}" if several else launch.name


def _cells(code: Code) -> tuple[str, ...]:
    return (
        str(code.registers),
        "not known" if code.spill_bytes is None else f"{code.spill_bytes} B",
        f"{code.local_bytes} B",
        f"{code.occupancy:.0%} ({code.blocks_per_multiprocessor} blocks)",
    )


def _mix(code: Code) -> str:
    return ", ".join(f"{n} {kind}" for kind, n in code.instructions.items())


def _html(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table without colours of its own: it takes those of the page."""
    lines = "".join(f"<tr>{_html_cells('td', row)}</tr>" for row in rows)
    return f"<table><thead><tr>{_html_cells('th', head)}</tr></thead><tbody>{lines}</tbody></table>"


def _html_cells(tag: str, cells: Sequence[str]) -> str:
    """The first may break within its many switches, the others not at all."""
    first, *others = map(escape, cells)
    made = [f'<{tag} style="text-align: left">{first.replace("+", "+<wbr>")}</{tag}>']
    return "".join(made + [f'<{tag} style="white-space: nowrap">{cell}</{tag}>' for cell in others])


def seconds(value: float) -> str:
    """Three digits and a unit."""
    return _scaled(value, ("s", 1.0), ("ms", 1e-3), ("us", 1e-6))


def _bytes(value: float) -> str:
    return _scaled(value, ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


def _rate(value: float) -> str:
    return _scaled(value, ("GB/s", 1e9), ("MB/s", 1e6))


def _scaled(value: float, *units: tuple[str, float]) -> str:
    """In the first unit of which it is one or more, else in the last."""
    name, unit = next((pair for pair in units if value >= pair[1]), units[-1])
    return f"{value / unit:.3g} {name}" if value < 1000 * unit else f"{value / unit:,.0f} {name}"
