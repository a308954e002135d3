"""`colintern doctor`: the guide's debugging checklist, applied to params.yaml and this machine."""

import argparse
import json
import os
import sys
from textwrap import wrap

from colintern.commands import print_coloured
from colintern.core.terminal import TERMINAL_COLUMNS, escape_controls
from colintern.params import load_params
from colintern.storage.paths import require_base

SUMMARY = "check settings, model and machine before training; exit 1 if a check fails"
EXAMPLE = "colintern doctor"
COLOURS = {"pass": "32", "warn": "33", "fail": "31"}
INDENT = 24  # columns of status and name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--json", action="store_true", help="the findings as JSON")


def run(args: argparse.Namespace) -> None:
    """Print the results of all checks; exit 1 if one of them is `fail`."""
    params = load_params()
    require_base(params.base, params)
    from colintern.modeling.base_config import load_cached_or_preset_config
    from colintern.preflight.checks import ENVIRONMENT_CHECKS, RUN_CHECKS, collect_run_facts, run_checks
    from colintern.preflight.environment import probe_environment

    facts = collect_run_facts(params, load_cached_or_preset_config(params), None)
    environment = probe_environment(params, facts.is_demo)
    results = [*run_checks(facts, RUN_CHECKS), *run_checks(environment, ENVIRONMENT_CHECKS)]
    counts = {status: sum(result.status == status for result in results) for status in COLOURS}
    if args.json:
        checks = [result._asdict() for result in results]
        print(json.dumps({"size": facts.bounds.name, "checks": checks} | counts, indent=2))
    else:
        print(f"{params.base}: {facts.counts.total_parameters:,} parameters, judged as {facts.bounds.name}")
        for result in results:
            _print_result(result.status, result.name, result.found, result.remedy)
        print_coloured(", ".join(f"{count} {_colour_status(status)}" for status, count in counts.items()))
    if counts["fail"]:
        raise SystemExit(1)


def _print_result(status: str, name: str, found: str, remedy: str) -> None:
    first, *rest = wrap(escape_controls(found), TERMINAL_COLUMNS - INDENT)
    print_coloured(f"{_colour_status(status)}  {name:<18}{first}")
    # Commands are there to be copied: a word is not broken, however long it is.
    remedy_lines = []
    for line in remedy.splitlines():
        width = TERMINAL_COLUMNS - INDENT - 3
        remedy_lines += wrap(line.strip(), width, break_long_words=False, break_on_hyphens=False)
    for number, line in enumerate(remedy_lines):
        rest.append(f"{'   ' if number else '-> '}{line}")
    for line in rest:
        print(f"{'':<{INDENT}}{line}")


def _colour_status(status: str) -> str:
    """Colour a status on a terminal that has colours; https://no-color.org."""
    is_plain = not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return status if is_plain else f"\033[{COLOURS[status]}m{status}\033[0m"
