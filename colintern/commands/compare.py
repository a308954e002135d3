"""`colintern compare`: is one evaluation better than another, or is it chance."""

import argparse

from colintern.core.errors import UserError
from colintern.scoring.metrics import MAIN_METRIC, METRIC_KEYS

SUMMARY = "compare evaluations query by query: differences, intervals, tests, what changed most"
EXAMPLE = "colintern compare main my-experiment"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command line."""
    evaluation = "a git revision, a DVC experiment, or a folder with an evaluation"
    parser.add_argument("a", metavar="A", help=f"{evaluation}; the others are compared with it")
    parser.add_argument("others", metavar="B", nargs="+", help=evaluation)
    parser.add_argument("--metric", default=MAIN_METRIC.key, choices=METRIC_KEYS, help="(default: %(default)s)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--md", action="store_true", help="as Markdown, for a pull request")
    form.add_argument("--json", action="store_true", help="all of it as JSON")


def run(args: argparse.Namespace) -> None:
    """Print a comparison of each evaluation with the first."""
    import json

    from colintern.analysis.comparison import (
        compare_eval_runs,
        comparison_to_dict,
        comparison_to_markdown,
        format_comparison,
        load_eval_run,
    )

    if len({args.a, *args.others}) <= len(args.others):
        raise UserError(f"{args.a} {' '.join(args.others)}: an evaluation is named twice; give each once")
    first, *others = [load_eval_run(name) for name in (args.a, *args.others)]
    comparisons = [compare_eval_runs(first, other, args.metric) for other in others]
    if args.json:
        print(json.dumps([comparison_to_dict(comparison) for comparison in comparisons], indent=2))
    else:
        render = comparison_to_markdown if args.md else format_comparison
        print("\n\n".join(map(render, comparisons)))
