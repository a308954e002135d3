"""`colintern mine`: hard negatives from a trained adapter."""

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from colintern.commands import print_phase
from colintern.core.errors import UserError
from colintern.core.project import root
from colintern.params import Params, load_params
from colintern.storage.paths import require_model, require_new_file

if TYPE_CHECKING:
    from colintern.training.mining import MiningResult

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
    base = ensure_inputs(params)
    print_phase(f"mine: loading {args.adapter}")
    mined = _mine_and_write(params, base, args)
    counts = [len(row.negatives) for row in mined.rows]
    mean = sum(counts) / len(counts)
    print(
        f"{args.out}: {len(counts)} rows, {mean:.1f} negatives each, {counts.count(0)} rows without\n"
        f"left out: {mined.num_positives} pages that answer the query, {mined.num_too_close} that score too close to "
        f"one that does\nto train with them: dvc exp run -S negatives=2 -S negatives_file={args.out}"
    )


def _mine_and_write(params: Params, base: str, args: argparse.Namespace) -> "MiningResult":
    """Mine and write; imports wait until the hub is off, because `datasets` reads that when it is imported."""
    from contextlib import closing

    from colintern.data.training_set import get_training_data_params, load_training_data
    from colintern.encoding.loading import get_encoder_settings, load_batch_embedder, load_page_encoder
    from colintern.encoding.multi_process import EmbeddingPool, count_workers
    from colintern.modeling.loading import require_adapter, require_same_base, require_same_tiling
    from colintern.storage.identity import content_hash, get_versions
    from colintern.training.mining import MiningLimits, mine_hard_negatives
    from colintern.training.pairs import write_mined_negatives

    require_adapter(args.adapter)
    require_same_base(args.adapter, params.base, params.base_revision)
    require_same_tiling(args.adapter, params.max_visual_tokens, params.tiling)
    load = partial(load_page_encoder, get_encoder_settings(params), args.adapter, base)
    limits = MiningLimits(args.top, args.margin, args.keep)
    encoder, num_workers = load(), count_workers(params.launch)
    load_worker = partial(load_batch_embedder, load) if num_workers > 1 else lambda: encoder.embed_batch
    with closing(EmbeddingPool(load_worker, num_workers)) as pool:
        data = load_training_data(params)
        mined = mine_hard_negatives(data, limits, encoder, pool, params.eval_batch_size, params.workers)
    provenance: dict[str, object] = {
        "adapter": str(args.adapter),
        "adapter_sha256": content_hash(args.adapter / "adapter_model.safetensors"),
        "base": params.base,
        "base_revision": params.base_revision,
        "data": get_training_data_params(params),
        "limits": {"top": args.top, "margin": args.margin, "keep": args.keep},
        "pages": mined.num_pages,
        "versions": get_versions(),
    }
    write_mined_negatives(root() / args.out, mined.rows, provenance)
    return mined
