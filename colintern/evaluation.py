"""Runs mteb's retrieval tasks on a model and gathers their scores.

mteb does the retrieval and the metrics; what is ours is to leave no clock in its files, so that two runs of the same
thing leave the same bytes.
"""

import json
import shutil
from operator import itemgetter
from pathlib import Path
from typing import Any

import mteb
import torch
from torch import nn

from colintern.benchmarks import from_cache, tasks_for
from colintern.features import FEATURES, PageFeatures
from colintern.identity import content_hash
from colintern.jsonfile import dumps
from colintern.loading import load_adapter, load_processor, require_adapter
from colintern.manifest import check_base
from colintern.mteb_model import ColIntern3_5Encoder
from colintern.params import Params, root

METRICS = ("ndcg_at_5", "ndcg_at_10", "recall_at_100")
CLOCK = ("evaluation_time", "date", "evaluation_phases", "kg_co2_emissions")  # of mteb's result files; all may be null
TIMING_FILE = "logs/eval-timing.json"  # not an out of any stage

Scores = dict[str, dict[str, Any]]


def evaluate_adapter(params: Params, adapter: Path, output_folder: Path) -> dict[str, Scores]:
    """Evaluate a trained adapter and, if `params.eval_untrained`, its base with the same head before training.

    `output_folder` is emptied first.

    Returns:
        {"trained": scores, "untrained": scores}, see `evaluate`. mteb's files of both carry the hash of the adapter's
        weights as the revision, because the head of the untrained model is the adapter's.

    Raises:
        UserError: an adapter folder or a base that cannot be used; see also `tasks_for`.
    """
    require_adapter(adapter)
    tasks_for(params)  # a misspelt name is refused before a model is loaded
    base = check_base(params)
    if output_folder.exists():  # nobody shall take an older run's files for this one's
        shutil.rmtree(output_folder)
    torch.set_num_threads(params.threads)
    revision = content_hash(adapter / "adapter_model.safetensors")[:40]
    processor = load_processor(params, adapter)
    scores = {}
    for name, label in (("trained", "colintern3_5"), ("untrained", "colintern3_5-untrained")):
        if name == "trained" or params.eval_untrained:
            model = load_adapter(params, base, adapter, trained=name == "trained")
            features = PageFeatures(model, processor, root() / FEATURES, params.feature_cache_gb)
            scores[name] = evaluate(model, processor, params, label, revision, output_folder, features)
    return scores


def evaluate(
    model: nn.Module,
    processor: Any,
    params: Params,
    label: str,
    revision: str,
    output_folder: str | Path,
    features: PageFeatures | None = None,
) -> Scores:
    """Evaluate a model on every task of `params.benchmarks`.

    mteb's files land in `output_folder`/results/colintern__<label>/<revision>/, older ones there are overwritten;
    what the clock wrote into them goes to `TIMING_FILE`.

    Returns:
        {benchmark label: {metric: mean over its tasks, "tasks": {task name: {metric: score}}}} with `METRICS`, each
        0 to 1 and rounded to 6 digits. A task's score is mteb's: the mean over its splits and language subsets.

    Raises:
        UserError: see `tasks_for`.
        RuntimeError: a task could not be run, or has a score that is not a number.
    """
    pairs = tasks_for(params)
    # mteb's types know no list of tensors
    encoder: Any = ColIntern3_5Encoder(model, processor, label, revision, features)
    cache = mteb.ResultCache(output_folder)
    result = mteb.evaluate(
        encoder,
        [from_cache(task) for task in {task.metadata.name: task for _, task in pairs}.values()],
        co2_tracker=False,
        encode_kwargs={"batch_size": params.eval_batch_size, "show_progress_bar": False},
        cache=cache,
        overwrite_strategy="always",
        show_progress_bar=False,
    )
    if result.exceptions:
        raise RuntimeError("; ".join(f"{error.task_name}: {error.exception}" for error in result.exceptions))
    by_task = {found.task_name: _task_scores(found) for found in result.task_results}
    _move_clock_values(cache.get_task_result_path("any", encoder.mteb_model_meta).parent)
    scores: Scores = {}
    for benchmark in dict(pairs):
        tasks = {task.metadata.name: by_task[task.metadata.name] for name, task in pairs if name == benchmark}
        means = {metric: sum(task[metric] for task in tasks.values()) / len(tasks) for metric in METRICS}
        scores[benchmark] = {m: round(v, 6) for m, v in means.items()} | {
            "tasks": {name: {m: round(v, 6) for m, v in task.items()} for name, task in tasks.items()}
        }
    return scores


def _task_scores(result: mteb.TaskResult) -> dict[str, float]:
    scores = {metric: float(result.get_score(getter=itemgetter(metric))) for metric in METRICS}
    broken = [metric for metric, score in scores.items() if not 0 <= score <= 1]
    if broken:
        raise RuntimeError(f"{result.task_name}: {broken[0]} is {scores[broken[0]]}")
    return scores


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


def report(trained: Scores, untrained: Scores | None) -> Scores:
    """What metrics/eval.json holds: the trained model's scores and, under "untrained", the means before training."""
    if untrained is None:
        return trained
    return {
        name: scores | {"untrained": {metric: untrained[name][metric] for metric in METRICS}}
        for name, scores in trained.items()
    }


def score_rows(by_model: dict[str, Scores]) -> list[dict[str, Any]]:
    """One row for each benchmark, task and model, for plots: the keys are benchmark, task, model and `METRICS`."""
    return [
        {"benchmark": benchmark, "task": task, "model": model} | scores
        for model, benchmarks in by_model.items()
        for benchmark, found in benchmarks.items()
        for task, scores in found["tasks"].items()
    ]


def table(by_model: dict[str, Scores]) -> str:
    """The scores x100 as text of at most 80 columns: each benchmark's tasks, then its mean, for each model."""
    lines = [f"{'x100':<42}{'model':<11}{'ndcg@5':>8}{'ndcg@10':>8}{'rec@100':>9}"]
    for benchmark in next(iter(by_model.values())):
        for model, scores in by_model.items():
            tasks = scores[benchmark]["tasks"]
            rows = {f"  {task.removesuffix('Retrieval')}": found for task, found in tasks.items()}
            for name, found in (rows | {f"{benchmark}, mean of {len(tasks)}": scores[benchmark]}).items():
                numbers = [f"{100 * found[metric]:.1f}" for metric in METRICS]
                lines.append(f"{name[:41]:<42}{model[:10]:<11}{numbers[0]:>8}{numbers[1]:>8}{numbers[2]:>9}")
    return "\n".join(lines)
