"""The subcommands of `colintern`, one module each (see colintern/__main__.py), and what they print with."""

import sys

from colintern.core.terminal import escape_controls


def print_coloured(text: str) -> None:
    """Print text with our escape sequences; the caller escapes foreign text in it."""
    print(text, file=getattr(sys.stdout, "stream", sys.stdout))


def print_phase(text: str) -> None:
    """Print what a command does next, to stderr, because stdout may be JSON."""
    print(escape_controls(text), file=sys.stderr, flush=True)
