"""The `colintern` command. A subcommand is a module of colintern/commands, found there by its name.

Each has SUMMARY (a line for --help), EXAMPLE (a command line), `add_arguments(parser)` and `run(args)`, and has
slow imports inside `run`, so that `--help` answers at once.
"""

import argparse
import os
import pkgutil
import re
import select
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from textwrap import fill

from colintern import commands
from colintern.core.errors import exit_on_user_error

# Commands in the order of the work; others follow by name.
ORDER = """recipe recommend tiles data verify doctor check_adapter evaluate report compare mine tune search
serve embed export""".split()


@exit_on_user_error()
def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Returns:
        The exit code: 0, 130 after Ctrl-C, 141 if the reader closes the pipe. Bad input raises SystemExit(2).
    """
    args = _build_parser().parse_args(argv)
    warnings.simplefilter("ignore", FutureWarning)  # transformers warns about names that only its own code uses
    run: Callable[[argparse.Namespace], None] = args.run
    try:
        run(args)
        sys.stdout.flush()
    except BrokenPipeError:
        if not _is_reader_gone():  # the pipe is another one
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python would try once more at its exit, and say so
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def _is_reader_gone() -> bool:
    """Return whether the reader of standard output has closed it, as `| head` does."""
    output = select.poll()
    output.register(1, 0)
    return any(event & select.POLLERR for _, event in output.poll(0))


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="colintern",
        description="Train, evaluate and compare ColIntern3.5 retrievers.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_PrintVersion, nargs=0, help="show the version number and exit")
    found = parser.add_subparsers(title="subcommands", required=True, metavar="COMMAND")
    examples = ["Examples:"]
    names = sorted(module.name for module in pkgutil.iter_modules(commands.__path__))
    for name in sorted(names, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER)):
        command = import_module(f"colintern.commands.{name}")
        example = _wrap_example(command.EXAMPLE)
        one = found.add_parser(
            name.replace("_", "-"),
            help=command.SUMMARY,
            description=fill(f"{command.SUMMARY[0].upper()}{command.SUMMARY[1:]}.", 80),
            epilog=f"Example:\n{example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(one)
        one.set_defaults(run=command.run)
        examples.append(example)
    parser.epilog = "\n".join(examples)
    return parser


def _wrap_example(example: str) -> str:
    """Indent a command line; break it where it is wider than 80 columns, not within quotes or an option."""
    lines = ["   "]
    for word in re.findall(r'--[\w-]+ (?:"[^"]*"|[^-\s]\S*)|"[^"]*"|\S+', example):
        if len(lines[-1]) + len(word) + 1 > 78:
            lines[-1] += " \\"
            lines.append("       ")
        lines[-1] += f" {word}"
    return "\n".join(lines)


class _PrintVersion(argparse.Action):
    """Print the version of the package, or, in the image, which holds no package, that of the checkout."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import PackageNotFoundError, version

        try:
            number = version("colintern")
        except PackageNotFoundError:
            import tomllib

            project = Path(__file__).parents[1] / "pyproject.toml"
            number = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"]
        sys.stdout.write(f"colintern {number}\n")
        parser.exit()


if __name__ == "__main__":
    sys.exit(main())
