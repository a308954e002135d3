"""Embed batches on every GPU of this machine, in their order; a batch that does not fit into memory is halved."""

import ctypes
import logging
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import SpawnProcess
from multiprocessing.queues import Queue
from multiprocessing.util import Finalize
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from colintern.core.errors import OutOfMemoryError, UserError
from colintern.core.memory import is_out_of_memory
from colintern.core.terminal import configure_logging

logger = logging.getLogger(__name__)
PR_SET_PDEATHSIG = 1
BATCHES_PER_WORKER = 2  # in flight: one is computed, one waits
Item = TypeVar("Item")
EmbedBatch = Callable[[Sequence[Item]], list[Tensor]]


class OomBackoffEmbedder(Generic[Item]):
    """Embeds batches, and divides them into halves from the first one on that does not fit into memory."""

    def __init__(self, embed: EmbedBatch[Item]):
        self.embed = embed
        self.max_batch_size: int | None = None  # a power of two, so that it does not depend on which batch did not fit

    def __call__(self, batch: Sequence[Item]) -> list[Tensor]:
        """Return the vectors of each item; raise the error of a single item that does not fit."""
        embeddings: list[Tensor] = []
        while len(embeddings) < len(batch):
            part = batch[len(embeddings) :][: self.max_batch_size]
            try:
                embeddings += self.embed(part)
                continue
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or len(part) == 1:
                    raise
            torch.cuda.empty_cache()
            self.max_batch_size = 1 << ((len(part) - 1).bit_length() - 1)
            logger.warning(
                f"out of memory: a batch of {len(part)} pages does not fit; batches have {self.max_batch_size} from "
                "here on, which may change the last bits of the vectors"
            )
        return embeddings


class EmbeddingPool(Generic[Item]):
    """Processes that embed batches, one per GPU; they start with the first batch. A single one is this process.

    Args:
        load: loads the model, and returns the function that embeds a batch. Called in each process, in which the GPU
            is chosen; must be picklable if there are several.
        num_workers: number of processes, see `count_workers`.
    """

    def __init__(self, load: Callable[[], EmbedBatch[Item]], num_workers: int):
        self.load, self.num_workers = load, num_workers
        self.embedder: OomBackoffEmbedder[Item] | None = None
        self.executor: ProcessPoolExecutor | None = None
        self.processes: set[SpawnProcess] = set()

    def embed_batches(self, batches: Iterable[Sequence[Item]]) -> Iterator[list[Tensor]]:
        """Yield the vectors of each batch, in order; batches are taken from `batches` as they are needed.

        Raises:
            OutOfMemoryError: a process was killed.
            UserError: a process has ended.
        """
        if self.num_workers > 1:
            yield from self._embed_in_workers(iter(batches))
            return
        for batch in batches:
            self.embedder = self.embedder or OomBackoffEmbedder(self.load())
            yield self.embedder(batch)

    def _embed_in_workers(self, batches: Iterator[Sequence[Item]]) -> Iterator[list[Tensor]]:
        executor = self.executor = self.executor or self._start_executor()
        waiting: deque[Future[list[np.ndarray]]] = deque()
        try:
            for batch in batches:
                waiting.append(executor.submit(_embed_in_worker, batch))
                self.processes.update(p for p in multiprocessing.active_children() if isinstance(p, SpawnProcess))
                if len(waiting) == BATCHES_PER_WORKER * self.num_workers:
                    yield list(map(torch.from_numpy, waiting.popleft().result()))
            while waiting:
                yield list(map(torch.from_numpy, waiting.popleft().result()))
        except BrokenProcessPool as error:
            self.close()
            raise self._make_worker_error(error) from error

    def _start_executor(self) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")  # CUDA cannot be used after a fork
        ranks = context.Queue()
        for rank in range(self.num_workers):
            ranks.put(rank)
        return ProcessPoolExecutor(self.num_workers, context, _init_worker, (ranks, self.load))

    def _make_worker_error(self, error: BrokenProcessPool) -> UserError:
        """Name how the first process ended; the executor then ends the others with SIGTERM."""
        codes = [process.exitcode for process in self.processes]
        code = next((code for code in codes if code not in (None, 0, -signal.SIGTERM)), None)
        if code is None:
            return UserError(f"a process that embeds pages has ended: {error}")
        if code == -signal.SIGKILL:
            return OutOfMemoryError(
                "a process that embeds pages was killed (SIGKILL); the machine probably ran out of memory. Lower "
                "launch in params.yaml or the batch size, and run the same command again"
            )
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        return UserError(f"a process that embeds pages was ended {how}; see the messages above")

    def close(self) -> None:
        """End the processes when they have embedded the batches that they work on."""
        if self.executor:
            self.executor.shutdown(cancel_futures=True)
            self.executor = None


def count_workers(launch: str | int, num_gpus: int | None = None, num_machines: int = 1) -> int:
    """Return the number of processes that `launch` of params.yaml means.

    By default that is one per GPU; without GPUs, one per machine.

    Args:
        launch: auto, or a number.
        num_gpus: of a cluster; None means those of this machine.
        num_machines: of a cluster.

    Raises:
        UserError: there are fewer GPUs.
    """
    num_gpus = torch.cuda.device_count() if num_gpus is None else num_gpus
    num_workers = num_gpus or num_machines if launch == "auto" else int(launch)
    if num_gpus and num_workers > num_gpus:
        raise UserError(f"launch: {num_workers} is more than the {num_gpus} GPUs that can be seen")
    return num_workers


def kill_with_parent() -> None:
    """Make Linux kill this process when the one that started it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def call_at_exit(function: Callable[[], None]) -> None:
    """Call a function when a worker exits normally; `multiprocessing` does not run what `atexit` registers."""
    Finalize(None, function, exitpriority=0)


_load: Callable[[], EmbedBatch]
_embedder: OomBackoffEmbedder | None = None


def _init_worker(ranks: "Queue[int]", load: Callable[[], EmbedBatch]) -> None:
    """Take a GPU; Ctrl-C is left to the parent."""
    global _load
    kill_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if torch.cuda.is_available():
        torch.cuda.set_device(ranks.get() % torch.cuda.device_count())
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    configure_logging()
    _load = load


def _embed_in_worker(batch: Sequence) -> list[np.ndarray]:
    """Embed a batch. The model is loaded here: an error of the executor's initializer would not reach the parent."""
    global _embedder
    _embedder = _embedder or OomBackoffEmbedder(_load())
    return [vectors.numpy() for vectors in _embedder(batch)]
