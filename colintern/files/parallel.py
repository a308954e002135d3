"""A function over many tasks on all cores, with a progress bar; for work that is no part of a training step."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from tqdm.auto import tqdm


def spread(function: Callable[[Any], Any], tasks: Sequence[Any], label: str, unit: str) -> Iterator[Any]:
    """The function's results, in the order of the tasks. Function and tasks must be picklable."""
    if not tasks:
        return
    # spawn: pdfium and pyarrow start threads, which do not survive a fork
    with (
        ProcessPoolExecutor(min(len(tasks), os.cpu_count() or 1), mp_context=get_context("spawn")) as pool,
        tqdm(total=len(tasks), desc=label, unit=unit, disable=None) as bar,
    ):
        for done in pool.map(function, tasks):
            bar.update()
            yield done
