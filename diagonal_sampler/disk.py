"""Files that are never half there, also where other programs look at them meanwhile, and locks between programs.

Nothing but the standard library: queue_batch.py and the quickstart use it with any Python.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
PARTIAL_SUFFIX = ".partial"
"""Of a file that is not whole yet."""
BUSY_SECONDS = 2.0  # a virus scanner, an indexer or a cloud folder may hold a new file on Windows for so long
_BINARY = getattr(os, "O_BINARY", 0)
_LOST = (errno.EIO, errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
_TAKEN = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)


def insist(action: Callable[[], T]) -> T:
    """Do something with a file, again for two seconds where another program has it open (on Windows).

    Raises the OSError of the last try.
    """
    give_up = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            return action()
        except PermissionError:
            if time.monotonic() > give_up:
                raise
        time.sleep(0.1)


def replace_file(source: Path, target: Path) -> None:
    """os.replace that insists."""
    insist(lambda: os.replace(source, target))


def remove_file(path: Path) -> None:
    """Path.unlink that insists; a file that is gone already is no error."""
    insist(lambda: path.unlink(missing_ok=True))


def sync_path(path: Path) -> None:
    """Have a file, or the names in a folder, written to the disk.

    Raises:
        OSError: it cannot be. A file system that does not do so with folders (SMB on macOS, some of FUSE) is no error.
    """
    is_folder = path.is_dir()
    if os.name == "nt" and is_folder:  # Windows opens no folders, and keeps their names safe by itself
        return
    handle = os.open(path, os.O_RDONLY | _BINARY if os.name != "nt" else os.O_RDWR | _BINARY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not is_folder or error.errno in _LOST:
            raise
    finally:
        os.close(handle)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`: what is written there takes its place at the end, or goes with an error.

    It is on the disk before it has the name: a power cut then leaves the file of before, or this one. A temporary file
    that cannot be removed is no error; the next one of this name takes its place.
    """
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    try:
        yield partial
        insist(lambda: sync_path(partial))
        replace_file(partial, path)
    finally:
        with suppress(OSError):  # else it would hide the error that matters
            remove_file(partial)


def try_lock(handle: int) -> bool:
    """Lock an open file until it is closed, at the latest with its process; False where it is locked already.

    Raises OSError where the file system has no locks.
    """
    try:
        if os.name == "nt":
            import msvcrt

            os.lseek(handle, 0, os.SEEK_SET)  # it locks the byte there
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _TAKEN:
            return False
        raise
    return True
