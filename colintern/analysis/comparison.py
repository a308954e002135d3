"""Whether one evaluation is better than another: differences query by query, their intervals, and a test.

Both models answered the same queries, so the pairs are compared. A score is, as in mteb, the mean over a benchmark's
tasks of the mean over a task's language subsets of the mean over its queries; queries are resampled within a subset.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
CHUNK = 500  # resamples drawn at once: bounds the memory, some 20 MB for 5,000 queries
LEVEL = 0.05
SAME = 1e-9  # scores closer than this are a tie

Array = NDArray[np.float64]
Stratum = tuple[str, str]  # task, subset


class Row(NamedTuple):
    """A task or a benchmark in two evaluations.

    `before`, `after`: its scores, 0 to 1. `low`, `high`: the 95 % interval of their difference (paired bootstrap,
    percentiles). `p`: that of a sign-flip test of no difference, two-sided. `adjusted`: p after Holm, over all rows of
    the comparison.
    """

    name: str
    benchmark: bool
    before: float
    after: float
    low: float
    high: float
    p: float
    adjusted: float
    wins: int
    losses: int
    ties: int

    @property
    def verdict(self) -> str:
        if self.adjusted >= LEVEL or self.low <= 0 <= self.high:
            return ""
        return "better" if self.after > self.before else "worse"


class Drawn(NamedTuple):
    """One subset's scores (queries,) in both evaluations, and the means that chance gave to their difference."""

    before: Array
    after: Array
    bootstrap: Array  # (RESAMPLES,): queries drawn with replacement
    flipped: Array  # (RESAMPLES,): the two models' scores swapped in half of the queries


def draw(before: Array, after: Array, name: str) -> Drawn:
    """Resample a subset; `name` alone decides the random numbers, so the same input gives the same result."""
    rng = np.random.default_rng(crc32(name.encode()))
    difference = after - before
    size = len(difference)
    bootstrap, flipped = np.empty(RESAMPLES), np.empty(RESAMPLES)
    changed = difference[np.abs(difference) > SAME]  # a sign changes nothing at the others
    for start in range(0, RESAMPLES, CHUNK):
        part = slice(start, start + CHUNK)
        bootstrap[part] = difference[rng.integers(0, size, (CHUNK, size), dtype=np.int32)].mean(axis=1)
        signs = rng.integers(0, 2, (CHUNK, len(changed)), dtype=np.int8) * 2.0 - 1
        flipped[part] = signs @ changed / size
    return Drawn(before, after, bootstrap, flipped)


def row(name: str, tasks: Mapping[str, list[Drawn]], benchmark: bool) -> Row:
    """The row of one task, or of several as a benchmark; `tasks`: the subsets of each."""
    shares = [(part, 1 / len(tasks) / len(parts)) for parts in tasks.values() for part in parts]
    before, after = (
        float(sum(share * scores.mean() for scores, share in side))
        for side in ([(p.before, s) for p, s in shares], [(p.after, s) for p, s in shares])
    )
    low, high = np.percentile(sum(share * part.bootstrap for part, share in shares), (2.5, 97.5))
    found = abs(sum(share * float((part.after - part.before).mean()) for part, share in shares))
    flipped = np.abs(sum(share * part.flipped for part, share in shares))
    p = (1 + int((flipped >= found - SAME).sum())) / (RESAMPLES + 1)
    every = np.concatenate([part.after - part.before for part, _ in shares])
    wins, losses = int((every > SAME).sum()), int((every < -SAME).sum())
    return Row(name, benchmark, before, after, float(low), float(high), p, p, wins, losses, len(every) - wins - losses)


def holm(rows: list[Row]) -> list[Row]:
    """The rows with `adjusted`: of 20 tasks without a difference one is below 0.05 by chance (Holm 1979)."""
    order = sorted(range(len(rows)), key=lambda i: rows[i].p)
    highest = 0.0
    adjusted = dict.fromkeys(order, 0.0)
    for place, i in enumerate(order):
        highest = max(highest, min(1.0, (len(rows) - place) * rows[i].p))
        adjusted[i] = highest
    return [one._replace(adjusted=adjusted[i]) for i, one in enumerate(rows)]


def compare(pairs: Iterable[dict[str, Any]]) -> list[Row]:
    """One row for each task and, where a benchmark has several, before its tasks, for the benchmark.

    Args:
        pairs: one for each query: benchmark, task, subset, before and after.
    """
    scores: dict[str, dict[Stratum, list[tuple[float, float]]]] = {}
    for pair in pairs:
        strata = scores.setdefault(pair["benchmark"], {})
        strata.setdefault((pair["task"], pair["subset"]), []).append((pair["before"], pair["after"]))
    known: dict[Stratum, Drawn] = {}  # a task may be in two benchmarks
    rows = []
    for benchmark, strata in scores.items():
        tasks: dict[str, list[Drawn]] = {}
        for stratum, values in strata.items():
            if stratum not in known:
                before, after = np.array(values).T
                known[stratum] = draw(before, after, "/".join(stratum))
            tasks.setdefault(stratum[0], []).append(known[stratum])
        if len(tasks) > 1:
            rows.append(row(benchmark, tasks, benchmark=True))
        rows += [row(task, {task: parts}, benchmark=False) for task, parts in tasks.items()]
    return holm(rows)
