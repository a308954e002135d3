"""The scores of an evaluation: of each task, of each benchmark, of each language; the metric file and the plots."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # ten seconds that `colintern compare` has no use for
    import mteb
    from mteb.abstasks.abstask import AbsTask

BYTES = 2  # of a number, as vector stores keep them: float16
METRICS = ("ndcg_at_5", "ndcg_at_10", "recall_at_100")
SIZES = ("vectors_per_page", "bytes_per_page")
TASK_COLUMNS = ("task", *METRICS, *SIZES)
BENCHMARK_COLUMNS = ("mean", *METRICS)

Means = dict[str, float]
Scores = dict[str, dict[str, Any]]


def size(vectors: int, pages: int, dim: int) -> Means:
    """What a page takes on average, its numbers kept as float16."""
    return {"vectors_per_page": round(vectors / pages, 2), "bytes_per_page": round(vectors * dim * BYTES / pages)}


def collect(
    pairs: Iterable[tuple[str, AbsTask]], results: Mapping[str, mteb.TaskResult], sizes: Mapping[str, Means]
) -> Scores:
    """Scores of the tasks of each benchmark, and their means.

    Args:
        pairs: (label of a benchmark, task), see `resolve_benchmarks`.
        results: mteb's results by the task's name.
        sizes: what `size` says, by the task's name; stands beside the task's scores, its mean beside the benchmark's;
            empty where it is not known.

    Returns:
        {benchmark: {metric: mean over its tasks, "tasks": {task: {metric: score}}}}, each 0 to 1 and rounded to 6
        digits. A task's score is mteb's: the mean over its splits and language subsets. Where a task has several
        languages, "languages": {ISO 639-3 code: {metric: score}} stands in it, and in its benchmark the means over
        those tasks that have the language (so ViDoRe v2's English is of 4 tasks, its French of 3).
    """
    by_benchmark: dict[str, dict[str, dict[str, Means]]] = {}
    for benchmark, task in pairs:
        by_benchmark.setdefault(benchmark, {})[task.metadata.name] = _by_language(results[task.metadata.name])
    return {benchmark: _benchmark(tasks, sizes) for benchmark, tasks in by_benchmark.items()}


def checked(result: mteb.TaskResult) -> mteb.TaskResult:
    """Raises RuntimeError where a score is no number from 0 to 1."""
    for metric, score in _by_language(result)[""].items():
        if not 0 <= score <= 1:
            raise RuntimeError(f"{result.task_name}: {metric} is {score}")
    return result


def _by_language(result: mteb.TaskResult) -> dict[str, Means]:
    """Scores by language; that of all is under ""."""
    entries = [entry for split in result.scores.values() for entry in split]
    languages = {code.partition("-")[0] for entry in entries for code in entry["languages"]}
    groups = {"": entries} | {
        language: [e for e in entries if language in {code.partition("-")[0] for code in e["languages"]}]
        for language in sorted(languages)
    }
    return {name: mean(found) for name, found in groups.items()}


def _benchmark(tasks: dict[str, dict[str, Means]], sizes: Mapping[str, Means]) -> dict[str, Any]:
    languages = sorted({language for task in tasks.values() for language in task if language})
    scores: dict[str, Any] = rounded(mean([task[""] for task in tasks.values()]))
    if len(languages) > 1:
        scores["languages"] = {
            language: rounded(mean([task[language] for task in tasks.values() if language in task]))
            for language in languages
        }
    known = [key for key in SIZES if all(key in sizes[name] for name in tasks)]
    scores |= {key: round(sum(sizes[name][key] for name in tasks) / len(tasks), 2) for key in known}
    scores["tasks"] = {name: _task(found) | sizes[name] for name, found in tasks.items()}
    return scores


def _task(found: dict[str, Means]) -> dict[str, Any]:
    several = {language: rounded(means) for language, means in found.items() if language}
    return rounded(found[""]) | ({"languages": several} if len(several) > 1 else {})


def mean(of: list[Any]) -> Means:
    """The mean of each metric."""
    return {metric: sum(float(one[metric]) for one in of) / len(of) for metric in METRICS}


def rounded(means: Means) -> Means:
    return {metric: round(value, 6) for metric, value in means.items()}


def short(task: str) -> str:
    """A task's name for tables: VidoreDocVQARetrieval is DocVQA, those of ViDoRe v2 keep their Vidore2."""
    return re.sub(r"^Vidore(?=\D)|Retrieval$", "", task)


def report(trained: Scores, untrained: Scores | None) -> Scores:
    """What an evaluation's eval.json holds: the trained model's scores and, under "untrained", the means before."""
    if untrained is None:
        return trained
    return {
        name: scores | {"untrained": {metric: untrained[name][metric] for metric in METRICS}}
        for name, scores in trained.items()
    }


def summarize_scores(trained: Scores) -> dict[str, Any]:
    """Return the content of metrics/eval.json: the mean of each metric over all tasks, and each task's scores.

    The tasks are a list, which DVC leaves out of its tables: as keys, they would add columns to `dvc metrics show` and
    `dvc exp show`. A task that is in several benchmarks counts once.
    """
    tasks = {task: (name, found) for name, scores in trained.items() for task, found in scores["tasks"].items()}
    return rounded(mean([found for _, found in tasks.values()])) | {
        "tasks": [
            {"task": task, "benchmark": name} | {metric: found[metric] for metric in METRICS}
            for task, (name, found) in tasks.items()
        ]
    }


def task_rows(trained: Scores) -> list[dict[str, Any]]:
    """Return one row for each task of the trained model, for plots: task, `METRICS` and `SIZES`."""
    return [
        {"task": short(row["task"])} | {key: row[key] for key in TASK_COLUMNS[1:]}
        for scores in trained.values()
        for row in [{"task": task} | found for task, found in scores["tasks"].items()]
    ]


def benchmark_rows(by_model: dict[str, Scores]) -> list[dict[str, Any]]:
    """Return one row for each benchmark and model, for plots: the benchmark's mean, labelled with both."""
    return [
        {"mean": f"{benchmark}, {model}"} | {key: found[key] for key in BENCHMARK_COLUMNS[1:]}
        for benchmark in next(iter(by_model.values()))
        for model, benchmarks in by_model.items()
        for found in [benchmarks[benchmark]]
    ]
