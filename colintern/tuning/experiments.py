"""The DVC experiment of a trial: started, waited for, found again and removed."""

import fcntl
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, TextIO

from colintern.core.project import root
from colintern.params import format_override
from colintern.storage.lock import open_lock
from colintern.tuning.study_storage import StudyStorage
from colintern.tuning.trial_context import OWNER, STARTED, STORAGE, STUDY, TRIAL

DVC = (sys.executable, "-m", "dvc")
POLL_SECONDS = 0.5
STOP_SECONDS = 20  # for a checkpoint; a preempted machine has 30 in all


class ClaimedTrial(NamedTuple):
    """A trial that this worker runs; `id` is the storage's, `values` are its settings.

    `killed_tries` are the numbers of the trials of the same settings whose workers were killed.
    """

    number: int
    id: int
    values: dict[str, object]
    killed_tries: list[int]


def run_experiment(
    storage: StudyStorage, trial: ClaimedTrial, name: str, log: Path, check_workspace: Callable[[], None], *options: str
) -> int:
    """Run the train stage with a trial's settings through `dvc exp run --temp`, and return DVC's exit code.

    Records the trial's heartbeat meanwhile, and waits while another command, such as `dvc push`, holds DVC's lock.
    `log` receives DVC's output. `check_workspace` raises UserError if the workspace differs from the one that the study
    was created with; it is called before DVC copies the workspace, and again afterwards.

    Only one worker of this repository starts an experiment at a time: DVC stashes in the workspace and applies the
    first stash it finds. The DVC process inherits the lock, so the lock survives a killed worker. That DVC process is
    not killed; its train stage exits when it finds that its worker is gone (`tuning.pruning`).
    """
    context = {STORAGE: storage.url, STUDY: storage.study_name, TRIAL: str(trial.number), OWNER: str(os.getpid())}
    changes = [part for key, value in trial.values.items() for part in ("-S", format_override(key, value))]
    log.parent.mkdir(parents=True, exist_ok=True)
    with open_lock(root() / ".scratch" / "tune-start.lock") as lock, log.open("wb") as output:
        while not _try_lock(lock):
            storage.sleep(POLL_SECONDS, trial.id)
        check_workspace()
        process = subprocess.Popen(
            [*DVC, "--wait-for-lock", "exp", "run", "--temp", *options, *changes, "--name", name, "train"],
            env=_get_stage_environment() | context,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C must reach only this process
            pass_fds=[lock.fileno()],
        )
        has_started = False
        try:
            while process.poll() is None:
                storage.sleep(POLL_SECONDS, trial.id)
                if not has_started and STARTED in storage.rdb.get_trial(trial.id).user_attrs:
                    has_started = True
                    check_workspace()
                    fcntl.flock(lock, fcntl.LOCK_UN)
        except KeyboardInterrupt:
            if has_started:
                _stop_training(process)
            raise
        if not has_started:  # failed, or DVC knew this training
            check_workspace()
        fcntl.flock(lock, fcntl.LOCK_UN)
    return process.returncode


def _try_lock(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _stop_training(process: "subprocess.Popen[bytes]") -> None:
    """Send SIGINT to a running training, which DVC ignores, and wait up to STOP_SECONDS for its checkpoint.

    A training that takes longer exits once it finds its worker gone.
    """
    with suppress(ProcessLookupError, subprocess.TimeoutExpired):
        os.killpg(process.pid, signal.SIGINT)
        process.wait(STOP_SECONDS)


def _get_stage_environment() -> dict[str, str]:
    """Return this environment with this interpreter first in PATH: a stage's command is `python -m ...`."""
    return os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}


def run_git(*arguments: str) -> str:
    """Run git, and return what it prints."""
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout


def list_experiments() -> dict[str, str]:
    """Return {name: ref} of the repository's DVC experiments."""
    refs = run_git("for-each-ref", "--format=%(refname)", "refs/exps/").splitlines()
    matches = (re.fullmatch(r"refs/exps/[0-9a-f]{2}/[0-9a-f]{38}/(.+)", ref) for ref in refs)
    return {match[1]: match[0] for match in matches if match}


def remove_experiment(name: str) -> None:
    """Remove a DVC experiment if it exists."""
    subprocess.run([*DVC, "exp", "remove", "-q", name], env=_get_stage_environment(), capture_output=True)
