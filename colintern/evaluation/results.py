"""Results of an evaluation: what each query scored, and the means of tasks, benchmarks and languages.

Per-query results go to a parquet file whose bytes depend on nothing but the rows. The means go to the metric file, to
the plots of DVC and to eval.json.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NotRequired, TypedDict

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from colintern.scoring.metrics import MAIN_METRIC, METRIC_KEYS, RANKING_METRICS, compute_chance

if TYPE_CHECKING:  # ten seconds that `colintern compare` has no use for
    import mteb
    from datasets import Dataset
    from mteb.abstasks.abstask import AbsTask

NUM_TOP_PAGES = 5  # pages of a ranking that are kept
NUM_FUSED_PAGES = 100  # pages of a ranking that are fused with another's, see `write_rankings`
NAME_COLUMN = "image_filename"  # of a corpus without images, see `read_page_names`
NAMES_BATCH_SIZE = 64  # pages whose names are read at once; where a corpus is filtered, their images are copied
SIZE_KEYS = ("vectors_per_page", "bytes_per_page")
# Models beside "trained" and "untrained": BM25 over the text of pages, its fusion with the model, a random ranking.
BM25, HYBRID, CHANCE = "bm25", "hybrid", "chance"
TASK_COLUMNS = ("task", *METRIC_KEYS, *SIZE_KEYS)
BENCHMARK_COLUMNS = ("mean", *METRIC_KEYS)
QUERY_KEY = ("benchmark", "task", "subset", "query_id")
QUERY_SCHEMA = pa.schema(
    [
        *((key, pa.string()) for key in QUERY_KEY),
        *((key, pa.float64()) for key in METRIC_KEYS),
        ("rank", pa.int32()),
        ("top_pages", pa.list_(pa.string())),
        ("right_score", pa.float64()),
        ("wrong_score", pa.float64()),
        ("query", pa.string()),
        ("top_names", pa.list_(pa.string())),
    ]
)

UNRECORDED: dict[str, Any] = {
    "pool_factor": 1,
    "dim": 128,
    "tiling": "exact",
}  # of evaluations from before these keys

RANKING_SCHEMA = pa.schema(
    [("subset", pa.string()), ("query_id", pa.string()), ("pages", pa.list_(pa.dictionary(pa.int32(), pa.string())))]
)

Means = dict[str, float]
Scores = dict[str, dict[str, Any]]  # see `aggregate_scores`
Rankings = dict[tuple[str, str], list[str]]  # (subset, query id) -> ids of pages, best first


class RunInfo(TypedDict):
    """The run.json of an evaluation."""

    revision: str  # of the trained model
    params: dict[str, Any]  # of training and evaluation
    data: dict[str, str]  # revision of each task
    size: dict[str, Means]  # of each task, see `compute_page_size`
    folders: NotRequired[dict[str, str]]  # of the pages' files, for tasks made from documents
    text: NotRequired[dict[str, dict[str, int]]]  # of each task, where a model reads text: see `TextCoverage`


class QueryResult(NamedTuple):
    """What a query scored."""

    benchmark: str  # its label, "" while its task is evaluated
    task: str
    subset: str  # mteb's: a language, or "default"
    query_id: str
    scores: Means  # value of each ranking metric
    rank: int | None  # of the first relevant page, from 1; None if mteb's 1,000 best have none
    top_pages: list[str]  # ids, best first
    right_score: float | None = None  # MaxSim of the best relevant page among those 1,000; None if there is none
    wrong_score: float | None = None  # ... of the best other page
    query: str | None = None  # its words; None in results of older versions, as is the next
    top_names: list[str | None] | None = None  # of `top_pages` in the corpus, see `read_page_names`

    @property
    def identity(self) -> tuple[str, str, str]:
        """Return (task, subset, query id): the same query may be in several benchmarks."""
        return self.task, self.subset, self.query_id


def write_query_results(path: Path, results: Iterable[QueryResult]) -> None:
    """Write the results in the order of `QUERY_KEY`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [result._asdict() | result.scores for result in sorted(results, key=lambda result: result[: len(QUERY_KEY)])]
    pq.write_table(pa.Table.from_pylist(rows, schema=QUERY_SCHEMA), path, compression="zstd")


