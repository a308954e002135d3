"""How often `colintern compare` finds a difference between groups of seeds where there is none.

    python -m bench.seeds     # 500 comparisons for each row, a few minutes; --runs N

In: simulated ranks of 200 queries. Queries differ in how hard they are, for all runs alike; runs differ by their seed
(the spread, given as the standard deviation of a run's NDCG@5 x100), and a query by chance in each run. Both groups are
drawn from the same distribution, so each difference found is a false one, and 5 % of them are right. Compared are the
p of `colintern.analysis.significance`, one that covers queries alone (mean scores over seeds, sign flips), and a
percentile bootstrap of seeds and queries. The last line has the lowest and highest share of each in %:
`RESULT compare=LOW-HIGH queries=LOW-HIGH percentile=LOW-HIGH`.
"""

import argparse
import math
from collections.abc import Sequence
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from colintern.analysis import significance
from colintern.analysis.significance import SIGNIFICANCE_LEVEL, ScorePair, compare_scores

Array = NDArray[np.float64]
QUERIES, RESAMPLES = 200, 1000
GAINS = np.array([1 / math.log2(rank + 1) if rank <= 5 else 0.0 for rank in range(1, 31)])
ROWS = [(3, 3, spread) for spread in (0.0, 0.1, 0.2, 0.5)] + [(2, 2, 0.2), (5, 5, 0.2), (1, 3, 0.2), (3, 6, 0.2)]


def score_runs(rng: np.random.Generator, ease: Array, seeds: int, spread: float) -> Array:
    """NDCG@5 (seeds, queries) of runs whose skill has this spread in log odds of each rank."""
    odds = ease + rng.normal(0, spread, (seeds, 1)) + rng.normal(0, 0.5, (seeds, len(ease)))
    return GAINS[np.minimum(rng.geometric(1 / (1 + np.exp(-odds))), 30) - 1]


def is_outside_percentiles(rng: np.random.Generator, a: Array, b: Array) -> bool:
    """Whether the interval of a bootstrap over seeds and queries leaves out 0."""
    counts = rng.multinomial(a.shape[1], np.full(a.shape[1], 1 / a.shape[1]), RESAMPLES).T / a.shape[1]
    means = []
    for side in (a, b):
        drawn = rng.integers(0, len(side), (len(side), RESAMPLES))
        means.append(np.take_along_axis(side @ counts, drawn, axis=0).mean(axis=0))
    low, high = np.percentile(means[1] - means[0], (2.5, 97.5))
    return not low <= 0 <= high


def compare_groups(a: Array, b: Array, name: str = "Task") -> float:
    """The p of a comparison of scores (seeds, queries)."""
    [row] = compare_scores(ScorePair("bench", name, "", *pair) for pair in zip(a.T.tolist(), b.T.tolist(), strict=True))
    return row.p


def count_false(a_seeds: int, b_seeds: int, spread: float, runs: int) -> tuple[float, dict[str, float]]:
    """The mean spread of a run's score x100, and the share in % of the comparisons that find a difference."""
    rng = np.random.default_rng(7)
    fired, spreads = dict.fromkeys(("compare", "queries", "percentile"), 0), []
    for number in range(runs):
        ease = rng.normal(0.3, 1.2, QUERIES)
        a, b = score_runs(rng, ease, a_seeds, spread), score_runs(rng, ease, b_seeds, spread)
        fired["compare"] += compare_groups(a, b, f"{number}") < SIGNIFICANCE_LEVEL
        means = [side.mean(axis=0, keepdims=True) for side in (a, b)]
        fired["queries"] += compare_groups(means[0], means[1], f"{number}") < SIGNIFICANCE_LEVEL
        fired["percentile"] += is_outside_percentiles(rng, a, b)
        spreads.append(100 * b.mean(axis=1).std(ddof=1))
    return float(np.mean(spreads)), {name: 100 * count / runs for name, count in fired.items()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=500, help="comparisons of each row (default: %(default)s)")
    args = parser.parse_args(argv)
    print(f"{'seeds':<8}{'spread':>8}{'compare':>10}{'queries':>10}{'percentile':>12}   % found at 5 %")
    shares = []
    # Enough of 10,000 for a share; restored, because a test runs this in its process.
    with patch.object(significance, "NUM_RESAMPLES", RESAMPLES):
        for a_seeds, b_seeds, spread in ROWS:
            found, share = count_false(a_seeds, b_seeds, spread, args.runs)
            shares.append(share)
            values = f"{share['compare']:>10.1f}{share['queries']:>10.1f}{share['percentile']:>12.1f}"
            print(f"{f'{a_seeds}, {b_seeds}':<8}{found:>8.1f}{values}", flush=True)
    ranges = {name: [share[name] for share in shares] for name in shares[0]}
    print("RESULT " + " ".join(f"{name}={min(found):.1f}-{max(found):.1f}" for name, found in ranges.items()))


if __name__ == "__main__":
    main()
