"""A file that takes the place of another one when it is whole: whoever opens that finds the one or the other."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

SETTLED = 64 << 20  # bytes after which a file goes to the disk
SUFFIX = ".saving"  # of the file that is written: a fixed name, so that a killed save leaves one file at most


@contextmanager
def replacing(path: str | os.PathLike[str], nbytes: int) -> Iterator[BinaryIO]:
    """A new file beside the one at `path`, which replaces it at the end, with its permissions; not if anything fails.

    What the path links to is replaced, not the link. The data are on the disk before they have the name, and there is
    room for `nbytes` of them before any is written.

    Raises
    ------
    RuntimeError
        Where somebody else writes it at the same time.
    OSError
        Where the folder does not take it; what was there stays.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a folder; wanted the name of a file")
    beside = target.with_name(target.name + SUFFIX)
    file = _locked(beside)
    try:
        file.truncate(0)  # what a killed save has left
        with suppress(FileNotFoundError):
            os.chmod(beside, stat.S_IMODE(target.stat().st_mode))
        if hasattr(os, "posix_fallocate") and nbytes:
            os.posix_fallocate(file.fileno(), 0, nbytes)  # a disk that is full says so here; and it is written faster
        yield file
        os.fsync(file.fileno())
        _rename(file, beside, target)
    except BaseException:
        with suppress(OSError):  # Windows deletes no file that is open
            beside.unlink()
        raise
    finally:
        file.close()
    _sync(target.parent)


def settle(file: BinaryIO, start: int, stop: int) -> None:
    """Have these bytes of a file on the disk, and their memory free for those that follow.

    Else as much memory would be taken as the file is large, from whatever else is cached, and written at the end.
    """
    if hasattr(os, "posix_fadvise"):
        os.fdatasync(file.fileno())
        os.posix_fadvise(file.fileno(), start, stop - start, os.POSIX_FADV_DONTNEED)


def _locked(path: Path) -> BinaryIO:
    """Open a file that may be there already, and lock it."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)
    while True:
        file = os.fdopen(os.open(path, flags, 0o666), "r+b", buffering=0)
        try:
            if not _lock(file):
                raise RuntimeError(
                    f"another process, or another thread of this one, writes {path.name} at this time; nothing was "
                    "changed"
                )
            # Whoever had it may have given it its name between our opening and locking it.
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        except BaseException:
            file.close()
            raise
        file.close()


if sys.platform == "win32":
    import msvcrt

    def _lock(file: BinaryIO) -> bool:
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

    def _rename(file: BinaryIO, beside: Path, target: Path) -> None:
        file.close()  # Windows renames no file that is open
        os.replace(beside, target)

    def _sync(folder: Path) -> None:
        """Windows syncs no folders."""

else:
    import fcntl

    def _lock(file: BinaryIO) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system that has no locks
            return True
        return True

    def _rename(file: BinaryIO, beside: Path, target: Path) -> None:
        os.replace(beside, target)

    def _sync(folder: Path) -> None:
        at = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(at)
        finally:
            os.close(at)
