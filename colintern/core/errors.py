"""Errors that a user can cause, and the exit codes of a program."""

import errno
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from colintern.core.memory import describe_out_of_memory, patch_thread_start_to_check_memory
from colintern.core.project import root
from colintern.core.terminal import configure_logging, escape_output

logger = logging.getLogger(__name__)
DISK_FULL_CODES = (errno.ENOSPC, errno.EDQUOT)
FILE_SYSTEM_CODES = (errno.EACCES, errno.EPERM, errno.EROFS, *DISK_FULL_CODES)  # not faults of the program


class UserError(ValueError):
    """Bad input. The message names the key or file, its value and what would be valid; the process exits with 2."""

    exit_code = 2


class OutOfMemoryError(UserError):
    """The memory is too small; the message says what to change. The process exits with 6."""

    exit_code = 6


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Log a UserError of the `with` block or decorated main, and exit with its code; set up what the package logs.

    The code is 2 for a file or folder that may not be written or read and for a full disk, and 6 if memory is missing.
    Control characters in the output of the block are escaped.
    """
    configure_logging()
    patch_thread_start_to_check_memory()
    try:
        with escape_output():
            yield
    except UserError as error:
        logger.error(str(error))
        raise SystemExit(error.exit_code) from error
    except Exception as error:
        if message := _describe_file_system_error(error):
            code = UserError.exit_code
        elif message := describe_out_of_memory(error):
            code = OutOfMemoryError.exit_code
        else:
            raise
        logger.error(message)
        raise SystemExit(code) from error


def _describe_file_system_error(error: Exception) -> str:
    """Describe an error whose cause is permissions or a full disk; "" if it has another cause.

    A file that cannot be opened is named. If a disk fills up during a write, the system names no file, and libraries
    raise their own errors from it.
    """
    if isinstance(error, OSError) and error.errno in FILE_SYSTEM_CODES and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in DISK_FULL_CODES:
            free = shutil.disk_usage(root()).free / 1e6
            return f"{os.strerror(cause.errno)}: {free:.1f} MB are free on the disk of {root().absolute()}; make room"
        cause = cause.__cause__ or cause.__context__
    return ""
