"""Compiled kernels on disk: files of machine code, each keyed by everything that the code depends on.

Reading and writing never raise. A file that is missing, damaged, owned by someone else or made for another key is
ignored, and the kernel is compiled; what cannot be written is not kept. A file holds a mark, a hash of the rest, the
key and the code.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import FunctionType
from typing import NamedTuple

from .fingerprint import fingerprint

LIMIT = 128 << 20  # bytes in total; the least recently used files are deleted first
ABANDONED = 3600  # seconds after which the unfinished file of a killed process is deleted

_MARK = b"rmsprop_gpu kernel 1\n"
_KEPT = re.compile(r"[0-9a-f]{64}\.kernel")
_PREFIX, _PART = "rmsprop_gpu-", re.compile(r"rmsprop_gpu-\w+\.part")
_HASH = 32  # bytes

# Everything that compiles, and what it compiles.
PACKAGE = Path(__file__).parents[1]
SOURCES = (
    *("kernels/*.py", "arrays/dtypes.py", "steps/headers.py", "torch/exchange.py"),
    *("profiling/host.py", "profiling/device.py"),
)
FILES = sorted(path for pattern in SOURCES for path in PACKAGE.glob(pattern))


def _hash_of_sources() -> str:
    made = hashlib.sha256()
    for path in FILES:
        text = path.read_bytes()
        made.update(f"{path.relative_to(PACKAGE).as_posix()} {len(text)}\n".encode())
        made.update(text)
    return made.hexdigest()


try:
    SOURCE = _hash_of_sources() if FILES else ""
except OSError:
    SOURCE = ""  # no files, inside a zip for example


def folder() -> Path | None:
    """Where kernels are kept; None if they are not."""
    if os.environ.get("RMSPROP_GPU_CACHE") == "0":
        return None
    named = os.environ.get("RMSPROP_GPU_CACHE_DIR")
    if named:
        return Path(named).absolute()
    try:
        import platformdirs

        found = platformdirs.user_cache_path("rmsprop_gpu", appauthor=False) / "kernels"
    except (ImportError, RuntimeError):
        return None
    return found if found.is_absolute() else None  # it is relative if the user has no home


def key_of(target: object, make: FunctionType, *arguments: object) -> str | None:
    """All that the code of ``make(*arguments)`` depends on; None if that is unknown, so that nothing is kept.

    `target` is what compiles it, and for what.
    """
    said = [_said(x) for x in (make, *arguments)]
    if None in said or not SOURCE or folder() is None:
        return None
    makers = [x for x in (make, *arguments) if isinstance(x, FunctionType)]
    variants = [type(x) for x in arguments if isinstance(x, tuple)]  # their properties count too
    return repr((SOURCE, fingerprint(*makers, *variants), said, target))


def _said(x: object) -> str | None:
    """An argument as text; None if it has none, such as a function that is not in the sources."""
    if isinstance(x, type):
        return f"{x.__module__}.{x.__qualname__}"
    if isinstance(x, FunctionType):
        home = sys.modules.get(x.__module__)
        mine = home and Path(getattr(home, "__file__", None) or "") in FILES and vars(home).get(x.__name__) is x
        return f"{x.__module__}.{x.__name__}" if mine else None
    return repr(x) if isinstance(x, (bool, int, str, tuple)) else None  # a Variant is a tuple of bools


def _path(directory: Path, key: str) -> Path:
    return directory / f"{hashlib.sha256(key.encode()).hexdigest()}.kernel"


def _head(key: str, code: bytes) -> bytes:
    rest = len(key.encode()).to_bytes(8, "little") + key.encode() + code
    return _MARK + hashlib.sha256(rest).digest() + rest


def read(key: str | None) -> bytes | None:
    """The code that is kept for a key; None if there is none that may be run."""
    directory = folder()
    if key is None or directory is None:
        return None
    path = _path(directory, key)
    try:
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        with open(os.open(path, flags), "rb") as file:
            if not _is_ours(os.fstat(file.fileno())):
                return None
            data = file.read()
    except OSError:
        return None
    start = len(_MARK) + _HASH + 8
    stop = start + len(key.encode())
    code = data[stop:]
    if data[start:stop] != key.encode() or data != _head(key, code):
        return None
    with suppress(OSError):
        os.utime(path)  # mark as used now
    return code


def _is_ours(found: os.stat_result) -> bool:
    """Is it a file that this user owns and nobody else may write to? Its contents will be run."""
    if not stat.S_ISREG(found.st_mode) or found.st_size > LIMIT:
        return False
    return not hasattr(os, "geteuid") or (found.st_uid == os.geteuid() and not found.st_mode & 0o022)


def write(key: str | None, code: bytes) -> None:
    """Keep the code for a key; delete the least recently used files if there is too much."""
    directory = folder()
    if key is None or directory is None:
        return
    with suppress(OSError):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(prefix=_PREFIX, suffix=".part", dir=directory)
        try:
            with open(handle, "wb") as file:
                file.write(_head(key, code))
            os.replace(part, _path(directory, key))
        except BaseException:
            with suppress(OSError):
                os.unlink(part)
            raise
        _prune(directory)


class _File(NamedTuple):
    used: float  # seconds since the epoch
    size: int
    path: Path
    part: bool  # is it still being written?


def _files(directory: Path) -> Iterator[_File]:
    """The files there that have our names; other files are left alone."""
    for path in directory.iterdir():
        part = bool(_PART.fullmatch(path.name))
        if part or _KEPT.fullmatch(path.name):
            with suppress(OSError):  # another process has deleted it
                found = path.lstat()
                if stat.S_ISREG(found.st_mode):
                    yield _File(found.st_mtime, found.st_size, path, part)


def _prune(directory: Path) -> None:
    total, now = 0, time.time()
    for file in sorted(_files(directory), reverse=True):
        total += file.size
        if total > LIMIT or (file.part and now - file.used > ABANDONED):
            with suppress(OSError):
                file.path.unlink()


class Usage(NamedTuple):
    """How many kernels are kept, and how many bytes."""

    kernels: int
    size: int


def usage() -> Usage:
    """Count what is kept."""
    files = _all_files()
    return Usage(sum(not file.part for file in files), sum(file.size for file in files))


def clear() -> Usage:
    """Delete everything that is kept, and return what it was.

    Raises
    ------
    OSError
        If a file cannot be deleted.
    """
    was = usage()
    for file in _all_files():
        file.path.unlink(missing_ok=True)
    return was


def _all_files() -> list[_File]:
    directory = folder()
    try:
        return list(_files(directory)) if directory else []
    except OSError:
        return []
