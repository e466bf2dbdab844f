"""A checkpoint from several processes: a folder with one safetensors file per process, and an index of the contents.

The files have names that no other save uses, and the index comes last: the checkpoint exists from the moment it is
renamed. Until then the previous one is there with all its files, which are removed afterwards.
"""

from __future__ import annotations

import math
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from ..arrays.layout import Array
from . import index
from .container import CheckpointError, Described, Entry, FilePath, Progress, named, read_head, some, write_arrays
from .index import Index, index_text, read_index
from .kinds import BASES, dtypes_of, elements_of, is_counter
from .parts import Joined, Span, Tensors, span_of
from .pieces import Stored, Ways, write
from .replacing import SUFFIX, replacing
from .saved import VERSION

FORMAT = "rmsprop_gpu part"
_SUFFIX = re.escape(SUFFIX)
_OURS = re.compile(rf"{index.FILE.pattern}(?:{_SUFFIX})*|{re.escape(index.NAME)}(?:{_SUFFIX})+")


class Part(NamedTuple):
    """Elements of a state array, as held by one process.

    Parameters
    ----------
    parameter, kind : str
        The name of the parameter, and the kind of state: ``"square_avg"``, ``"step"``, ...
    start, stop : int or None
        Which elements of the whole array, counted in C order; None for a counter. An array without elements needs its
        part ``[0:0]``, or nothing would show that it exists.
    array : array
        These elements, on one axis, or the number as a 0-d array; NumPy's or CuPy's.
    at : callable
        As in `Entry`.
    """

    parameter: str
    kind: str
    start: int | None
    stop: int | None
    array: Array
    at: Callable[[], AbstractContextManager[Any]]


def new_token() -> str:
    """A token that tells the files of one save from those of any other: made by one process, and sent to all."""
    return secrets.token_hex(4)


def file_name(steps: int, token: str, rank: int) -> str:
    """The name of the file of a process."""
    return f"step-{steps:08d}-{token}-rank-{rank:05d}.safetensors"


# Writing


def write_file(folder: FilePath, name: str, parts: Iterable[Part], progress: Progress | None = None) -> list[str]:
    """Write the file of one process, and return the names of its parts; the folder is created if necessary.

    It belongs to no checkpoint until an index names it.
    """
    if not index.FILE.fullmatch(name):
        raise ValueError(f"{name!r} is not the name of a process's file; wanted one made by file_name()")
    entries: dict[str, Entry] = {}
    for parameter, kind, start, stop, array, at in parts:
        span = Span(parameter, kind, start, stop)
        if array.shape != span.shape:
            raise ValueError(f"{span.name!r} has shape {array.shape}; wanted {span.shape}")
        if span.name in entries:
            raise ValueError(f"{span.name!r} is there twice; wanted each part once")
        entries[span.name] = Entry(span.name, array, at)
    path = Path(os.fsdecode(folder))
    _make(path)
    metadata = {"format": FORMAT, "version": str(VERSION), "file": name}
    write_arrays(path / name, metadata, list(entries.values()), progress)
    return list(entries)


def _make(folder: Path) -> None:
    """Make sure that the folder exists, whichever process creates it first."""
    try:
        folder.mkdir()
    except FileExistsError:
        if not folder.is_dir():
            raise NotADirectoryError(f"{folder} is not a folder; wanted a folder, or an unused name") from None
        return
    with suppress(OSError):  # Windows cannot open folders
        at = os.open(folder.parent, os.O_RDONLY)
        try:
            os.fsync(at)
        finally:
            os.close(at)


