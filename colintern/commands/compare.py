"""`colintern compare`: is one evaluation better than another, or is it chance."""

import argparse

from colintern.core.errors import UserError
from colintern.scoring.metrics import MAIN_METRIC, METRIC_KEYS

SUMMARY = "compare evaluations query by query: differences, intervals, tests, what changed most"
EXAMPLE = "colintern compare main my-experiment"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command line."""
    evaluation = (
        "a git revision, a DVC experiment, or a folder with an evaluation; for several seeds NAME,NAME,NAME, or a "
        "pattern of the current commit's experiments, such as 'slower-*'"
    )
    parser.add_argument("a", metavar="A", help=f"{evaluation}. The others are compared with it")
    parser.add_argument("others", metavar="B", nargs="+", help="the same")
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
    )
    from colintern.analysis.eval_runs import load_eval_group

    groups = [load_eval_group(name) for name in (args.a, *args.others)]
    names = [run.name for group in groups for run in group.members or [group]]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{', '.join(twice)}: an evaluation is named twice; give each once")
    first, *others = groups
    comparisons = [compare_eval_runs(first, other, args.metric) for other in others]
    if args.json:
        print(json.dumps([comparison_to_dict(comparison) for comparison in comparisons], indent=2))
    else:
        render = comparison_to_markdown if args.md else format_comparison
        print("\n\n".join(map(render, comparisons)))
