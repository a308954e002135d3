"""Progress of long loops: a bar in a terminal, lines of text in a log."""

import sys
from typing import Any

from tqdm import tqdm

LOG_INTERVAL = 30  # seconds between two lines of a loop in a log
LOG_FORMAT = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]"


class ProgressBar(tqdm):
    """Draw tqdm's bar; in a log, print a line every `LOG_INTERVAL` seconds, and none of a loop that ends earlier."""

    def __init__(self, *args: Any, **kwargs: Any):
        if not sys.stderr.isatty():
            kwargs |= {"bar_format": LOG_FORMAT, "delay": LOG_INTERVAL, "mininterval": LOG_INTERVAL, "miniters": 1}
        super().__init__(*args, **kwargs)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Draw the bar in its row; in a log, print it as a line of its own."""
        if self.fp.isatty():
            return bool(super().display(msg, pos))
        print(self if msg is None else msg, file=self.fp, flush=True)
        return True

    def clear(self, nolock: bool = False) -> None:
        """Clear the bar's row for other output; a log has no such row."""
        if self.fp.isatty():
            super().clear(nolock)
