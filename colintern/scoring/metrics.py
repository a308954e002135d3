"""Ranking metrics: the one table of their names and cutoffs, and NDCG of a matrix of scores.

The dev set computes `ndcg_at_k`, where ties count against the model; an evaluation takes mteb's values (trec_eval).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import log2
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # the command line reads the table before torch is loaded
    from torch import Tensor


class RankingMetric(NamedTuple):
    """A metric of a ranking."""

    key: str  # in metric files, plots and mteb's results
    title: str  # in texts
    column: str  # at the top of a column in the terminal
    trec_name: str  # in trec_eval, which mteb computes it with
    cutoff: int  # pages at the top of the ranking that it looks at


RANKING_METRICS = (
    RankingMetric("ndcg_at_5", "NDCG@5", "ndcg@5", "ndcg_cut_5", 5),
    RankingMetric("ndcg_at_10", "NDCG@10", "ndcg@10", "ndcg_cut_10", 10),
    RankingMetric("recall_at_100", "recall@100", "rec@100", "recall_100", 100),
)
METRIC_KEYS = tuple(metric.key for metric in RANKING_METRICS)
MAIN_METRIC = RANKING_METRICS[0]  # the one that models are judged and compared by
# It on the dev set: in the Trainer's log and plots/dev.csv, in metrics/train.json, and in texts.
EVAL_KEY, DEV_KEY, DEV_TITLE = f"eval_{MAIN_METRIC.key}", f"dev_{MAIN_METRIC.key}", f"dev {MAIN_METRIC.title}"


def compute_chance(gains: Sequence[int], num_pages: int) -> dict[str, float]:
    """Compute the expected value of each metric for a query whose pages are ranked at random.

    Args:
        gains: relevance of each relevant page, above 0.
        num_pages: number of pages that are ranked.
    """
    chance = {}
    for metric in RANKING_METRICS:
        depth = min(metric.cutoff, num_pages)
        if metric.key.startswith("recall"):
            chance[metric.key] = depth / num_pages
        else:
            discounts = [1 / log2(rank + 1) for rank in range(1, depth + 1)]
            ideal = sum(gain * discount for gain, discount in zip(sorted(gains, reverse=True), discounts, strict=False))
            chance[metric.key] = sum(gains) * sum(discounts) / num_pages / ideal
    return chance


def ndcg_at_k(scores: Tensor, relevant: Sequence[Collection[int]], k: int) -> float:
    """Compute the mean NDCG at k of the rankings that `scores` gives, with binary relevance.

    NDCG@k = DCG@k / (DCG@k of a perfect ranking), DCG@k = sum over relevant pages of rank r <= k of 1 / log2(r + 1)
    (Jarvelin & Kekalainen 2002, as trec_eval and mteb compute it). A tie counts against the model: a relevant page
    ranks behind every other page of equal score. Otherwise a model whose embeddings have collapsed scores 1.
    Example: one query, scores (0.9, 0.8, 0.7), page 1 relevant: rank 2, NDCG@5 = 1 / log2(3) = 0.631.

    Args:
        scores: (queries, pages).
        relevant: for each query the indices of its relevant pages, at least one.
        k: depth, >= 1.

    Raises:
        ValueError: a score that is not finite, or a query without a relevant page or with one that does not exist.
    """
    if not scores.isfinite().all():
        raise ValueError("ndcg_at_k: a score is not finite")
    if len(relevant) != len(scores) or not len(scores) or k < 1:
        raise ValueError(f"ndcg_at_k: {len(scores)} rows of scores, {len(relevant)} sets of relevant pages, k = {k}")
    total = 0.0
    for i, (row, relevant_pages) in enumerate(zip(scores.tolist(), map(set, relevant), strict=True)):
        if not relevant_pages or not relevant_pages <= set(range(len(row))):
            found = sorted(relevant_pages)
            raise ValueError(f"query {i}: relevant pages {found}, expected one or more of 0..{len(row) - 1}")
        others = [score for page, score in enumerate(row) if page not in relevant_pages]
        relevant_scores = sorted((row[page] for page in relevant_pages), reverse=True)
        ranks = [j + sum(other >= score for other in others) for j, score in enumerate(relevant_scores, start=1)]
        ideal = sum(1 / log2(r + 1) for r in range(1, min(k, len(relevant_pages)) + 1))
        total += sum(1 / log2(r + 1) for r in ranks if r <= k) / ideal
    return total / len(scores)