def write_index(
    folder: FilePath, frame: Mapping[str, Any], tensors: Tensors, files: Mapping[str, Sequence[str]]
) -> None:
    """Turn files that were written into a checkpoint, and remove those of others.

    Parameters
    ----------
    folder : path-like
        Where the files are.
    frame : mapping
        A state dict without its arrays.
    tensors : mapping
        Dtype and shape of each parameter, by name.
    files : mapping
        What `write_file` returned, by file name.

    Raises
    ------
    TypeError, ValueError
        Naming parts that are missing, overlap, or belong to no tensor, or values in a group that are not JSON; the old
        checkpoint stays.
    OSError
        If one of the files is missing, or the index cannot be written; again the old checkpoint stays.
    """
    path = Path(os.fsdecode(folder))
    text = index_text(frame, tensors, files)
    missing = [name for name in files if not (path / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{path} lacks {some(missing)}, which were written; wanted one folder for all processes, with no other "
            "save into it at the same time"
        )
    with replacing(path / index.NAME, len(text)) as file:
        write(file, text)
    remove(path, lambda name: name not in files)


def names(folder: FilePath, file: str) -> bool:
    """Does the index name this file? True also if the index cannot be read."""
    try:
        return file.encode() in (Path(os.fsdecode(folder)) / index.NAME).read_bytes()
    except FileNotFoundError:
        return False
    except OSError:
        return True


def remove(folder: FilePath, which: Callable[[str], bool]) -> None:
    """Remove these files of saves, complete or not; files that are not ours or cannot be removed stay."""
    with suppress(OSError), os.scandir(os.fsdecode(folder)) as entries:
        for entry in entries:
            if _OURS.fullmatch(entry.name) and which(entry.name) and entry.is_file(follow_symlinks=False):
                with suppress(OSError):  # Windows cannot delete an open file
                    os.unlink(entry.path)


# Reading


class _File(NamedTuple):
    """The open file of a process."""

    name: str
    file: BinaryIO
    arrays: list[Described]
    start: int  # of the first of them


@contextmanager
def opened(folder: FilePath) -> Iterator[dict[str, Any]]:
    """The state dict in a folder, as from `checkpoint.opened`, with the names of its files as ``"files"``.

    All files are opened before any array is read: one that a save removes in the meantime can still be read to its end.
    """
    path = Path(os.fsdecode(folder))
    while True:
        with ExitStack() as stack:
            found = _open_all(path, stack)
            if found is None:
                continue  # a save has just replaced it
            content, files = found
            yield {**content.frame, "files": [file.name for file in files], "state": _state(content, files)}
            return


def _open_all(folder: Path, stack: ExitStack) -> tuple[Index, list[_File]] | None:
    """The index, and the files that it names; None if another save has replaced them."""
    at, name = folder / index.NAME, ""
    try:
        text = stack.enter_context(_open(at))
    except FileNotFoundError:
        folder.stat()  # if there is no folder, the system's error says so
        raise CheckpointError(
            f"{named(folder)} has no {index.NAME}, which a save writes last; wanted a folder written by save()"
        ) from None
    content = read_index(at, text)
    try:
        files = {}
        for name in content.files:
            files[name] = stack.enter_context(_open(folder / name))
        found = []
        for name, file in files.items():
            head = read_head(folder / name, file, FORMAT)
            if head is None:
                return None
            metadata, arrays, start = head
            if metadata.get("file") != name:
                was = metadata.get("file")
                raise CheckpointError(f"{named(folder / name)} was written as {was!r}; wanted the file with this name")
            found.append(_File(name, file, arrays, start))
    except FileNotFoundError:
        if _replaced(at, text):
            return None
        raise CheckpointError(f"{named(folder)} lacks {name}, which its {index.NAME} names") from None
    problems = [problem for file in found for problem in _differences(file, content)]
    if problems:
        raise CheckpointError(f"{named(folder)} is damaged: {some(problems)}")
    return content, found


def _open(path: Path) -> BinaryIO:
    return open(path, "rb", buffering=0)


def _replaced(path: Path, file: BinaryIO) -> bool:
    """Is the file at this path no longer the one that is open?"""
    try:
        return not os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return True


def _differences(file: _File, content: Index) -> list[str]:
    """Where a file differs from its index."""
    listed, there = set(content.files[file.name]), {array.name for array in file.arrays}
    problems = [f"{name!r} is not in {file.name}" for name in content.files[file.name] if name not in there]
    for name, dtype, shape in file.arrays:
        span, where = span_of(name), f"{name!r} in {file.name}"
        if span is None or name not in listed:
            problems.append(f"{where} is not in the index")
            continue
        wanted = dtypes_of(content.tensors[span.parameter][0], span.kind)
        if dtype not in wanted:
            problems.append(f"{where} has dtype {dtype}; wanted {' or '.join(map(str, wanted))}")
        if shape != span.shape:
            problems.append(f"{where} has shape {shape}; wanted {span.shape}")
    return problems


def _state(content: Index, files: Sequence[_File]) -> dict[str, dict[str, Stored]]:
    """Each array by name, whichever files hold its parts."""
    parts: dict[tuple[str, str], list[tuple[int, int, BinaryIO, int]]] = {}
    dtypes: dict[tuple[str, str], np.dtype[Any]] = {}
    for _, file, arrays, start in files:
        offset = start
        for name, dtype, shape in arrays:
            span, nbytes = span_of(name), dtype.itemsize * math.prod(shape)
            if span is not None:
                part = (dtype.itemsize * (span.start or 0), nbytes, file, offset)
                parts.setdefault((span.parameter, span.kind), []).append(part)
                if (other := dtypes.setdefault((span.parameter, span.kind), dtype)) != dtype:
                    raise CheckpointError(f"{span.parameter}/{span.kind} has parts of {dtype} and of {other}")
            offset += nbytes
    ways = Ways()
    state: dict[str, dict[str, Stored]] = {name: {} for name in content.tensors}
    for (parameter, kind), found in parts.items():
        _, shape = content.tensors[parameter]
        whole = () if is_counter(kind) else (elements_of(shape, kind),) if kind in BASES else shape
        state[parameter][kind] = Stored(Joined(found), 0, dtypes[parameter, kind], whole, ways)
    return state
