"""`colintern check-adapter`: check that an adapter was trained and fits its base."""

import argparse
import json
import math
from pathlib import Path

from colintern.core.errors import UserError
from colintern.core.project import root
from colintern.storage.paths import require_model

SUMMARY = "check whether an adapter was trained, is whole, and fits its base; exit 1 if not"
EXAMPLE = "colintern check-adapter experiments/colintern"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the adapter's folder")
    parser.add_argument("--base", metavar="FOLDER", help="where its base is (default: where the adapter says)")
    parser.add_argument("--json", action="store_true", help="the statistics and findings as JSON")


def run(args: argparse.Namespace) -> None:
    """Print the results; exit 1 if a check fails, 2 if a file is missing or cannot be read."""
    require_model("FOLDER", args.folder, merged=False)
    if args.base and not (root() / args.base).is_dir():
        raise UserError(f"--base: {args.base} is no folder here; give the one the adapter was trained on")
    from colintern.modeling.adapter_files import adapter_weight_stats
    from colintern.preflight.adapter_check import check_adapter, find_base, format_adapter_table, read_adapter
    from colintern.storage.hub import enable_offline_mode

    adapter = read_adapter(args.folder)
    enable_offline_mode()  # the base is where the adapter says, or nowhere
    results = check_adapter(adapter, find_base(adapter, args.base))
    is_ok = all(result.ok for result in results)
    if args.json:
        start, now = (
            {name: row | {"std": row["std"] if math.isfinite(row["std"]) else None} for name, row in groups.items()}
            for groups in (adapter.identity["start"], adapter_weight_stats(adapter.files.weights, adapter.files.head))
        )  # JSON has no NaN
        report = {"ok": is_ok, "start": start, "now": now, "findings": [result._asdict() for result in results]}
        print(json.dumps(report, indent=2, allow_nan=False))
    else:
        print(format_adapter_table(adapter, results))
    if not is_ok:
        raise SystemExit(1)
