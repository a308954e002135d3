"""What a study found: its trials as a table, the best settings as JSON, and one HTML file with Optuna's plots."""

import base64
import io
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import optuna
from matplotlib.axes import Axes
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial

from colintern.core.errors import UserError
from colintern.core.terminal import TERMINAL_COLUMNS
from colintern.reporting import html
from colintern.scoring.metrics import DEV_KEY, DEV_TITLE
from colintern.storage.files import format_json
from colintern.tuning.search_space import SearchSpace
from colintern.tuning.trials import CAUSE, EXPERIMENT, NUM_COMPUTED, SLOT, get_experiment_name

BEST_PARAMS_FILE = Path("optuna_best_params.json")  # the guide's name
STATES = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running", "WAITING": "waiting"}
MIN_TRIALS_FOR_IMPORTANCE = 4
PLOT_SIZE = (5.4, 3.3)  # inches
WIDE_PLOT, WIDE_PLOT_SIZE = "Settings and score", (11.0, 3.6)


class EveryTrialFailedError(UserError):
    """No trial of the study is complete. The process exits with 4."""

    exit_code = 4


class TrialRow(NamedTuple):
    """One trial of a study.

    `score` is its dev NDCG@5, the last one reported if it was stopped; `second` the value of the second objective;
    `scores` those after each evaluation; `num_computed` the page features that it computed; None where unknown.
    """

    number: int
    name: str
    state: str
    score: float | None
    second: float | None
    scores: list[float]
    values: dict[str, Any]
    num_computed: int | None
    is_retry: bool


class StudyResults(NamedTuple):
    """What a study found.

    `complete` has the best trial first, of equals the earlier one. With two objectives `front` has the complete trials
    that no other one dominates, the smallest first. `importance` is the share of the score's variance that each key
    explains, the highest first; {} with fewer than four complete trials, or if all have one score.
    """

    study: optuna.Study
    space: SearchSpace
    rows: list[TrialRow]
    complete: list[TrialRow]
    front: list[TrialRow]
    importance: dict[str, float]


def collect_results(study: optuna.Study, space: SearchSpace) -> StudyResults:
    """Collect the trials of a study, the best of them, and the importance of the searched keys."""
    trials = study.get_trials(deepcopy=False)
    rows = [_make_row(study, trial) for trial in trials if trial.params or trial.state.name != "FAIL"]
    complete = sorted((row for row in rows if row.state == "complete"), key=lambda row: (-(row.score or 0), row.number))
    front = []
    if space.second_objective and complete:
        numbers = {trial.number for trial in study.best_trials}
        front = sorted((row for row in rows if row.number in numbers), key=lambda row: (row.second or 0, row.number))
    return StudyResults(study, space, rows, complete, front, _compute_importance(study, space, complete))


def _make_row(study: optuna.Study, trial: FrozenTrial) -> TrialRow:
    scores = [value for _, value in sorted(trial.intermediate_values.items())]
    score, second = [*(trial.values or []), None, None][:2]
    if score is None and scores and trial.state.name == "PRUNED":
        score = scores[-1]
    return TrialRow(
        trial.number,
        trial.user_attrs.get(EXPERIMENT) or get_experiment_name(study, trial.number),
        STATES[trial.state.name],
        score,
        second,
        scores,
        dict(trial.params),
        trial.user_attrs.get(NUM_COMPUTED),
        trial.user_attrs.get(SLOT, trial.number) != trial.number,
    )


def _compute_importance(study: optuna.Study, space: SearchSpace, complete: list[TrialRow]) -> dict[str, float]:
    """Compute importances by functional ANOVA (Hutter et al. 2014)."""
    if len(complete) < MIN_TRIALS_FOR_IMPORTANCE or len({row.score for row in complete}) == 1:
        return {}
    evaluator = FanovaImportanceEvaluator(seed=space.settings["seed"] % 2**32)
    importances = get_param_importances(study, evaluator=evaluator, params=[*space.distributions], target=_get_score)
    return dict(sorted(importances.items(), key=lambda pair: (-pair[1], pair[0])))


def _get_score(trial: FrozenTrial) -> float:
    return trial.values[0]


def require_complete_trial(results: StudyResults) -> None:
    """Check that trials which failed were not all there are.

    Raises:
        EveryTrialFailedError: None is complete; the most common cause is in the message.
    """
    causes = Counter(
        trial.user_attrs.get(CAUSE, "its worker was killed")
        for trial in results.study.get_trials(deepcopy=False)
        if trial.state.name == "FAIL" and trial.params
    )
    if not causes or results.complete:
        return
    [(cause, count)] = causes.most_common(1)
    raise EveryTrialFailedError(
        f"no trial of {results.study.study_name!r} is complete; {count} of {causes.total()} failed with:\n  {cause}\n"
        "params.yaml is unchanged; the output of each trial is in logs/tune/"
    )


