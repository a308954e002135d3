"""What a study found: the best settings as JSON, all trials as a table, and one HTML file with plots."""

import json
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from colintern.core.errors import UserError
from colintern.reporting import html
from colintern.storage.files import dumps
from colintern.tuning import plots
from colintern.tuning.space import Search
from colintern.tuning.trials import CAUSE, COMPUTED, EXPERIMENT, SLOT

BEST = Path("optuna_best_params.json")  # the guide's name
WIDTH = 80
STATES = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running", "WAITING": "waiting"}


class EveryTrialFailed(UserError):
    """No trial of the study came to an end. The process exits with 4."""

    exit_code = 4


class Row(NamedTuple):
    """A trial: `score` is its dev NDCG@5, the last one reported where it was stopped, None where there is none;
    `second` is what that is weighed against, see `Search.against`."""

    number: int
    name: str
    state: str
    score: float | None
    second: float | None
    curve: list[float]
    values: dict[str, Any]
    computed: int | None
    again: bool


def rows(study: Any) -> list[Row]:
    """All trials, by number; without those whose worker died before they had settings."""
    found = []
    for trial in study.get_trials(deepcopy=False):
        if not trial.params and trial.state.name == "FAIL":
            continue
        curve = [value for _, value in sorted(trial.intermediate_values.items())]
        done = trial.state.name in ("COMPLETE", "PRUNED")
        name = trial.user_attrs.get(EXPERIMENT) or f"{study.study_name}-{trial.number:03}"
        again = trial.user_attrs.get(SLOT, trial.number) != trial.number
        values, computed = dict(trial.params), trial.user_attrs.get(COMPUTED)
        score, second = [*(trial.values or []), None, None][:2]
        score = curve[-1] if done and curve and score is None else score
        found.append(Row(trial.number, name, STATES[trial.state.name], score, second, curve, values, computed, again))
    return found


def complete(found: list[Row]) -> list[Row]:
    """The trials that ran to their end, the best first; of equals the earlier one."""
    return sorted((row for row in found if row.state == "complete"), key=lambda row: (-(row.score or 0.0), row.number))


def front(found: list[Row]) -> list[Row]:
    """Of two objectives: the complete trials that none beats in one without being beaten by it in the other, the
    smallest first."""
    done = [row for row in found if row.state == "complete" and row.second is not None]

    def beaten(row: Row) -> bool:
        points = {(-(one.score or 0.0), one.second or 0.0) for one in done}
        own = (-(row.score or 0.0), row.second or 0.0)
        return any(point != own and point[0] <= own[0] and point[1] <= own[1] for point in points)

    return sorted((row for row in done if not beaten(row)), key=lambda row: (row.second or 0.0, row.number))


def importance(study: Any, search: Search) -> dict[str, float]:
    """How much of the score's variance each key explains (functional ANOVA, Hutter et al. 2014), the most first; {}
    with fewer than four complete trials, or where all score alike."""
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    scores = [row.score for row in complete(rows(study))]
    if len(scores) < 4 or len(set(scores)) == 1:
        return {}
    evaluator = FanovaImportanceEvaluator(seed=search.settings["seed"] % 2**32)
    found = get_param_importances(
        study, target=lambda t: t.values[0], evaluator=evaluator, params=[one.key for one in search.space]
    )
    return dict(sorted(found.items(), key=lambda pair: (-pair[1], pair[0])))


def check(study: Any) -> None:
    """Raises EveryTrialFailed where no trial came to an end, with the cause that most of them had."""
    found = rows(study)
    causes = Counter(
        trial.user_attrs.get(CAUSE, "its worker was killed")
        for trial in study.get_trials(deepcopy=False)
        if trial.state.name == "FAIL" and trial.params
    )
    if not causes or complete(found):
        return
    [(common, count)] = causes.most_common(1)
    words = (
        f"no trial of {study.study_name!r} came to its end; {count} of {sum(causes.values())} failed with:\n  {common}"
    )
    raise EveryTrialFailed(f"{words}\nparams.yaml is as it was; what each trial printed is in logs/tune/")


