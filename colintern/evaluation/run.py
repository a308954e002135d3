"""Run mteb's retrieval tasks on models, or take the results of those that a run like this one has finished.

mteb does the retrieval and the metrics. What is added: no times are left in its files, so that two runs of the same
thing leave the same bytes, and each finished task is kept below `.scratch`, in a folder named by the fingerprint of all
that decides its scores: a run that was killed, or that has one task more, runs the rest.
"""

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import mteb
from mteb.abstasks.abstask import AbsTask

from colintern.core.errors import UserError
from colintern.core.project import root
from colintern.data.benchmarks import resolve_benchmarks, use_fetched_data
from colintern.encoding.precision import get_bytes_per_vector
from colintern.evaluation.baselines import RankFusion
from colintern.evaluation.models import EvalModel
from colintern.evaluation.mteb_encoder import ColIntern3_5Encoder
from colintern.evaluation.page_text import load_text_task
from colintern.evaluation.results import (
    CHANCE,
    QueryRecords,
    RunInfo,
    Scores,
    aggregate_scores,
    compute_page_size,
    read_query_results,
    read_rankings,
    record_per_query,
    replace_by_chance,
    require_valid_scores,
    write_query_results,
    write_rankings,
)
from colintern.modeling.runtime import configure_cpu_runtime
from colintern.params import Params
from colintern.storage.files import format_json
from colintern.storage.identity import fingerprint
from colintern.storage.lock import hold_lock

logger = logging.getLogger(__name__)
TIME_KEYS = ("evaluation_time", "date", "evaluation_phases", "kg_co2_emissions")  # of mteb's files; all may be null
TIMING_FILE = "logs/eval-timing.json"  # not an out of any stage
MAX_STORED_MODELS = 20  # whose finished tasks are kept; the least recently evaluated are deleted first
QUERIES_FILE, SIZE_FILE, RANKINGS_FILE = "queries.parquet", "size.json", "rankings.parquet"
CHANCE_FILE = "chance.json"
SPEED_FILE = "speed.json"  # apart from the size, because two runs of the same thing leave the same results


def evaluate_models(models: Mapping[str, EvalModel], params: Params, out: Path) -> dict[str, Scores]:
    """Evaluate models, "trained" among them, on every task of `params.benchmarks`.

    `out` is replaced by a folder with mteb's files, results/<organisation>__<model>/<revision>/<task>.json, the results
    of each query, queries/<name in `models`>.parquet, and run.json, the settings; complete or not at all.

    Returns:
        The scores of each model by its name in `models`, and those of a random ranking as "chance", see
        `results.aggregate_scores`. Tasks whose pages have no text are left out of those of models that need it.

    Raises:
        UserError: the trained model needs text, and a task has none; see also `resolve_benchmarks` and
            `EvalModel.load_encoder`.
        RuntimeError: a task has a score that is not a number.
    """
    pairs = resolve_benchmarks(params.benchmarks)
    configure_cpu_runtime(params.threads)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    tasks = {task.metadata.name: task for _, task in pairs}
    scores: dict[str, Scores] = {}
    sizes: dict[str, dict[str, Any]] = {}
    for which, model in models.items():
        folders = run_or_load(model, list(tasks.values()), params.eval_batch_size)
        if which == "trained" and (missing := tasks.keys() - folders.keys()):
            raise UserError(f"MODEL: {model.name} reads text, and the pages of {', '.join(sorted(missing))} have none")
        evaluated = [(label, task) for label, task in pairs if task.metadata.name in folders]
        sizes[which] = _read_json_files(folders, SIZE_FILE)
        results = {name: _read_task_result(folder, model, name) for name, folder in folders.items()}
        scores[which] = aggregate_scores(evaluated, results, sizes[which])
        _copy_results(partial, which, evaluated, folders)
        if which == "trained":
            chances = _read_json_files(folders, CHANCE_FILE)
            results = {name: replace_by_chance(result, chances[name]) for name, result in results.items()}
            chance = aggregate_scores(pairs, results, {name: {} for name in tasks})
    run = _describe_run(models["trained"], params.benchmarks, tasks, sizes["trained"])
    run["text"] = next((sizes[which] for which, model in models.items() if model.reads_text), {})
    (partial / "run.json").write_text(format_json(run))
    shutil.rmtree(out, ignore_errors=True)
    partial.replace(out)
    return scores | {CHANCE: chance}


