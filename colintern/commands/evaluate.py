"""`colintern evaluate`: what the eval stage does, for any model and any of the data that was fetched."""

import argparse
import re
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colintern.core.errors import UserError
from colintern.params import FULL_SIZE, PRECISIONS, Params, check_value, load_params, split_hub_id
from colintern.storage.paths import require_evaluated_model, require_writable

if TYPE_CHECKING:
    from colintern.evaluation.models import EvalModel

SUMMARY = "evaluate an adapter, a merged model or one on the hub; the rest is as in params.yaml"
MODEL = "folder of an adapter or a merged model, a hub id as ID@COMMIT, or a retrieval model that mteb knows"
BASELINES = "models to compare with: bm25, hybrid, or one that mteb loads; none: --baselines without a name"
SIZES_FILE, SIZES_PLOT = "sizes.csv", "sizes.svg"
SIZE_OPTIONS = {  # option -> key of params.yaml, description
    "pool-factor": ("pool_factor", "vectors of a tile that are made into one"),
    "dim": ("dim", "numbers kept of a vector"),
    "precision": ("embedding_precision", f"how the numbers of pages are kept: {', '.join(PRECISIONS)}"),
    "rescore": ("rescore_top_k", "best pages of a query that are scored again with full vectors, 0 for none"),
}
EXAMPLE = 'colintern evaluate experiments/colintern --benchmarks "ViDoRe(v2)" --batch-size 16'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command line."""
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument("--benchmarks", nargs="+", metavar="NAME", help="as in params.yaml (default: those in it)")
    parser.add_argument("--batch-size", type=int, metavar="N", help="default: eval_batch_size of params.yaml")
    parser.add_argument("--baselines", nargs="*", metavar="NAME", help=f"{BASELINES} (default: those of params.yaml)")
    for name, (key, text) in SIZE_OPTIONS.items():
        kind, metavar = (str, "NAME") if key == "embedding_precision" else (int, "N")
        parser.add_argument(f"--{name}", type=kind, nargs="+", metavar=metavar, help=f"{text} (default: params.yaml's)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: results/evaluate/<model>-<revision>")


def run(args: argparse.Namespace) -> None:
    """Print the table; mteb's files, what each query scored and eval.json are in the out folder.

    Of several sizes, each has a folder in it, and sizes.csv and sizes.svg compare them with the full embeddings.
    """
    settings = _list_settings(args)
    name = args.model.rstrip("/")
    require_evaluated_model(name)
    if args.out:
        _require_replaceable(args.out)
        require_writable("--out", args.out.parent)
    from colintern.storage.manifest import ensure_benchmark, is_local_benchmark, set_arrow_cache

    for benchmark in settings[0].benchmarks:
        if is_local_benchmark(benchmark):
            ensure_benchmark(benchmark)
        elif "/" in benchmark:
            raise UserError(
                f"benchmarks: {benchmark!r}: no such folder, and names of mteb's benchmarks contain no /; give a "
                "folder that fetch-data has read, or a name such as 'ViDoRe(v2)'"
            )
    set_arrow_cache()
    from colintern.data.benchmarks import (  # `datasets` reads the environment when it is imported
        resolve_benchmarks,
        use_fetched_data,
    )

    for _, task in resolve_benchmarks(
        settings[0].benchmarks
    ):  # refuse an unknown name or missing data before anything is loaded
        use_fetched_data(task)
    _evaluate_settings(args, name, settings, _find_models(settings, name))


def _evaluate_settings(
    args: argparse.Namespace, name: str, settings: list[Params], models: list[dict[str, "EvalModel"]]
) -> None:
    from colintern.analysis.score_tables import format_score_table
    from colintern.analysis.size_table import SizeRow, format_size_table, list_size_rows
    from colintern.evaluation.baselines import add_baselines
    from colintern.evaluation.results import merge_means
    from colintern.evaluation.run import evaluate_models, read_seconds_per_query
    from colintern.reporting.plots import plot_sizes
    from colintern.storage.files import format_json, write_csv

    label = re.sub(r"[^\w.-]+", "-", Path(name.partition("@")[0]).name)
    out = args.out or Path("results/evaluate") / f"{label}-{models[0]['trained'].revision[:8]}"
    has_several = len(settings) > 1
    if out.exists() and _require_replaceable(out) != has_several:
        shutil.rmtree(out)
    rows: list[SizeRow] = []
    for params, which in zip(settings, models, strict=True):
        folder = out / _get_size_folder(params) if has_several else out
        scores = evaluate_models(add_baselines(params, which), params, folder)
        (folder / "eval.json").write_text(format_json(merge_means(scores)))
        if has_several:
            seconds = read_seconds_per_query(which["trained"], params.benchmarks)
            rows += list_size_rows(scores["trained"], params, seconds, folder, out / _get_size_folder(settings[0]))
    if has_several:
        write_csv(out / SIZES_FILE, [row._asdict() for row in rows], SizeRow._fields)
        plot_sizes(rows, out / SIZES_PLOT)
        print(format_size_table(rows))
        print(f"{out}: {SIZES_FILE}, {SIZES_PLOT}, and a folder of each setting")
    else:
        print(format_score_table(scores))
        print(f"{out}: mteb's files, what each query scored, eval.json")


def _get_size_folder(params: Params) -> str:
    rescored = f"-rescore{params.rescore_top_k}" if params.rescore_top_k else ""
    return f"pool{params.pool_factor}-dim{params.dim}-{params.embedding_precision}{rescored}"


def _require_replaceable(out: Path) -> bool:
    """Refuse an out folder that exists and is no evaluation; return whether it is one of several sizes."""
    # One that was killed has no table yet.
    has_sizes = (out / SIZES_FILE).is_file() or any([*out.glob("pool*-dim*/run.json"), *out.glob("pool*-dim*.partial")])
    if out.exists() and not (has_sizes or (out / "run.json").is_file()):
        raise UserError(f"--out: {out} exists and is no evaluation; give a folder that may be replaced")
    return has_sizes


def _list_settings(args: argparse.Namespace) -> list[Params]:
    """Return params.yaml with the options of the command line, once for each size that they give.

    Of several sizes the first one is that of the full embeddings, with which the others are compared.
    """
    params = load_params()
    if args.batch_size is not None and args.batch_size < 1:
        raise UserError(f"--batch-size: {args.batch_size} is not valid; it must be 1 or more")
    params = replace(
        params,
        benchmarks=tuple(args.benchmarks or params.benchmarks),
        baselines=tuple(params.baselines if args.baselines is None else args.baselines),
        eval_batch_size=args.batch_size or params.eval_batch_size,
    )
    choices: list[list[object]] = []
    for option, (key, _) in SIZE_OPTIONS.items():
        given = getattr(args, option.replace("-", "_"))
        for value in given or ():
            if problems := check_value(key, value):
                raise UserError(problems[0].replace(key, f"--{option}", 1))
        choices.append(given or [getattr(params, key)])
    sizes: list[dict[str, Any]] = [dict(zip(FULL_SIZE, values, strict=True)) for values in product(*choices)]
    settings = [replace(params, **size) for size in sizes]
    if all(getattr(args, option.replace("-", "_")) is None for option in SIZE_OPTIONS):
        return settings
    # Rescoring full embeddings with full embeddings gives the same ranking.
    full = replace(params, **FULL_SIZE)
    return list(dict.fromkeys([full, *(size for size in settings if replace(size, rescore_top_k=0) != full)]))


def _find_models(settings: list[Params], name: str) -> list[dict[str, "EvalModel"]]:
    """Find the model in a folder here, in mteb's registry or on the hub, once for each setting."""
    from colintern.encoding.loading import get_encoder_settings
    from colintern.evaluation.baselines import find_mteb_baseline, require_full_size, suggest_baselines
    from colintern.evaluation.models import make_eval_models
    from colintern.storage.hub import Repo, enable_offline_mode
    from colintern.storage.manifest import BASE_SUFFIXES, download_hub_files

    folder = Path(name)
    if not folder.is_dir():
        baselines = [find_mteb_baseline(params, name) for params in settings]
        if None not in baselines:
            for params in settings:
                require_full_size(params, name)
            return [{"trained": model} for model in baselines if model]
        commit = split_hub_id("MODEL", name, f"; nor does mteb know it, {suggest_baselines(name)}")
        repo = Repo("MODEL", *commit, "model")
        download_hub_files([(repo, BASE_SUFFIXES)])
        folder = repo.snapshot_folder
    enable_offline_mode()
    return [make_eval_models(get_encoder_settings(params), folder, params.eval_untrained) for params in settings]
