"""`colintern export`: an adapter as a standalone model."""

import argparse
import re
from pathlib import Path

from colintern.commands import print_phase
from colintern.core.errors import UserError
from colintern.params import is_on_hub, load_params
from colintern.storage.paths import require_model, require_writable

SUMMARY = "write an adapter as a merged model with its code and a card; push it to the hub only if asked"
EXAMPLE = "colintern export experiments/colintern --out exported"
SUBMISSION_OPTIONS = ("revision", "license", "release_date", "languages", "training_datasets")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command line."""
    parser.add_argument("model", type=Path, metavar="MODEL", help="the adapter's folder")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="created by this command; must not exist yet"
    )
    parser.add_argument("--name", metavar="NAME", help="of the model in its card (default: that of FOLDER)")
    parser.add_argument("--for", dest="target", choices=["vllm"], help="write the layout that vLLM serves instead")
    parser.add_argument("--push", metavar="ID", help="push to this repository, owner/name; made private if it is new")
    add = parser.add_argument_group("submission to mteb's leaderboard, after --push").add_argument
    add("--submission", action="store_true", help="write results and metadata for mteb instead; --name is owner/name")
    add("--revision", metavar="COMMIT", help="of the pushed model on the hub")
    add("--license", metavar="NAME", help="of the model, as mteb names it, such as apache-2.0, or a URL")
    add("--release-date", metavar="DATE", help="of the model, such as 2026-12-01")
    add("--languages", nargs="+", metavar="CODE", help="such as eng-Latn (default: those of the training queries)")
    add("--training-datasets", nargs="+", metavar="NAME", help="in mteb's names (default: those of the run on the hub)")


def run(args: argparse.Namespace) -> None:
    """Write the folder, atomically; exit 2 where the adapter is untrained, incomplete, or of another base."""
    if args.out.exists():
        raise UserError(f"--out: {args.out} exists; give a folder that does not")
    require_writable("--out", args.out.parent)
    require_model("MODEL", args.model, merged=False)
    if args.submission:
        _write_submission(args)
        return
    if given := [f"--{key.replace('_', '-')}" for key in SUBMISSION_OPTIONS if getattr(args, key) is not None]:
        raise UserError(f"{', '.join(given)}: for --submission only; add it, or leave them out")
    if args.push is not None and not is_on_hub(args.push):
        raise UserError(f"--push: {args.push!r} is no repository; write owner/name")
    params = load_params()
    print_phase(f"export: checking {args.model} and its base")
    from colintern.storage.manifest import set_arrow_cache

    set_arrow_cache()
    from huggingface_hub import constants

    from colintern.reporting.export import export_model, push_model
    from colintern.storage.hub import enable_offline_mode

    offline = constants.HF_HUB_OFFLINE
    if args.push and offline:
        raise UserError(f"--push: {args.push} cannot be reached, because HF_HUB_OFFLINE is set")
    enable_offline_mode()
    name = args.name or args.out.resolve().name
    reason = export_model(params, args.model, args.out, name, for_vllm=args.target == "vllm")
    size = sum(file.stat().st_size for file in args.out.rglob("*") if file.is_file())
    card = f"without results in its card: {reason}" if reason else "its results are in its card"
    print(f"{args.out}: {size / 1e6:.1f} MB; {card}")
    if args.push:
        constants.HF_HUB_OFFLINE = offline
        print(f"pushed: {push_model(args.out, args.push)}")


def _write_submission(args: argparse.Namespace) -> None:
    if args.push or args.target:
        raise UserError("--submission: --push and --for write another folder; run them apart, --push before")
    if args.name is not None and not is_on_hub(args.name):
        raise UserError(f"--name: {args.name!r} is no repository; write owner/name, as you pushed it")
    if args.revision is not None and not re.fullmatch(r"[0-9a-f]{40}", args.revision):
        raise UserError(f"--revision: {args.revision!r} is no commit; give the 40 hex digits that --push printed")
    params = load_params()
    print_phase(f"export: collecting the results of {args.model} for mteb")
    from colintern.storage.hub import enable_offline_mode
    from colintern.storage.manifest import set_arrow_cache

    set_arrow_cache()
    from colintern.reporting.submission import SubmissionFacts, write_submission

    enable_offline_mode()
    facts = SubmissionFacts(args.name, *(getattr(args, key) for key in SUBMISSION_OPTIONS))
    missing = write_submission(params, args.model, args.out, facts)
    print(f"{args.out}: results/, model_meta.py, evaluation_request.md")
    if missing:
        print(f"public tasks of ViDoRe(v3) that were not evaluated: {', '.join(missing)}")
