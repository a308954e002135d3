"""Write the report on one model: what an evaluation, its training and its files say, in the order a reader asks."""

import json
from pathlib import Path
from typing import Any

from markupsafe import Markup

from colintern.analysis.score_tables import (
    PUBLISHED,
    PUBLISHED_COLUMNS,
    classify_ndcg,
    compare_with_target,
    select_published_columns,
)
from colintern.evaluation.models import EvalModel
from colintern.evaluation.results import UNRECORDED, Means, shorten_task_name
from colintern.monitoring.health import HEALTH, RULES
from colintern.reporting import plots
from colintern.reporting.evaluation import (
    FULL_SIZE,
    Evaluation,
    compute_intervals,
    compute_margin,
    count_ranks,
    get_embedding_size,
    list_bars,
    select_worst_queries,
)
from colintern.reporting.examples import QueryExample
from colintern.reporting.failures import group_failures, judge_queries
from colintern.reporting.html import render_html
from colintern.scoring.metrics import EVAL_KEY, MAIN_METRIC, METRIC_KEYS, RANKING_METRICS
from colintern.statistics.dataset_stats import load_dataset_stats, summarize_stats
from colintern.storage.identity import content_hash, get_versions, read_identity
from colintern.storage.manifest import MANIFEST, SURVEY

GOOD_VERDICT = "learned"


def render_report(
    folder: Path, model: EvalModel, evaluation: Evaluation, examples: list[QueryExample], num_passed: int
) -> str:
    """Render the HTML, with what `explain_failures` returned; the same inputs give the same bytes."""
    queries = judge_queries([task for _, task in evaluation.pairs], evaluation.queries)
    size = get_embedding_size(evaluation.run)
    return render_html(
        "report.html",
        examples,
        title=f"{folder.resolve().name} {model.revision[:8]}",
        headline=_summarize_benchmarks(evaluation),
        smaller=None if size == FULL_SIZE else ", ".join(f"{key} {value}" for key, value in size.items()),
        training=_read_training(folder),
        metrics=RANKING_METRICS,
        bars=Markup(plots.plot_bars(list_bars(evaluation), f"{MAIN_METRIC.title} by task")),
        has_before=bool(evaluation.before),
        table=_list_score_rows(evaluation),
        published=_list_published(evaluation),
        scores=_plot_scores(evaluation),
        ranks=count_ranks(evaluation.queries),
        queries=len(evaluation.queries),
        groups=group_failures(queries),
        wrong_first=sum(query.is_failed for query in queries),
        failed=len(select_worst_queries(evaluation.queries)),
        passed=num_passed,
        data=_summarize_data(folder, UNRECORDED | evaluation.run["params"]),
        settings=sorted(evaluation.run["params"].items()),
        environment=_list_environment(folder, model, evaluation),
    )


def _summarize_benchmarks(evaluation: Evaluation) -> list[dict[str, object]]:
    """Return for each benchmark its score, the interval, the score before training, the guide's band."""
    before = {row.name: 100 * row.after for row in compute_intervals(evaluation.before)}
    rows = {row.name: row for row in compute_intervals(evaluation.queries)}
    benchmarks = []
    for name, scores in evaluation.scores.items():
        tasks = list(scores["tasks"])
        row = rows[name] if len(tasks) > 1 else rows[tasks[0]]
        is_first = [query.rank == 1 for query in evaluation.queries if query.benchmark == name]
        benchmarks.append(
            {
                "name": name,
                "score": 100 * scores[MAIN_METRIC.key],
                "low": 100 * row.low,
                "high": 100 * row.high,
                "before": before.get(row.name),
                "band": classify_ndcg(name, scores[MAIN_METRIC.key]),
                "first": sum(is_first) / len(is_first),
                "queries": len(is_first),
            }
        )
    return benchmarks


def _list_score_rows(evaluation: Evaluation) -> list[dict[str, object]]:
    rows = []

    def add_row(name: str, values: Means, is_mean: bool, verdict: str) -> None:
        numbers = [100 * values[key] for key in METRIC_KEYS]
        rows.append({"name": name, "mean": is_mean, "values": numbers, "verdict": verdict})

    for name, scores in evaluation.scores.items():
        if len(scores["tasks"]) > 1:  # else its one task says the same
            add_row(name, scores, True, classify_ndcg(name, scores[MAIN_METRIC.key]))
        for language, values in scores.get("languages", {}).items():
            add_row(f"{name}, {language}", values, True, classify_ndcg(name, values[MAIN_METRIC.key]))
        for task, values in scores["tasks"].items():
            add_row(shorten_task_name(task), values, False, compare_with_target(task, values[MAIN_METRIC.key]))
    return rows


