"""Lock files for one process at a time, and folders for shared use; a lock ends with its process."""

import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TextIO

from colintern.core.errors import UserError
from colintern.storage.files import irregular_type

logger = logging.getLogger(__name__)
MAX_ORPHAN_SECONDS = 30  # the data loader of a killed trainer ends within this time: it checks every 5 s


class IrregularLockError(UserError, OSError):
    """The lock is not a regular file. Also an OSError: a cache whose lock cannot be taken is still read."""


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
def hold_lock(path: Path, waiting: str = "") -> Iterator[None]:
    """Hold an exclusive lock on `path`; if another process has it, print `waiting` and wait."""
    with open_lock(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting:
                logger.info(waiting)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def try_lock(folder: Path) -> Iterator[None]:
    """Hold an exclusive lock on `folder`, without waiting for a running process.

    Raises:
        UserError: another process holds it; its PID is named.
    """
    lock = folder.with_suffix(".lock")
    with open_lock(lock) as file:
        for _ in range(MAX_ORPHAN_SECONDS):
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
            raise UserError(f"{lock}: is held by a child of process {owner}, which is gone; end the child first")
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


@cache
def mark_in_use(folder: Path) -> None:
    """Hold a shared lock on `folder` until this process ends, and record when it was last read; see `is_in_use`."""
    with suppress(OSError):  # it is missing, or its file system has no locks
        fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_SH)
        os.utime(folder)


def is_in_use(folder: Path) -> bool:
    """Return whether a process has marked `folder` as in use, or may have: some file systems have no locks."""
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
