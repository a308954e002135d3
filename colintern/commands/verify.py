"""`colintern verify`: count what LoRA would train before any weights are loaded."""

import argparse

from colintern.core.errors import UserError
from colintern.params import load_params
from colintern.storage.paths import require_base

SUMMARY = "count what LoRA trains and what stays frozen, without any weights"
EXAMPLE = "colintern verify --base internvl3_5-2b"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument(
        "--base",
        metavar="BASE",
        help="a folder, a hub id as ID@COMMIT, or internvl3_5-1b, -2b, -4b, -8b (default: that of the params file)",
    )
    parser.add_argument("--params", default="params.yaml", metavar="FILE", help="default: params.yaml")
    parser.add_argument("--json", action="store_true", help="the counts and faults as JSON")


def run(args: argparse.Namespace) -> None:
    """Print the report."""
    import json
    from dataclasses import asdict

    params = load_params(args.params)
    base = args.base or params.base
    require_base(base, params)
    from colintern.modeling.base_config import get_tile_size, load_base_config
    from colintern.modeling.base_tile import format_a4_tilings
    from colintern.modeling.lora import find_lora_errors, find_lora_warnings, format_lora_report, report_lora_on_meta
    from colintern.modeling.retriever import build_meta_model

    config = load_base_config(base, params)
    report = report_lora_on_meta(build_meta_model(config, None), params)
    errors = find_lora_errors(report)
    if args.json:
        result = {"base": base, **asdict(report), "faults": errors, "notes": find_lora_warnings(report)}
        print(json.dumps(result, indent=2))
    else:
        print(format_lora_report(base, report))
        print(format_a4_tilings(params.max_visual_tokens, get_tile_size(config), config.image_seq_length))
    if errors:
        raise UserError("\n  ".join(errors))
    if not args.json:
        print("ok: every pattern matches, the head is trained, tower and projector are frozen")
