"""What a run shows: one line of 80 columns at a terminal, a few rows in a log."""

import fcntl
import os
import pty
import re
import struct
import termios
import threading
import time
from types import SimpleNamespace

import pytest
from processes import kill
from small_run import STEPS, at_step

from colintern.core import progress as bars
from colintern.monitoring import progress
from colintern.monitoring.progress import ProgressReporter

ROW = r"loss \d\.\d{3}(, dev \d\.\d{3})?(, [\d.]+ pages/s)?, [\d.]+ GB"
TIME = r"\[(\d+:)?\d\d:\d\d<(\d+:)?(\d\d|\?):?(\d\d)?\]"


def at_terminal(name: str) -> None:
    os.environ.pop("CI", None)
    terminal = os.open(name, os.O_RDWR | os.O_NOCTTY)
    for number in (1, 2):
        os.dup2(terminal, number)


def shown_at_80_columns(place) -> str:
    """What a run prints to a terminal of 80 columns."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    found = bytearray()

    def read() -> None:
        try:
            while part := os.read(master, 4096):
                found.extend(part)
        except OSError:  # nobody has the terminal open any more
            pass

    reader = threading.Thread(target=read)
    reader.start()
    code = place.run(at_terminal, os.ttyname(slave))
    os.close(slave)
    reader.join(30)
    assert code == 0, found.decode()
    return found.decode()


@pytest.mark.integration
def test_a_terminal_of_80_columns_shows_one_line_with_all_facts(place):
    text = shown_at_80_columns(place)
    lines = [re.sub(r"\x1b\[\w+", "", line) for line in re.split(r"[\r\n]+", text)]
    assert max(map(len, lines)) <= 80, max(lines, key=len)
    bars = [line for line in lines if re.match(r" *\d+% \d+/10 \[", line)]
    assert len(bars) >= STEPS
    assert re.fullmatch(rf"100% 10/10 {TIME}, {ROW}", bars[-1].strip()), bars[-1]
    assert "dev" in bars[-1] and any("pages/s" in bar for bar in bars)
    assert text.count("\n") < 40 and "'loss'" not in text, "logged rows go to plots/, not above the bar"
    assert re.search(r"\rstep \d+:", text) or re.search(r"\nstep \d+:", text), "health's words have lines of their own"


@pytest.mark.integration
def test_a_log_gets_few_rows_and_one_that_goes_on_knows_its_last_scores(place):
    assert place.run(at_step, 7, kill) < 0
    assert place.run() == 0, place.log
    rows = re.findall(r"^step .*/10 .*$", place.log, re.M)
    assert [int(re.match(r"step (\d+)/", row)[1]) for row in rows] == [8, 9, 10, 10], rows
    assert all(re.fullmatch(rf"step \d+/10 {TIME}, {ROW}", row) for row in rows), rows
    assert "dev" in rows[0], "measured before the kill"
    assert "\r" not in place.log


@pytest.mark.parametrize("seconds", [0, 30])
def test_rows_of_a_long_run_come_every_half_minute(monkeypatch, capsys, seconds):
    clock = iter(range(10**6))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(progress, "MIN_ROW_INTERVAL", seconds)
    shown, args = ProgressReporter(pages_per_step=32), SimpleNamespace(disable_tqdm=True)
    state = SimpleNamespace(log_history=[], global_step=0, max_steps=9230, is_world_process_zero=True)
    shown.on_train_begin(args, state, None)
    for step in range(5, 1000, 5):
        state.global_step = step
        shown.on_step_begin(args, state, None)
        shown.on_step_end(args, state, None)
        shown.on_log(args, state, None, logs={"loss": 1.0})
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 199 if seconds == 0 else len(rows) < 40
    assert max(map(len, rows)) <= 80


def test_a_log_gets_a_line_of_a_long_loop_every_half_minute_and_none_of_a_short_one(monkeypatch, capsys):
    assert bars.LOG_INTERVAL == 30
    monkeypatch.setattr(bars, "LOG_INTERVAL", 0.1)
    assert sum(bars.ProgressBar([1, 2, 3], desc="short")) == 6
    with bars.ProgressBar(total=10, desc="fetching") as bar:
        bar.write("a file failed; trying again in 1 s")
    assert capsys.readouterr() == ("a file failed; trying again in 1 s\n", "")
    for _ in bars.ProgressBar(range(35), desc="indexing", unit="page"):
        time.sleep(0.01)
    text = capsys.readouterr().err
    *lines, last = text.splitlines()
    assert 2 <= len(lines) <= 4 and re.match(r"indexing: 35/35 \[00:00<00:00, +\d+", last), lines
    assert all(re.match(r"indexing: \d+/35 \[00:00<00:00, +[\d.]+page/s\]$", line) for line in lines), lines
    assert "\r" not in text and "\x1b" not in text
