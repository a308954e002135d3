"""Embed the pages of a source into a store: in batches, on every GPU, resumable.

Only ids and names of pages stay in memory.
"""

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
from itertools import islice
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from colintern.core.errors import OutOfMemoryError
from colintern.core.memory import is_out_of_memory
from colintern.core.progress import ProgressBar
from colintern.encoding.page_features import Page
from colintern.search.corpora import PageCorpus, PageImages, is_in_shard
from colintern.stores.base import EmbeddedPage, PageStore, StoredPage

logger = logging.getLogger(__name__)
PR_SET_PDEATHSIG = 1
BATCHES_PER_WORKER = 2  # in flight: one is computed, one waits
EmbedImages = Callable[[Sequence[Image.Image]], list[Tensor]]


class EmbedCounts(NamedTuple):
    """Pages of the source that are stored, and what this run changed."""

    pages: int
    added: int
    replaced: int
    removed: int


class OomBackoffEmbedder:
    """Embeds images in batches, and halves the batch size where one does not fit into memory."""

    def __init__(self, embed: EmbedImages, batch_size: int):
        self.embed, self.batch_size = embed, batch_size

    def __call__(self, images: Sequence[Image.Image]) -> list[Tensor]:
        """Return the vectors of each image; raise the error of a single image that does not fit."""
        embeddings: list[Tensor] = []
        while len(embeddings) < len(images):
            batch = images[len(embeddings) :][: self.batch_size]
            try:
                embeddings += self.embed(batch)
                continue
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or len(batch) == 1:
                    raise
            torch.cuda.empty_cache()
            self.batch_size = len(batch) // 2
            logger.warning(f"out of memory: --batch-size is {self.batch_size} from here on")
        return embeddings


class ChangedPages:
    """The pages of a corpus that are not stored, or whose file has changed; iterating reads them.

    Args:
        corpus: its `bad` is extended with pages that cannot be read.
        stored: pages by id.
    """

    def __init__(self, corpus: PageCorpus, stored: dict[str, StoredPage]):
        self.corpus = corpus
        pages = corpus.pages.items()
        self.ids = {id_ for id_, page in pages if id_ not in stored or stored[id_].key != page.key}
        self.pixels = {id_: stored[id_].pixels for id_ in self.ids & stored.keys()}  # hashes
        self.unchanged: set[str] = set()  # of those that were read, ids of pages that have the stored pixels

    def __iter__(self) -> PageImages:
        for page, image in self.corpus.read(self.ids, self.corpus.bad):
            keyed = add_pixel_hash(page, image)
            if self.pixels.get(page.id) == keyed.pixels:
                self.unchanged.add(page.id)
            else:
                yield keyed, image


def add_pixel_hash(page: StoredPage, image: Image.Image) -> StoredPage:
    """Return the page with the hash of its pixels."""
    return page._replace(pixels=Page.from_image(image).key)


def embed_into_store(
    store: PageStore,
    corpus: PageCorpus,
    shard: tuple[int, int],
    embed: Callable[[ChangedPages], Iterator[EmbeddedPage]],
) -> EmbedCounts:
    """Store the pages of a corpus that are new or changed, and remove those of its source that are gone.

    Args:
        store: where they are written.
        corpus: the pages of `shard`; its `bad` is extended with pages that cannot be read.
        shard: (number from 1, count); pages of other shards are left as they are.
        embed: returns the pages with their vectors, in any order.
    """
    stored = {
        id_: page
        for id_, page in store.list_pages().items()
        if page.source == corpus.source and is_in_shard(page, shard)
    }
    changed = ChangedPages(corpus, stored)
    current = (corpus.pages.keys() - changed.ids) & stored.keys()
    added = replaced = 0
    bar = ProgressBar(embed(changed), desc="embedding", total=len(changed.ids), unit="page")
    for rows in _group_by_bytes(iter(bar), store.batch_bytes):
        store.upsert(rows)
        ids = {row.page.id for row in rows}
        current |= ids
        added, replaced = added + len(ids - stored.keys()), replaced + len(ids & stored.keys())
    current |= changed.unchanged
    if gone := sorted(stored.keys() - current):
        store.delete(gone)
    store.finish(len(current))
    return EmbedCounts(len(current), added, replaced, len(gone))


def _group_by_bytes(rows: Iterator[EmbeddedPage], limit: int) -> Iterator[list[EmbeddedPage]]:
    group: list[EmbeddedPage] = []
    size = 0
    for row in rows:
        if group and size + row.vectors.nbytes > limit:
            yield group
            group, size = [], 0
        group.append(row)
        size += row.vectors.nbytes
    if group:
        yield group


def embed_in_process(
    pages: Iterable[tuple[StoredPage, Image.Image]], load: Callable[[], EmbedImages], batch_size: int
) -> Iterator[EmbeddedPage]:
    """Embed pages in this process; the model is loaded for the first of them."""
    images = iter(pages)
    embedder: OomBackoffEmbedder | None = None
    while batch := list(islice(images, batch_size)):
        embedder = embedder or OomBackoffEmbedder(load(), batch_size)
        embeddings = embedder([image for _, image in batch])
        yield from (EmbeddedPage(page, vectors) for (page, _), vectors in zip(batch, embeddings, strict=True))


def embed_in_workers(
    pages: Iterable[tuple[StoredPage, Image.Image]], load: Callable[[], EmbedImages], batch_size: int, num_workers: int
) -> Iterator[EmbeddedPage]:
    """Embed pages in processes, one per GPU, in the order of the pages; `load` is called in each and must be picklable.

    Raises:
        OutOfMemoryError: a process was killed.
    """
    changed = iter(pages)
    context = multiprocessing.get_context("spawn")  # CUDA cannot be used after a fork
    numbers = context.Queue()
    for number in range(num_workers):
        numbers.put(number)
    waiting: deque[tuple[list[Any], Future]] = deque()
    with ProcessPoolExecutor(num_workers, context, _init_worker, (numbers, load, batch_size)) as pool:
        try:
            while True:
                while len(waiting) < BATCHES_PER_WORKER * num_workers and (batch := list(islice(changed, batch_size))):
                    images = [image for _, image in batch]
                    waiting.append(([page for page, _ in batch], pool.submit(_embed_in_worker, images)))
                if not waiting:
                    return
                keyed, future = waiting.popleft()
                for page, vectors in zip(keyed, future.result(), strict=True):
                    yield EmbeddedPage(page, torch.from_numpy(vectors))
        except BrokenProcessPool as error:
            raise OutOfMemoryError(
                "a process that embeds pages was killed or could not load the model; see the messages above. Lower "
                "launch in params.yaml or --batch-size, and run the same command again: stored pages are kept"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


_embedder: OomBackoffEmbedder


def _init_worker(numbers: Any, load: Callable[[], EmbedImages], batch_size: int) -> None:
    """Take a GPU and load the model; the process ends with its parent, and leaves Ctrl-C to it."""
    global _embedder
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if torch.cuda.is_available():
        torch.cuda.set_device(numbers.get() % torch.cuda.device_count())
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    _embedder = OomBackoffEmbedder(load(), batch_size)


def _embed_in_worker(images: Sequence[Image.Image]) -> list[Any]:
    return [vectors.numpy() for vectors in _embedder(images)]
