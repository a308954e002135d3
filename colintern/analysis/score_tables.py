"""Show scores as tables for people, beside what the guide asks for and what others have published."""

import re
from typing import Any, NamedTuple

from colintern.data.formats import PSEUDO_QUERIES_LABEL
from colintern.evaluation.results import BM25, HYBRID, Means, Scores, shorten_task_name
from colintern.scoring.metrics import MAIN_METRIC, RANKING_METRICS

# The guide's bands of NDCG@5, lower bound first. It says nothing of 0.30 to 0.50 and of more than 0.85: the first is
# called fair here, the second excellent.
BANDS = ((0.70, "excellent"), (0.50, "good"), (0.30, "fair"), (0.10, "poor"), (0.0, "broken"))
BANDED_NAME = re.compile(r"ViDoRe\(v(1|2|1&v2)\)|Vidore2?[A-Z]\w*")  # benchmarks and tasks that the guide knew
NO_BAND, FAVOURED = "no band", "favoured"
TARGETS = {  # the guide's, NDCG@5
    "VidoreArxivQARetrieval": (0.60, 0.75),
    "VidoreDocVQARetrieval": (0.65, 0.80),
    "VidoreInfoVQARetrieval": (0.55, 0.70),
    "VidoreTatdqaRetrieval": (0.50, 0.65),
}
LANGUAGE_NAMES = {
    "deu": "German", "eng": "English", "fra": "French", "ita": "Italian", "por": "Portuguese", "spa": "Spanish"
}  # fmt: skip


class PublishedScores(NamedTuple):
    """NDCG@5 x100, recomputed in August 2026 from mteb's public results; a task's data may be of another revision."""

    model: str
    v1: float
    v2: float
    v2_english: float
    arxiv: float
    docvqa: float
    infovqa: float
    tatdqa: float


PUBLISHED = (
    PublishedScores("colSmol-256M", 79.7, 34.8, 50.0, 72.9, 56.6, 84.2, 76.6),
    PublishedScores("colSmol-500M", 82.5, 42.9, 52.1, 74.9, 58.0, 87.2, 77.5),
    PublishedScores("colpali-v1.3", 84.8, 54.7, 56.1, 83.3, 58.4, 85.5, 70.8),
    PublishedScores("VultronRetrieverFlash-0.8B", 88.2, 60.4, 60.7, 88.6, 62.2, 92.2, 77.9),
    PublishedScores("llama-nemoretriever-colembed-1b", 90.5, 63.0, 66.4, 87.6, 64.5, 93.6, 79.8),
    PublishedScores("colqwen2.5-v0.2", 89.5, 60.1, 61.5, 88.9, 63.6, 92.5, 82.1),
    PublishedScores("Argus-Colqwen3.5-9b (best)", 92.7, 69.3, 70.7, 92.3, 68.1, 94.3, 85.5),
)
PUBLISHED_COLUMNS = ("v1", "v2 all", "v2 en", "Arxiv", "DocVQA", "Info", "TatDQA")


class PublishedV3Scores(NamedTuple):
    """NDCG@10 x100 on ViDoRe v3, the mean of its public tasks; source and date as of `PublishedScores`."""

    model: str
    all_languages: float
    english: float


