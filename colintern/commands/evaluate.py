"""`colintern evaluate`: what the eval stage does, for any model and any of the data that was fetched."""

import argparse
import re
from dataclasses import replace
from pathlib import Path

from colintern.params import Params, UserError, at_commit, load

SUMMARY = "evaluate an adapter, a merged model or one on the hub; the rest is as in params.yaml"
EXAMPLE = 'colintern evaluate experiments/colintern --benchmarks "ViDoRe(v2)" --batch-size 16'


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder of an adapter or a merged model, or hub id as ID@COMMIT")
    parser.add_argument("--benchmarks", nargs="+", metavar="NAME", help="as in params.yaml (default: those in it)")
    parser.add_argument("--batch-size", type=int, metavar="N", help="default: eval_batch_size of params.yaml")
    for name, text in (
        ("pool-factor", "vectors of a tile that are made into one"),
        ("dim", "numbers of a vector kept"),
    ):
        help_ = f"{text}; of several, all are evaluated (default: params.yaml's)"
        parser.add_argument(f"--{name}", type=int, nargs="+", metavar="N", help=help_)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: results/evaluate/<model>-<revision>")


def run(args: argparse.Namespace) -> None:
    """Print the table; mteb's files, what each query scored and eval.json are in the out folder."""
    params = _params(args)
    import warnings

    from colintern.files.manifest import arrow_cache

    arrow_cache()
    warnings.simplefilter("ignore", FutureWarning)  # transformers', about names of its own
    from colintern.data.benchmarks import from_cache, tasks_for  # `datasets` reads the environment when it is imported
    from colintern.evaluation.scores import report
    from colintern.evaluation.subjects import subjects
    from colintern.evaluation.tasks import evaluate
    from colintern.evaluation.verdicts import table
    from colintern.files.hub import stay_offline
    from colintern.files.jsonfile import dumps

    for _, task in tasks_for(params):  # a name that is unknown, or data that is not there, before anything is loaded
        from_cache(task)
    name = args.model.rstrip("/")
    folder = Path(name) if Path(name).is_dir() else _from_hub(name)
    stay_offline()
    found = subjects(params, folder)
    label = re.sub(r"[^\w.-]+", "-", Path(name.partition("@")[0]).name)
    out = args.out or Path("results/evaluate") / f"{label}-{found['trained'].revision[:8]}"
    if out.exists() and not (out / "run.json").is_file():
        raise UserError(f"--out: {out} exists and is no evaluation; give a folder that may be replaced")
    out.parent.mkdir(parents=True, exist_ok=True)
    scores = evaluate(found, params, out)
    (out / "eval.json").write_text(dumps(report(scores["trained"], scores.get("untrained"))))
    print(table(scores))
    print(f"{out}: mteb's files, what each query scored, eval.json")


def _params(args: argparse.Namespace) -> Params:
    params = load()
    if args.batch_size is not None and args.batch_size < 1:
        raise UserError(f"--batch-size: {args.batch_size} is not valid; it must be 1 or more")
    return replace(
        params,
        benchmarks=tuple(args.benchmarks or params.benchmarks),
        eval_batch_size=args.batch_size or params.eval_batch_size,
    )


def _from_hub(name: str) -> Path:
    """The folder in the hub's cache, fetched first where it must be."""
    from colintern.files import hub
    from colintern.files.hub_errors import Repo
    from colintern.files.manifest import BASE_SUFFIXES, hub_files

    repo = Repo("MODEL", *at_commit("MODEL", name), "model")
    hub_files([(repo, BASE_SUFFIXES)])
    return hub.folder(repo)
