"""Arrays of which several files have parts: their names, whether all are there, and how they are read as one."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple, TypeAlias

import numpy as np

from .kinds import elements_of, is_counter

# By name what a parameter is, of which the state has the shape: its dtype and its shape.
Tensors: TypeAlias = Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]

_NUMBER = "(0|[1-9][0-9]{0,18})"  # written in one way only
_NAME = re.compile(rf"(?s:(.*))/([^/\[\]]+)(?:\[{_NUMBER}:{_NUMBER}\])?")


class Span(NamedTuple):
    """What a part is of, and which elements, counted in C order; a counter has no range."""

    parameter: str
    kind: str
    start: int | None
    stop: int | None

    @property
    def name(self) -> str:
        """As in a file: ``w/square_avg[4096:40960]``, ``w/step``."""
        whole = f"{self.parameter}/{self.kind}"
        return whole if self.start is None else f"{whole}[{self.start}:{self.stop}]"

    @property
    def shape(self) -> tuple[int, ...]:
        return () if self.start is None or self.stop is None else (self.stop - self.start,)


def span_of(name: str) -> Span | None:
    """What a part of this name is; None where it is no such name."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    parameter, kind, start, stop = match.groups()
    return Span(parameter, kind, None, None) if start is None else Span(parameter, kind, int(start), int(stop))


def problems_of_parts(tensors: Tensors, files: Mapping[str, Iterable[str]]) -> list[str]:
    """What is wrong with the parts that files have, by their names: each element has to be there, and once."""
    problems: list[str] = []
    seen: dict[str, str] = {}
    found: dict[str, dict[str, list[Span]]] = {name: {} for name in tensors}
    for file, names in files.items():
        for name in names:
            where, span = f"{name!r} in {file}", span_of(name)
            if name in seen:
                problems.append(f"{where} is in {seen[name]} too")
            elif span is None:
                problems.append(f"{where} is no name of a part, as 'w/square_avg[0:8]' and 'w/step' are")
            elif span.parameter not in tensors:
                problems.append(f"{where} is of none of the tensors")
            elif is_counter(span.kind) != (span.start is None):
                wanted = "no range, as of one number" if is_counter(span.kind) else "a range of elements"
                problems.append(f"{where} is no part of a {span.kind}; wanted {wanted}")
            else:
                found[span.parameter].setdefault(span.kind, []).append(span)
            seen.setdefault(name, file)
    for parameter, kinds in found.items():
        if not kinds:
            problems.append(f"no part of {parameter!r} is there")
        for kind, spans in kinds.items():
            if not is_counter(kind):
                ranges = sorted((span.start or 0, span.stop or 0) for span in spans)
                problems += _problems_of_ranges(
                    f"{parameter}/{kind}", ranges, elements_of(tensors[parameter][1], kind), seen
                )
    return problems


def _problems_of_ranges(
    array: str, ranges: Iterable[tuple[int, int]], size: int, files: Mapping[str, str]
) -> Iterator[str]:
    """What of an array is missing, or there twice, by ranges in their order."""
    end, last = 0, ""
    for start, stop in ranges:
        name = f"{array}[{start}:{stop}]"
        where = f"{name!r} in {files[name]}"
        if not start <= stop <= size:
            yield f"{where} is no range of its {size} elements"
            continue
        if start > end:
            yield f"{array!r} lacks its elements {end} to {start} of {size}"
        elif start < end and start < stop:
            yield f"{last} and {where} overlap"
        if stop > end:
            end, last = stop, where
    if end < size:
        yield f"{array!r} lacks its elements {end} to {size} of {size}"


class Joined:
    """The parts of an array, which cover it, as one file of its bytes."""

    def __init__(self, parts: Iterable[tuple[int, int, BinaryIO, int]]) -> None:
        """Of each part, in bytes: where it begins in the array, how long it is, its file, where it begins there."""
        self._parts = sorted((part for part in parts if part[1]), key=_start)
        self._at = 0

    def seek(self, offset: int, /) -> None:
        self._at = offset

    def readinto(self, into: memoryview, /) -> int:
        """Read, to the end of a part at most; how many bytes?"""
        start, nbytes, file, offset = self._parts[bisect_right(self._parts, self._at, key=_start) - 1]
        file.seek(offset + self._at - start)
        within = into[: start + nbytes - self._at]
        count: int = file.readinto(within)  # type: ignore[attr-defined]  # files without a buffer have it
        self._at += count
        return count


def _start(part: tuple[int, int, BinaryIO, int]) -> int:
    return part[0]
