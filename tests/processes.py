"""Processes that tests start: forked from a server that has imported what takes ten seconds to import.

A fault is a function that the process calls before it does its work; those that kill do it with SIGKILL, in the middle
of what they are named after.
"""

import logging
import multiprocessing
import os
import runpy
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from colintern.core.terminal import configure_logging

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        *(f"colintern.{name}" for name in ("training.run", "modeling.loading", "evaluation.run")),
        *("colintern.evaluation.models", "colintern.tuning.studies", "optuna", "sqlalchemy"),
    ]
)

Fault = Callable[..., None] | None


class Place:
    """A folder in which runs of `work(*command)` are started; what a run prints is in `out`, `err` and `log`, both."""

    def __init__(self, folder: Path, work: Callable[..., None]):
        self.folder, self.work = folder, work

    def start(self, fault: Fault = None, *arguments: object, command: str = "") -> multiprocessing.process.BaseProcess:
        process = FORKS.Process(target=_child, args=(self.folder, self.work, shlex.split(command), fault, *arguments))
        process.start()
        return process

    def run(self, fault: Fault = None, *arguments: object, command: str = "") -> int:
        """The exit code, negative for a signal."""
        process = self.start(fault, *arguments, command=command)
        process.join(180)
        assert process.exitcode is not None, "hangs"
        return process.exitcode

    @property
    def out(self) -> str:
        return (self.folder / "out.txt").read_text()

    @property
    def err(self) -> str:
        return (self.folder / "err.txt").read_text()

    @property
    def log(self) -> str:
        return self.out + self.err


def _child(folder: Path, work: Callable[..., None], command: list[str], fault: Fault, *arguments: object) -> None:
    os.chdir(folder)
    for number, name in ((1, "out.txt"), (2, "err.txt")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND), number)
    multiprocessing.set_start_method(None, force=True)  # what a process has that was started from a shell
    configure_logging()
    logging.getLogger("colintern").propagate = False  # conftest sets it for `caplog`, which has no part here
    if fault:
        fault(*arguments)
    work(*command)


def program(name: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """What `python -m NAME` does in the current folder, without the seconds that its imports take."""
    run = Place(Path.cwd(), _as_main)
    code = run.run(None, command=shlex.join([name, *arguments]))
    return subprocess.CompletedProcess([name, *arguments], code, run.out, run.err)


def _as_main(name: str, *arguments: str) -> None:
    sys.argv = [name, *arguments]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def signal_self(*numbers: int) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


def kill() -> None:
    signal_self(signal.SIGKILL)


def leave() -> None:
    os._exit(99)
