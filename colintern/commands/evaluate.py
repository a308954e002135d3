"""`colintern evaluate`: what the eval stage does, for any model and any of the data that was fetched."""

import argparse
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from colintern.core.errors import UserError
from colintern.params import Params, load_params, split_hub_id
from colintern.storage.paths import require_evaluated_model, require_writable

SUMMARY = "evaluate an adapter, a merged model or one on the hub; the rest is as in params.yaml"
MODEL = "folder of an adapter or a merged model, a hub id as ID@COMMIT, or a late-interaction model that mteb knows"
SIZES = "sizes.csv"
EXAMPLE = 'colintern evaluate experiments/colintern --benchmarks "ViDoRe(v2)" --batch-size 16'


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument("--benchmarks", nargs="+", metavar="NAME", help="as in params.yaml (default: those in it)")
    parser.add_argument("--batch-size", type=int, metavar="N", help="default: eval_batch_size of params.yaml")
    several = "of several, all are evaluated (default: params.yaml's)"
    for name, text in (
        ("pool-factor", "vectors of a tile that are made into one"),
        ("dim", "numbers kept of a vector"),
    ):
        parser.add_argument(f"--{name}", type=int, nargs="+", metavar="N", help=f"{text}; {several}")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: results/evaluate/<model>-<revision>")


def run(args: argparse.Namespace) -> None:
    """Print the table; mteb's files, what each query scored and eval.json are in the out folder.

    Of several sizes each has a folder in it, and sizes.csv and sizes.svg set them side by side.
    """
    settings = _settings(args)
    name = args.model.rstrip("/")
    require_evaluated_model(name)
    if args.out:
        _require_replaceable(args.out)
        require_writable("--out", args.out.parent)
    import csv

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
    from colintern.analysis import sizes
    from colintern.analysis.verdicts import table

    # `datasets` reads the environment when it is imported.
    from colintern.data.benchmarks import resolve_benchmarks, use_fetched_data
    from colintern.evaluation.scores import report
    from colintern.evaluation.subjects import subjects
    from colintern.evaluation.tasks import evaluate
    from colintern.storage.files import dumps
    from colintern.storage.hub import enable_offline_mode

    # An unknown name or missing data is refused before anything is loaded.
    for _, task in resolve_benchmarks(settings[0].benchmarks):
        use_fetched_data(task)
    models = _peers(settings, name)
    if not models:
        folder = Path(name) if Path(name).is_dir() else _from_hub(name)
        enable_offline_mode()
        models = [subjects(params, folder) for params in settings]
    label = re.sub(r"[^\w.-]+", "-", Path(name.partition("@")[0]).name)
    out = args.out or Path("results/evaluate") / f"{label}-{models[0]['trained'].revision[:8]}"
    if out.exists() and _require_replaceable(out) != (len(settings) > 1):
        shutil.rmtree(out)
    rows: list[dict[str, Any]] = []
    for params, found in zip(settings, models, strict=True):
        place = out / f"pool{params.pool_factor}-dim{params.dim}" if len(settings) > 1 else out
        scores = evaluate(found, params, place)
        (place / "eval.json").write_text(dumps(report(scores["trained"], scores.get("untrained"))))
        if len(settings) > 1:
            rows += sizes.rows(scores["trained"], params.pool_factor, params.dim)
    if len(settings) == 1:
        print(table(scores))
        print(f"{out}: mteb's files, what each query scored, eval.json")
        return
    with (out / SIZES).open("w", newline="") as file:
        writer = csv.DictWriter(file, sizes.FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    sizes.plot(rows, out / "sizes.svg")
    print(sizes.table(rows))
    print(f"{out}: {SIZES}, sizes.svg, and a folder of each setting")


def _require_replaceable(out: Path) -> bool:
    """Refuse an out folder that exists and is no evaluation; tell whether it is one of several sizes."""
    # One that was killed has no table yet.
    swept = (out / SIZES).is_file() or any([*out.glob("pool*-dim*/run.json"), *out.glob("pool*-dim*.partial")])
    if out.exists() and not (swept or (out / "run.json").is_file()):
        raise UserError(f"--out: {out} exists and is no evaluation; give a folder that may be replaced")
    return swept


def _settings(args: argparse.Namespace) -> list[Params]:
    """params.yaml with what the command line says, once for each size that is asked for."""
    params = load_params()
    if args.batch_size is not None and args.batch_size < 1:
        raise UserError(f"--batch-size: {args.batch_size} is not valid; it must be 1 or more")
    for option, numbers, most in (("--pool-factor", args.pool_factor, 64), ("--dim", args.dim, 128)):
        if wrong := [number for number in numbers or () if not 1 <= number <= most]:
            raise UserError(f"{option}: {wrong[0]} is not valid; it must be 1 to {most}")
    params = replace(
        params,
        benchmarks=tuple(args.benchmarks or params.benchmarks),
        eval_batch_size=args.batch_size or params.eval_batch_size,
    )
    factors, dims = args.pool_factor or [params.pool_factor], args.dim or [params.dim]
    return [replace(params, pool_factor=factor, dim=dim) for dim in dims for factor in factors]


def _peers(settings: list[Params], name: str) -> list[dict[str, Any]]:
    """The model as mteb knows it, once for each setting; [] if it is a folder here, or mteb does not know it."""
    from colintern.analysis.peers import peer

    found = [] if Path(name).is_dir() else [peer(params, name) for params in settings]
    return [{"trained": one} for one in found if one is not None]


def _from_hub(name: str) -> Path:
    """The folder in the hub's cache, fetched first where it must be."""
    from colintern.analysis.peers import nearest
    from colintern.storage.hub import Repo
    from colintern.storage.manifest import BASE_SUFFIXES, download_hub_files

    repo = Repo("MODEL", *split_hub_id("MODEL", name, f"; nor does mteb know it, {nearest(name)}"), "model")
    download_hub_files([(repo, BASE_SUFFIXES)])
    return repo.snapshot_folder
