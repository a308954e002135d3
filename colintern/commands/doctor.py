"""`colintern doctor`: the guide's debugging checklist, asked of params.yaml and of this machine."""

import argparse

from colintern.core.terminal import escape_controls, print_coloured
from colintern.params import load
from colintern.storage.paths import require_base

SUMMARY = "check settings, model and machine before training; exit 1 if a check fails"
EXAMPLE = "colintern doctor"
COLOURS = {"pass": "32", "warn": "33", "fail": "31"}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="the findings as JSON")


def run(args: argparse.Namespace) -> None:
    """Print the findings; exit 1 where one is `fail`, 0 else."""
    import json

    params = load()
    require_base(params.base, params)
    from colintern.modeling.bases import at_hand
    from colintern.preflight.doctor import CHECKS, examined, facts_for
    from colintern.preflight.surroundings import AROUND, surroundings

    facts = facts_for(params, at_hand(params), None)
    found = [*examined(facts, CHECKS), *examined(surroundings(facts), AROUND)]
    counts = {status: sum(finding.status == status for finding in found) for status in COLOURS}
    if args.json:
        print(json.dumps({"size": facts.bounds.name, "checks": [f._asdict() for f in found]} | counts, indent=2))
    else:
        total = facts.counts["total_parameters"]
        print(f"{params.base}: {total:,} parameters, judged as {facts.bounds.name}")
        for finding in found:
            _show(finding.status, finding.name, finding.found, finding.remedy)
        print_coloured(", ".join(f"{count} {_paint(status)}" for status, count in counts.items()))
    if counts["fail"]:
        raise SystemExit(1)


def _show(status: str, name: str, found: str, remedy: str) -> None:
    from textwrap import wrap

    lines = wrap(escape_controls(found), 80 - 24)
    print_coloured(f"{_paint(status)}  {name:<18}{lines[0]}")
    for line in [*lines[1:], *_remedy(remedy)]:
        print(f"{'':<24}{line}")


def _remedy(text: str) -> list[str]:
    """One line for each line of it, however long: commands are there to be copied."""
    from textwrap import wrap

    found = []
    for line in text.splitlines():
        found += wrap(line.strip(), 80 - 27, break_long_words=False, break_on_hyphens=False)
    return [f"{'-> ' if n == 0 else '   '}{line}" for n, line in enumerate(found)]


def _paint(status: str) -> str:
    """The status, in colour on a terminal that has it; https://no-color.org."""
    import os
    import sys

    plain = not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return status if plain else f"\033[{COLOURS[status]}m{status}\033[0m"