def _list_published(evaluation: Evaluation) -> dict[str, object] | None:
    own = [None if value is None else 100 * value for value in select_published_columns(evaluation.scores)]
    if own == [None] * len(own):
        return None
    return {"columns": PUBLISHED_COLUMNS, "rows": [(row.model, row[1:]) for row in PUBLISHED], "own": own}


def _plot_scores(evaluation: Evaluation) -> list[dict[str, object]]:
    sections = []
    for name in evaluation.scores:
        queries = [query for query in evaluation.queries if query.benchmark == name]
        scored = [query for query in queries if query.right_score is not None and query.wrong_score is not None]
        if scored:
            right, wrong = [query.right_score or 0 for query in scored], [query.wrong_score or 0 for query in scored]
            margins = list(map(compute_margin, scored))
            histograms = plots.plot_score_histograms(right, wrong, f"{name}: right page and best wrong page")
            sections.append(
                {
                    "name": name,
                    "scores": Markup(histograms),
                    "margins": Markup(plots.plot_margins(margins, f"{name}: margins")),
                    "left_out": len(queries) - len(scored),
                }
            )
    return sections


def _read_training(folder: Path) -> dict[str, object] | None:
    """Return the curves of the adapter's trainer_state.json and the findings of its health.json."""
    file = folder / "trainer_state.json"
    if not file.is_file():
        return None
    state = json.loads(file.read_text())
    log = state["log_history"]
    loss = [(row["step"], row["loss"]) for row in log if "loss" in row]
    dev = [(row["step"], row[EVAL_KEY]) for row in log if EVAL_KEY in row]
    health = json.loads((folder / HEALTH).read_text()) if (folder / HEALTH).is_file() else {}
    dev_title = f"{MAIN_METRIC.title} on the dev set"
    return {
        "loss": Markup(plots.plot_curve(loss, "Training loss")) if loss else "",
        "dev": Markup(plots.plot_curve(dev, dev_title, is_marked=True)) if dev else "",
        "steps": state["global_step"],
        "epochs": state["num_train_epochs"],
        "verdict": health.get("verdict", ""),
        "good": health.get("verdict") == GOOD_VERDICT,
        "rules": [
            (name, health["values"][name], words, health["wrong"].get(name, ""))
            for name, (words, _) in RULES.items()
            if name in health.get("values", {})
        ],
    }


def _summarize_data(folder: Path, settings: dict[str, Any]) -> dict[str, object] | None:
    """Return the data in numbers, if data/survey.json is of the data that the model was trained on."""
    if not Path(SURVEY).is_file() or not Path(MANIFEST).is_file():
        return None
    if read_identity(folder).get("deps", {}).get(MANIFEST) != content_hash(Path(MANIFEST)):
        return None
    sets = summarize_stats(load_dataset_stats(settings["max_visual_tokens"], settings["tiling"]))
    keys = [key for key in next(iter(sets.values()), {}) if not key.startswith("languages")]
    languages: dict[str, object] = {name: values.get("languages, guessed", {}) for name, values in sets.items()}
    return {"keys": keys, "sets": sets, "languages": languages}


def _list_environment(folder: Path, model: EvalModel, evaluation: Evaluation) -> list[tuple[str, str]]:
    identity = read_identity(folder)
    rows = [("model", str(folder)), ("revision (sha256 of its weights)", model.revision)]
    if base := identity.get("base", {}):
        rows.append(("base", f"{base.get('folder', '')} {base.get('revision', '')}".strip()))
        files = base.get("files", {}).items()
        rows += [(f"base {name}", file["sha256"]) for name, file in files if name.endswith(".safetensors")]
    rows += [(f"data of {task}", revision) for task, revision in sorted(evaluation.run["data"].items())]
    trained_with = identity.get("versions", {})
    if trained_with:
        rows.append(("trained with", _join_versions(trained_with)))
    rows.append(("evaluated with", f"mteb {evaluation.mteb_version}"))
    changed = {name: number for name, number in get_versions().items() if trained_with.get(name) != number}
    return [*rows, ("heatmaps made with", _join_versions(changed) if changed else "the same")]


def _join_versions(numbers: dict[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in sorted(numbers.items()))