def read_query_results(source: Path | bytes) -> list[QueryResult]:
    """Read a file that `write_query_results` wrote, or one of an older version, which has fewer columns.

    Raises:
        ValueError: it is no parquet file, or lacks a column that every version writes.
    """
    # Not `read_table`: a thread of its scanner that is there when Python ends aborts the process
    # (apache/arrow#34314); of such a short one, one in seven on busy cores.
    file = pq.ParquetFile(pa.BufferReader(source) if isinstance(source, bytes) else source)
    if missing := {*QUERY_KEY, *METRIC_KEYS, "rank", "top_pages"} - {*file.schema_arrow.names}:
        raise ValueError(f"columns {', '.join(sorted(missing))} are missing")
    return [
        QueryResult(
            scores={key: row[key] for key in METRIC_KEYS},
            **{key: row[key] for key in QueryResult._fields if key in row},
        )
        for row in file.read(use_threads=False).to_pylist()
    ]


def write_rankings(path: Path, rankings: Rankings) -> None:
    """Write the best pages of each query."""
    rows = [{"subset": key[0], "query_id": key[1], "pages": pages} for key, pages in sorted(rankings.items())]
    pq.write_table(pa.Table.from_pylist(rows, schema=RANKING_SCHEMA), path, compression="zstd")


def read_rankings(path: Path) -> Rankings:
    """Read a file that `write_rankings` wrote."""
    rows = pq.ParquetFile(path).read(use_threads=False).to_pylist()
    return {(row["subset"], row["query_id"]): row["pages"] for row in rows}


class QueryRecords(NamedTuple):
    """What `record_per_query` records of a task."""

    results: list[QueryResult]  # without their benchmark
    rankings: Rankings  # the `NUM_FUSED_PAGES` best pages
    chance: dict[str, Means]  # mean of `compute_chance` over the queries of each subset


def record_per_query(task: AbsTask, records: QueryRecords) -> AbsTask:
    """Copy a retrieval task so that it records each query that mteb scores."""
    copied: Any = copy.copy(task)  # mteb keeps one object for each task
    task_specific_scores = copied.task_specific_scores

    def record_scores(
        scores: Mapping[str, Means],
        qrels: Mapping[str, Mapping[str, int]],
        rankings: Mapping[str, Means],
        hf_split: str,
        hf_subset: str,
    ) -> Means:
        """Record each query's scores, which mteb then averages and drops."""
        data = copied.dataset[hf_subset][hf_split]
        names = read_page_names(data["corpus"])
        words = dict(zip(data["queries"]["id"], data["queries"]["text"], strict=True))
        chances: list[Means] = []
        for query_id, values in scores.items():
            page_scores = rankings[query_id]
            # Of equal scores the higher id goes first, as in trec_eval.
            order = sorted(page_scores, key=lambda page: (page_scores[page], page), reverse=True)
            best: dict[bool, int] = {}  # whether it is relevant -> position of the first such page
            for position, page in enumerate(order):
                best.setdefault(qrels[query_id].get(page, 0) > 0, position)
            best_scores = {is_right: round(float(page_scores[order[i]]), 6) for is_right, i in best.items()}
            records.rankings[hf_subset, query_id] = order[:NUM_FUSED_PAGES]
            gains = [gain for gain in qrels[query_id].values() if gain > 0]
            chances.append(compute_chance(gains, len(data["corpus"])))
            records.results.append(
                QueryResult(
                    benchmark="",
                    task=task.metadata.name,
                    subset=hf_subset,
                    query_id=query_id,
                    scores={metric.key: round(values[metric.trec_name], 6) for metric in RANKING_METRICS},
                    rank=best[True] + 1 if True in best else None,
                    top_pages=order[:NUM_TOP_PAGES],
                    right_score=best_scores.get(True),
                    wrong_score=best_scores.get(False),
                    query=words[query_id],
                    top_names=[names.get(page) for page in order[:NUM_TOP_PAGES]],
                )
            )
        records.chance[hf_subset] = average_metrics(chances)
        return task_specific_scores(scores, qrels, rankings, hf_split=hf_split, hf_subset=hf_subset)

    copied.task_specific_scores = record_scores
    return copied


