"""`colintern mine`: hard negatives from a trained adapter."""

import argparse
from pathlib import Path

from colintern.commands import print_phase
from colintern.core.errors import UserError
from colintern.core.project import root
from colintern.params import load_params
from colintern.storage.paths import require_model, require_new_file

SUMMARY = "find hard negatives for the training set with a trained adapter"
EXAMPLE = "colintern mine --adapter experiments/colintern --out data/mined/negatives.parquet"
DEFAULT = "(default: %(default)s)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add = parser.add_argument
    add("--adapter", type=Path, default=Path("experiments/colintern"), metavar="FOLDER", help=DEFAULT)
    add("--out", default="data/mined/negatives.parquet", metavar="FILE", help=f"below the repository {DEFAULT}")
    add("--top", type=int, default=50, metavar="K", help=f"ranks of a query to take negatives from {DEFAULT}")
    help_margin = "pages above this share of the right page's score may be right too: left out"
    add("--margin", type=float, default=0.95, help=f"{help_margin} {DEFAULT}")
    add("--keep", type=int, default=10, metavar="N", help=f"negatives per row at most {DEFAULT}")


def run(args: argparse.Namespace) -> None:
    """Mine hard negatives, and write them to --out."""
    for name, value, is_valid, valid in (
        ("--top", args.top, args.top >= 1, "1 or more"),
        ("--keep", args.keep, args.keep >= 1, "1 or more"),
        ("--margin", args.margin, 0 < args.margin <= 1, "0 < x <= 1"),
    ):
        if not is_valid:
            raise UserError(f"{name}: {value} is not valid; it must be {valid}")
    require_model("--adapter", args.adapter, merged=False)
    if not (root() / args.out).resolve().is_relative_to(root().resolve()):
        raise UserError(f"--out: {args.out} is outside the repository; give a path below it, as negatives_file needs")
    require_new_file("--out", root() / args.out)
    params = load_params()
    from colintern.storage.manifest import ensure_inputs

    print_phase("mine: checking the base and the training pages")
    ensure_inputs(params)
    print_phase(f"mine: loading {args.adapter}")
    # Only now: `datasets` decides at its import whether it may call the hub.
    from colintern.training.mining import MiningLimits, mine_hard_negatives
    from colintern.training.pairs import write_mined_negatives

    mined = mine_hard_negatives(params, args.adapter, MiningLimits(args.top, args.margin, args.keep))
    write_mined_negatives(root() / args.out, mined.rows, mined.provenance)
    counts = [len(row.negatives) for row in mined.rows]
    mean = sum(counts) / len(counts)
    print(
        f"{args.out}: {len(counts)} rows, {mean:.1f} negatives each, {counts.count(0)} rows without\n"
        f"left out: {mined.num_positives} pages that answer the query, {mined.num_too_close} that score too close to "
        f"one that does\nto train with them: dvc exp run -S negatives=2 -S negatives_file={args.out}"
    )
