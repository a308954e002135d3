"""Errors of users, and how a program ends with them."""

import errno
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from colintern.core.memory import describe_out_of_memory, patch_thread_start_to_check_memory
from colintern.core.project import root
from colintern.core.terminal import escape_controls, escape_output

# Of what the place of a file is to blame for, not the program: somebody else's, read-only, full.
FULL = (errno.ENOSPC, errno.EDQUOT)
PLACE = (errno.EACCES, errno.EPERM, errno.EROFS, *FULL)


class UserError(ValueError):
    """Bad input. The message names the key or file, its value and what would be valid; the process exits with 2."""

    exit_code = 2


class OutOfMemory(UserError):
    """The memory is too small; the message says what to change. The process exits with 6."""

    exit_code = 6


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Around a program's main (as `with` or as a decorator): print a UserError on stderr and exit with its code; with 2
    for a file or folder that may not be written or read, and for a full disk; with 6 where memory is missing. What is
    printed meanwhile is escaped."""
    patch_thread_start_to_check_memory()
    try:
        with escape_output():
            yield
    except UserError as problem:
        print(escape_controls(f"error: {problem}"), file=sys.stderr)
        raise SystemExit(problem.exit_code) from problem
    except Exception as problem:
        if words := _place_fault(problem):
            code = UserError.exit_code
        elif words := describe_out_of_memory(problem):
            code = OutOfMemory.exit_code
        else:
            raise
        print(escape_controls(f"error: {words}"), file=sys.stderr)
        raise SystemExit(code) from problem


def _place_fault(problem: Exception) -> str:
    """Describe the fault of a file's place that an error tells of; "" if it tells of none.

    A file that cannot be opened is named. The system names no file where a disk is full while one is written, and
    libraries raise errors of their own over it; other errors that were handled on the way are not looked at.
    """
    if isinstance(problem, OSError) and problem.errno in PLACE and problem.filename is not None:
        return f"{problem.filename}: {problem.strerror}"
    behind: BaseException | None = problem
    while behind is not None:
        if isinstance(behind, OSError) and behind.errno in FULL:
            free = shutil.disk_usage(root()).free / 1e6
            return f"{os.strerror(behind.errno)}: {free:.1f} MB are free on the disk of {root().absolute()}; make room"
        behind = behind.__cause__ or behind.__context__
    return ""