def read_page_names(corpus: Dataset) -> dict[str, str]:
    """Read the file names that a corpus holds beside its images, by page id; names of several pages are left out."""
    if NAME_COLUMN in corpus.column_names:
        return dict(zip(corpus["id"], corpus[NAME_COLUMN], strict=True))
    if "image" not in corpus.column_names:
        return {}
    names: dict[str, str] = {}
    for batch in corpus.select_columns(["id", "image"]).with_format("arrow").iter(NAMES_BATCH_SIZE):
        if not pa.types.is_struct(batch["image"].type):
            return {}
        names |= zip(batch["id"].to_pylist(), pc.struct_field(batch["image"], "path").to_pylist(), strict=True)
    uses = Counter(names.values())
    return {page: name for page, name in names.items() if name and uses[name] == 1}


def compute_page_size(num_vectors: int, num_pages: int, bytes_per_vector: int) -> Means:
    """Compute what a page takes on average."""
    num_bytes = num_vectors * bytes_per_vector
    return {"vectors_per_page": round(num_vectors / num_pages, 2), "bytes_per_page": round(num_bytes / num_pages)}


def aggregate_scores(
    pairs: Iterable[tuple[str, AbsTask]], results: Mapping[str, mteb.TaskResult], sizes: Mapping[str, Means]
) -> Scores:
    """Average the scores of the tasks of each benchmark.

    Args:
        pairs: (label of a benchmark, task), see `resolve_benchmarks`.
        results: mteb's results by the task's name.
        sizes: of `compute_page_size`, by the task's name, put beside the task's scores, their mean beside the
            benchmark's; empty where it is not known.

    Returns:
        {benchmark: {metric: mean over its tasks, "tasks": {task: {metric: score}}}}, each 0 to 1 and rounded to 6
        digits. A task's score is mteb's: the mean over its splits and language subsets. Where a task has several
        languages, it has "languages": {ISO 639-3 code: {metric: score}}, and its benchmark the means over those tasks
        that have the language (so ViDoRe v2's English is of 4 tasks, its French of 3).
    """
    by_benchmark: dict[str, dict[str, dict[str, Means]]] = {}
    for benchmark, task in pairs:
        by_benchmark.setdefault(benchmark, {})[task.metadata.name] = _average_by_language(results[task.metadata.name])
    return {benchmark: _aggregate_benchmark(tasks, sizes) for benchmark, tasks in by_benchmark.items()}


def require_valid_scores(result: mteb.TaskResult) -> None:
    """Raise RuntimeError where a score is not a number from 0 to 1."""
    for metric, score in _average_by_language(result)[""].items():
        if not 0 <= score <= 1:
            raise RuntimeError(f"{result.task_name}: {metric} is {score}")


def _average_by_language(result: mteb.TaskResult) -> dict[str, Means]:
    """Average the scores of each language; the mean of all is under ""."""
    entries = [entry for split in result.scores.values() for entry in split]
    codes = [{code.partition("-")[0] for code in entry["languages"]} for entry in entries]
    groups = {"": entries} | {
        language: [entry for entry, spoken in zip(entries, codes, strict=True) if language in spoken]
        for language in sorted(set().union(*codes))
    }
    return {language: average_metrics(group) for language, group in groups.items()}


def _aggregate_benchmark(tasks: dict[str, dict[str, Means]], sizes: Mapping[str, Means]) -> dict[str, object]:
    languages = sorted({language for task in tasks.values() for language in task if language})
    scores: dict[str, object] = {**round_metrics(average_metrics([task[""] for task in tasks.values()]))}
    if len(languages) > 1:
        scores["languages"] = {
            language: round_metrics(average_metrics([task[language] for task in tasks.values() if language in task]))
            for language in languages
        }
    for key in SIZE_KEYS:
        if all(key in sizes[name] for name in tasks):
            scores[key] = round(sum(sizes[name][key] for name in tasks) / len(tasks), 2)
    scores["tasks"] = {name: _round_task(means) | sizes[name] for name, means in tasks.items()}
    return scores