def _describe_run(
    trained: EvalModel, benchmarks: Sequence[str], tasks: Mapping[str, AbsTask], sizes: dict[str, dict[str, float]]
) -> RunInfo:
    return {
        "revision": trained.revision,
        "params": trained.params | trained.identity["params"] | {"benchmarks": list(benchmarks)},
        "data": {name: task.metadata.dataset["revision"] for name, task in tasks.items()},
        "size": sizes,
        "folders": {name: folder for name, task in tasks.items() if (folder := getattr(task, "documents", ""))},
    }


def run_or_load(model: EvalModel, tasks: Sequence[AbsTask], batch_size: int) -> dict[str, Path]:
    """Return the folder of each task, with mteb's files and the queries' results; run those that are not finished.

    A folder gets its name when all is in it, so what a killed run left half-done is never taken. A task is left out
    if the model needs the text of pages, and none has any.
    """
    store = _get_store(model)
    encoder = None
    folders = {}
    with (
        hold_lock(store.with_suffix(".lock"), f"{store}: another process evaluates this model; waiting for it"),
        ExitStack() as stack,
    ):
        for task in tasks:
            name = task.metadata.name
            folder = store / _get_folder_name(task)
            if folder.is_dir() and _is_readable(folder, model, name):
                logger.info(f"{model.name}: {name}: finished before, its results are taken")
                folders[name] = folder
                continue
            data = use_fetched_data(task)
            coverage: Mapping[str, int] = {}
            if model.reads_text:
                data, counts = load_text_task(data)
                coverage = counts._asdict()
                if not counts.pages_with_text:
                    logger.warning(f"{model.name}: {name}: its pages have no text; left out")
                    continue
            if model.fused:
                parts = [_get_store(part) / _get_folder_name(task) / RANKINGS_FILE for part in model.fused]
                if not all(part.is_file() for part in parts):
                    continue  # one of them was left out
                encoder = RankFusion(model, list(map(read_rankings, parts)))
            if encoder is None:  # loaded only where there is something to do
                encoder = model.load_encoder()
                if isinstance(encoder, ColIntern3_5Encoder):  # a model of mteb has no processes
                    stack.callback(encoder.close)
            _run_task(encoder, data, batch_size, folder, coverage)
            folders[name] = folder
        store.touch()
        _remove_old_stores(store)
    return folders


def read_seconds_per_query(model: EvalModel, benchmarks: Sequence[str]) -> dict[str, float]:
    """Return the mean time of scoring all pages for one query, by benchmark, of tasks that `run_or_load` finished."""
    seconds: dict[str, list[float]] = {}
    for benchmark, task in resolve_benchmarks(benchmarks):
        speed = json.loads((_get_store(model) / _get_folder_name(task) / SPEED_FILE).read_text())
        seconds.setdefault(benchmark, []).append(speed["seconds_per_query"])
    return {benchmark: sum(times) / len(times) for benchmark, times in seconds.items()}


def _get_store(model: EvalModel) -> Path:
    return root() / ".scratch" / f"eval-{fingerprint(model.identity)[:16]}"


def _get_folder_name(task: AbsTask) -> str:
    data = {"revision": task.metadata.dataset["revision"], "subsets": list(task.hf_subsets)}
    return f"{task.metadata.name}-{fingerprint(data)[:16]}"


