"""Runs mteb's retrieval tasks on a model, or takes the results of those that a run like this one has finished.

mteb does the retrieval and the metrics. What is ours is to leave no clock in its files, so that two runs of the same
thing leave the same bytes, and to keep each finished task below `.scratch`, in a folder named by the fingerprint of all
that decides its scores: a run that was killed, or that has one task more, runs the rest.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mteb
import pyarrow.parquet as pq
from mteb.abstasks.abstask import AbsTask

from colintern.core.project import root
from colintern.data.benchmarks import resolve_benchmarks, use_fetched_data
from colintern.evaluation import queries
from colintern.evaluation.mteb_encoder import ColIntern3_5Encoder
from colintern.evaluation.scores import Scores, checked, collect, size
from colintern.evaluation.subjects import Subject
from colintern.modeling.host import settle
from colintern.params import Params
from colintern.storage.files import dumps
from colintern.storage.identity import fingerprint
from colintern.storage.lock import locked

CLOCK = ("evaluation_time", "date", "evaluation_phases", "kg_co2_emissions")  # of mteb's result files; all may be null
TIMING_FILE = "logs/eval-timing.json"  # not an out of any stage
KEPT = 20  # models whose finished tasks are kept; the least recently evaluated go first
QUERIES, SIZE = "queries.parquet", "size.json"


def evaluate(subjects: Mapping[str, Subject], params: Params, out: Path) -> dict[str, Scores]:
    """Evaluate models on every task of `params.benchmarks`.

    Args:
        subjects: "trained" and, if wanted, "untrained".
        out: replaced by a folder with mteb's files, results/<organisation>__<model>/<revision>/<task>.json, what each
            query scored, queries/<trained or untrained>.parquet, and run.json, the settings; whole or not at all.

    Returns:
        {"trained": scores, "untrained": scores}, see `scores.collect`.

    Raises:
        UserError: see `resolve_benchmarks` and `Subject.encoder`.
        RuntimeError: a task has a score that is not a number.
    """
    pairs = resolve_benchmarks(params.benchmarks)
    settle(params.threads)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    scores, sizes = {}, {}
    for name, subject in subjects.items():
        folders = finished(subject, params, [task for _, task in pairs])
        results = {task: _result(folder, subject, task) for task, folder in folders.items()}
        sizes = {task: json.loads((folder / SIZE).read_text()) for task, folder in folders.items()}
        scores[name] = collect(pairs, results, sizes)
        _gather(partial, name, pairs, folders)
    trained = subjects["trained"]
    data = {task.metadata.name: task.metadata.dataset["revision"] for _, task in pairs}
    folders_by_task = {task.metadata.name: getattr(task, "documents", "") for _, task in pairs}
    documents = {task: folder for task, folder in folders_by_task.items() if folder}  # of the pages' files
    settings = trained.params | trained.identity["params"] | {"benchmarks": list(params.benchmarks)}
    run = {"revision": trained.revision, "params": settings, "data": data, "size": sizes, "folders": documents}
    (partial / "run.json").write_text(dumps(run))
    shutil.rmtree(out, ignore_errors=True)
    partial.replace(out)
    return scores


def finished(subject: Subject, params: Params, tasks: list[AbsTask]) -> dict[str, Path]:
    """The folder of each task, by its name, with mteb's files and the queries' results; runs what is not there yet.

    A folder gets its name when all is in it, so what a killed run left half-done is never taken.
    """
    store = root() / ".scratch" / f"eval-{fingerprint(subject.identity)[:16]}"
    encoder = None
    folders = {}
    with locked(store.with_suffix(".lock"), f"{store}: another process evaluates this model; waiting for it"):
        for task in {task.metadata.name: task for task in tasks}.values():
            name = task.metadata.name
            data = {"revision": task.metadata.dataset["revision"], "subsets": list(task.hf_subsets)}
            folders[name] = store / f"{name}-{fingerprint(data)[:16]}"
            if folders[name].is_dir() and _whole(folders[name], subject, name):
                print(f"{subject.name}: {name}: finished before, its results are taken")
                continue
            encoder = encoder or subject.encoder()  # loaded only where there is something to do
            _run(encoder, task, params, folders[name])
        store.touch()
        _forget(store)
    return folders


def _run(encoder: Any, task: AbsTask, params: Params, folder: Path) -> None:
    partial = folder.with_name(folder.name + ".partial")
    for old in (partial, folder):
        shutil.rmtree(old, ignore_errors=True)
    cache = mteb.ResultCache(partial)
    rows: list[dict[str, Any]] = []
    ours = isinstance(encoder, ColIntern3_5Encoder)
    if ours:
        encoder.page_count = encoder.vector_count = 0
    found = mteb.evaluate(
        encoder,
        queries.keep(use_fetched_data(task), rows),
        co2_tracker=False,
        encode_kwargs={"batch_size": params.eval_batch_size, "show_progress_bar": False},
        cache=cache,
        overwrite_strategy="always",
        show_progress_bar=False,
    )
    for result in found.task_results:
        checked(result)
    _move_clock_values(cache.get_task_result_path("any", encoder.mteb_model_meta).parent)
    queries.write(partial / QUERIES, rows)
    taken = size(encoder.vector_count, encoder.page_count, params.dim) if ours else {}  # mteb does not tell a peer's
    (partial / SIZE).write_text(dumps(taken))
    partial.replace(folder)


def _whole(folder: Path, subject: Subject, task: str) -> bool:
    try:
        _result(folder, subject, task)
        json.loads((folder / SIZE).read_text())
        pq.read_table(folder / QUERIES)
    except (OSError, ValueError, KeyError) as error:
        print(f"warning: {folder}: {str(error).partition(chr(10))[0]}; the task is run again")
        return False
    return True


def _result(folder: Path, subject: Subject, task: str) -> mteb.TaskResult:
    place = folder / "results" / subject.name.replace("/", "__") / subject.revision
    return mteb.TaskResult.from_disk(place / f"{task}.json")


def _forget(store: Path) -> None:
    """Delete the results of all but the `KEPT` models that were evaluated last."""
    stores = sorted((p for p in store.parent.glob("eval-*") if p.is_dir()), key=lambda p: p.stat().st_mtime)
    for old in stores[:-KEPT]:
        shutil.rmtree(old)
        old.with_suffix(".lock").unlink(missing_ok=True)


def _gather(out: Path, name: str, pairs: list[tuple[str, AbsTask]], folders: dict[str, Path]) -> None:
    """Copy the files of all tasks into one folder, as mteb would have left them there."""
    rows, settings = [], []
    for benchmark, task in pairs:
        table = pq.read_table(folders[task.metadata.name] / QUERIES)
        rows += [row | {"benchmark": benchmark} for row in table.to_pylist()]
    for folder in folders.values():
        shutil.copytree(folder / "results", out / "results", dirs_exist_ok=True)
        [one] = (folder / "results").rglob("run_settings.jsonl")
        settings += one.read_text().splitlines(keepends=True)
        (out / one.relative_to(folder)).write_text("".join(sorted(settings)))
    queries.write(out / "queries" / f"{name}.parquet", rows)


def _move_clock_values(folder: Path) -> None:
    """Take times, dates and emissions out of mteb's files in `folder` and keep them in the timing file.

    The files stay loadable by mteb, whose schema allows null in these places.
    """
    timings = {}
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if "evaluation_time" in content:  # model_meta.json has no clock values
            timings["/".join(path.with_suffix("").parts[-3:])] = {key: content.get(key) for key in CLOCK}
            content |= dict.fromkeys(CLOCK)
        path.write_text(dumps(content), encoding="utf-8")
    log = root() / TIMING_FILE  # not the copy in which DVC runs a queued experiment: that one is deleted
    known = json.loads(log.read_text(encoding="utf-8")) if log.is_file() else {}
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(dumps(known | timings), encoding="utf-8")
