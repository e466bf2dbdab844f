"""Lines and tables: with rich in a terminal, as plain text if that is not installed, as HTML in a notebook."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import Any, TypeAlias

Table: TypeAlias = tuple[tuple[str, ...], list[tuple[str, ...]]]  # head and rows
WIDTH = 120  # if the report is not printed to a terminal
NARROW = 24  # the least width of a first column that gives way to the others


class Shown:
    """Anything that has lines and tables, and shows them."""

    def _lines(self) -> list[str]:
        """Sentences about the whole."""
        raise NotImplementedError

    def _tables(self) -> list[Table]:
        raise NotImplementedError

    def __str__(self) -> str:
        try:
            from rich.console import Console
        except ImportError:
            return _plain(self._lines(), self._tables())
        console = Console(highlight=False)
        console.width = console.width if console.is_terminal else WIDTH
        with console.capture() as captured:
            console.print(self)
        return captured.get().rstrip("\n")

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table as RichTable
        from rich.text import Text

        yield from map(Text, self._lines())
        for head, rows in self._tables():
            table = RichTable(box=SIMPLE_HEAD)
            for i, name in enumerate(head):
                if i == 0:  # only this column may break, within its many switches
                    longest = max(len(row[0]) for row in rows)
                    table.add_column(name, overflow="fold", min_width=min(longest, NARROW))
                else:
                    table.add_column(name, justify="right", no_wrap=True)
            for row in rows:
                table.add_row(*map(Text, row))
            yield table

    def _repr_html_(self) -> str:
        lines = "<br>".join(map(escape, self._lines()))
        return f"<p>{lines}</p>" + "".join(_html(head, rows) for head, rows in self._tables())


def _plain(lines: Sequence[str], tables: Sequence[Table]) -> str:
    """Columns as wide as their widest cell, the first aligned left, the others right."""
    blocks = ["\n".join(lines)]
    for head, rows in tables:
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        made = []
        for first, *others in (head, tuple("-" * width for width in widths), *rows):
            cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
            made.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
        blocks.append("\n".join(made))
    return "\n\n".join(blocks)


def _html(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table without its own colours: it inherits those of the page."""
    lines = "".join(f"<tr>{_html_cells('td', row)}</tr>" for row in rows)
    return f"<table><thead><tr>{_html_cells('th', head)}</tr></thead><tbody>{lines}</tbody></table>"


def _html_cells(tag: str, cells: Sequence[str]) -> str:
    """The cells of a row: the first may break within its many switches, the others not at all."""
    first, *others = map(escape, cells)
    made = [f'<{tag} style="text-align: left">{first.replace("+", "+<wbr>")}</{tag}>']
    return "".join(made + [f'<{tag} style="white-space: nowrap">{cell}</{tag}>' for cell in others])
