"""Compare sizes of a model's embeddings: bytes a page, scores, time of a query, each beside the full embeddings."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from colintern.analysis.comparison import compare_eval_runs
from colintern.analysis.eval_runs import load_eval_run
from colintern.evaluation.results import Scores
from colintern.params import Params
from colintern.scoring.metrics import MAIN_METRIC


class SizeRow(NamedTuple):
    """Storage per page and retrieval quality on a benchmark, under a setting of the embeddings."""

    benchmark: str
    pool_factor: int
    dim: int
    embedding_precision: str
    rescore_top_k: int
    vectors_per_page: float
    bytes_per_page: float  # of what ranks all pages; rescoring reads the full embeddings of `rescore_top_k` pages more
    ndcg_at_5: float
    ndcg_at_10: float
    change: float  # of NDCG@5, from the full embeddings
    p: float  # of a paired test of that change
    seconds_per_query: float  # of scoring all pages


def list_size_rows(
    scores: Scores, params: Params, seconds: Mapping[str, float], folder: Path, full_folder: Path
) -> list[SizeRow]:
    """Return one row for each benchmark.

    Args:
        scores: of the model under the settings of `params`.
        params: see above.
        seconds: of a query, by benchmark.
        folder: holds this evaluation.
        full_folder: holds that of the full embeddings.
    """
    comparison = compare_eval_runs(load_eval_run(str(full_folder)), load_eval_run(str(folder)), MAIN_METRIC.key)
    changes = {row.name: row for row in comparison.rows}
    size = params.pool_factor, params.dim, params.embedding_precision, params.rescore_top_k
    size_rows = []
    for name, values in scores.items():
        # A benchmark of one task has only the row of the task.
        change = next(changes[key] for key in (name, *values["tasks"]) if key in changes)
        measured = {key: values[key] for key in SizeRow._fields[5:9]}
        size_rows.append(
            SizeRow(name, *size, **measured, change=change.difference, p=change.p, seconds_per_query=seconds[name])
        )
    return size_rows


def format_size_table(rows: Sequence[SizeRow]) -> str:
    """Format as text of at most 80 columns."""
    lines = [
        f"{'benchmark':<12}{'pool':>5}{'dim':>4} {'stored':<8}{'best':>4}{'bytes/page':>11}{'ndcg@5':>7}{'ndcg@10':>8}"
        f"{'change':>7}{'p':>6}{'ms':>7}"
    ]
    for row in rows:
        lines.append(
            f"{row.benchmark[:11]:<12}{row.pool_factor:>5}{row.dim:>4} {row.embedding_precision:<8}"
            f"{row.rescore_top_k or '':>4}{row.bytes_per_page:>11,.0f}{100 * row.ndcg_at_5:>7.1f}"
            f"{100 * row.ndcg_at_10:>8.1f}{100 * row.change:>+7.1f}{row.p:>6.3f}{1000 * row.seconds_per_query:>7.1f}"
        )
    return "\n".join([*lines, *LEGEND])


LEGEND = (
    "change, p: of ndcg@5 from the full embeddings, and of a paired test of it; ms: of",
    "a query, to score all pages; best: pages of a query that are scored again with",
    "the full embeddings, which are kept beside the bytes of this row",
)
