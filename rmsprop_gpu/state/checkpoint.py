"""A state dict as one safetensors file: written in pieces and put in its place at once, read in pieces into the state.

The library opens such files and validates them. It does not write them here: it wants every byte in host memory at
one time, and takes address and shape on trust, so that an array in another order of memory is permuted without a word.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, BinaryIO, NamedTuple, TypeAlias

import numpy as np

from ..arrays.layout import Array
from ..extras import extra
from .flat import as_json
from .pieces import Stored, Ways, pieces, write
from .replacing import SETTLED, replacing, settle
from .saved import VERSION

FORMAT = "rmsprop_gpu"
# What the format calls the dtypes that state has.
DTYPES = {"float64": "F64", "int64": "I64", "float32": "F32"}
_OURS = {theirs: np.dtype(ours) for ours, theirs in DTYPES.items()}
_ALIGNMENT = 8  # of the data in the file
_LONGEST_HEAD = 100_000_000  # bytes, says the library

Progress: TypeAlias = Callable[[int, int], object]


class Entry(NamedTuple):
    """An array that is to be written."""

    name: str
    array: Array
    at: Callable[[], AbstractContextManager[Any]]  # where work on it belongs: its device, after what came before


class CheckpointError(ValueError):
    """A file that is no checkpoint, or not whole, or newer."""


def save(
    path: str | bytes | os.PathLike[Any], frame: Mapping[str, Any], entries: Sequence[Entry], tell: Progress | None
) -> None:
    """Write a state dict, given without its arrays, and these; what the file was stays until the new one is whole."""
    entries = sorted(entries, key=lambda entry: -entry.array.itemsize)  # so that each begins at a multiple of it
    head, ways = _head(frame, entries), Ways()
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


def _head(frame: Mapping[str, Any], entries: Sequence[Entry]) -> bytes:
    """What stands before the data: its own length, and as JSON where each array is, and texts."""
    groups = json.dumps(json.loads(as_json(frame))["param_groups"])
    texts = {name: str(frame[name]) for name in ("version", "optimizer", "steps", "skipped_steps")}
    head: dict[str, Any] = {"__metadata__": {"format": FORMAT, **texts, "param_groups": groups}}
    end = 0
    for name, array, _ in entries:
        start, end = end, end + array.nbytes
        head[name] = {"dtype": DTYPES[str(array.dtype)], "shape": list(array.shape), "data_offsets": [start, end]}
    try:
        text = json.dumps(head, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{error.object[error.start - 20 : error.end + 20]!r} is in a name or a group and is no Unicode, which a "
            "checkpoint cannot hold; wanted another name"
        ) from None
    text += b" " * (-len(text) % _ALIGNMENT)
    if len(text) > _LONGEST_HEAD:
        raise ValueError(
            f"names, shapes and groups take {len(text):,} bytes; wanted at most {_LONGEST_HEAD:,}, which the format has"
        )
    return len(text).to_bytes(8, "little") + text


@contextmanager
def opened(path: str | bytes | os.PathLike[Any]) -> Iterator[dict[str, Any]]:
    """The state dict in a file, with a `Stored` in the place of each array: while it is open these can be read.

    Raises
    ------
    CheckpointError
        Naming what the file is where it is no checkpoint of this package, is damaged, or newer.
    MissingExtraError
        Where safetensors is not installed.
    """
    while True:
        with open(path, "rb", buffering=0) as file:
            found = _read_head(path, file)
            if found is None:
                continue  # a save has put another one in its place
            metadata, described = found
            ways = Ways()
            state: dict[str, dict[str, Stored]] = {}
            start = 8 + int.from_bytes(file.read(8), "little")
            for name, dtype, shape in described:
                parameter, _, buffer = name.rpartition("/")
                array = state.setdefault(parameter, {})[buffer] = Stored(file, start, dtype, shape, ways)
                start += array.nbytes
            yield {**_frame(path, metadata), "state": state}
            return


def _read_head(
    path: str | bytes | os.PathLike[Any], file: BinaryIO
) -> tuple[dict[str, str], list[tuple[str, np.dtype[Any], tuple[int, ...]]]] | None:
    """The texts in a file, and of each array name, dtype and shape, in the order in which they lie.

    None where the path is another file's meanwhile.
    """
    with extra("safetensors"):
        from safetensors import SafetensorError, safe_open
    if os.fstat(file.fileno()).st_size == 0:
        raise CheckpointError(f"{_named(path)} is empty; wanted a checkpoint as save() writes it")
    try:
        with safe_open(os.fsdecode(path), "numpy") as content:
            if not os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                return None
            metadata, names = content.metadata() or {}, content.offset_keys()
            views = [content.get_slice(name) for name in names]
            described = [(view.get_dtype(), tuple(view.get_shape())) for view in views]
    except SafetensorError as error:
        kind = _kind(file) or "damaged, cut off, or no safetensors file"
        raise CheckpointError(
            f"{_named(path)} is {kind} ({_plain(error)}); wanted a checkpoint as save() writes it"
        ) from None
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{_named(path)} is a safetensors file, but no checkpoint of rmsprop_gpu: its metadata has the format "
            f"{metadata.get('format')!r}"
        )
    version = _whole(metadata.get("version"))
    if version != VERSION:
        newer = isinstance(version, int) and version > VERSION
        why = "a newer one has written it" if newer else "it is damaged"
        raise CheckpointError(f"{_named(path)} has version {version!r}, and this package reads {VERSION}: {why}")
    odd = [f"{name!r} ({dtype})" for name, (dtype, _) in zip(names, described, strict=True) if dtype not in _OURS]
    odd += [f"{name!r}, which has no slash" for name in names if "/" not in name]
    if odd:
        some = ", ".join([*odd[:8], *["..."] * (len(odd) > 8)])
        raise CheckpointError(f"{_named(path)} has arrays that no state has, by their dtypes or names: {some}")
    return metadata, [(name, _OURS[dtype], shape) for name, (dtype, shape) in zip(names, described, strict=True)]


def _kind(file: BinaryIO) -> str | None:
    """What else people keep state in, by its first bytes; a good checkpoint may begin with the same."""
    first = file.read(8)
    file.seek(0)
    if first.startswith(b"PK\x03\x04"):
        return "a zip file, as torch.save and numpy.savez write them"
    if first.startswith(b"\x80") and first[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "a pickle, which is not opened"
    return "an npy file" if first.startswith(b"\x93NUMPY") else None


def _frame(path: str | bytes | os.PathLike[Any], metadata: Mapping[str, str]) -> dict[str, Any]:
    """A state dict without its arrays."""
    try:
        groups = json.loads(metadata.get("param_groups", ""))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{_named(path)} is damaged: its param_groups are no JSON ({error})") from None
    counts = {name: _whole(metadata.get(name)) for name in ("steps", "skipped_steps", "version")}
    return {"optimizer": metadata.get("optimizer"), **counts, "param_groups": groups}


def _whole(text: str | None) -> Any:
    """A whole number where this is one; else as it is, to be refused by whoever knows what it is for."""
    return int(text) if text is not None and text.isascii() and text.isdigit() and len(text) < 20 else text


def _plain(error: Exception) -> str:
    """What an error says, on a line that speaks to no terminal."""
    text = str(error)[:300]
    return text if text.isprintable() else ascii(text)


def _named(path: str | bytes | os.PathLike[Any]) -> str:
    return repr(os.fspath(path))
