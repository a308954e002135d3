"""Map a function over many tasks on all cores, with a progress bar. Training steps do not use it."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import TypeVar

from colintern.core.errors import UserError
from colintern.core.progress import ProgressBar

SERIAL_SECONDS = 2.0  # other processes start after this: each takes as long to import what its function needs
Task = TypeVar("Task")
Result = TypeVar("Result")


def parallel_map(function: Callable[[Task], Result], tasks: Sequence[Task], label: str, unit: str) -> Iterator[Result]:
    """Yield the function's results in the order of the tasks. Function and tasks must be picklable.

    Raises:
        UserError: one of the other processes was killed.
    """
    done = 0
    end = time.monotonic() + SERIAL_SECONDS
    with ProgressBar(total=len(tasks), desc=label, unit=unit) as bar:
        while done < len(tasks) and time.monotonic() < end:
            yield function(tasks[done])
            bar.update()
            done += 1
        if done == len(tasks):
            return
        processes = min(len(tasks) - done, os.cpu_count() or 1)
        # spawn: pyarrow starts threads, which do not survive a fork
        try:
            with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
                for result in pool.map(function, tasks[done:]):
                    bar.update()
                    yield result
        except BrokenProcessPool as error:
            raise UserError(
                f"{label}: one of {processes} processes was killed; if the system is out of memory, free some"
            ) from error
