"""Find and read the evaluation that a report is on, and summarize its queries for people."""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import mteb
from mteb.abstasks.abstask import AbsTask

from colintern.analysis.score_tables import list_published_scores
from colintern.analysis.significance import ScoreComparison, ScorePair, compare_scores
from colintern.core.errors import UserError
from colintern.data.benchmarks import resolve_benchmarks
from colintern.evaluation.results import (
    UNRECORDED,
    QueryResult,
    RunInfo,
    Scores,
    aggregate_scores,
    read_query_results,
    shorten_task_name,
)
from colintern.params import FULL_SIZE, Params
from colintern.reporting.plots import Bar
from colintern.scoring.metrics import MAIN_METRIC

EVALUATION_FOLDERS = ("results/mteb_evaluation", "results/evaluate/*", "results/evaluate/*/pool*-dim*")
SETTINGS = (*"attention dtype eval_batch_size max_query_tokens max_visual_tokens threads tiling".split(), *FULL_SIZE)
RANK_RANGES = {"1": 1, "2 to 5": 5, "6 to 10": 10, "11 to 100": 100, "101 to 1,000": 1000}  # name -> last rank


class Evaluation(NamedTuple):
    """An evaluation as a report needs it."""

    run: RunInfo
    pairs: list[tuple[str, AbsTask]]  # (label of a benchmark, task)
    scores: Scores
    queries: list[QueryResult]
    before: list[QueryResult]  # training; empty where that is not known
    mteb_version: str


def find_evaluation(revision: str, given: Path | None, settings: dict[str, object] | None = None) -> Path:
    """Find the folder of the evaluation of the model with this revision, made with these settings.

    Raises:
        UserError: `given` holds none or that of another model, or none is found.
    """
    settings = settings or {}
    revisions = read_revisions(settings, given)
    if given and given not in revisions:
        raise UserError(
            f"--results: {given} holds no run.json; give an evaluation's folder, such as {EVALUATION_FOLDERS[0]}"
        )
    for folder, found in revisions.items():
        if found == revision:
            return folder
    under = f" with {', '.join(f'{key} {value}' for key, value in settings.items())}" if settings else ""
    others = f"none of {', '.join(EVALUATION_FOLDERS)} is of it{under}"
    raise UserError(
        f"MODEL: its revision is {revision}, and {f'{given} is of revision {revisions[given]}' if given else others}; "
        f"evaluate it: dvc repro eval, or colintern evaluate MODEL"
    )


def read_revisions(settings: dict[str, object], given: Path | None = None) -> dict[Path, str]:
    """Return the model's revision of each evaluation with these settings, by its folder; of `given` alone, if given."""
    folders = [given] if given else [path for pattern in EVALUATION_FOLDERS for path in sorted(Path().glob(pattern))]
    revisions = {}
    for folder in folders:
        if (folder / "run.json").is_file():
            run = _read_run(folder)
            if settings.items() <= (FULL_SIZE | UNRECORDED | run["params"]).items():
                revisions[folder] = run["revision"]
    return revisions


def _read_run(folder: Path) -> RunInfo:
    return json.loads((folder / "run.json").read_text())


def get_embedding_size(run: RunInfo) -> dict[str, object]:
    """Return the settings of `FULL_SIZE` that a run.json is of."""
    return {key: run["params"].get(key, full) for key, full in FULL_SIZE.items()}


def apply_evaluated_settings(params: Params, folder: Path) -> Params:
    """Return `params` with the settings of the evaluation in `folder`."""
    evaluated = FULL_SIZE | UNRECORDED | _read_run(folder)["params"]
    settings = {key: evaluated[key] for key in SETTINGS if key in evaluated}
    return replace(params, benchmarks=tuple(evaluated["benchmarks"]), **settings)


def read_evaluation(params: Params, folder: Path) -> Evaluation:
    """Read everything in the folder; `params` are those of `apply_evaluated_settings`."""
    run = _read_run(folder)
    pairs = resolve_benchmarks(params.benchmarks)
    results = {}
    for _, task in pairs:
        name, data = task.metadata.name, task.metadata.dataset["revision"]
        if run["data"].get(name) != data:
            raise UserError(
                f"{folder}: {name} was evaluated on data {run['data'].get(name)}, here it is {data}; dvc repro eval"
            )
        results[name] = _read_task_result(folder, run["revision"], name)
    if not (queries_file := folder / "queries" / "trained.parquet").is_file():
        raise UserError(f"{queries_file}: missing; evaluate the model again: dvc repro -f eval")
    queries = read_query_results(queries_file)
    if all(query.right_score is None and query.wrong_score is None for query in queries):
        raise UserError(f"{folder}: its queries have no right_score, so it is of an older version; dvc repro -f eval")
    untrained = folder / "queries" / "untrained.parquet"
    before = read_query_results(untrained) if untrained.is_file() else []
    version = next(iter(results.values())).mteb_version or "unknown"
    return Evaluation(run, pairs, aggregate_scores(pairs, results, run["size"]), queries, before, version)


def _read_task_result(folder: Path, revision: str, task: str) -> mteb.TaskResult:
    for path in (folder / "results").glob(f"*/{revision}/{task}.json"):
        if not path.parts[-3].endswith(("-untrained", "-hybrid")):
            return mteb.TaskResult.from_disk(path)
    raise UserError(f"{folder}: has no result of {task} for revision {revision}; dvc repro -f eval")


def compute_intervals(queries: Iterable[QueryResult]) -> list[ScoreComparison]:
    """Compute NDCG@5 of each task and benchmark with its 95 % interval, by comparison with scores of 0."""
    key = MAIN_METRIC.key
    return compare_scores(
        ScorePair(query.benchmark, query.task, query.subset, 0.0, query.scores[key]) for query in queries
    )


def list_bars(evaluation: Evaluation) -> list[Bar]:
    """Return the rows of `compute_intervals` x100, with those before training and what others have published."""
    before = {(row.name, row.benchmark): 100 * row.after for row in compute_intervals(evaluation.before)}
    return [
        Bar(
            row.name if row.benchmark else shorten_task_name(row.name),
            100 * row.after,
            100 * row.low,
            100 * row.high,
            before.get((row.name, row.benchmark)),
            list_published_scores(row.name),
        )
        for row in compute_intervals(evaluation.queries)
    ]


def count_ranks(queries: list[QueryResult]) -> list[tuple[str, int]]:
    """Count the queries whose first right page has a rank in each range."""
    counts, first = [], 1
    for name, last in RANK_RANGES.items():
        counts.append((name, sum(first <= (query.rank or 0) <= last for query in queries)))
        first = last + 1
    return [*counts, ("further back", sum(query.rank is None for query in queries))]


def compute_margin(query: QueryResult) -> float:
    """Compute the score of the right page less that of the best wrong one; -inf where the right one was not found."""
    if query.right_score is None:
        return float("-inf")
    return 0.0 if query.wrong_score is None else query.right_score - query.wrong_score


def select_worst_queries(queries: Iterable[QueryResult]) -> list[QueryResult]:
    """Select the queries with NDCG@5 below 1, lowest first, equal ones by their margin; one of two benchmarks once."""
    key = MAIN_METRIC.key
    failed = {query.identity: query for query in queries if query.scores[key] < 1}
    return sorted(
        failed.values(), key=lambda query: (query.scores[key], compute_margin(query), query.task, query.query_id)
    )
