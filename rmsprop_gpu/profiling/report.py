"""What a profile shows: tables in a terminal and in a notebook, and a roofline."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, TypeAlias

from ..extras import extra
from ..optimizer.summary import counted
from .plot import roofline
from .results import Code, Launch, Results
from .units import rate, seconds, size

Table: TypeAlias = tuple[tuple[str, ...], list[tuple[str, ...]]]  # head and rows
WIDTH = 120  # where the report is not printed to a terminal
LAUNCHES = ("launch", "tensors", "elements", "chunks", "bytes an element", "time", "GB/s", "of a copy")
CODES = ("launch", "grid x block", "registers", "spilled", "local memory", "occupancy")


@dataclass(frozen=True)
class Report(Results):
    """What `profile` measured, and shows."""

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
        return roofline(self, ax)


def _lines(report: Report) -> list[str]:
    """What is true of the step as a whole."""
    tensors, elements = (sum(getattr(x, name) for x in report.launches) for name in ("tensors", "elements"))
    without = f", {report.skipped} without a gradient" if report.skipped else ""
    return [
        f"{report.optimizer} over {counted(tensors, 'tensor')}, {counted(elements, 'element')}{without}, "
        f"on {report.device}",
        f"a step: host {report.host}, kernels {report.device_times}; median (quartiles) of {report.repeats} repeats",
        f"moved: {size(report.bytes)} at {rate(report.rate)}, {report.fraction_of_copy:.0%} of a copy's speed",
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
