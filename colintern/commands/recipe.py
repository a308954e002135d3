"""`colintern recipe`: write a complete params.yaml, or add to one the keys that it lacks."""

import argparse
import difflib
import subprocess
from collections.abc import Iterable
from pathlib import Path

from colintern.core.errors import UserError
from colintern.core.recipes import add_missing_keys, list_recipes, read_summary, render_recipe

SUMMARY = "list the recipes, or write one into params.yaml"
EXAMPLE = "colintern recipe internvl3_5-1b"
TARGET = Path("params.yaml")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="recipe to write; without it, the recipes are listed")
    parser.add_argument("--force", action="store_true", help="overwrite edits of params.yaml that git does not hold")
    parser.add_argument(
        "--update", action="store_true", help="add the keys that params.yaml lacks, with values that change nothing"
    )


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    recipes = list_recipes()
    if args.update:
        if args.name is not None or args.force:
            raise UserError("--update edits params.yaml as it is: it takes no recipe and no --force")
        _add_missing_keys()
    elif args.name is None:
        width = max(map(len, recipes))
        for name, path in recipes.items():
            print(f"{name:{width}}  {read_summary(path)}")
    elif args.name not in recipes:
        near = ", ".join(difflib.get_close_matches(args.name, recipes, n=3, cutoff=0.0))
        raise UserError(f"recipe {args.name!r} is unknown; nearest: {near}")
    else:
        if not args.force and _would_lose_edits(TARGET, map(render_recipe, recipes.values())):
            raise UserError(f"{TARGET}: holds edits that git has not committed; commit them, or lose them with --force")
        TARGET.write_text(render_recipe(recipes[args.name]), encoding="utf-8")
        print(f"{TARGET} is now recipe {args.name}; `dvc repro` runs it")


def _add_missing_keys() -> None:
    from colintern.params import load_params, read_yaml_mapping

    read_yaml_mapping(TARGET, "`key: value` on each line", "`colintern recipe demo` writes one")  # raises if no YAML
    text, added = add_missing_keys(TARGET.read_text(encoding="utf-8"))
    TARGET.write_text(text, encoding="utf-8")
    print("\n".join([f"{TARGET}: {len(added)} keys added", *(f"  {entry}" for entry in added)]))
    load_params(TARGET)  # reports keys that are unknown or misspelt


def _would_lose_edits(target: Path, recipes: Iterable[str]) -> bool:
    """Return whether overwriting the file would lose text that neither a recipe nor git's last commit holds."""
    if not target.exists() or target.read_bytes() in [text.encode() for text in recipes]:
        return False
    # `git diff` is silent about files that git does not track, so it must track the file first.
    is_tracked = _run_git("ls-files", "--error-unmatch", "--", target.name)
    return not (is_tracked and _run_git("diff", "--quiet", "HEAD", "--", target.name))


def _run_git(*arguments: str) -> bool:
    """Return whether git is installed, has this repository and answers the command with exit code 0."""
    try:
        return subprocess.run(["git", *arguments], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False
