"""Limit the number of DataLoader workers, set them up, and stop them."""

import logging
import multiprocessing
import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.queues import Queue

from colintern.core.errors import OutOfMemoryError, UserError

logger = logging.getLogger(__name__)
WORKERS_PER_CPU = 4
MIN_LIMIT = 8  # of workers, where there are few CPUs
LOADER_ERROR = re.compile(r"DataLoader worker \(pid.*")  # torch's message about a worker that is gone


def check_workers(workers: int) -> None:
    """Check that this machine can use so many workers: each is a copy of the process."""
    cpus = os.cpu_count() or 1
    limit = max(MIN_LIMIT, WORKERS_PER_CPU * cpus)
    if workers > limit:
        raise UserError(f"workers: {workers} is not valid on a machine of {cpus} CPUs; it must be from 0 to {limit}")


def init_worker(number: int) -> None:
    """Set up a DataLoader worker: ignore SIGTERM, and exit if a batch cannot be sent.

    SIGTERM may reach the whole process group while the trainer still needs this worker to finish its current step;
    torch's handler would end it.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Queue._on_queue_feeder_error = staticmethod(exit_on_send_error)  # type: ignore[attr-defined]


def seed_and_init_worker(worker_init_fn: Callable[[int], None], number: int) -> None:
    """Call the DataLoader's own `worker_init_fn`, then `init_worker`."""
    worker_init_fn(number)
    init_worker(number)


def exit_on_send_error(error: Exception, batch: object) -> None:
    """Exit this worker because it cannot send a batch; Python would drop the batch, and the trainer wait forever."""
    logger.error(f"a worker cannot send a batch: {type(error).__name__}: {error}")
    os._exit(1)


@contextmanager
def stop_workers_on_exit(workers: int) -> Iterator[None]:
    """Kill the DataLoader workers when the `with` block ends, normally or with an error.

    SIGTERM is not enough: the workers ignore it (see `init_worker`), and Python would wait for them at exit.

    Raises:
        OutOfMemoryError: a worker was killed, exited or could not be started.
    """
    try:
        yield
    except BlockingIOError as error:  # of fork
        raise OutOfMemoryError(
            f"workers: {workers}: cannot start another process ({error.strerror}); lower workers, or raise `ulimit -u` "
            "or the container's process limit"
        ) from error
    except (RuntimeError, ConnectionResetError, ConnectionRefusedError, EOFError) as error:
        match = LOADER_ERROR.search(str(error))
        if isinstance(error, RuntimeError) and not match:
            raise
        # Other errors: torch reads a batch before the system has noticed that its worker is gone.
        reason = match[0].rstrip(" .") if match else "a DataLoader worker exited"
        raise OutOfMemoryError(
            f"{reason}; it probably ran out of memory. Lower workers (now {workers}) or batch_size and run the same "
            "command again: it resumes from the last checkpoint"
        ) from error
    finally:
        if remaining := [process for process in multiprocessing.active_children() if process.daemon]:
            handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's raises an error for each killed process
            for process in remaining:
                process.kill()
                process.join()
            signal.signal(signal.SIGCHLD, handler)