def write(study: Any, search: Search, folder: Path) -> list[Path]:
    """optuna_best_params.json, which of two objectives holds the front, and STUDY.html; the same study gives the same
    bytes."""
    found, weights = rows(study), importance(study, search)
    page = folder / f"{study.study_name}.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(_page(study.study_name, found, weights, search), encoding="utf-8")
    if not complete(found):
        return [page]
    if search.against:
        chosen: dict[str, Any] = {"front": [_facts(row) | {search.against: row.second} for row in front(found)]}
    else:
        chosen = _facts(complete(found)[0])
    facts = {
        "study": study.study_name,
        **chosen,
        "trials": dict(Counter(row.state for row in found)),
        "importance": {key: round(value, 4) for key, value in weights.items()},
        "settings": search.settings,
    }
    BEST.write_text(dumps(facts), encoding="utf-8")
    return [BEST, page]


def _facts(row: Row) -> dict[str, Any]:
    return {"experiment": row.name, "dev_ndcg_at_5": row.score, "params": row.values}


def table(found: list[Row], weights: dict[str, float], search: Search) -> list[str]:
    """The trials at 80 columns, the best first; keys that do not fit are named below it."""
    keys = [*weights, *(one.key for one in search.space if one.key not in weights)]
    order = {id(row): place for place, row in enumerate(complete(found))}
    ranked = sorted(found, key=lambda row: (order.get(id(row), len(found)), row.state, row.number))
    head = ["trial", "dev NDCG@5", *([search.against] if search.against else []), "state", "computed"]
    on = {row.number for row in front(found)}
    lines = [
        [
            f"{row.number:03}{' again' if row.again else ''}{' *' if row.number in on else ''}",
            "" if row.score is None else f"{row.score:.4f}",
            *(["" if row.second is None else f"{row.second:,.0f}"] if search.against else []),
            row.state,
            "" if row.computed is None else f"{row.computed:,}",
        ]
        for row in ranked
    ]
    shown = []
    for key in keys:
        column = [key, *(text(row.values.get(key)) for row in ranked)]
        wide = [max(map(len, cells)) for cells in zip(head, *lines, strict=True)]
        if sum(wide) + 2 * len(wide) + max(map(len, column)) > WIDTH:
            continue
        shown.append(key)
        head.append(key)
        lines = [[*line, cell] for line, cell in zip(lines, column[1:], strict=True)]
    wide = [max(map(len, cells)) for cells in zip(head, *lines, strict=True)]
    made = [
        "  ".join(
            cell.rjust(size) if place else cell.ljust(size)
            for place, (cell, size) in enumerate(zip(line, wide, strict=True))
        )
        for line in (head, *lines)
    ]
    missing = [key for key in keys if key not in shown]
    below = ["* on the front: no trial is better in one of both and as good in the other"] if on else []
    below += [f"not shown: {', '.join(missing)}; they are in the HTML file"] if missing else []
    return [line.rstrip() for line in made] + below


def text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)


def _page(name: str, found: list[Row], weights: dict[str, float], search: Search) -> str:
    environment = Environment(
        loader=FileSystemLoader([Path(__file__).parent, html.TEMPLATES]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    scored = [row for row in found if row.score is not None]
    best = complete(found)
    return environment.get_template("study.html").render(
        style=Markup((html.TEMPLATES / "style.css").read_text(encoding="utf-8")),
        name=name,
        best=best[0] if best else None,
        against=search.against,
        front=front(found),
        weighed=Markup(plots.front(best, front(found), search.against)) if front(found) else None,
        counts=Counter(row.state for row in found),
        history=Markup(plots.history(scored, not search.against)) if scored else None,
        importance=Markup(plots.importance(weights)) if weights else None,
        parallel=Markup(plots.parallel(scored, search.space)) if scored else None,
        curves=Markup(plots.curves(scored)) if any(len(row.curve) > 1 for row in scored) else None,
        rows=[*best, *(row for row in found if row.state != "complete")],
        keys=[one.key for one in search.space],
        space=json.dumps(search.facts()),
        settings=search.settings,
        text=text,
    )
