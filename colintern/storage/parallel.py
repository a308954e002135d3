"""A function over many tasks on all cores, with a progress bar; for work that is no part of a training step."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

from colintern.core.errors import UserError
from colintern.core.progress import ProgressBar

START = 2.0  # seconds that a process takes to import what its function needs


def spread(function: Callable[[Any], Any], tasks: Sequence[Any], label: str, unit: str) -> Iterator[Any]:
    """The function's results, in the order of the tasks. Function and tasks must be picklable.

    Work of no more than `START` seconds is done here: other processes would begin when it is over.

    Raises:
        UserError: one of the other processes was killed.
    """
    here = 0
    end = time.monotonic() + START
    with ProgressBar(total=len(tasks), desc=label, unit=unit) as bar:
        while here < len(tasks) and time.monotonic() < end:
            yield function(tasks[here])
            bar.update()
            here += 1
        if here == len(tasks):
            return
        processes = min(len(tasks) - here, os.cpu_count() or 1)
        # spawn: pyarrow starts threads, which do not survive a fork
        try:
            with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
                for done in pool.map(function, tasks[here:]):
                    bar.update()
                    yield done
        except BrokenProcessPool as error:
            raise UserError(
                f"{label}: one of {processes} processes was killed; if the system is out of memory, free some"
            ) from error
