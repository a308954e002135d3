"""`colintern mine`: hard negatives from a trained adapter."""

import argparse
from pathlib import Path

from colintern.core.errors import UserError
from colintern.core.project import root
from colintern.core.terminal import print_phase
from colintern.params import load
from colintern.storage.paths import require_model, require_new_file

SUMMARY = "find hard negatives for the training set with a trained adapter"
EXAMPLE = "colintern mine --adapter experiments/colintern --out data/mined/negatives.parquet"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adapter", type=Path, default=Path("experiments/colintern"), metavar="FOLDER", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--out",
        default="data/mined/negatives.parquet",
        metavar="FILE",
        help="below the repository (default: %(default)s)",
    )
    parser.add_argument(
        "--top", type=int, default=50, metavar="K", help="ranks of a query that are looked at (default: %(default)s)"
    )
    parser.add_argument(
        "--margin",
        type=float,
        default=0.95,
        help="pages above this share of the right page's score may be right too: left out (default: %(default)s)",
    )
    parser.add_argument(
        "--keep", type=int, default=10, metavar="N", help="negatives a row gets at most (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> None:
    for name, value, valid in (
        ("--top", args.top, args.top >= 1),
        ("--keep", args.keep, args.keep >= 1),
        ("--margin", args.margin, 0 < args.margin <= 1),
    ):
        if not valid:
            raise UserError(
                f"{name}: {value} is not valid; it must be {'0 < x <= 1' if name == '--margin' else '1 or more'}"
            )
    require_model("--adapter", args.adapter, merged=False)
    if not (root() / args.out).resolve().is_relative_to(root().resolve()):
        raise UserError(f"--out: {args.out} is outside the repository; give a path below it, as negatives_file needs")
    require_new_file("--out", root() / args.out)
    params = load()
    from colintern.storage.manifest import ensure_inputs

    print_phase("mine: checking the base and the training pages")
    ensure_inputs(params)
    print_phase(f"mine: loading {args.adapter}")
    # Only now: when `datasets` is imported, it reads whether it may use the hub.
    from colintern.training.mining import MiningLimits, mine_hard_negatives
    from colintern.training.pairs import write_mined_negatives

    result = mine_hard_negatives(params, args.adapter, MiningLimits(args.top, args.margin, args.keep))
    write_mined_negatives(root() / args.out, result.rows, result.provenance)
    counts = [len(row.negatives) for row in result.rows]
    mean = sum(counts) / len(counts)
    print(
        f"{args.out}: {len(counts)} rows, {mean:.1f} negatives each, {counts.count(0)} rows without\n"
        f"left out: {result.num_positives} pages that answer the query, "
        f"{result.num_too_close} that score too close to one that does"
    )
    print(f"to train with them: dvc exp run -S negatives=2 -S negatives_file={args.out}")