def _round_task(by_language: dict[str, Means]) -> dict[str, object]:
    languages = {language: round_metrics(means) for language, means in by_language.items() if language}
    return round_metrics(by_language[""]) | ({"languages": languages} if len(languages) > 1 else {})


def average_metrics(rows: Sequence[Mapping[str, float]]) -> Means:
    """Compute the mean of each metric."""
    return {metric: sum(float(row[metric]) for row in rows) / len(rows) for metric in METRIC_KEYS}


def round_metrics(means: Means) -> Means:
    """Round each metric as files hold it."""
    return {metric: round(value, 6) for metric, value in means.items()}


def shorten_task_name(task: str) -> str:
    """Shorten for tables: VidoreDocVQARetrieval is DocVQA, tasks of ViDoRe v2 keep their Vidore2."""
    return re.sub(r"^Vidore(?=\D)|Retrieval$", "", task)


def replace_by_chance(result: mteb.TaskResult, chance: Mapping[str, Means]) -> mteb.TaskResult:
    """Return a task's result with the scores of a random ranking, given for each subset."""
    scores = {
        split: [{**entry, **chance[entry["hf_subset"]]} for entry in entries]
        for split, entries in result.scores.items()
    }
    return result.model_copy(update={"scores": scores})


def merge_means(by_model: Mapping[str, Scores]) -> Scores:
    """Return what eval.json holds: the trained model's scores and, under each other model's name, its means."""
    others = {model: scores for model, scores in by_model.items() if model != "trained"}
    return {
        benchmark: scores
        | {model: _select_metrics(other[benchmark]) for model, other in others.items() if benchmark in other}
        for benchmark, scores in by_model["trained"].items()
    }


def summarize_scores(by_model: Mapping[str, Scores]) -> dict[str, object]:
    """Return the content of metrics/eval.json: the mean of each metric over all tasks, and each task's scores.

    Of BM25 and the hybrid only the mean NDCG@5 is among them, if the pages of all tasks have text.

    The tasks are a list, which DVC leaves out of its tables: as keys, they would add columns to `dvc metrics show` and
    `dvc exp show`. A task that is in several benchmarks counts once.
    """
    tasks = _list_tasks(by_model["trained"])
    means = round_metrics(average_metrics([values for _, values in tasks.values()]))
    for model in (BM25, HYBRID):
        others = _list_tasks(by_model.get(model, {}))
        if others.keys() == tasks.keys():
            mean = average_metrics([values for _, values in others.values()])
            means[f"{model}_{MAIN_METRIC.key}"] = round_metrics(mean)[MAIN_METRIC.key]
    return means | {
        "tasks": [{"task": task, "benchmark": name} | _select_metrics(values) for task, (name, values) in tasks.items()]
    }


def _list_tasks(scores: Scores) -> dict[str, tuple[str, Means]]:
    return {task: (name, values) for name, means in scores.items() for task, values in means["tasks"].items()}


def _select_metrics(means: Means) -> Means:
    return {metric: means[metric] for metric in METRIC_KEYS}


def list_task_rows(trained: Scores) -> list[dict[str, object]]:
    """Return one row with `TASK_COLUMNS` for each task of the trained model, for plots."""
    return [
        {"task": shorten_task_name(task)} | {key: values[key] for key in TASK_COLUMNS[1:]}
        for scores in trained.values()
        for task, values in scores["tasks"].items()
    ]


def list_benchmark_rows(by_model: dict[str, Scores]) -> list[dict[str, object]]:
    """Return one row for each benchmark and model, for plots: the benchmark's mean, labelled with both."""
    return [
        {"mean": f"{benchmark}, {model}"} | {key: scores[benchmark][key] for key in METRIC_KEYS}
        for benchmark in next(iter(by_model.values()))
        for model, scores in by_model.items()
        if benchmark in scores
    ]
