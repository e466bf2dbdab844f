"""A state dict as one safetensors file: written in pieces, renamed into place, read in pieces into the state."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from . import folder
from .container import CheckpointError, Entry, FilePath, Progress, as_whole, named, read_head, write_arrays
from .flat import as_json
from .pieces import Stored, Ways

FORMAT = "rmsprop_gpu"


def save(path: FilePath, frame: Mapping[str, Any], entries: Sequence[Entry], tell: Progress | None) -> None:
    """Write a state dict, given as a frame and its arrays; the old file stays until the new one is complete."""
    groups = json.dumps(json.loads(as_json(frame))["param_groups"])
    texts = {name: str(frame[name]) for name in ("version", "optimizer", "steps", "skipped_steps")}
    write_arrays(path, {"format": FORMAT, **texts, "param_groups": groups}, entries, tell)


@contextmanager
def opened(path: FilePath) -> Iterator[dict[str, Any]]:
    """The state dict in a file or folder, with a `Stored` for each array; these can be read while it is open.

    Raises
    ------
    CheckpointError
        If the file is not a checkpoint of this package (naming what it is), is damaged, or is newer.
    MissingExtraError
        If safetensors is not installed.
    """
    if os.path.isdir(path):
        with folder.opened(path) as saved:
            yield saved
        return
    while True:
        with open(path, "rb", buffering=0) as file:
            found = read_head(path, file, FORMAT)
            if found is None:
                continue  # a save has just replaced it
            metadata, described, start = found
            ways = Ways()
            state: dict[str, dict[str, Stored]] = {}
            for name, dtype, shape in described:
                parameter, _, buffer = name.rpartition("/")
                array = state.setdefault(parameter, {})[buffer] = Stored(file, start, dtype, shape, ways)
                start += array.nbytes
            yield {**_frame(path, metadata), "state": state}
            return


def _frame(path: FilePath, metadata: Mapping[str, str]) -> dict[str, Any]:
    """A state dict without its arrays."""
    try:
        groups = json.loads(metadata.get("param_groups", ""))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{named(path)} is damaged: its param_groups are not JSON ({error})") from None
    counts = {name: as_whole(metadata.get(name)) for name in ("steps", "skipped_steps", "version")}
    return {"optimizer": metadata.get("optimizer"), **counts, "param_groups": groups}