def _run_task(encoder: Any, task: AbsTask, batch_size: int, folder: Path, coverage: Mapping[str, int]) -> None:
    partial = folder.with_name(folder.name + ".partial")
    for old in (partial, folder):
        shutil.rmtree(old, ignore_errors=True)
    cache = mteb.ResultCache(partial)
    records = QueryRecords([], {}, {})
    is_own = isinstance(encoder, ColIntern3_5Encoder)
    if is_own:
        encoder.reset_counts()
    results = mteb.evaluate(
        encoder,
        record_per_query(task, records),
        co2_tracker=False,
        encode_kwargs={"batch_size": batch_size, "show_progress_bar": False},
        cache=cache,
        overwrite_strategy="always",
        show_progress_bar=False,
    )
    for result in results.task_results:
        require_valid_scores(result)
    _move_times(cache.get_task_result_path("any", encoder.mteb_model_meta).parent)
    write_query_results(partial / QUERIES_FILE, records.results)
    write_rankings(partial / RANKINGS_FILE, records.rankings)
    (partial / CHANCE_FILE).write_text(format_json(records.chance))
    # mteb does not report the size of a baseline's embeddings.
    size: Mapping[str, float] = coverage
    speed = {}
    if is_own:
        bytes_per_vector = get_bytes_per_vector(encoder.precision, encoder.dim)
        size = compute_page_size(encoder.vector_count, encoder.page_count, bytes_per_vector)
        speed = {"seconds_per_query": encoder.scoring_seconds / encoder.query_count}
    (partial / SIZE_FILE).write_text(format_json(size))
    (partial / SPEED_FILE).write_text(format_json(speed))
    partial.replace(folder)


def _read_json_files(folders: Mapping[str, Path], file: str) -> dict[str, Any]:
    """Read a file of each task's folder."""
    return {name: json.loads((folder / file).read_text()) for name, folder in folders.items()}


def _is_readable(folder: Path, model: EvalModel, task: str) -> bool:
    try:
        _read_task_result(folder, model, task)
        _read_json_files({SIZE_FILE: folder}, SIZE_FILE)
        _read_json_files({CHANCE_FILE: folder}, CHANCE_FILE)
        read_query_results(folder / QUERIES_FILE)
        read_rankings(folder / RANKINGS_FILE)
    except (OSError, ValueError, KeyError) as error:
        logger.warning(f"{folder}: {str(error).partition(chr(10))[0]}; the task is run again")
        return False
    return True


def _read_task_result(folder: Path, model: EvalModel, task: str) -> mteb.TaskResult:
    path = folder / "results" / model.name.replace("/", "__") / model.revision / f"{task}.json"
    return mteb.TaskResult.from_disk(path)


def _remove_old_stores(store: Path) -> None:
    """Delete the results of all but the `MAX_STORED_MODELS` models that were evaluated last."""
    stores = sorted((p for p in store.parent.glob("eval-*") if p.is_dir()), key=lambda p: p.stat().st_mtime)
    for old in stores[:-MAX_STORED_MODELS]:
        shutil.rmtree(old)
        old.with_suffix(".lock").unlink(missing_ok=True)


def _copy_results(out: Path, which: str, pairs: list[tuple[str, AbsTask]], folders: dict[str, Path]) -> None:
    """Copy the files of all tasks into one folder, as mteb would have left them there."""
    queries, run_settings = [], []
    for benchmark, task in pairs:
        results = read_query_results(folders[task.metadata.name] / QUERIES_FILE)
        queries += [result._replace(benchmark=benchmark) for result in results]
    for folder in folders.values():
        shutil.copytree(folder / "results", out / "results", dirs_exist_ok=True)
        [settings_file] = (folder / "results").rglob("run_settings.jsonl")
        run_settings += settings_file.read_text().splitlines(keepends=True)
        (out / settings_file.relative_to(folder)).write_text("".join(sorted(run_settings)))
    if folders:  # none where no page has the text that the model reads
        write_query_results(out / "queries" / f"{which.replace('/', '__')}.parquet", queries)


def _move_times(folder: Path) -> None:
    """Move times, dates and emissions from mteb's files in `folder` to the timing file.

    The files stay loadable by mteb, whose schema allows null in these places.
    """
    timings = {}
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if "evaluation_time" in content:  # model_meta.json has no times
            timings["/".join(path.with_suffix("").parts[-3:])] = {key: content.get(key) for key in TIME_KEYS}
            content |= dict.fromkeys(TIME_KEYS)
        path.write_text(format_json(content), encoding="utf-8")
    log = root() / TIMING_FILE  # not the copy in which DVC runs a queued experiment: that one is deleted
    known = json.loads(log.read_text(encoding="utf-8")) if log.is_file() else {}
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(format_json(known | timings), encoding="utf-8")
