"""The `colintern` command. A subcommand is a module of colintern/commands, found there by its name.

Each has SUMMARY (a line for --help), EXAMPLE (a command line), `arguments(parser)` and `run(args)`, and imports what is
slow to import inside `run`, so that `--help` answers at once.
"""

import argparse
import os
import pkgutil
import select
import signal
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from textwrap import fill

from colintern import commands
from colintern.params import exit_on_user_error


@exit_on_user_error()
def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; the exit code: 0, or 2 for bad input (raised as SystemExit), 141 where nobody reads on."""
    args = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], None] = args.run
    try:
        run(args)
        sys.stdout.flush()
    except BrokenPipeError:
        if not _unread():  # a pipe of its own
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python would try once more at its exit, and say so
        return 128 + signal.SIGPIPE
    return 0


def _unread() -> bool:
    """Whether the reader of standard output is gone: `| head` has what it wanted."""
    output = select.poll()
    output.register(1, 0)
    return any(event & select.POLLERR for _, event in output.poll(0))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="colintern",
        description="Train, evaluate and compare ColIntern3.5 retrievers.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found = parser.add_subparsers(title="subcommands", required=True, metavar="COMMAND")
    examples = ["Examples:"]
    for module in pkgutil.iter_modules(commands.__path__):
        command = import_module(f"colintern.commands.{module.name}")
        one = found.add_parser(
            module.name.replace("_", "-"),
            help=command.SUMMARY,
            description=fill(f"{command.SUMMARY[0].upper()}{command.SUMMARY[1:]}.", 80),
            epilog=f"Example:\n    {command.EXAMPLE}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.arguments(one)
        one.set_defaults(run=command.run)
        examples.append(f"    {command.EXAMPLE}")
    parser.epilog = "\n".join(examples)
    return parser


if __name__ == "__main__":
    sys.exit(main())
