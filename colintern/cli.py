"""The `colintern` command. Each subcommand imports what it needs itself, so that `--help` answers at once."""

import argparse
import difflib
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from colintern.params import UserError, exit_on_user_error, load

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = """Examples:
    colintern recipe                     list the recipes
    colintern recipe internvl3_5-1b      write one into params.yaml
    colintern tiles 1240 1754            show which tiles a page is cut into
    colintern data                       show what fetch-data found in the data"""


@exit_on_user_error()
def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; the exit code: 0, or 2 for bad input (raised as SystemExit)."""
    args = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], None] = args.run
    run(args)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="colintern",
        description="Train, evaluate and compare ColIntern3.5 retrievers.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="subcommands", required=True, metavar="COMMAND")

    recipe = _command(
        commands,
        "recipe",
        _recipe,
        "list the recipes, or write one into params.yaml",
        "colintern recipe internvl3_5-1b",
    )
    recipe.add_argument("name", nargs="?", metavar="NAME", help="recipe to write; without it, the recipes are listed")
    recipe.add_argument("--force", action="store_true", help="overwrite edits of params.yaml that git does not hold")

    tiles = _command(
        commands,
        "tiles",
        _tiles,
        "show which tiles a page is cut into",
        "colintern tiles 1240 1754 --max-visual-tokens 1536 --tile 448 --tokens-per-tile 256",
    )
    tiles.add_argument("width", type=_pixels, metavar="WIDTH", help="page width in pixels")
    tiles.add_argument("height", type=_pixels, metavar="HEIGHT", help="page height in pixels")
    tiles.add_argument(
        "--max-visual-tokens", type=_tokens, metavar="N", help="most a page may cost (default: that of params.yaml)"
    )
    tiles.add_argument("--tile", type=_pixels, metavar="PX", help="side of a tile (default: that of the base)")
    tiles.add_argument(
        "--tokens-per-tile", type=_tokens, metavar="N", help="visual tokens a tile costs (default: that of the base)"
    )

    _command(commands, "data", _data, "show what fetch-data found in the data", "colintern data")
    return parser


def _command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    run: Callable[[argparse.Namespace], None],
    summary: str,
    example: str,
) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"Example:\n    {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run)
    return command


def _pixels(text: str) -> int:
    return _whole(text, 1_000_000)


def _tokens(text: str) -> int:
    return _whole(text, 65536)


def _whole(text: str, high: int) -> int:
    if not (text.isdecimal() and len(text) <= 9 and 1 <= int(text) <= high):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to {high}")
    return int(text)


def _recipe(args: argparse.Namespace) -> None:
    recipes = {path.stem: path for path in sorted((ROOT / "recipes").glob("*.yaml"))}
    if not recipes:
        raise UserError(f"{ROOT / 'recipes'}: no recipes here; run colintern from a checkout of the repository")
    if args.name is None:
        width = max(map(len, recipes))
        for name, path in recipes.items():
            print(f"{name:{width}}  {path.read_text(encoding='utf-8').partition(chr(10))[0].lstrip('# ')}")
        return
    if args.name not in recipes:
        near = ", ".join(difflib.get_close_matches(args.name, recipes, n=3, cutoff=0.0))
        raise UserError(f"recipe {args.name!r} is unknown; nearest: {near}")
    target = ROOT / "params.yaml"
    if not args.force and _would_lose_edits(target, recipes.values()):
        raise UserError(f"{target}: holds edits that git has not committed; commit them, or lose them with --force")
    target.write_bytes(recipes[args.name].read_bytes())  # the text, not the values: comments are half of a recipe
    print(f"{target} is now recipe {args.name}; `dvc repro` runs it")


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
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def _tiles(args: argparse.Namespace) -> None:
    from colintern.tiles import base_tile, choose_grid

    bound, tile, tokens = args.max_visual_tokens, args.tile, args.tokens_per_tile
    if (tile is None) != (tokens is None):
        raise UserError("--tile and --tokens-per-tile describe one base: give both, or neither")
    if bound is None or tile is None:
        params = load()
        bound = bound or params.max_visual_tokens
        if tile is None:
            tile, tokens = base_tile(Path(params.base))
    if bound < tokens:
        raise UserError(f"max_visual_tokens: {bound} is less than one tile costs; it must be at least {tokens}")
    grid = choose_grid(args.width, args.height, bound // tokens, tile)
    print(f"page    {args.width} x {args.height} px")
    print(f"tiles   {grid.cols} x {grid.rows} of {tile} px{' + thumbnail' if grid.thumbnail else ''}")
    print(f"tokens  {grid.tiles} x {tokens} = {grid.tiles * tokens} visual tokens, at most {bound}")


def _data(args: argparse.Namespace) -> None:
    from colintern.inventory import inventory, table
    from colintern.manifest import QUARANTINE, read

    found = inventory(load())
    print(table(found, read(QUARANTINE)["rows"]))


if __name__ == "__main__":
    sys.exit(main())