V3_NAME, NUM_V3_TASKS, V3_METRIC = "ViDoRe(v3)", 8, RANKING_METRICS[1]  # mteb's name, public tasks and main metric
PUBLISHED_V3 = (  # best first; models of text read the same pages as Markdown, in ViDoRe v3.1
    PublishedV3Scores("webAI-ColVec1.1-8b", 65.3, 65.9),
    PublishedV3Scores("VultronRetrieverPrime-8B", 64.7, 65.5),
    PublishedV3Scores("VultronRetrieverCore-4.5B", 63.7, 64.8),
    PublishedV3Scores("nemotron-colembed-8b-v2", 63.5, 64.4),
    PublishedV3Scores("colqwen3.5-4.5B-v3", 61.6, 63.1),
    PublishedV3Scores("colnomic-7b", 57.6, 59.4),
    PublishedV3Scores("jina-v4", 57.0, 58.8),
    PublishedV3Scores("VultronRetrieverFlash-0.8B", 56.5, 58.3),
    PublishedV3Scores("llama-nemoretriever-colembed-1b", 55.5, 58.8),
    PublishedV3Scores("Qwen3-VL-Embedding-2B (one vector)", 52.9, 56.0),
    PublishedV3Scores("colqwen2.5-v0.2", 52.4, 55.6),
    PublishedV3Scores("embeddinggemma-300m (text)", 47.8, 50.1),
    PublishedV3Scores("colpali-v1.3", 43.0, 47.5),
    PublishedV3Scores("colmodernvbert", 26.1, 44.3),
    PublishedV3Scores("BM25s (text)", 25.9, 39.0),
    PublishedV3Scores("colSmol-256M", 20.7, 39.3),
)


def classify_ndcg(benchmark: str, ndcg: float) -> str:
    """Return the guide's band of an NDCG@5 from 0 to 1 on ViDoRe v1 or v2, `NO_BAND` on a later one, "" on others."""
    if BANDED_NAME.fullmatch(benchmark):
        return next(band for low, band in BANDS if ndcg >= low)
    return NO_BAND if benchmark.startswith(("ViDoRe", "Vidore")) else ""


def compare_with_target(task: str, ndcg: float) -> str:
    """Compare a task's NDCG@5 with the guide's target for it; "" if it has none."""
    if task not in TARGETS:
        return ""
    low, high = TARGETS[task]
    position = "below" if ndcg < low else "above" if ndcg > high else "within"
    return f"{position} {100 * low:.0f}-{100 * high:.0f}"


def list_published_scores(name: str) -> list[float]:
    """Return NDCG@5 x100 of the published models for a benchmark or task, in the order of PUBLISHED; or nothing."""
    names = dict(zip(("ViDoRe(v1)", "ViDoRe(v2)", "", *TARGETS), PublishedScores._fields[1:], strict=True))
    return [getattr(row, names[name]) for row in PUBLISHED] if name and name in names else []


def select_published_columns(scores: Scores) -> list[float | None]:
    """Return a run's NDCG@5 under each of `PUBLISHED_COLUMNS`, None where it has none."""
    tasks = {name: values for benchmark in scores.values() for name, values in benchmark["tasks"].items()}
    v2 = scores.get("ViDoRe(v2)", {})
    english = v2.get("languages", {}).get("eng", {})
    columns = [scores.get("ViDoRe(v1)", {}), v2, english, *(tasks.get(name, {}) for name in TARGETS)]
    return [values.get(MAIN_METRIC.key) for values in columns]


def format_score_table(by_model: dict[str, Scores]) -> str:
    """Format the scores x100 as text of at most 80 columns: each benchmark's tasks, then its means, for each model.

    The last column is the guide's band for a mean, and its target for a task, both of NDCG@5, and says where the
    pages have no text for a baseline, or where the queries are made from it.
    """
    header = "".join(f"{metric.column:>{len(metric.column) + 1}}" for metric in RANKING_METRICS)
    lines = [f"{'x100':<34}{'model':<10}{header} verdict"]
    for benchmark, trained in by_model["trained"].items():
        for model, scores in by_model.items():
            lines += _format_model_rows(benchmark, model, scores.get(benchmark, {}), trained)
    scores = by_model["trained"]
    return "\n".join([*lines, *_format_notes(by_model), *_format_published(scores), *_format_published_v3(scores)])


