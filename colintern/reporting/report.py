"""The report on one model: what an evaluation, its training and its files say, in the order a reader asks."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from colintern.analysis.verdicts import COLUMNS, PUBLISHED, band, columns, target
from colintern.evaluation.scores import METRICS, short
from colintern.evaluation.subjects import Subject
from colintern.monitoring.health import HEALTH, RULES
from colintern.reporting import plots
from colintern.reporting.cases import Case
from colintern.reporting.evaluated import FULL, Evaluation, bars, intervals, margin, ranks, size
from colintern.reporting.html import render
from colintern.statistics.dataset_stats import load_dataset_stats, summarize_stats
from colintern.storage.identity import content_hash, read_identity, versions
from colintern.storage.manifest import MANIFEST, SURVEY

GOOD = "learned"


def report(model: Path, subject: Subject, found: Evaluation, cases: list[Case], passed: int) -> str:
    """The HTML of the report, see `failures` for the last two; the same inputs give the same bytes."""
    rows = intervals(found.rows)
    failed = len({(row["task"], row["subset"], row["query_id"]) for row in found.rows if row["ndcg_at_5"] < 1})
    return render(
        "report.html",
        cases,
        title=f"{model.resolve().name} {subject.revision[:8]}",
        headline=_headline(found),
        smaller=None if size(found.run) == FULL else size(found.run),
        training=_training(model),
        bars=Markup(plots.bars(bars(found), "NDCG@5 by task")),
        has_before=bool(found.before),
        intervals=rows,
        table=_table(found),
        published=_published(found),
        scores=_score_plots(found),
        ranks=ranks(found.rows),
        queries=len(found.rows),
        failed=failed,
        passed=passed,
        data=_data(model, found.run["params"]["max_visual_tokens"]),
        settings=sorted(found.run["params"].items()),
        environment=_environment(model, subject, found),
    )


def _headline(found: Evaluation) -> list[dict[str, Any]]:
    """A benchmark each: its score, the interval, the score before training, the guide's word."""
    before = {row.name: row.after for row in intervals(found.before)} if found.before else {}
    known = {row.name: row for row in intervals(found.rows)}
    made = []
    for name, scores in found.scores.items():
        tasks = list(scores["tasks"])
        row = known[name] if len(tasks) > 1 else known[tasks[0]]
        first = [one["rank"] == 1 for one in found.rows if one["benchmark"] == name]
        made.append(
            {
                "name": name,
                "score": 100 * scores["ndcg_at_5"],
                "low": 100 * row.low,
                "high": 100 * row.high,
                "before": 100 * before[row.name] if row.name in before else None,
                "band": band(name, scores["ndcg_at_5"]),
                "first": sum(first) / len(first),
                "queries": len(first),
            }
        )
    return made


def _table(found: Evaluation) -> list[dict[str, Any]]:
    made = []
    for name, scores in found.scores.items():
        every = {name: scores} | {f"{name}, {key}": value for key, value in scores.get("languages", {}).items()}
        for label, values in every.items():
            verdict = band(name, values["ndcg_at_5"])
            if len(scores["tasks"]) == 1 and label == name:
                continue  # its one task says the same
            made.append({"name": label, "mean": True, "values": [100 * values[m] for m in METRICS], "verdict": verdict})
        for task, values in scores["tasks"].items():
            verdict = target(task, values["ndcg_at_5"])
            numbers = [100 * values[m] for m in METRICS]
            made.append({"name": short(task), "mean": False, "values": numbers, "verdict": verdict})
    return made


def _published(found: Evaluation) -> dict[str, Any] | None:
    own = columns(found.scores)
    if all(value is None for value in own):
        return None
    rows = [(row.model, list(row[1:])) for row in PUBLISHED]
    return {
        "columns": COLUMNS,
        "rows": rows,
        "own": [None if value is None else 100 * value for value in own],
    }


def _score_plots(found: Evaluation) -> list[dict[str, Any]]:
    made = []
    for name in found.scores:
        rows = [row for row in found.rows if row["benchmark"] == name and row["right_score"] is not None]
        both = [row for row in rows if row["wrong_score"] is not None]
        if both:
            right, wrong = [row["right_score"] for row in both], [row["wrong_score"] for row in both]
            made.append(
                {
                    "name": name,
                    "scores": Markup(plots.two_histograms(right, wrong, f"{name}: right page and best wrong page")),
                    "margins": Markup(plots.margins([margin(row) for row in both], f"{name}: margins")),
                    "left_out": sum(row["benchmark"] == name for row in found.rows) - len(both),
                }
            )
    return made


def _training(model: Path) -> dict[str, Any] | None:
    """Return the curves of the adapter's trainer_state.json and the findings of its health.json."""
    file = model / "trainer_state.json"
    if not file.is_file():
        return None
    state = json.loads(file.read_text())
    log = state["log_history"]
    loss = [(row["step"], row["loss"]) for row in log if "loss" in row]
    dev = [(row["step"], row["eval_ndcg_at_5"]) for row in log if "eval_ndcg_at_5" in row]
    health = json.loads((model / HEALTH).read_text()) if (model / HEALTH).is_file() else {}
    return {
        "loss": Markup(plots.curve(loss, "Training loss")) if loss else "",
        "dev": Markup(plots.curve(dev, "NDCG@5 on the dev set", marked=True)) if dev else "",
        "steps": state["global_step"],
        "epochs": state["num_train_epochs"],
        "verdict": health.get("verdict", ""),
        "good": health.get("verdict") == GOOD,
        "rules": [
            (name, health["values"][name], words, health["wrong"].get(name, ""))
            for name, (words, _) in RULES.items()
            if name in health.get("values", {})
        ],
    }


def _data(model: Path, max_visual_tokens: int) -> dict[str, Any] | None:
    """Return the data in numbers, if data/survey.json is of the data that the model was trained on."""
    identity = read_identity(model)
    if not Path(SURVEY).is_file() or not Path(MANIFEST).is_file():
        return None
    if identity.get("deps", {}).get(MANIFEST) != content_hash(Path(MANIFEST)):
        return None
    sets = summarize_stats(load_dataset_stats(max_visual_tokens))
    keys = [key for key in next(iter(sets.values()), {}) if not key.startswith("languages")]
    languages: dict[str, Any] = {name: values.get("languages, guessed", {}) for name, values in sets.items()}
    return {"keys": keys, "sets": sets, "languages": languages}


def _environment(model: Path, subject: Subject, found: Evaluation) -> Sequence[tuple[str, str]]:
    identity = read_identity(model)
    base = identity.get("base", {})
    rows = [("model", str(model)), ("revision (sha256 of its weights)", subject.revision)]
    if base:
        rows.append(("base", f"{base.get('folder', '')} {base.get('revision', '')}".strip()))
        files = base.get("files", {}).items()
        rows += [(f"base {name}", file["sha256"]) for name, file in files if name.endswith(".safetensors")]
    rows += [(f"data of {task}", revision) for task, revision in sorted(found.run["data"].items())]
    if "versions" in identity:
        rows.append(("trained with", _listed(identity["versions"])))
    rows.append(("evaluated with", f"mteb {found.mteb_version}"))
    other = {name: number for name, number in versions().items() if identity.get("versions", {}).get(name) != number}
    return [*rows, ("heatmaps made with", _listed(other) if other else "the same")]


def _listed(numbers: dict[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in sorted(numbers.items()))
