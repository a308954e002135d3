"""Rank the pages of a source in a store that `colintern embed` has filled."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from colintern.core.errors import UserError
from colintern.encoding.embed import embed_queries
from colintern.encoding.loading import EncoderSettings
from colintern.encoding.pooling import truncate_dim
from colintern.evaluation.models import make_eval_models
from colintern.evaluation.mteb_encoder import ColIntern3_5Encoder
from colintern.ingest.documents import InvalidRow
from colintern.search.corpora import list_documents
from colintern.search.searcher import Ranking
from colintern.search.sources import PageSource
from colintern.storage.hub import enable_offline_mode
from colintern.storage.identity import content_hash
from colintern.stores.base import PageStore, StoredPage
from colintern.stores.urls import open_store


@dataclass(frozen=True)
class StoreSearcher:
    """A store, the model that filled it, and the pages of a source."""

    encoder: ColIntern3_5Encoder
    store: PageStore
    stored: Mapping[str, StoredPage]  # of all sources, by id
    sources: Mapping[str, PageSource]  # by id, those that the store has
    num_missing: int  # pages of the source that the store lacks
    num_outdated: int  # pages whose file has changed since they were embedded

    def count_pages(self) -> int:
        """Count the pages of the source that the store has."""
        return len(self.sources)

    def rank_queries(self, queries: Sequence[str], top: int) -> list[tuple[Tensor, Ranking]]:
        """Return the embedding of each query, and its `top` best pages of the source."""
        dim = (self.store.get_identity() or {})["dim"]
        embeddings = truncate_dim(embed_queries(self.encoder.model, self.encoder.processor, queries, 1), dim)
        # Pages of other sources may rank before those of this one.
        count = top if len(self.stored) == len(self.sources) else len(self.stored)
        hits = [self.store.search(query, count) for query in embeddings]
        rankings = [
            [(self.sources[page_id], score) for page_id, score in found if page_id in self.sources] for found in hits
        ]
        return [(query, ranking[:top]) for query, ranking in zip(embeddings, rankings, strict=True)]


def open_store_searcher(
    settings: EncoderSettings, model: Path, url: str, source: Path
) -> tuple[StoreSearcher, list[InvalidRow]]:
    """Open a store and load the model that filled it; also return the files of the source that cannot be read.

    Raises:
        UserError: the store cannot be opened, was filled by another model, or has no page of the source.
    """
    listed, bad = list_documents(source)
    store = open_store(url)
    identity, revision = store.get_identity() or {}, content_hash(model)[:40]
    if identity.get("revision") != revision:
        raise UserError(
            f"--store: {store.label}: revision: was filled with {identity.get('revision')} ({identity.get('model')}), "
            f"but --model {model} has {revision}; give that model, or fill another store with colintern embed"
        )
    stored = store.list_pages()
    sources = {page.id: file for page, file in listed.items() if page.id in stored}
    num_outdated = sum(page.id in stored and stored[page.id].key != page.key for page in listed)
    if not sources:
        raise UserError(f"--store: {store.label}: has no page of {source}; run: colintern embed {source}")
    enable_offline_mode()
    encoder = make_eval_models(settings, model)["trained"].load_encoder()
    return StoreSearcher(encoder, store, stored, sources, len(listed) - len(sources), num_outdated), bad
