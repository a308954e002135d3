"""`colintern check-adapter`: are the trained weights really there."""

import argparse
from pathlib import Path

from colintern.core.errors import UserError
from colintern.core.project import root
from colintern.storage.paths import require_model

SUMMARY = "tell whether an adapter was trained, is whole, and fits its base; exit 1 if not"
EXAMPLE = "colintern check-adapter experiments/colintern"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the adapter's folder")
    parser.add_argument("--base", metavar="FOLDER", help="where its base is (default: where the adapter says)")
    parser.add_argument("--json", action="store_true", help="the statistics and findings as JSON")


def run(args: argparse.Namespace) -> None:
    """Print the table; exit 1 where a finding is bad, 2 where a file is missing or cannot be read."""
    import json
    import math

    require_model("FOLDER", args.folder, merged=False)
    if args.base and not (root() / args.base).is_dir():
        raise UserError(f"--base: {args.base} is no folder here; give the one the adapter was trained on")
    from colintern.modeling.weights import statistics
    from colintern.preflight.adapter_check import base_folder, check, read_adapter, table
    from colintern.storage.hub import enable_offline_mode

    adapter = read_adapter(args.folder)
    enable_offline_mode()  # the base is where the adapter says, or nowhere
    found = check(adapter, base_folder(adapter, args.base))
    good = all(finding.ok for finding in found)
    if args.json:
        start, now = (
            {name: row | {"std": row["std"] if math.isfinite(row["std"]) else None} for name, row in rows.items()}
            for rows in (adapter.identity["start"], statistics(adapter.files.weights, adapter.files.head))
        )  # JSON has no NaN
        report = {"ok": good, "start": start, "now": now, "findings": [finding._asdict() for finding in found]}
        print(json.dumps(report, indent=2, allow_nan=False))
    else:
        print(table(adapter, found))
    if not good:
        raise SystemExit(1)
