"""One process at a time: a lock on a file, released when its process ends. And shared locks on folders in use."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TextIO

from colintern.core.errors import UserError
from colintern.storage.regular import irregular_type

ORPHANS = 30  # seconds after which a killed trainer's data loader should have ended; it looks every 5


class IrregularLockError(UserError, OSError):
    """A lock that is no regular file. Also an OSError: a cache whose lock cannot be taken is still read."""


def open_lock(path: Path) -> TextIO:
    """Open a lock file, and create it and its folder if they are missing.

    Raises:
        IrregularLockError: it is a folder, a named pipe or a device; opening a pipe would block.
        OSError: it may not be created or written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and (kind := irregular_type(path)):
        raise IrregularLockError(f"{path}: is {kind}, not a regular file; delete it, it is then created again")
    return path.open("a+")


@contextmanager
def locked(path: Path, waiting: str = "") -> Iterator[None]:
    """Hold `path`; where another process has it, print `waiting` and wait. A process that dies lets go of it."""
    with open_lock(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting:
                print(waiting, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def locked_or_refused(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process alone, without waiting for another one that holds it.

    Raises:
        UserError: another process holds it; its PID is named.
    """
    lock = folder.with_suffix(".lock")
    with open_lock(lock) as file:
        for _ in range(ORPHANS):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                file.seek(0)
                owner = file.read().strip()
                if Path("/proc", owner).exists():
                    raise UserError(f"{lock}: process {owner} is training this very run") from error
                time.sleep(1)  # the owner was killed; its data loader's processes hold the lock until they notice
        else:
            raise UserError(f"{lock}: is held by what process {owner}, now gone, has started; end that first")
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


@cache
def mark_in_use(folder: Path) -> None:
    """Hold a shared lock on `folder` until this process ends, and record when it was last read; see `is_in_use`."""
    with suppress(OSError):  # it is missing, or its file system knows no locks
        fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_SH)
        os.utime(folder)


def is_in_use(folder: Path) -> bool:
    """Return whether a process has marked `folder` as in use, or may have: some file systems know no locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def get_last_use(folder: Path) -> tuple[float, float]:
    """Return the sort key (mtime, ctime) of a folder's last use, in seconds since 1970.

    `mark_in_use` sets mtime; where it is 0, no process has read the folder, and ctime orders such folders.
    """
    stat = folder.stat()
    return stat.st_mtime, stat.st_ctime
