"""Test whether one evaluation is better than another: differences query by query, their intervals, and a test.

Both models answered the same queries, so the pairs are compared. A score is, as in mteb, the mean over a benchmark's
tasks of the mean over a task's language subsets of the mean over its queries; queries are resampled within a subset.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

NUM_RESAMPLES = 10_000
CHUNK_SIZE = 500  # resamples drawn at once: bounds the memory, some 20 MB for 5,000 queries
SIGNIFICANCE_LEVEL = 0.05
TIE_EPS = 1e-9  # scores closer than this are a tie

Array = NDArray[np.float64]
Stratum = tuple[str, str]  # task, subset


class ScorePair(NamedTuple):
    """A query's score in two evaluations, 0 to 1."""

    benchmark: str
    task: str
    subset: str
    before: float
    after: float


class ScoreComparison(NamedTuple):
    """A task or a benchmark in two evaluations."""

    name: str
    benchmark: bool
    before: float  # 0 to 1, as is the next
    after: float
    low: float  # 95 % interval of the difference (paired bootstrap, percentiles)
    high: float
    p: float  # of a sign-flip test of no difference, two-sided
    adjusted: float  # p after Holm, over all rows of the comparison
    wins: int  # queries that score higher in the second evaluation
    losses: int
    ties: int

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
    """One subset's scores (queries,) in both evaluations, and resampled means (NUM_RESAMPLES,) of their difference."""

    before: Array
    after: Array
    bootstrap: Array  # queries drawn with replacement
    flipped: Array  # the two models' scores swapped in half of the queries


def bootstrap(before: Array, after: Array, name: str) -> Resamples:
    """Resample a subset; `name` alone seeds the random numbers, so the same input gives the same result."""
    rng = np.random.default_rng(crc32(name.encode()))
    difference = after - before
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
    before = float(sum(weight * subset.before.mean() for subset, weight in weighted))
    after = float(sum(weight * subset.after.mean() for subset, weight in weighted))
    low, high = np.percentile(sum(weight * subset.bootstrap for subset, weight in weighted), (2.5, 97.5))
    difference = abs(sum(weight * float((subset.after - subset.before).mean()) for subset, weight in weighted))
    flipped = np.abs(sum(weight * subset.flipped for subset, weight in weighted))
    p = (1 + int((flipped >= difference - TIE_EPS).sum())) / (NUM_RESAMPLES + 1)
    changes = np.concatenate([subset.after - subset.before for subset, _ in weighted])
    wins, losses = int((changes > TIE_EPS).sum()), int((changes < -TIE_EPS).sum())
    ties = len(changes) - wins - losses
    return ScoreComparison(name, benchmark, before, after, float(low), float(high), p, p, wins, losses, ties)


def adjust_holm(rows: list[ScoreComparison]) -> list[ScoreComparison]:
    """Fill in `adjusted`: of 20 tasks without a difference one is below 0.05 by chance (Holm 1979)."""
    p = np.array([row.p for row in rows])
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(np.minimum(1.0, np.arange(len(p), 0, -1) * p[order]))
    return [row._replace(adjusted=value) for row, value in zip(rows, adjusted.tolist(), strict=True)]


def compare_scores(pairs: Iterable[ScorePair]) -> list[ScoreComparison]:
    """Compare each task and, where a benchmark has several, before its tasks, the benchmark; a pair for each query."""
    scores: dict[str, dict[Stratum, list[tuple[float, float]]]] = {}
    for pair in pairs:
        strata = scores.setdefault(pair.benchmark, {})
        strata.setdefault((pair.task, pair.subset), []).append((pair.before, pair.after))
    known: dict[Stratum, Resamples] = {}  # a task may be in two benchmarks
    rows = []
    for benchmark, strata in scores.items():
        tasks: dict[str, list[Resamples]] = {}
        for stratum, values in strata.items():
            if stratum not in known:
                before, after = np.array(values).T
                known[stratum] = bootstrap(before, after, "/".join(stratum))
            tasks.setdefault(stratum[0], []).append(known[stratum])
        if len(tasks) > 1:
            rows.append(_compare_tasks(benchmark, tasks, benchmark=True))
        rows += [_compare_tasks(task, {task: subsets}, benchmark=False) for task, subsets in tasks.items()]
    return adjust_holm(rows)
