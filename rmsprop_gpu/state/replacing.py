"""A file that replaces another one when it is complete: a reader finds one or the other."""

from __future__ import annotations

import errno
import os
import stat
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

SETTLED = 64 << 20  # bytes after which data are flushed to disk
SUFFIX = ".saving"  # of the file being written: a fixed name, so that a killed save leaves at most one file

_writing: set[tuple[int, Path]] = set()  # by which thread, and which file


@contextmanager
def replacing(path: str | bytes | os.PathLike[Any], nbytes: int) -> Iterator[BinaryIO]:
    """A new file beside the one at `path`, which replaces it at the end, with its permissions; not if anything fails.

    If the path is a link, its target is replaced, not the link. The data are on disk before they get the name, and
    space for `nbytes` is reserved before any is written. A signal handler may do the same in the middle of it.

    Raises
    ------
    RuntimeError
        If another process or thread is writing it at the same time.
    OSError
        If it cannot be written into the folder; what was there stays.
    """
    target = Path(os.path.realpath(os.fsdecode(path)))
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a folder; wanted the name of a file")
    if target.exists() and not target.is_file():
        raise OSError(f"{target} is not a regular file, and would be replaced by one")
    beside = target.with_name(target.name + SUFFIX)
    while (mine := (threading.get_ident(), beside)) in _writing:
        beside = beside.with_name(beside.name + SUFFIX)  # for a handler in the middle of a save to the same file
    file, renamed = _locked(beside), False
    _writing.add(mine)
    try:
        file.truncate(0)  # remove what a killed save has left
        _make_room(file, nbytes)
        yield file
        with _folder(target.parent) as folder:
            os.chmod(beside, _mode(target))
            os.fsync(file.fileno())
            _rename(file, beside, target)
            renamed = True
            if folder is not None:
                os.fsync(folder)
    except BaseException:
        if not renamed:
            with suppress(OSError):  # Windows cannot delete an open file
                beside.unlink()
        raise
    finally:
        _writing.discard(mine)
        file.close()


def settle(file: BinaryIO, start: int, stop: int) -> None:
    """Flush these bytes of a file to disk, and free their memory for those that follow.

    Otherwise the page cache would grow by the size of the file, push out other data, and be written only at the end.
    """
    if hasattr(os, "posix_fadvise"):
        os.fdatasync(file.fileno())
        os.posix_fadvise(file.fileno(), start, stop - start, os.POSIX_FADV_DONTNEED)


def _make_room(file: BinaryIO, nbytes: int) -> None:
    """Make a full disk report that now; writing into reserved space is also faster."""
    if hasattr(os, "posix_fallocate") and nbytes:
        try:
            os.posix_fallocate(file.fileno(), 0, nbytes)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):  # some file systems cannot do it
                raise


def _mode(target: Path) -> int:
    """The permissions of an existing file; else those of a new one."""
    try:
        return stat.S_IMODE(target.stat().st_mode)
    except FileNotFoundError:
        mask = os.umask(0o077)  # it cannot be read without being set
        os.umask(mask)
        return 0o666 & ~mask


def _locked(path: Path) -> BinaryIO:
    """Open a file that may already exist, and lock it."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)
    while True:
        file = os.fdopen(os.open(path, flags, 0o600), "r+b", buffering=0)
        try:
            if not _lock(file):
                raise RuntimeError(
                    f"another process, or another thread of this one, is writing to {path.name}; nothing was changed"
                )
            # The previous holder may have renamed it between our opening and locking it.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
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
        file.close()  # Windows cannot rename an open file
        os.replace(beside, target)

    @contextmanager
    def _folder(path: Path) -> Iterator[int | None]:
        """Do nothing: Windows cannot sync folders."""
        yield None

else:
    import fcntl

    def _lock(file: BinaryIO) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks
            return True
        return True

    def _rename(file: BinaryIO, beside: Path, target: Path) -> None:
        os.replace(beside, target)

    @contextmanager
    def _folder(path: Path) -> Iterator[int | None]:
        """A folder, opened before anything in it is changed, to be synced afterwards."""
        at = os.open(path, os.O_RDONLY)
        try:
            yield at
        finally:
            os.close(at)
