"""Progress of long loops: a bar in a terminal, lines of text in a log."""

import sys
import time

from tqdm import tqdm

LOG_INTERVAL = 30  # seconds between two lines of a loop in a log
LOG_FORMAT = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]"


class ProgressBar(tqdm):
    """Draw tqdm's bar; in a log, print a line every `LOG_INTERVAL` seconds, and none of a loop that ends earlier."""

    def __init__(self, *args: object, **kwargs: object):
        self.is_log = not sys.stderr.isatty()
        self.next_line = time.monotonic() + LOG_INTERVAL
        self.printed: int | None = None  # of the loop's steps, at the last line
        if self.is_log:
            kwargs |= {"bar_format": LOG_FORMAT, "mininterval": LOG_INTERVAL, "miniters": 1, "leave": False}
        super().__init__(*args, **kwargs)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Draw the bar in its row; in a log, print a line if one is due."""
        if not self.is_log:
            return bool(super().display(msg, pos))
        if msg is None and time.monotonic() >= self.next_line:
            self.fp.write(f"{self}\n")
            self.fp.flush()
            self.next_line, self.printed = time.monotonic() + LOG_INTERVAL, self.n
        return False

    def clear(self, nolock: bool = False) -> None:
        """Clear the bar's row for other output; a log has no such row."""
        if not self.is_log:
            super().clear(nolock)

    def close(self) -> None:
        """End the bar; in a log, with a last line after those that were printed."""
        if self.is_log and self.printed not in (None, self.n):
            self.next_line = 0
            self.display()
        super().close()