def format_trial_table(results: StudyResults) -> list[str]:
    """Format the trials as lines of at most 80 columns, the best first; keys that do not fit are named below them."""
    rows, second_objective = results.rows, results.space.second_objective
    keys = list(results.importance or results.space.distributions)
    rest = sorted((row for row in rows if row.state != "complete"), key=lambda row: (row.state, row.number))
    ranked = [*results.complete, *rest]
    columns = [
        ["trial", *(f"{r.number:03}{' again' * r.is_retry}{' *' * (r in results.front)}" for r in ranked)],
        [DEV_TITLE, *("" if row.score is None else f"{row.score:.4f}" for row in ranked)],
        ["state", *(row.state for row in ranked)],
        ["computed", *("" if row.num_computed is None else f"{row.num_computed:,}" for row in ranked)],
    ]
    if second_objective:
        columns.insert(2, [second_objective, *("" if r.second is None else f"{r.second:,.0f}" for r in ranked)])
    hidden = []
    for key in keys:
        column = [key, *(format_value(row.values.get(key)) for row in ranked)]
        if sum(max(map(len, cells)) + 2 for cells in [*columns, column]) - 2 > TERMINAL_COLUMNS:
            hidden.append(key)
        else:
            columns.append(column)
    padded = [[cell.rjust(max(map(len, cells))) for cell in cells] for cells in columns]
    padded[0] = [cell.ljust(max(map(len, columns[0]))) for cell in columns[0]]
    lines = ["  ".join(cells).rstrip() for cells in zip(*padded, strict=True)]
    if results.front:
        lines.append("* on the front: no trial is better in one of both and as good in the other")
    if hidden:
        lines.append(f"not shown: {', '.join(hidden)}; they are in the HTML file")
    return lines


def format_value(value: object) -> str:
    """Format the value of a key, "" for None."""
    return f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)


def write_study_report(results: StudyResults, folder: Path) -> list[Path]:
    """Write optuna_best_params.json and FOLDER/STUDY.html, and return their paths; the same study gives the same bytes.

    With two objectives the JSON holds the front. It is not written where no trial is complete.
    """
    page = folder / f"{results.study.study_name}.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(_render_page(results), encoding="utf-8")
    if not results.complete:
        return [page]
    second_objective = results.space.second_objective
    if second_objective:
        chosen: dict[str, object] = {
            "front": [_summarize_trial(row) | {second_objective: row.second} for row in results.front]
        }
    else:
        chosen = _summarize_trial(results.complete[0])
    content = {
        "study": results.study.study_name,
        **chosen,
        "trials": dict(Counter(row.state for row in results.rows)),
        "importance": {key: round(value, 4) for key, value in results.importance.items()},
        "settings": results.space.settings,
    }
    BEST_PARAMS_FILE.write_text(format_json(content), encoding="utf-8")
    return [BEST_PARAMS_FILE, page]


def _summarize_trial(row: TrialRow) -> dict[str, object]:
    return {"experiment": row.name, DEV_KEY: row.score, "params": row.values}


def _draw_plots(results: StudyResults) -> dict[str, str]:
    """Draw Optuna's plots of a study, and return {title: SVG as a data URI}."""
    from optuna.visualization import matplotlib as optuna_plots  # here: it imports pyplot

    study, keys = results.study, [*results.space.distributions]
    second_objective = results.space.second_objective
    # Optuna knows the direction, and draws the best score so far, only where no target is given.
    target: Any = {"target_name": DEV_TITLE} | ({"target": _get_score} if second_objective else {})
    plots: dict[str, Callable[[], Axes]] = {}
    if results.front:
        names = [DEV_TITLE, second_objective.replace("_", " ")]
        plots["Front"] = lambda: optuna_plots.plot_pareto_front(study, target_names=names)
    if results.complete:
        plots["History"] = lambda: optuna_plots.plot_optimization_history(study, **target)
    if any(len(row.scores) > 1 for row in results.rows):
        plots["In training"] = lambda: optuna_plots.plot_intermediate_values(study)
    if results.importance:
        evaluator = FanovaImportanceEvaluator(seed=results.space.settings["seed"] % 2**32)
        plots["Importance"] = lambda: optuna_plots.plot_param_importances(
            study, evaluator=evaluator, params=keys, **target
        )
    if results.complete:
        plots[WIDE_PLOT] = lambda: optuna_plots.plot_parallel_coordinate(study, params=keys, **target)
    return {title: _draw_svg(plot, title) for title, plot in plots.items()}


def _draw_svg(plot: Callable[[], Axes], title: str) -> str:
    with matplotlib.rc_context({"backend": "agg", "svg.hashsalt": title, "svg.fonttype": "none"}):
        figure: Any = plot().figure
        for side in ("left", "center"):
            figure.axes[0].set_title("", loc=side)  # the page has a heading
        figure.set_size_inches(WIDE_PLOT_SIZE if title == WIDE_PLOT else PLOT_SIZE)
        svg = io.BytesIO()
        figure.savefig(svg, format="svg", bbox_inches="tight", metadata={"Date": None})
        matplotlib.pyplot.close(figure)
    return "data:image/svg+xml;base64," + base64.b64encode(svg.getvalue()).decode()


def _render_page(results: StudyResults) -> str:
    return html.render_html(
        "study.html",
        [],
        name=results.study.study_name,
        best=results.complete[0] if results.complete else None,
        against=results.space.second_objective,
        front=results.front,
        counts=Counter(row.state for row in results.rows),
        plots=_draw_plots(results),
        importance=results.importance,
        rows=[*results.complete, *(row for row in results.rows if row.state != "complete")],
        keys=[*results.space.distributions],
        space=json.dumps(results.space.describe_distributions()),
        settings=results.space.settings,
        format_value=format_value,
    )
