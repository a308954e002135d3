"""Test whether one evaluation is better than another: differences query by query, their intervals, and a test.

Both models answered the same queries, so the pairs are compared. A score is, as in mteb, the mean over a benchmark's
tasks of the mean over a task's language subsets of the mean over its queries; queries are resampled within a subset.

A side may be runs with several seeds. Then interval and p cover both queries and seeds, see `_test_over_seeds`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

NUM_RESAMPLES = 10_000
CHUNK_SIZE = 500  # resamples drawn at once: bounds the memory, some 20 MB for 5,000 queries
SIGNIFICANCE_LEVEL = 0.05
MAX_FREEDOM = 1e6  # of a t distribution, which is the normal one there
TIE_EPS = 1e-9  # scores closer than this are a tie

Array = NDArray[np.float64]
Stratum = tuple[str, str]  # task, subset
SeedScores = float | Sequence[float]  # of each seed, in one order for all queries; a number where there is one


class ScorePair(NamedTuple):
    """A query's score in two evaluations, 0 to 1."""

    benchmark: str
    task: str
    subset: str
    before: SeedScores
    after: SeedScores


class ScoreComparison(NamedTuple):
    """A task or a benchmark in two evaluations."""

    name: str
    benchmark: bool
    before: float  # 0 to 1, as is the next
    after: float
    low: float  # 95 % interval of the difference (paired bootstrap, percentiles; see `_test_over_seeds` for seeds)
    high: float
    p: float  # of a sign-flip test of no difference, two-sided; of a t-test where there are several seeds
    adjusted: float  # p after Holm, over all rows of the comparison
    wins: int  # queries that score higher in the second evaluation
    losses: int
    ties: int
    spread_before: float | None = None  # standard deviation over seeds, None for one seed
    spread_after: float | None = None

    @property
    def difference(self) -> float:
        """Return the second score less the first."""
        return self.after - self.before

    @property
    def verdict(self) -> str:
        """Return "better", "worse", or "" where no difference is shown."""
        if self.adjusted >= SIGNIFICANCE_LEVEL or self.low <= 0 <= self.high:
            return ""
        return "better" if self.after > self.before else "worse"


class Resamples(NamedTuple):
    """One subset's scores in both evaluations, and resampled means (NUM_RESAMPLES,) of the difference over queries."""

    before: Array  # (seeds, queries), as is the next
    after: Array
    bootstrap: Array  # queries drawn with replacement
    flipped: Array  # the two models' scores swapped in half of the queries


def bootstrap(before: Array, after: Array, name: str) -> Resamples:
    """Resample a subset; `name` alone seeds the random numbers, so the same input gives the same result."""
    rng = np.random.default_rng(crc32(name.encode()))
    difference = after.mean(axis=0) - before.mean(axis=0)
    size = len(difference)
    means, flipped = np.empty(NUM_RESAMPLES), np.empty(NUM_RESAMPLES)
    changed = difference[np.abs(difference) > TIE_EPS]  # a sign changes nothing at the others
    for start in range(0, NUM_RESAMPLES, CHUNK_SIZE):
        chunk = slice(start, start + CHUNK_SIZE)
        means[chunk] = difference[rng.integers(0, size, (CHUNK_SIZE, size), dtype=np.int32)].mean(axis=1)
        signs = rng.integers(0, 2, (CHUNK_SIZE, len(changed)), dtype=np.int8) * 2.0 - 1
        flipped[chunk] = signs @ changed / size
    return Resamples(before, after, means, flipped)


def _compare_tasks(name: str, tasks: Mapping[str, list[Resamples]], benchmark: bool) -> ScoreComparison:
    """Compare one task, or several as a benchmark; `tasks`: the subsets of each."""
    weighted = [(subset, 1 / len(tasks) / len(subsets)) for subsets in tasks.values() for subset in subsets]
    before = np.sum([weight * subset.before.mean(axis=1) for subset, weight in weighted], axis=0)  # (seeds,)
    after = np.sum([weight * subset.after.mean(axis=1) for subset, weight in weighted], axis=0)
    difference = float(after.mean() - before.mean())
    if len(before) == len(after) == 1:
        low, high = np.percentile(sum(weight * subset.bootstrap for subset, weight in weighted), (2.5, 97.5))
        null = np.abs(sum(weight * subset.flipped for subset, weight in weighted))
    else:
        null = _draw_null_over_seeds(weighted, (before, after), name)
        margin = np.percentile(null, 95)
        low, high = difference - margin, difference + margin
    p = (1 + int((null >= abs(difference) - TIE_EPS).sum())) / (NUM_RESAMPLES + 1)
    changes = np.concatenate([subset.after.mean(axis=0) - subset.before.mean(axis=0) for subset, _ in weighted])
    wins, losses = int((changes > TIE_EPS).sum()), int((changes < -TIE_EPS).sum())
    counts = wins, losses, len(changes) - wins - losses
    spreads = (float(seeds.std(ddof=1)) if len(seeds) > 1 else None for seeds in (before, after))
    means = float(before.mean()), float(after.mean())
    return ScoreComparison(name, benchmark, *means, float(low), float(high), p, p, *counts, *spreads)


