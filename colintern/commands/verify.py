"""`colintern verify`: what LoRA would train, counted before anything is loaded."""

import argparse

from colintern.core.errors import UserError
from colintern.params import load_params
from colintern.storage.paths import require_base

SUMMARY = "count what LoRA trains and what stays frozen, without any weights"
EXAMPLE = "colintern verify --base internvl3_5-2b"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--base",
        metavar="BASE",
        help="a folder, a hub id as ID@COMMIT, or internvl3_5-1b, -2b, -4b, -8b (default: that of the params file)",
    )
    parser.add_argument("--params", default="params.yaml", metavar="FILE", help="default: params.yaml")
    parser.add_argument("--json", action="store_true", help="the counts and faults as JSON")


def run(args: argparse.Namespace) -> None:
    """Print the report; exit 2 where training with these targets would go wrong."""
    import json

    params = load_params(args.params)
    base = args.base or params.base
    require_base(base, params)
    from colintern.modeling.bases import config
    from colintern.modeling.lora import examine, faults, notes, table
    from colintern.modeling.modeling_colintern import meta_model

    counts = examine(meta_model(config(base, params), None), params)
    wrong = faults(counts)
    if args.json:
        print(json.dumps({"base": base} | counts | {"faults": wrong, "notes": notes(counts)}, indent=2))
    else:
        print(table(base, counts))
    if wrong:
        raise UserError("\n  ".join(wrong))
    if not args.json:
        print("ok: every pattern matches, the head is trained, tower and projector are frozen")
