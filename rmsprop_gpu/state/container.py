"""The safetensors files of checkpoints: written in pieces; heads are read, and other kinds of file are recognized.

The library opens these files and validates them. It does not write them here: it needs every byte in host memory at
once, and trusts address and shape, so that an array in another memory order would be silently permuted.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, BinaryIO, NamedTuple, TypeAlias

import numpy as np

from ..arrays.layout import Array
from ..extras import extra
from .pieces import Ways, pieces, write
from .replacing import SETTLED, replacing, settle
from .saved import VERSION

# The format's names for the dtypes of state.
DTYPES = {"float64": "F64", "int64": "I64", "float32": "F32", "uint16": "U16", "int16": "I16", "uint8": "U8"}
_OURS = {theirs: np.dtype(ours) for ours, theirs in DTYPES.items()}
_ALIGNMENT = 8  # of the data in the file
LONGEST_HEAD = 100_000_000  # bytes, the library's limit

FilePath: TypeAlias = str | bytes | os.PathLike[Any]
Progress: TypeAlias = Callable[[int, int], object]


class Entry(NamedTuple):
    """An array to be written."""

    name: str
    array: Array
    at: Callable[[], AbstractContextManager[Any]]  # the context for work on it: its device, after earlier work


class Described(NamedTuple):
    """An array as described in the head of a file."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


class CheckpointError(ValueError):
    """A checkpoint cannot be read: it is no checkpoint of this package, damaged, cut off or of a newer version.

    It is a `ValueError`. Nothing has been loaded.

    Examples
    --------
    >>> import numpy as np
    >>> from pathlib import Path
    >>> from tempfile import TemporaryDirectory
    >>> from rmsprop_gpu import RMSProp
    >>> with TemporaryDirectory() as folder:
    ...     path = Path(folder) / "opt.safetensors"
    ...     _ = path.write_bytes(b"something else")
    ...     try:
    ...         _ = RMSProp(np.ones(3)).load(path)
    ...     except CheckpointError as error:
    ...         print("opt.safetensors" in str(error))
    True
    """


def write_arrays(path: FilePath, metadata: Mapping[str, str], entries: Sequence[Entry], tell: Progress | None) -> None:
    """Write a file with these texts and arrays; the old file stays until the new one is complete."""
    entries = sorted(entries, key=lambda entry: -entry.array.itemsize)  # so that each starts at a multiple of it
    head, ways = _head(metadata, entries), Ways()
    done, total = 0, sum(entry.array.nbytes for entry in entries)
    with replacing(path, len(head) + total) as file:
        write(file, head)
        settled = 0
        for entry in entries:
            with entry.at():
                for piece in pieces(entry.array):
                    ways.of(piece).write(file, piece)
                    done += piece.nbytes
                    if len(head) + done - settled >= SETTLED:
                        settle(file, settled, len(head) + done)
                        settled = len(head) + done
                    if tell is not None:
                        tell(done, total)


def _head(metadata: Mapping[str, str], entries: Sequence[Entry]) -> bytes:
    """What precedes the data: its own length, then JSON with the position of each array, and the texts."""
    head: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, array, _ in entries:
        start, end = end, end + array.nbytes
        head[name] = {"dtype": DTYPES[str(array.dtype)], "shape": list(array.shape), "data_offsets": [start, end]}
    text = as_text(head)
    return len(text).to_bytes(8, "little") + text


def as_text(content: Mapping[str, Any]) -> bytes:
    """JSON as stored in files: of a length within the format's limit, and a multiple of the alignment of the data."""
    try:
        text = json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{error.object[error.start - 20 : error.end + 20]!r} is in a name or a group and is not valid Unicode, "
            "which a checkpoint cannot hold; wanted another name"
        ) from None
    text += b" " * (-len(text) % _ALIGNMENT)
    if len(text) > LONGEST_HEAD:
        raise ValueError(
            f"names, shapes and groups take {len(text):,} bytes; wanted at most {LONGEST_HEAD:,}, the format's limit"
        )
    return text


def read_head(path: FilePath, file: BinaryIO, wanted: str) -> tuple[dict[str, str], list[Described], int] | None:
    """The texts in an open file of this format, its arrays in storage order, and where they begin.

    None if the path has come to name another file.
    """
    with extra("safetensors"):
        from safetensors import SafetensorError, safe_open
    if os.fstat(file.fileno()).st_size == 0:
        raise CheckpointError(f"{named(path)} is empty; wanted a checkpoint as save() writes it")
    try:
        with safe_open(os.fsdecode(path), "numpy") as content:
            if not os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                return None
            metadata, names = content.metadata() or {}, content.offset_keys()
            views = [content.get_slice(name) for name in names]
            described = [(view.get_dtype(), tuple(view.get_shape())) for view in views]
    except SafetensorError as error:
        kind = _kind(file) or "damaged, cut off, or not a safetensors file"
        raise CheckpointError(
            f"{named(path)} is {kind} ({plain(error)}); wanted a checkpoint as save() writes it"
        ) from None
    if metadata.get("format") != wanted:
        raise CheckpointError(
            f"{named(path)} is a safetensors file, but not a checkpoint of rmsprop_gpu: its metadata has the format "
            f"{metadata.get('format')!r}"
        )
    check_version(path, as_whole(metadata.get("version")))
    odd = [f"{name!r} ({dtype})" for name, (dtype, _) in zip(names, described, strict=True) if dtype not in _OURS]
    odd += [f"{name!r}, which has no slash" for name in names if "/" not in name]
    if odd:
        raise CheckpointError(f"{named(path)} has arrays that cannot be state, by their dtypes or names: {some(odd)}")
    arrays = [Described(name, _OURS[dtype], shape) for name, (dtype, shape) in zip(names, described, strict=True)]
    return metadata, arrays, 8 + int.from_bytes(file.read(8), "little")


def check_version(path: FilePath, version: object) -> None:
    """Refuse a version that this package cannot read."""
    if version != VERSION:
        newer = isinstance(version, int) and version > VERSION
        why = "it was written by a newer one" if newer else "it is damaged"
        raise CheckpointError(f"{named(path)} has version {version!r}, and this package reads {VERSION}: {why}")


def _kind(file: BinaryIO) -> str | None:
    """Another format used for state, recognized by its first bytes; a valid checkpoint may begin with the same."""
    first = file.read(8)
    file.seek(0)
    if first.startswith(b"PK\x03\x04"):
        return "a zip file, as torch.save and numpy.savez write them"
    if first.startswith(b"\x80") and first[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "a pickle, which is not opened"
    return "an npy file" if first.startswith(b"\x93NUMPY") else None


def as_whole(text: str | None) -> Any:
    """The integer in a text; other text is returned unchanged, to be refused by the caller."""
    return int(text) if text is not None and text.isascii() and text.isdigit() and len(text) < 20 else text


def some(texts: Sequence[str]) -> str:
    """The first of them, if there are many."""
    return ", ".join([*texts[:8], *["..."] * (len(texts) > 8)])


def plain(error: Exception) -> str:
    """The text of an error on one line, with control characters for the terminal escaped."""
    text = str(error)[:300]
    return text if text.isprintable() else ascii(text)


def named(path: FilePath) -> str:
    return repr(os.fspath(path))
