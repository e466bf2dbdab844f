"""The index of a checkpoint folder: which parts are in which file, and everything that is not an array."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ..arrays import dtypes
from .container import LONGEST_HEAD, CheckpointError, as_text, check_version, named, plain, some
from .flat import as_json
from .parts import Tensors, problems_of_parts

NAME = "index.json"
FORMAT = "rmsprop_gpu folder"
# An index names no other files: none outside the folder, and none that a save would not remove.
FILE = re.compile(r"step-[0-9]{8,20}-[0-9a-f]{8}-rank-[0-9]{5,10}\.safetensors")
_MOST_AXES = 64  # NumPy's limit


class Index(NamedTuple):
    """The content of an index."""

    frame: dict[str, Any]
    tensors: Tensors
    files: dict[str, list[str]]  # the parts in each file, by its name


def index_text(frame: Mapping[str, Any], tensors: Tensors, files: Mapping[str, Sequence[str]]) -> bytes:
    """The text to be written; a ValueError names parts that are missing, overlap, or belong to no tensor."""
    problems = problems_of_parts(tensors, files)
    if problems:
        raise ValueError(f"the parts are not a complete state, nothing was changed: {some(problems)}")
    described = {name: {"dtype": str(dtype), "shape": list(shape)} for name, (dtype, shape) in tensors.items()}
    listed = {name: list(parts) for name, parts in files.items()}
    return as_text({"format": FORMAT, **json.loads(as_json(frame)), "tensors": described, "files": listed})


def read_index(path: Path, file: BinaryIO) -> Index:
    """Read an index, and check that its parts, by their names, are a complete state."""
    wanted = "wanted an index as save() writes it"
    if os.fstat(file.fileno()).st_size > LONGEST_HEAD:
        raise CheckpointError(f"{named(path)} is longer than {LONGEST_HEAD:,} bytes; {wanted}")
    try:
        content = json.loads(file.read().decode())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{named(path)} is not JSON ({plain(error)}); {wanted}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{named(path)} is JSON, but not an index of rmsprop_gpu; {wanted}")
    check_version(path, content.get("version"))
    tensors, files = content.get("tensors"), content.get("files")
    if not isinstance(tensors, dict) or not all(map(_is_tensor, tensors.values())):
        raise CheckpointError(f"{named(path)} is damaged: its tensors are not a dtype and a shape each")
    if not isinstance(files, dict) or not all(map(_is_list_of_texts, files.values())):
        raise CheckpointError(f"{named(path)} is damaged: its files are not a list of parts each")
    foreign = [repr(name) for name in files if not FILE.fullmatch(name)]
    if foreign:
        raise CheckpointError(f"{named(path)} names files that no save writes: {some(foreign)}")
    described = {name: (dtypes.named(x["dtype"]), tuple(x["shape"])) for name, x in tensors.items()}
    problems = problems_of_parts(described, files)
    if problems:
        raise CheckpointError(f"{named(path)} is damaged: {some(problems)}")
    frame = {name: content.get(name) for name in ("optimizer", "version", "steps", "skipped_steps", "param_groups")}
    return Index(frame, described, files)


def _is_tensor(x: Any) -> bool:
    """Does this describe a parameter as an index does?"""
    if not isinstance(x, dict) or x.get("dtype") not in dtypes.NAMES or not isinstance(x.get("shape"), list):
        return False
    return len(x["shape"]) <= _MOST_AXES and all(type(n) is int and 0 <= n < 2**63 for n in x["shape"])


def _is_list_of_texts(x: Any) -> bool:
    return isinstance(x, list) and all(isinstance(one, str) for one in x)
