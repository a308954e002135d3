"""Write text on a terminal; names of files and words of data may hold control characters."""

import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from typing import TextIO

TERMINAL_COLUMNS = 80  # width of the tables that are printed
# All control characters but newline and tab, and characters that break a line or change its direction.
CONTROL_CHARACTERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def escape_controls(text: str) -> str:
    r"""Escape control characters as in a Python literal: \x1b."""
    return CONTROL_CHARACTERS.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


class EscapingStream:
    """A text stream that escapes control characters; `stream` is the wrapped one, for our escape sequences."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        """Write the text escaped."""
        return self.stream.write(escape_controls(text))

    def __getattr__(self, name: str) -> object:
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


class TerminalHandler(logging.Handler):
    """Writes information to standard output, and warnings and errors after the name of their level to standard error.

    The streams are those of the moment: `escape_output` replaces standard output.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, above the progress bars."""
        is_info = record.levelno <= logging.INFO
        text = escape_controls(f"{'' if is_info else f'{record.levelname.lower()}: '}{record.getMessage()}")
        stream = sys.stdout if is_info else sys.stderr
        if tqdm := sys.modules.get("tqdm"):  # its import takes longer than `colintern --help`
            tqdm.tqdm.write(text, file=stream)
        else:
            stream.write(f"{text}\n")
        stream.flush()


def configure_logging() -> None:
    """Show what this package logs; a program that only imports it shows warnings, as the standard library does."""
    logger = logging.getLogger("colintern")
    if not logger.handlers:
        logger.addHandler(TerminalHandler())
        logger.setLevel(logging.INFO)
        logger.propagate = False  # libraries add handlers to the root
