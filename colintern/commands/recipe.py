"""`colintern recipe`: complete starting points for params.yaml."""

import argparse
import difflib
import subprocess
from collections.abc import Iterable
from pathlib import Path

from colintern.core.errors import UserError

SUMMARY = "list the recipes, or write one into params.yaml"
EXAMPLE = "colintern recipe internvl3_5-1b"
RECIPES, TARGET = Path("recipes"), Path("params.yaml")  # of the clone it is run in, wherever colintern is installed


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="recipe to write; without it, the recipes are listed")
    parser.add_argument("--force", action="store_true", help="overwrite edits of params.yaml that git does not hold")


def run(args: argparse.Namespace) -> None:
    recipes = {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}
    if not recipes:
        raise UserError(f"{RECIPES.absolute()}: no recipes here; run this in the top folder of a clone")
    if args.name is None:
        width = max(map(len, recipes))
        for name, path in recipes.items():
            print(f"{name:{width}}  {path.read_text(encoding='utf-8').partition(chr(10))[0].lstrip('# ')}")
        return
    if args.name not in recipes:
        near = ", ".join(difflib.get_close_matches(args.name, recipes, n=3, cutoff=0.0))
        raise UserError(f"recipe {args.name!r} is unknown; nearest: {near}")
    if not args.force and _would_lose_edits(TARGET, recipes.values()):
        raise UserError(f"{TARGET}: holds edits that git has not committed; commit them, or lose them with --force")
    TARGET.write_bytes(recipes[args.name].read_bytes())  # the text, not the values: comments are half of a recipe
    print(f"{TARGET} is now recipe {args.name}; `dvc repro` runs it")


def _would_lose_edits(target: Path, recipes: Iterable[Path]) -> bool:
    """Whether overwriting the file would lose text that neither a recipe nor git's last commit holds."""
    if not target.exists() or target.read_bytes() in [path.read_bytes() for path in recipes]:
        return False
    # `git diff` is silent about files that git does not track, so it must track the file first.
    return not (
        _git("ls-files", "--error-unmatch", "--", target.name) and _git("diff", "--quiet", "HEAD", "--", target.name)
    )


def _git(*arguments: str) -> bool:
    """Whether git is installed, has this repository and answers the command with exit code 0."""
    try:
        return subprocess.run(["git", *arguments], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False
