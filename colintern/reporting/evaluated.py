"""The evaluation a report is on: found by the model it was made of, read, and put in numbers for people."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import mteb
import pyarrow.parquet as pq
from mteb.abstasks.abstask import AbsTask

from colintern.analysis.comparison import Row, compare
from colintern.analysis.verdicts import PUBLISHED, TARGETS
from colintern.core.errors import UserError
from colintern.data.benchmarks import resolve_benchmarks
from colintern.evaluation.scores import Scores, collect, short
from colintern.params import Params
from colintern.reporting.plots import Bar

PLACES = ("results/mteb_evaluation", "results/evaluate/*", "results/evaluate/*/pool*-dim*")
SETTINGS = (
    "attention",
    "dim",
    "dtype",
    "eval_batch_size",
    "max_query_tokens",
    "max_visual_tokens",
    "pool_factor",
    "threads",
)
FULL = {"pool_factor": 1, "dim": 128}  # the embeddings as they are; see encoding/pooling.py


class Evaluation(NamedTuple):
    """`rows`: of each query, see `evaluation.queries`; `before`: those before training, empty where there are none."""

    folder: Path
    run: dict[str, Any]
    pairs: list[tuple[str, AbsTask]]
    scores: Scores
    rows: list[dict[str, Any]]
    before: list[dict[str, Any]]
    mteb_version: str


def find(revision: str, given: Path | None, wanted: dict[str, Any] | None = None) -> Path:
    """The folder of the evaluation of the model with this revision; `wanted`: under these settings.

    Raises:
        UserError: `given` holds none or that of another model, or none is found.
    """
    runs = {path: json.loads((path / "run.json").read_text()) for path in _candidates(given)}
    found = {path: run["revision"] for path, run in runs.items() if _has(run, wanted or {})}
    if given and given not in found:
        raise UserError(f"--results: {given} holds no run.json; give an evaluation's folder, such as {PLACES[0]}")
    for path, of in found.items():
        if of == revision:
            return path
    under = f" with {', '.join(f'{key} {value}' for key, value in wanted.items())}" if wanted else ""
    where = f"{given} is of revision {found[given]}" if given else f"none of {', '.join(PLACES)} is of it{under}"
    raise UserError(
        f"MODEL: its revision is {revision}, and {where}; evaluate it: dvc repro eval, or colintern evaluate MODEL"
    )


def _has(run: dict[str, Any], wanted: dict[str, Any]) -> bool:
    return all((FULL | run["params"]).get(key) == value for key, value in wanted.items())


def size(run: dict[str, Any]) -> dict[str, int]:
    """The size of embeddings that a run.json is of."""
    return {key: run["params"].get(key, plain) for key, plain in FULL.items()}


def _candidates(given: Path | None) -> list[Path]:
    folders = [given] if given else [path for place in PLACES for path in sorted(Path().glob(place))]
    return [path for path in folders if (path / "run.json").is_file()]


def as_evaluated(params: Params, folder: Path) -> Params:
    """`params` with the settings of the evaluation in `folder`."""
    run = json.loads((folder / "run.json").read_text())
    settings = {key: run["params"][key] for key in SETTINGS if key in run["params"]}
    return replace(params, benchmarks=tuple(run["params"]["benchmarks"]), **settings)


def evaluation(params: Params, folder: Path) -> Evaluation:
    """Everything in the folder; `params` as `as_evaluated` gives them.

    Raises:
        UserError: the data has changed since, or the results are of an older version.
    """
    run = json.loads((folder / "run.json").read_text())
    pairs = resolve_benchmarks(params.benchmarks)
    for _, task in pairs:
        name, now = task.metadata.name, task.metadata.dataset["revision"]
        if run["data"].get(name) != now:
            raise UserError(
                f"{folder}: {name} was evaluated on data {run['data'].get(name)}, here it is {now}; dvc repro eval"
            )
    results = {task.metadata.name: _result(folder, run["revision"], task.metadata.name) for _, task in pairs}
    rows = _queries(folder / "queries" / "trained.parquet")
    if "right_score" not in rows[0]:
        raise UserError(f"{folder}: its queries have no right_score, so it is of an older version; dvc repro -f eval")
    before = folder / "queries" / "untrained.parquet"
    version = next(iter(results.values())).mteb_version or "unknown"
    return Evaluation(
        folder,
        run,
        pairs,
        collect(pairs, results, run["size"]),
        rows,
        _queries(before) if before.is_file() else [],
        version,
    )


def _result(folder: Path, revision: str, task: str) -> mteb.TaskResult:
    for path in (folder / "results").glob(f"*/{revision}/{task}.json"):
        if not path.parts[-3].endswith("-untrained"):
            return mteb.TaskResult.from_disk(path)
    raise UserError(f"{folder}: has no result of {task} for revision {revision}; dvc repro -f eval")


def _queries(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise UserError(f"{path}: missing; evaluate the model again: dvc repro -f eval")
    return pq.ParquetFile(path).read(use_threads=False).to_pylist()  # not read_table: evaluation/outcomes.py


def intervals(rows: list[dict[str, Any]]) -> list[Row]:
    """NDCG@5 of each task and benchmark with its 95 % interval: the comparison with a model that finds nothing."""
    return compare(row | {"before": 0.0, "after": row["ndcg_at_5"]} for row in rows)


def bars(found: Evaluation) -> list[Bar]:
    """The rows of `intervals` x100, with the same before training and what others have published for the same."""
    before = {(row.name, row.benchmark): row.after for row in intervals(found.before)} if found.before else {}
    made = []
    for row in intervals(found.rows):
        low = before.get((row.name, row.benchmark))
        made.append(
            Bar(
                row.name if row.benchmark else short(row.name),
                100 * row.after,
                100 * row.low,
                100 * row.high,
                None if low is None else 100 * low,
                published(row.name),
            )
        )
    return made


def published(name: str) -> list[float]:
    """NDCG@5 x100 of the published models for a benchmark or task, in the order of PUBLISHED; or nothing."""
    columns = {"ViDoRe(v1)": "v1", "ViDoRe(v2)": "v2"} | dict(
        zip(TARGETS, ("arxiv", "docvqa", "infovqa", "tatdqa"), strict=True)
    )
    return [getattr(row, columns[name]) for row in PUBLISHED] if name in columns else []


def ranks(rows: list[dict[str, Any]]) -> list[tuple[str, int]]:
    """How many queries have their first right page at which rank."""
    bands = (("1", 1, 1), ("2 to 5", 2, 5), ("6 to 10", 6, 10), ("11 to 100", 11, 100), ("101 to 1,000", 101, 1000))
    counted = [(name, sum(low <= (row["rank"] or 0) <= high for row in rows)) for name, low, high in bands]
    return [*counted, ("further back", sum(row["rank"] is None for row in rows))]


def margin(row: dict[str, Any]) -> float:
    """Score of the right page less that of the best wrong one; -inf where the right one was not found."""
    if row["right_score"] is None:
        return float("-inf")
    return row["right_score"] - (row["wrong_score"] if row["wrong_score"] is not None else row["right_score"])


def worst(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The queries by their NDCG@5, lowest first, equal ones by their margin; none that was answered in full."""
    failed = {(row["task"], row["subset"], row["query_id"]): row for row in rows if row["ndcg_at_5"] < 1}
    return sorted(failed.values(), key=lambda row: (row["ndcg_at_5"], margin(row), row["task"], row["query_id"]))
