"""The subcommands of `colintern`, one module each (see colintern/__main__.py), and what they print with."""

import sys
from collections.abc import Iterable
from textwrap import fill
from typing import TYPE_CHECKING, TextIO

from colintern.core.terminal import escape_controls

if TYPE_CHECKING:
    from colintern.ingest.documents import InvalidRow


def print_coloured(text: str) -> None:
    """Print text with our escape sequences; the caller escapes foreign text in it."""
    print(text, file=getattr(sys.stdout, "stream", sys.stdout))


def print_phase(text: str) -> None:
    """Print what a command does next, to stderr, because stdout may be JSON."""
    print(escape_controls(text), file=sys.stderr, flush=True)


def print_left_out(pages: "Iterable[InvalidRow]", log: TextIO | None = None) -> None:
    """Print the pages that cannot be read, within the width of a terminal; to stdout by default."""
    for page in pages:
        line = escape_controls(f"left out: {page.where}: {page.reason}")  # before it is measured
        print(fill(line, 80, subsequent_indent="  ", break_long_words=False), file=log)
