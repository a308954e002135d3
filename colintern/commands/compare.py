"""`colintern compare`: is one evaluation better than another, or is it chance."""

import argparse

from colintern.core.errors import UserError

SUMMARY = "compare evaluations query by query: differences, intervals, tests, what changed most"
EXAMPLE = "colintern compare main my-experiment"
METRICS = ("ndcg_at_5", "ndcg_at_10", "recall_at_100")


def arguments(parser: argparse.ArgumentParser) -> None:
    what = "a git revision, a DVC experiment, or a folder with an evaluation"
    parser.add_argument("a", metavar="A", help=f"{what}; the others are compared with it")
    parser.add_argument("others", metavar="B", nargs="+", help=what)
    parser.add_argument("--metric", default=METRICS[0], choices=METRICS, help="(default: %(default)s)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--md", action="store_true", help="as Markdown, for a pull request")
    form.add_argument("--json", action="store_true", help="all of it as JSON")


def run(args: argparse.Namespace) -> None:
    import json

    from colintern.analysis.outcomes import outcome

    if len({args.a, *args.others}) <= len(args.others):
        raise UserError(f"{args.a} {' '.join(args.others)}: an evaluation is named twice; give each once")
    first, *others = [outcome(name) for name in (args.a, *args.others)]
    from colintern.analysis.differences import as_json, difference, markdown, text  # mteb, which takes seconds

    found = [difference(first, other, args.metric) for other in others]
    if args.json:
        print(json.dumps([as_json(one) for one in found], indent=2))
    else:
        print("\n\n".join(markdown(one) if args.md else text(one) for one in found))
