"""Embed the pages of a source into a store: in batches, on every GPU, resumable.

Only ids and names of pages stay in memory.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import NamedTuple

from PIL import Image

from colintern.core.progress import ProgressBar
from colintern.encoding.multi_process import EmbeddingPool
from colintern.encoding.page_features import Page
from colintern.search.corpora import PageCorpus, PageImages, is_in_shard
from colintern.stores.base import EmbeddedPage, PageStore, StoredPage


class EmbedCounts(NamedTuple):
    """Pages of the source that are stored, and what this run changed."""

    pages: int
    added: int
    replaced: int
    removed: int


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


def embed_pages_in_pool(
    pages: Iterable[tuple[StoredPage, Image.Image]], pool: EmbeddingPool[Image.Image], batch_size: int
) -> Iterator[EmbeddedPage]:
    """Embed pages, in their order."""
    waiting: deque[StoredPage] = deque()
    images = iter(pages)

    def iter_batches() -> Iterator[list[Image.Image]]:
        while batch := list(islice(images, batch_size)):
            waiting.extend(page for page, _ in batch)
            yield [image for _, image in batch]

    for embeddings in pool.embed_batches(iter_batches()):
        yield from (EmbeddedPage(waiting.popleft(), vectors) for vectors in embeddings)
