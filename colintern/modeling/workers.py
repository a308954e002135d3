"""The processes that load data, `workers` of them: how many a machine may have, how each begins, how all end."""

import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.queues import Queue
from typing import Any

from colintern.params import OutOfMemory, UserError

WORKERS_PER_CPU = 4
MIN_LIMIT = 8  # of workers, where there are few CPUs
LOADER_ERROR = re.compile(r"DataLoader worker \(pid.*")  # torch's, of a worker that is gone


def check_workers(workers: int) -> None:
    """Refuse more workers than this machine has use for: each is a copy of the process, and takes its time to start.

    Raises:
        UserError: there are too many.
    """
    cpus = os.cpu_count() or 1
    most = max(MIN_LIMIT, WORKERS_PER_CPU * cpus)
    if workers > most:
        raise UserError(f"workers: {workers} is not valid on a machine of {cpus} CPUs; it must be from 0 to {most}")


def start_worker(number: int) -> None:
    """Begin a worker. It ignores SIGTERM, which may be sent to a whole process group, because its trainer still needs
    it for the step under way, and torch's own handler would end it; `loader_processes` ends it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Queue._on_queue_feeder_error = staticmethod(end_worker)  # type: ignore[attr-defined]


def seed_and_start_worker(seed: Callable[[int], None], number: int) -> None:
    """Begin a worker whose loader has an initialisation of its own, `seed`."""
    seed(number)
    start_worker(number)


def end_worker(error: Exception, batch: Any) -> None:
    """End this worker, which cannot send a batch. Python would drop the batch, and the trainer wait for it for ever."""
    print(f"a worker cannot send a batch: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    os._exit(1)


@contextmanager
def loader_processes(workers: int) -> Iterator[None]:
    """Around whatever loads data in processes: they are gone when it has ended, however it has.

    They have to be killed: Python sends those that are left at its exit SIGTERM, which they ignore, and waits for them.

    Raises:
        OutOfMemory: one of them was killed, ended by itself, or could not be started.
    """
    try:
        yield
    except BlockingIOError as error:  # of fork
        raise OutOfMemory(
            f"workers: {workers}: no more processes can be started here: {error.strerror}; lower workers, or raise the "
            "limit of `ulimit -u` or of the container"
        ) from error
    except (RuntimeError, ConnectionResetError, ConnectionRefusedError, EOFError) as error:
        lost = LOADER_ERROR.search(str(error))
        if isinstance(error, RuntimeError) and not lost:
            raise
        # Not a RuntimeError: torch looks at a batch before the system has noticed that its worker is gone.
        what = lost[0].rstrip(" .") if lost else "DataLoader worker is gone"
        raise OutOfMemory(
            f"{what}; if nobody killed it, memory ran out: lower workers, {workers}, or batch_size; the same command "
            "resumes from the last checkpoint"
        ) from error
    finally:
        if left := [process for process in multiprocessing.active_children() if process.daemon]:
            handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's raises an error for each that is killed
            for process in left:
                process.kill()
                process.join()
            signal.signal(signal.SIGCHLD, handler)
