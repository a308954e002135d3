"""`colintern report`: what a model does and where it fails, as one HTML file."""

import argparse
from pathlib import Path

from colintern.core.errors import UserError
from colintern.core.terminal import print_phase
from colintern.params import load_params
from colintern.storage.paths import require_model, require_new_file

SUMMARY = "write an HTML file on an evaluated model: verdict, curves, scores, worst queries with heatmaps"
EXAMPLE = "colintern report experiments/colintern"


def arguments(parser: argparse.ArgumentParser) -> None:
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
    from colintern.evaluation.subjects import subjects
    from colintern.reporting.evaluated import as_evaluated, evaluation, find, worst
    from colintern.reporting.failures import failures
    from colintern.reporting.report import report
    from colintern.storage.hub import enable_offline_mode

    enable_offline_mode()
    subject = subjects(params, args.model)["trained"]
    folder = find(subject.revision, args.results)
    params = as_evaluated(params, folder)
    found = evaluation(params, folder)
    subject = subjects(params, args.model)["trained"]
    tasks, rows = [task for _, task in found.pairs], worst(found.rows)
    print_phase(f"report: drawing the worst {min(args.worst, len(rows))} of {len(rows)} queries below NDCG@5 1")
    cases, passed = failures(subject.encoder(), tasks, rows, args.worst) if rows and args.worst else ([], 0)
    out = args.out or Path("results/report") / f"{args.model.resolve().name}-{subject.revision[:8]}.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(report(args.model, subject, found, cases, passed), encoding="utf-8")
    pages = sum(len(one.sheets) for one in cases)
    print(f"{out}: {len(cases)} queries with {pages} pages, {out.stat().st_size / 1e6:.1f} MB")
    if passed:
        print(f"left out of the worst queries: {passed} to which no page is the right one")