def _draw_null_over_seeds(weighted: list[tuple[Resamples, float]], seeds: tuple[Array, Array], name: str) -> Array:
    """Draw sizes (NUM_RESAMPLES,) of the difference of two means over queries and seeds where there is none.

    The variance is that of a two-way random-effects model: seeds (nested in an evaluation) and queries (crossed with
    it), less their interaction, which both contain. The t distribution has Hillis's degrees of freedom (2007,
    Statistics in Medicine 26:596; for readers nested in tests 2014, 33:330), as for few readers of many cases in
    radiology. A percentile bootstrap of both, of which Owen (2007, Annals of Applied Statistics 1:386) computes the
    bias, was tried: of few seeds it fires too often, of seeds that hardly differ too rarely (`python -m bench.seeds`).

    Args:
        weighted: subsets with their weights in the score.
        seeds: the score of each seed (seeds,) in either evaluation. Their spread is pooled, so one may have one seed.
        name: seeds the random numbers.
    """
    freedom = sum(map(len, seeds)) - 2
    factor = sum(1 / len(scores) for scores in seeds)
    seed_variance = factor * sum(((scores - scores.mean()) ** 2).sum() for scores in seeds) / freedom
    query_variance = np.var(sum(weight * subset.bootstrap for subset, weight in weighted))
    interaction = factor * sum(weight**2 * _compute_interaction(subset) for subset, weight in weighted) / freedom
    variance = seed_variance + max(query_variance - interaction, 0.0)
    if seed_variance > 0:
        freedom = min(freedom * (variance / seed_variance) ** 2, MAX_FREEDOM)
    rng = np.random.default_rng(crc32(name.encode()))
    return np.sqrt(variance) * np.abs(rng.standard_t(freedom, NUM_RESAMPLES))


def _compute_interaction(subset: Resamples) -> float:
    """Sum over both evaluations the squares of what neither its seed nor its query explains of a score.

    Divided by the degrees of freedom of queries, and by their number for the variance of a mean over them.
    """
    size = subset.before.shape[1]
    residuals = (
        scores - scores.mean(axis=0) - scores.mean(axis=1, keepdims=True) + scores.mean()
        for scores in (subset.before, subset.after)
    )
    return float(sum((residual**2).sum() for residual in residuals)) / max(size - 1, 1) / size


def adjust_holm(rows: list[ScoreComparison]) -> list[ScoreComparison]:
    """Fill in `adjusted`: of 20 tasks without a difference one is below 0.05 by chance (Holm 1979)."""
    p = np.array([row.p for row in rows])
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(np.minimum(1.0, np.arange(len(p), 0, -1) * p[order]))
    return [row._replace(adjusted=value) for row, value in zip(rows, adjusted.tolist(), strict=True)]


def compare_scores(pairs: Iterable[ScorePair]) -> list[ScoreComparison]:
    """Compare each task and, where a benchmark has several, before its tasks, the benchmark; a pair for each query."""
    scores: dict[str, dict[Stratum, list[tuple[SeedScores, SeedScores]]]] = {}
    for pair in pairs:
        strata = scores.setdefault(pair.benchmark, {})
        strata.setdefault((pair.task, pair.subset), []).append((pair.before, pair.after))
    known: dict[Stratum, Resamples] = {}  # a task may be in two benchmarks
    rows = []
    for benchmark, strata in scores.items():
        tasks: dict[str, list[Resamples]] = {}
        for stratum, values in strata.items():
            if stratum not in known:
                before, after = (np.array(side).reshape(len(values), -1).T for side in zip(*values, strict=True))
                known[stratum] = bootstrap(before, after, "/".join(stratum))
            tasks.setdefault(stratum[0], []).append(known[stratum])
        if len(tasks) > 1:
            rows.append(_compare_tasks(benchmark, tasks, benchmark=True))
        rows += [_compare_tasks(task, {task: subsets}, benchmark=False) for task, subsets in tasks.items()]
    return adjust_holm(rows)
