"""Hard negatives from a trained adapter: the pages it ranks high for a query, without those that may answer it.

A page that scores nearly as high as the right one is often right as well, and nobody has said so. Such pages are left
out by a margin relative to the score of the row's own page ("TopK-PercPos", de Souza Moreira et al. 2024, NV-Retriever,
arXiv 2407.15831).
"""

from collections import defaultdict
from collections.abc import Collection, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from colintern.core.progress import ProgressBar
from colintern.core.project import root
from colintern.data.training_set import get_training_data_params
from colintern.encoding.embed import embed_features, embed_queries
from colintern.encoding.page_features import FEATURES, Page, PageFeatures
from colintern.modeling.host import settle
from colintern.modeling.loading import load_adapter, load_processor, require_adapter, require_base
from colintern.params import Params
from colintern.scoring.maxsim import maxsim_scores
from colintern.storage.identity import content_hash, versions
from colintern.storage.manifest import check_base
from colintern.training.negatives import Mined
from colintern.training.pairs import Pair, candidates

CHUNK = 256  # pages whose embeddings are in memory at once; 256 pages of 1,536 tokens take 0.2 GB


class Limits(NamedTuple):
    """The `top` ranks of a query are looked at; pages above `margin` x the right page's score go; `keep` are kept."""

    top: int
    margin: float
    keep: int


class Found(NamedTuple):
    """The rows of the file, what made them, and how many pages were left out: right ones, and too close ones."""

    rows: list[Mined]
    provenance: dict[str, Any]
    right: int
    close: int


def mine(params: Params, adapter: Path, limits: Limits) -> Found:
    """Negatives for each row of the training split, from all pages that training may see.

    Raises:
        UserError: data, base or adapter are missing or changed.
    """
    require_adapter(adapter)
    base = check_base(params)
    require_base(params, adapter)
    settle(params.threads)
    model = load_adapter(params, base, adapter)
    processor = load_processor(params, adapter, model)
    train, pages, unfit = candidates(params)
    features = PageFeatures(model, processor, root() / FEATURES, params.feature_cache_gb, params.feature_cache_format)
    features.fill(pages, params.workers)
    queries = list(dict.fromkeys(row.query for row in train))
    tokens = embed_queries(
        model, processor, ProgressBar(queries, desc="embedding queries", unit="query"), params.eval_batch_size
    )
    ranking = Ranking(train, queries, limits.top)
    page_features = map(features, pages)
    with ProgressBar(desc="ranking pages", total=len(pages), unit="page") as bar:
        for start in range(0, len(pages), CHUNK):
            embedded = embed_features(model, processor, islice(page_features, CHUNK), params.eval_batch_size)
            ranking.add(pages[start : start + CHUNK], maxsim_scores(tokens, embedded))
            bar.update(len(embedded))
    rows, right, close = select(train, ranking, limits, unfit)
    provenance = {
        "adapter": str(adapter),
        "adapter_sha256": content_hash(adapter / "adapter_model.safetensors"),
        "base": params.base,
        "base_revision": params.base_revision,
        "data": get_training_data_params(params),
        "limits": limits._asdict(),
        "pages": len(pages),
        "versions": versions(),
    }
    return Found(rows, provenance, right, close)


class Ranking:
    """The best pages of each query so far, and the score of each row's own page; pages come chunk by chunk."""

    def __init__(self, train: Sequence[Pair], queries: Sequence[str], top: int):
        self.top = top
        self.places = {query: place for place, query in enumerate(queries)}
        self.keys: list[str] = []
        self.scores = torch.empty(len(queries), 0)
        self.pages = torch.empty(len(queries), 0, dtype=torch.long)
        self.own: dict[tuple[str, str], float] = {}
        self.asked: defaultdict[str, set[str]] = defaultdict(set)
        for row in train:
            self.asked[row.page.key].add(row.query)

    def add(self, pages: Sequence[Page], scores: Tensor) -> None:
        """`scores`: (queries, pages) of a chunk of pages."""
        first = len(self.keys)
        self.keys += [page.key for page in pages]
        for column, page in enumerate(pages):
            for query in self.asked.get(page.key, ()):
                self.own[query, page.key] = scores[self.places[query], column].item()
        numbers = torch.arange(first, len(self.keys)).expand(len(scores), -1)
        # Stable: of equal scores the earlier page comes first, whatever the chunks.
        self.scores, order = torch.cat([self.scores, scores], 1).sort(dim=1, descending=True, stable=True)
        self.pages = torch.cat([self.pages, numbers], 1).gather(1, order)[:, : self.top]
        self.scores = self.scores[:, : self.top]

    def best(self, query: str) -> list[tuple[str, float]]:
        """(page, score) of the top ranks of a query, the best first."""
        place = self.places[query]
        keys = (self.keys[number] for number in self.pages[place].tolist())
        return list(zip(keys, self.scores[place].tolist(), strict=True))


def select(
    train: Sequence[Pair], ranking: Ranking, limits: Limits, unfit: Collection[str]
) -> tuple[list[Mined], int, int]:
    """The rows of the file, and how many ranked pages were left out as right ones and as too close to the right one.

    Example: margin 0.95, own page at 10.0: pages at 9.6 and above may be right too and are left out, one at 9.4 is a
    negative.
    """
    answers = defaultdict(set)
    for row in train:
        answers[row.query].add(row.page.key)
    mined, right, close = [], 0, 0
    for query, page in dict.fromkeys((row.query, row.page.key) for row in train):
        # A margin of a negative score would lie above it.
        own = ranking.own[query, page]
        most = own - (1 - limits.margin) * abs(own)
        best = ranking.best(query)
        others = [(key, score) for key, score in best if key not in answers[query]]
        hard = [(key, score) for key, score in others if score <= most]
        right, close = right + len(best) - len(others), close + len(others) - len(hard)
        kept = [(key, score) for key, score in hard if key not in unfit][: limits.keep]
        mined.append(Mined(query, page, [key for key, _ in kept], [score for _, score in kept]))
    return mined, right, close
