"""Search the pages of a folder or a PDF with a model: what `colintern search` and `colintern serve` share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from colintern.encoding.embed import embed_queries
from colintern.encoding.loading import EncoderSettings
from colintern.evaluation.models import make_eval_models
from colintern.ingest.documents import InvalidRow
from colintern.modeling.processor import ColIntern3_5Processor
from colintern.modeling.retriever import ColIntern3_5
from colintern.reporting.examples import RankedPage
from colintern.scoring.maxsim import maxsim_scores
from colintern.search.index import PageIndex, get_index_identity
from colintern.search.sources import PageSource, render_sources
from colintern.storage.hub import enable_offline_mode
from colintern.storage.identity import content_hash

Ranking = list[tuple[PageSource, float]]  # best first, with the score


@dataclass(frozen=True)
class PageSearcher:
    """A model and the pages that it searches; `index.add_pages` has to embed them first."""

    model: ColIntern3_5
    processor: ColIntern3_5Processor
    index: PageIndex
    sources: Sequence[PageSource]
    rescore_top_k: int

    def count_pages(self) -> int:
        """Count the pages that the index has."""
        return len(self.sources) - len(self.index.list_missing(self.sources))

    def rank_queries(self, queries: Sequence[str], top: int) -> list[tuple[Tensor, Ranking]]:
        """Return the embedding (tokens, 128) of each query, and its `top` best pages."""
        embeddings = embed_queries(self.model, self.processor, queries, 1)
        return [(query, rank_pages(self.index, query, self.sources, self.rescore_top_k)[:top]) for query in embeddings]

    def render_ranking(
        self,
        ranking: Ranking,
        bad: list[InvalidRow],
        get_link: Callable[[PageSource], str] = lambda source: source.link,
    ) -> list[RankedPage]:
        """Render ranked pages, to be explained; `bad` gets those that cannot be rendered as they were embedded."""
        images = dict(render_sources([source for source, _ in ranking], bad))
        changed = [source for source, image in images.items() if not self.index.has_pixels(source, image)]
        bad += [
            InvalidRow(source.name, "has changed since it was embedded; run the command again") for source in changed
        ]
        pages = []
        for rank, (source, _) in enumerate(ranking, start=1):
            full, stored = self.index.load_best_embedding(source), self.index.load_embedding(source)
            if source in images and source not in changed and full is not None:
                scored = full if rank <= self.rescore_top_k else stored
                image, link = images[source], get_link(source)
                pages.append(RankedPage(source.name, f"rank {rank}", "found", image, full, scored, link))
        return pages


def load_searcher(
    settings: EncoderSettings,
    model: Path,
    index: Path,
    sources: Sequence[PageSource],
    precision: str,
    rescore_top_k: int,
) -> PageSearcher:
    """Load a model from its folder, and open its index below the folder `index`.

    Args:
        settings: how the model is loaded.
        model: folder of an adapter or of a merged model.
        index: folder of all indexes.
        sources: pages to search.
        precision: how the index stores numbers.
        rescore_top_k: best pages that are scored again by float16 vectors, which the index then stores too; 0: none.
    """
    enable_offline_mode()
    eval_model = make_eval_models(settings, model)["trained"]
    encoder = eval_model.load_encoder()
    base = eval_model.identity.get("base")
    identity = get_index_identity(content_hash(model), base, encoder.model, encoder.processor)
    pages = PageIndex(index, identity, precision, keeps_full=rescore_top_k > 0)
    return PageSearcher(encoder.model, encoder.processor, pages, sources, rescore_top_k)


def rank_pages(index: PageIndex, query: Tensor, sources: Sequence[PageSource], rescore_top_k: int) -> Ranking:
    """Rank all pages of an index for a query of (tokens, 128), best first.

    The `rescore_top_k` best are scored again by the float16 copy; the others follow with the scores that they have.
    """
    ranking = sorted(index.score_pages(query, sources), key=lambda page: -page[1])
    best = [(source, index.load_best_embedding(source)) for source, _ in ranking[:rescore_top_k]]
    full = {source: embedding for source, embedding in best if embedding is not None}
    scores = maxsim_scores([query], list(full.values()))[0].tolist()
    return sorted(zip(full, scores, strict=True), key=lambda page: -page[1]) + ranking[rescore_top_k:]


def list_results(ranking: Ranking, get_link: Callable[[PageSource], str]) -> list[dict[str, Any]]:
    """List ranked pages as JSON: rank, score, file below the source, page from 1 in a PDF, link."""
    return [
        {
            "rank": rank,
            "score": round(score, 4),
            "file": source.file,
            "page": source.page_number,
            "link": get_link(source),
        }
        for rank, (source, score) in enumerate(ranking, start=1)
    ]
