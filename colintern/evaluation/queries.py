"""What mteb scored each query with: rows, in a small parquet file whose bytes depend on nothing but the rows."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

if TYPE_CHECKING:
    from datasets import Dataset
    from mteb.abstasks.abstask import AbsTask

TOP = 5  # pages of a ranking that are kept
NAMES_BATCH = 64  # pages whose names are read at once; where a corpus is filtered, their images are copied
SCHEMA = pa.schema(
    [
        ("benchmark", pa.string()),
        ("task", pa.string()),
        ("subset", pa.string()),  # mteb's: a language, or "default"
        ("query_id", pa.string()),
        ("ndcg_at_5", pa.float64()),
        ("ndcg_at_10", pa.float64()),
        ("recall_at_100", pa.float64()),
        ("rank", pa.int32()),  # of the first relevant page, from 1; null if mteb's 1,000 best have none
        ("top_pages", pa.list_(pa.string())),  # ids, best first
        ("right_score", pa.float64()),  # MaxSim of the best relevant page among those 1,000; null if there is none
        ("wrong_score", pa.float64()),  # ... of the best other page
        ("query", pa.string()),  # its words; null in results of older versions, as is the next
        ("top_names", pa.list_(pa.string())),  # of `top_pages` in the corpus, see `read_page_names`; null without one
    ]
)
KEY = ("benchmark", "task", "subset", "query_id")
NAMES = {"ndcg_at_5": "ndcg_cut_5", "ndcg_at_10": "ndcg_cut_10", "recall_at_100": "recall_100"}  # trec_eval's


def keep(task: AbsTask, rows: list[dict[str, Any]]) -> AbsTask:
    """A copy of a retrieval task that adds a row to `rows` for each query it scores, without its benchmark."""
    kept: Any = copy.copy(task)  # mteb keeps one object for each task
    own = kept.task_specific_scores

    def with_rows(scores: Any, qrels: Any, results: Any, hf_split: str, hf_subset: str) -> dict[str, float]:
        """mteb calls this with each query's scores, which it then averages and drops."""
        data = kept.dataset[hf_subset][hf_split]
        names = read_page_names(data["corpus"])
        words = dict(zip(data["queries"]["id"], data["queries"]["text"], strict=True))
        for query, found in scores.items():
            rows.append(
                {"task": task.metadata.name, "subset": hf_subset, "query_id": query}
                | {metric: round(found[name], 6) for metric, name in NAMES.items()}
                | (ranking := _ranking(results[query], qrels[query]))
                | {"query": words[query], "top_names": [names.get(page) for page in ranking["top_pages"]]}
            )
        return own(scores, qrels, results, hf_split=hf_split, hf_subset=hf_subset)

    kept.task_specific_scores = with_rows
    return kept


def read_page_names(corpus: Dataset) -> dict[str, str]:
    """Read the file names that a corpus holds beside its images, by page id; names of several pages are left out."""
    if "image" not in corpus.column_names:
        return {}
    names: dict[str, str] = {}
    for batch in corpus.select_columns(["id", "image"]).with_format("arrow").iter(NAMES_BATCH):
        if not pa.types.is_struct(batch["image"].type):
            return {}
        names |= zip(batch["id"].to_pylist(), pc.struct_field(batch["image"], "path").to_pylist(), strict=True)
    uses = Counter(names.values())
    return {page: name for page, name in names.items() if name and uses[name] == 1}


def _ranking(found: Mapping[str, float], judged: Mapping[str, int]) -> dict[str, Any]:
    # Of equal scores the higher id goes first, as in trec_eval.
    order = sorted(found, key=lambda page: (found[page], page), reverse=True)
    right = [judged.get(page, 0) > 0 for page in order]
    scores = [round(float(found[page]), 6) for page in order]
    return {
        "rank": right.index(True) + 1 if True in right else None,
        "top_pages": order[:TOP],
        "right_score": scores[right.index(True)] if True in right else None,
        "wrong_score": scores[right.index(False)] if False in right else None,
    }


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """The rows in the order of `KEY`; what a row lacks is null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ordered = sorted(rows, key=lambda row: [row.get(key) or "" for key in KEY])
    pq.write_table(pa.Table.from_pylist(ordered, schema=SCHEMA), path, compression="zstd")
