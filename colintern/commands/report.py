"""`colintern report`: what a model does and where it fails, as one HTML file."""

import argparse
from pathlib import Path
from textwrap import fill

from colintern.commands import print_phase
from colintern.core.errors import UserError
from colintern.params import describe_demo_base, load_params
from colintern.storage.paths import require_model, require_new_file

SUMMARY = "write an HTML file on an evaluated model: verdict, curves, scores, worst queries with heatmaps"
EXAMPLE = "colintern report experiments/colintern"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command line."""
    parser.add_argument("model", type=Path, metavar="MODEL", help="folder of an adapter or a merged model")
    parser.add_argument(
        "--results", type=Path, metavar="FOLDER", help="its evaluation (default: found by its revision)"
    )
    parser.add_argument(
        "--worst",
        type=int,
        default=30,
        metavar="N",
        help="queries shown with pages and heatmaps (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: results/report/<model>-<revision>.html")


def run(args: argparse.Namespace) -> None:
    """Write the file; nothing in it is fetched from anywhere when it is opened."""
    if args.worst < 0:
        raise UserError(f"--worst: {args.worst} is not valid; it must be 0 or more")
    require_model("MODEL", args.model)
    if args.results and not (args.results / "run.json").is_file():
        raise UserError(f"--results: {args.results} holds no run.json; give an evaluation's folder")
    require_new_file("--out", args.out or Path("results/report/name.html"))
    params = load_params()
    print_phase(f"report: reading the evaluation of {args.model}")
    from colintern.storage.manifest import set_arrow_cache

    set_arrow_cache()
    from colintern.encoding.loading import get_encoder_settings
    from colintern.evaluation.models import make_eval_models
    from colintern.modeling.loading import PretrainedRef
    from colintern.reporting.evaluation import (
        apply_evaluated_settings,
        find_evaluation,
        read_evaluation,
        select_worst_queries,
    )
    from colintern.reporting.examples import explain_failures
    from colintern.reporting.report import render_report
    from colintern.storage.hub import enable_offline_mode

    enable_offline_mode()
    folder = find_evaluation(PretrainedRef.resolve(args.model).revision, args.results)
    params = apply_evaluated_settings(params, folder)
    evaluation = read_evaluation(params, folder)
    model = make_eval_models(get_encoder_settings(params), args.model)["trained"]
    tasks, worst = [task for _, task in evaluation.pairs], select_worst_queries(evaluation.queries)
    print_phase(f"report: drawing the worst {min(args.worst, len(worst))} of {len(worst)} queries below NDCG@5 1")
    is_shown = worst and args.worst
    examples, num_passed = explain_failures(model.load_encoder(), tasks, worst, args.worst) if is_shown else ([], 0)
    out = args.out or Path("results/report") / f"{args.model.resolve().name}-{model.revision[:8]}.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(render_report(args.model, model, evaluation, examples, num_passed), encoding="utf-8")
    num_pages = sum(len(example.pages) for example in examples)
    print(f"{out}: {len(examples)} queries with {num_pages} pages, {out.stat().st_size / 1e6:.1f} MB")
    if note := describe_demo_base(params.base, params.benchmarks):
        print(fill(note, 80))
    if num_passed:
        print(f"left out of the worst queries: {num_passed} to which no page is the right one")
