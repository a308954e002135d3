"""Hard-negative mining with a trained adapter: pages ranked high for a query, without those that may answer it.

A page that scores nearly as high as the labelled one often answers the query as well. Such pages are excluded by a
margin relative to the score of the labelled page ("TopK-PercPos", de Souza Moreira et al. 2024, NV-Retriever, arXiv
2407.15831).
"""

from collections import defaultdict
from collections.abc import Collection, Sequence
from itertools import chain, islice
from typing import NamedTuple

import torch
from torch import Tensor

from colintern.core.progress import ProgressBar
from colintern.data.training_set import TrainingData
from colintern.encoding.embed import embed_queries
from colintern.encoding.loading import PageEncoder
from colintern.encoding.multi_process import EmbeddingPool
from colintern.encoding.page_features import Page
from colintern.scoring.maxsim import maxsim_scores
from colintern.training.pairs import MinedNegatives, TrainingPair, load_mining_candidates

MAX_PAGES_IN_MEMORY = 256  # embeddings; 256 pages of 1,536 tokens take 0.2 GB


class MiningLimits(NamedTuple):
    """Ranks that are considered, the largest share of the positive's score, and most negatives of a pair."""

    range_max: int
    relative_margin: float
    num_negatives: int


class MiningResult(NamedTuple):
    """The negatives of each pair, how many pages were ranked, and excluded as positives and as too close."""

    rows: list[MinedNegatives]
    num_pages: int
    num_positives: int
    num_too_close: int


def mine_hard_negatives(
    data: TrainingData,
    limits: MiningLimits,
    encoder: PageEncoder,
    pool: EmbeddingPool[Page],
    batch_size: int,
    num_data_workers: int,
) -> MiningResult:
    """Mine negatives for each training pair.

    Args:
        data: training pairs and pages.
        limits: of the ranking.
        encoder: embeds the queries.
        pool: embeds the pages, with `encoder` or in several processes.
        batch_size: pages or queries per forward pass.
        num_data_workers: processes that decode pages if `pool` has one process.
    """
    train, pages, excluded_page_keys = load_mining_candidates(data)
    if pool.num_workers == 1:  # several processes compute the features that they need
        encoder.features.precompute(pages, num_data_workers)
    queries = list(dict.fromkeys(pair.query for pair in train))
    query_bar = ProgressBar(queries, desc="embedding queries", unit="query")
    query_embeddings = embed_queries(encoder.model, encoder.processor, query_bar, batch_size)
    top_k = TopKAccumulator(train, queries, limits.range_max)
    batches = (pages[start : start + batch_size] for start in range(0, len(pages), batch_size))
    page_embeddings = chain.from_iterable(pool.embed_batches(batches))
    with ProgressBar(desc="ranking pages", total=len(pages), unit="page") as bar:
        for start in range(0, len(pages), MAX_PAGES_IN_MEMORY):
            chunk = list(islice(page_embeddings, MAX_PAGES_IN_MEMORY))
            top_k.add(pages[start : start + MAX_PAGES_IN_MEMORY], maxsim_scores(query_embeddings, chunk))
            bar.update(len(chunk))
    rows, num_positives, num_too_close = filter_negatives(train, top_k, limits, excluded_page_keys)
    return MiningResult(rows, len(pages), num_positives, num_too_close)


class TopKAccumulator:
    """Keeps the best pages of each query, and the score of each pair's own page, while pages come in chunks."""

    def __init__(self, train: Sequence[TrainingPair], queries: Sequence[str], range_max: int):
        self.range_max = range_max
        self.row_of_query = {query: row for row, query in enumerate(queries)}
        self.page_keys: list[str] = []
        self.scores = torch.empty(len(queries), 0)
        self.page_indices = torch.empty(len(queries), 0, dtype=torch.long)
        self.positive_scores: dict[tuple[str, str], float] = {}
        self.queries_of_page: defaultdict[str, set[str]] = defaultdict(set)
        for pair in train:
            self.queries_of_page[pair.page.key].add(pair.query)

    def add(self, pages: Sequence[Page], scores: Tensor) -> None:
        """Add a chunk of pages with their scores, (queries, pages)."""
        first = len(self.page_keys)
        self.page_keys += [page.key for page in pages]
        for column, page in enumerate(pages):
            for query in self.queries_of_page.get(page.key, ()):
                self.positive_scores[query, page.key] = scores[self.row_of_query[query], column].item()
        indices = torch.arange(first, len(self.page_keys)).expand(len(scores), -1)
        # A stable sort: of equal scores the earlier page comes first, whatever the size of the chunks.
        self.scores, order = torch.cat([self.scores, scores], 1).sort(dim=1, descending=True, stable=True)
        self.page_indices = torch.cat([self.page_indices, indices], 1).gather(1, order)[:, : self.range_max]
        self.scores = self.scores[:, : self.range_max]

    def rank_pages(self, query: str) -> list[tuple[str, float]]:
        """Return (page key, score) of the best pages of a query, the best first."""
        row = self.row_of_query[query]
        keys = (self.page_keys[index] for index in self.page_indices[row].tolist())
        return list(zip(keys, self.scores[row].tolist(), strict=True))


def filter_negatives(
    train: Sequence[TrainingPair], top_k: TopKAccumulator, limits: MiningLimits, excluded_page_keys: Collection[str]
) -> tuple[list[MinedNegatives], int, int]:
    """Select each pair's negatives; also count the ranked pages excluded as positives and as too close to one.

    Example: relative_margin 0.95, the pair's page at 10.0: one at 9.6 may be a positive, one at 9.4 is a negative.
    """
    positives = defaultdict(set)
    for pair in train:
        positives[pair.query].add(pair.page.key)
    mined, num_positives, num_too_close = [], 0, 0
    for query, page in dict.fromkeys((pair.query, pair.page.key) for pair in train):
        positive_score = top_k.positive_scores[query, page]
        # By the absolute value: a fraction of a negative score would be above it.
        max_score = positive_score - (1 - limits.relative_margin) * abs(positive_score)
        ranked = top_k.rank_pages(query)
        others = [(key, score) for key, score in ranked if key not in positives[query]]
        hard = [(key, score) for key, score in others if score <= max_score]
        num_positives, num_too_close = (
            num_positives + len(ranked) - len(others),
            num_too_close + len(others) - len(hard),
        )
        kept = [(key, score) for key, score in hard if key not in excluded_page_keys][: limits.num_negatives]
        mined.append(MinedNegatives(query, page, [key for key, _ in kept], [score for _, score in kept]))
    return mined, num_positives, num_too_close
