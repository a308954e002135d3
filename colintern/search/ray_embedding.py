"""Embed pages on a Ray cluster: tasks on CPUs render them, actors on GPUs (CPUs where there is none) embed them.

Ray repeats what a worker did not finish. Rows of the pipeline are pickled pairs of a page and what it has: an image,
then its vectors; None if the store has its pixels. A pair without a page has an `InvalidRow`.
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import ray.data
from PIL import Image
from ray import cloudpickle

from colintern.core.errors import OutOfMemoryError, UserError
from colintern.core.memory import is_out_of_memory
from colintern.encoding.multi_process import EmbedBatch, OomBackoffEmbedder
from colintern.ingest.documents import InvalidRow
from colintern.search.embedding import ChangedPages, add_pixel_hash
from colintern.stores.base import EmbeddedPage

PAGES_PER_TASK = 32  # rendered
TASK_BYTES = 2**29  # that Ray reserves for them; with the same resources as a worker, Ray would render in the workers
PAGES_PER_TRANSFER = 16  # with their vectors, to the process that stores them
MAX_MESSAGE_CHARACTERS = 300


class RayCluster(NamedTuple):
    """What a Ray cluster has."""

    num_cpus: int
    num_gpus: int
    num_machines: int
    device: str  # the GPUs' names, or "cpu"


@contextmanager
def connect_to_ray(address: str) -> Iterator[RayCluster]:
    """Join the Ray cluster at ray://HOST:PORT; "ray" joins this machine's, or starts one for the `with` block.

    Raises:
        UserError: Ray cannot be joined or started, or the pipeline failed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    try:
        ray.init(None if address == "ray" else address, logging_level=logging.ERROR)
    except Exception as error:  # of many types
        raise UserError(f"--on: {address}: cannot be joined or started: {_get_last_line(error)}") from error
    try:
        resources = ray.cluster_resources()
        num_gpus, num_machines = int(resources.get("GPU", 0)), sum(node["Alive"] for node in ray.nodes())
        names = sorted(name.partition(":")[2] for name in resources if name.startswith("accelerator_type:"))
        yield RayCluster(int(resources["CPU"]), num_gpus, num_machines, ", ".join(names) if num_gpus else "cpu")
    except (ray.exceptions.RayError, ConnectionError) as error:
        error_type = OutOfMemoryError if is_out_of_memory(error) else UserError
        again = "see Ray's logs, and run the same command again: stored pages are kept"
        raise error_type(f"--on: {address}: the pipeline failed: {_get_last_line(error)}; {again}") from error
    finally:
        ray.shutdown()


def _get_last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:MAX_MESSAGE_CHARACTERS]


def embed_on_ray(
    pages: ChangedPages, load: Callable[[], EmbedBatch], batch_size: int, num_workers: int, resources: dict[str, int]
) -> Iterator[EmbeddedPage]:
    """Embed pages, in any order; each worker has these resources, and calls `load`, which must be picklable."""
    if not pages.ids:
        return
    folder = Path.cwd()  # of the pipeline; paths of documents and of the model may be relative to it
    render = partial(_render_task, folder=folder, read=pages.corpus.read_places)
    tasks = [_make_table([task]) for task in _group_into_tasks(pages)]
    pipeline = ray.remote(num_cpus=0)(_Pipeline).remote(
        tasks, render, (folder, load), batch_size, num_workers, resources
    )
    transfer = pipeline.take_batch.remote()
    while (table := ray.get(transfer)) is not None:
        transfer = pipeline.take_batch.remote()  # while the store writes
        for page, content in _read_table(table):
            if isinstance(content, InvalidRow):
                pages.corpus.bad.append(content)
            elif content is None:
                pages.unchanged.add(page.id)
            else:
                yield EmbeddedPage(page, content)


def _group_into_tasks(pages: ChangedPages) -> Iterator[list[Any]]:
    """Yield (page, place, hash of the stored pixels) of each page of a task; a place is read by one task."""
    task: list[Any] = []
    for page, place in pages.corpus.select_places(pages.ids).items():
        if len(task) >= PAGES_PER_TASK and place != task[-1][1]:
            yield task
            task = []
        task.append((page, place, pages.pixels.get(page.id)))
    yield task


class _Pipeline:
    """The actor that runs the pipeline, since Ray Data does not run in a client outside the cluster."""

    def __init__(
        self, tasks: Any, render: Any, embedder: Any, batch_size: int, num_workers: int, resources: dict[str, int]
    ):
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        ray.data.DataContext.get_current().enable_progress_bars = False
        options = {"batch_format": "pyarrow", "compute": ray.data.ActorPoolStrategy(size=num_workers), **resources}
        task = {"batch_size": 1, "batch_format": "pyarrow", "num_cpus": 1, "memory": TASK_BYTES}
        rendered = ray.data.from_arrow(tasks).map_batches(render, **task)
        embedded = rendered.map_batches(_Embedder, fn_constructor_args=embedder, batch_size=batch_size, **options)
        self.batches = iter(embedded.iter_batches(batch_size=PAGES_PER_TRANSFER, batch_format="pyarrow"))

    def take_batch(self) -> pa.Table | None:
        return next(self.batches, None)


def _render_task(table: pa.Table, folder: Path, read: Any) -> Iterator[pa.Table]:
    os.chdir(folder)
    [task] = _read_table(table)
    bad: list[InvalidRow] = []
    stored = {page.id: pixels for page, _, pixels in task}
    for page, image in read({page: place for page, place, _ in task}, bad):
        keyed = add_pixel_hash(page, image)
        yield _make_table([(keyed, None if keyed.pixels == stored[page.id] else image)])
    if bad:
        yield _make_table((None, row) for row in bad)


class _Embedder:
    def __init__(self, folder: Path, load: Callable[[], EmbedBatch]):
        os.chdir(folder)
        self.embed = OomBackoffEmbedder(load())

    def __call__(self, table: pa.Table) -> pa.Table:
        pairs = _read_table(table)
        vectors = iter(self.embed([content for _, content in pairs if isinstance(content, Image.Image)]))
        return _make_table((page, next(vectors).clone() if isinstance(c, Image.Image) else c) for page, c in pairs)


def _make_table(rows: Iterable[object]) -> pa.Table:
    return pa.table({"row": pa.array([cloudpickle.dumps(row) for row in rows], pa.large_binary())})


def _read_table(table: pa.Table) -> list[Any]:
    return [cloudpickle.loads(row) for row in table["row"].to_pylist()]