def _format_model_rows(benchmark: str, model: str, means: dict[str, Any], trained: dict[str, Any]) -> list[str]:
    is_judged = model == "trained"
    favoured = FAVOURED if model in (BM25, HYBRID) and PSEUDO_QUERIES_LABEL in benchmark else ""
    lines = []
    for task in trained["tasks"]:
        values = means.get("tasks", {}).get(task)
        if values is None:
            lines.append(f"{f'  {shorten_task_name(task)}'[:33]:<34}{model[:9]:<10} no text on its pages")
            continue
        verdict = compare_with_target(task, values[MAIN_METRIC.key]) if is_judged else favoured
        lines.append(_format_row(f"  {shorten_task_name(task)}", model, values, verdict))
    label = "all languages" if "languages" in means else f"mean of {len(means.get('tasks', ()))}"
    languages = means.get("languages", {}).items()
    rows = {label: means} | {LANGUAGE_NAMES.get(code, code): values for code, values in languages} if means else {}
    for name, values in rows.items():
        verdict = classify_ndcg(benchmark, values[MAIN_METRIC.key]) if is_judged else favoured
        lines.append(_format_row(f"{benchmark}, {name}", model, values, verdict))
    return lines


def _format_row(name: str, model: str, values: Means, verdict: str) -> str:
    numbers = "".join(f"{100 * values[metric.key]:>{len(metric.column) + 1}.1f}" for metric in RANKING_METRICS)
    return f"{name[:33]:<34}{model[:9]:<10}{numbers} {verdict}".rstrip()


def _format_notes(by_model: dict[str, Scores]) -> list[str]:
    """Explain the rows of baselines, where there are any."""
    notes = [f"{model[:9]}: {model}" for model in by_model if len(model) > 9]
    if any(PSEUDO_QUERIES_LABEL in benchmark for benchmark in by_model.get(BM25, {})):
        notes.append(f"{FAVOURED}: a program made the queries from the text that {BM25} searches")
    for task, values in {
        task: v for means in by_model.get(BM25, {}).values() for task, v in means["tasks"].items()
    }.items():
        if values["pages_with_text"] < values["pages"]:
            notes.append(
                f"{shorten_task_name(task)}: {values['pages_with_text']:,} of {values['pages']:,} pages have text"
            )
    return ["", *notes] if notes else []


def _format_published(scores: Scores) -> list[str]:
    """Format this run's NDCG@5 under those of published models, where it has one of their columns; else nothing."""
    own = select_published_columns(scores)
    if not any(value is not None for value in own):
        return []
    width = max(len(row.model) for row in PUBLISHED)
    lines = ["", f"{'NDCG@5 x100, published':<{width}}" + "".join(f"{name:>7}" for name in PUBLISHED_COLUMNS)]
    for row in PUBLISHED:
        lines.append(f"{row.model:<{width}}" + "".join(f"{value:>7.1f}" for value in row[1:]))
    cells = ("" if value is None else f"{100 * value:.1f}" for value in own)
    return [*lines, (f"{'this run':<{width}}" + "".join(f"{cell:>7}" for cell in cells)).rstrip()]


def _format_published_v3(scores: Scores) -> list[str]:
    """Format the published models on ViDoRe v3 with this run at its place; nothing where it lacks one of the tasks."""
    means = scores.get(V3_NAME, {"tasks": {}})
    if len(means["tasks"]) != NUM_V3_TASKS:
        return []
    values = (round(100 * group[V3_METRIC.key], 1) for group in (means, means["languages"]["eng"]))
    run = PublishedV3Scores("this run", *values)
    width = max(len(row.model) for row in PUBLISHED_V3)
    lines = [
        "",
        f"{f'ViDoRe v3, {V3_METRIC.title} x100, published':<{width}}" + "".join(f"{name:>7}" for name in ("all", "en")),
    ]
    for row in sorted((run, *PUBLISHED_V3), key=lambda row: -row.all_languages):
        lines.append(f"{row.model:<{width}}" + "".join(f"{value:>7.1f}" for value in row[1:]))
    columns = ([row.all_languages for row in PUBLISHED_V3], [row.english for row in PUBLISHED_V3])
    places = [1 + sum(value > own for value in column) for column, own in zip(columns, run[1:], strict=True)]
    number = len(PUBLISHED_V3) + 1
    return [*lines, f"this run has place {places[0]} of {number} over all languages, {places[1]} in English"]
