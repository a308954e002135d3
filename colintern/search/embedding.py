"""Embed the pages of a source into a store: in batches, on every GPU, resumable.

Only ids and names of pages stay in memory.
"""

from collections import deque
from collections.abc import Callable, Iterator
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


def embed_into_store(
    store: PageStore, corpus: PageCorpus, shard: tuple[int, int], embed: Callable[[PageImages], Iterator[EmbeddedPage]]
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
    pending = {id_ for id_, page in corpus.pages.items() if id_ not in stored or stored[id_].key != page.key}
    current = (corpus.pages.keys() - pending) & stored.keys()
    added = replaced = 0

    def iter_changed() -> PageImages:
        for page, image in corpus.read(pending, corpus.bad):
            keyed = page._replace(pixels=Page.from_image(image).key)
            if page.id in stored and stored[page.id].pixels == keyed.pixels:
                current.add(page.id)  # the file changed, this page did not
            else:
                yield keyed, image

    bar = ProgressBar(embed(iter_changed()), desc="embedding", total=len(pending), unit="page")
    for rows in _group_by_bytes(iter(bar), store.batch_bytes):
        store.upsert(rows)
        ids = {row.page.id for row in rows}
        current |= ids
        added, replaced = added + len(ids - stored.keys()), replaced + len(ids & stored.keys())
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


def embed_pages_in_pool(pages: PageImages, pool: EmbeddingPool[Image.Image], batch_size: int) -> Iterator[EmbeddedPage]:
    """Embed pages, in their order."""
    waiting: deque[StoredPage] = deque()

    def iter_batches() -> Iterator[list[Image.Image]]:
        while batch := list(islice(pages, batch_size)):
            waiting.extend(page for page, _ in batch)
            yield [image for _, image in batch]

    for embeddings in pool.embed_batches(iter_batches()):
        yield from (EmbeddedPage(waiting.popleft(), vectors) for vectors in embeddings)
