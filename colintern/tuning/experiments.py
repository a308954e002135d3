"""DVC's part of a trial: the experiment is started, watched over, found again and removed."""

import fcntl
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from colintern.core.project import root
from colintern.params import format_override
from colintern.storage.lock import open_lock
from colintern.tuning.store import Store
from colintern.tuning.trial_context import OWNER, STARTED, STORAGE, STUDY, TRIAL

DVC = (sys.executable, "-m", "dvc")
STOP_SECONDS = 20  # for a checkpoint; a preempted machine has 30 in all


class Taken(NamedTuple):
    """A trial that this worker runs; `id` is the storage's, `values` its settings, `before` the numbers of its killed
    tries."""

    number: int
    id: int
    values: dict[str, Any]
    before: list[int]


def experiment(store: Store, trial: Taken, name: str, log: Path, check: Callable[[], None], *options: str) -> int:
    """Run the train stage with a trial's settings through `dvc exp run --temp`, and return DVC's exit code.

    Records the trial's heartbeat meanwhile, and waits while another command, such as `dvc push`, holds DVC's lock.

    Only one worker of this repository starts an experiment at a time: DVC stashes in the workspace and applies the
    first stash it finds. The DVC process inherits the lock, so the lock survives a killed worker. That DVC process is
    not killed; its train stage exits when it finds that its worker is gone (`training.reporter`).

    Args:
        log: receives the output of DVC.
        check: raises UserError if the workspace differs from the one the study was created with. Called before DVC
            copies the workspace, and again afterwards.
    """
    told = {STORAGE: store.url, STUDY: store.study, TRIAL: str(trial.number), OWNER: str(os.getpid())}
    changes = [part for key, value in trial.values.items() for part in ("-S", format_override(key, value))]
    log.parent.mkdir(parents=True, exist_ok=True)
    lock = root() / ".scratch" / "tune-start.lock"
    with open_lock(lock) as held, log.open("wb") as output:
        while not _locked(held):
            wait(0.5, store, trial)
        check()
        process = subprocess.Popen(
            [*DVC, "--wait-for-lock", "exp", "run", "--temp", *options, *changes, "--name", name, "train"],
            env=environment() | told,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C must reach only this process
            pass_fds=[held.fileno()],
        )
        started = False
        try:
            while process.poll() is None:
                wait(0.5, store, trial)
                if not started and STARTED in store.optuna.get_trial(trial.id).user_attrs:
                    started = True
                    check()
                    fcntl.flock(held, fcntl.LOCK_UN)
        except KeyboardInterrupt:
            if started:
                _stop_training(process)
            raise
        if not started:  # failed, or DVC knew this training
            check()
        fcntl.flock(held, fcntl.LOCK_UN)
    return process.returncode


def _stop_training(process: "subprocess.Popen[bytes]") -> None:
    """Send SIGINT to a running training, which DVC ignores, and wait up to STOP_SECONDS for its checkpoint; a training
    that takes longer exits once it finds its worker gone."""
    with suppress(ProcessLookupError, subprocess.TimeoutExpired):
        os.killpg(process.pid, signal.SIGINT)
        process.wait(STOP_SECONDS)


LAST = {"beat": 0.0}


def wait(seconds: float, store: Store, trial: Taken) -> None:
    """Sleep; a sign of life where one is due."""
    if time.monotonic() - LAST["beat"] > store.heartbeat / 2:
        store.alive(trial.id)
        LAST["beat"] = time.monotonic()
    time.sleep(seconds)


def _locked(file: Any) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def environment() -> dict[str, str]:
    """With this interpreter first in PATH: a stage's command is `python -m ...`."""
    return os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout


def dvc(*arguments: str) -> None:
    subprocess.run([*DVC, *arguments], env=environment(), capture_output=True)


def experiments() -> dict[str, str]:
    """{name: ref} of the repository's DVC experiments."""
    refs = git("for-each-ref", "--format=%(refname)", "refs/exps/").splitlines()
    found = (re.fullmatch(r"refs/exps/[0-9a-f]{2}/[0-9a-f]{38}/(.+)", one) for one in refs)
    return {one[1]: one[0] for one in found if one}


def children() -> float:
    """CPU-seconds of the processes that this one has waited for, and of theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
