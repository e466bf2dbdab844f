"""Arrays with parts in several files: the parts' names, whether all are there, and how they are read as one."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple, TypeAlias

import numpy as np

from .kinds import elements_of, is_counter

# Dtype and shape of each parameter, by name; its state has the same shape.
Tensors: TypeAlias = Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]

_NUMBER = "(0|[1-9][0-9]{0,18})"  # only one spelling per number
_NAME = re.compile(rf"(?s:(.*))/([^/\[\]]+)(?:\[{_NUMBER}:{_NUMBER}\])?")


class Span(NamedTuple):
    """What a part belongs to, and which elements it has, counted in C order; a counter has no range."""

    parameter: str
    kind: str
    start: int | None
    stop: int | None

    @property
    def name(self) -> str:
        """The name in a file: ``w/square_avg[4096:40960]``, ``w/step``."""
        whole = f"{self.parameter}/{self.kind}"
        return whole if self.start is None else f"{whole}[{self.start}:{self.stop}]"

    @property
    def shape(self) -> tuple[int, ...]:
        return () if self.start is None or self.stop is None else (self.stop - self.start,)


def span_of(name: str) -> Span | None:
    """The part with this name; None if it is not the name of a part."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    parameter, kind, start, stop = match.groups()
    return Span(parameter, kind, None, None) if start is None else Span(parameter, kind, int(start), int(stop))


def problems_of_parts(tensors: Tensors, files: Mapping[str, Iterable[str]]) -> list[str]:
    """What is wrong with the parts in these files, by their names: each element has to be there exactly once."""
    problems: list[str] = []
    seen: dict[str, str] = {}
    found: dict[str, dict[str, list[Span]]] = {name: {} for name in tensors}
    for file, names in files.items():
        for name in names:
            where, span = f"{name!r} in {file}", span_of(name)
            if name in seen:
                problems.append(f"{where} is in {seen[name]} too")
            elif span is None:
                problems.append(f"{where} is not the name of a part, such as 'w/square_avg[0:8]' or 'w/step'")
            elif span.parameter not in tensors:
                problems.append(f"{where} belongs to none of the tensors")
            elif is_counter(span.kind) != (span.start is None):
                wanted = "no range, since it is one number" if is_counter(span.kind) else "a range of elements"
                problems.append(f"{where} is not a part of a {span.kind}; wanted {wanted}")
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
    """What is missing from an array, or there twice, from its ranges in order."""
    end, last = 0, ""
    for start, stop in ranges:
        name = f"{array}[{start}:{stop}]"
        where = f"{name!r} in {files[name]}"
        if not start <= stop <= size:
            yield f"{where} is not a range of its {size} elements"
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
    """The parts that make up an array, as one file of its bytes."""

    def __init__(self, parts: Iterable[tuple[int, int, BinaryIO, int]]) -> None:
        """For each part: its start in the array, its length, its file, and its start there; all in bytes."""
        self._parts = sorted((part for part in parts if part[1]), key=_start)
        self._at = 0

    def seek(self, offset: int, /) -> None:
        self._at = offset

    def readinto(self, into: memoryview, /) -> int:
        """Read, at most to the end of a part, and return the number of bytes."""
        start, nbytes, file, offset = self._parts[bisect_right(self._parts, self._at, key=_start) - 1]
        file.seek(offset + self._at - start)
        within = into[: start + nbytes - self._at]
        count: int = file.readinto(within)  # type: ignore[attr-defined]  # unbuffered files have it
        self._at += count
        return count


def _start(part: tuple[int, int, BinaryIO, int]) -> int:
    return part[0]
