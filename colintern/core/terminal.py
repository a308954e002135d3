"""Print text on a terminal; names of files and words of data may hold control characters."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any, TextIO

TERMINAL_COLUMNS = 80  # width of the tables that are printed
# All control characters but newline and tab, and characters that break a line or change its direction.
CONTROL_CHARACTERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def escape_controls(text: str) -> str:
    r"""Escape control characters as in a Python literal: \x1b."""
    return CONTROL_CHARACTERS.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


class EscapingStream:
    """A text stream that escapes control characters. `stream` is the one below, for escape sequences of our own."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        """Write the text escaped."""
        return self.stream.write(escape_controls(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


STREAMS: list[EscapingStream] = []


@contextmanager
def escape_output() -> Iterator[None]:
    """Escape control characters on standard output, and characters that its encoding lacks."""
    if hasattr(sys.stdout, "reconfigure"):
        with suppress(OSError):  # of a terminal that was opened for reading too
            sys.stdout.reconfigure(errors="backslashreplace")  # as Python sets it for stderr
    # Another thread may be printing to it when the block ends; Python does not keep it alive for that thread.
    STREAMS.append(EscapingStream(sys.stdout))
    with redirect_stdout(STREAMS[-1]):  # type: ignore[type-var]
        yield


def print_coloured(text: str) -> None:
    """Print text that holds escape sequences of our own; other people's words in it are escaped by the caller."""
    print(text, file=getattr(sys.stdout, "stream", sys.stdout))


def print_phase(text: str) -> None:
    """Print what a command does next, to stderr, because stdout may be JSON."""
    print(escape_controls(text), file=sys.stderr, flush=True)
