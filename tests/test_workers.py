"""DataLoader workers end with their run, however it ends, and the run reports the cause; see processes.py."""

import contextlib
import errno
import multiprocessing.popen_fork
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from processes import kill
from small_run import OUT, Run, params
from test_processes import free_port, rank_of

from colintern.core.errors import UserError, exit_on_user_error
from colintern.encoding.workers import check_workers

pytestmark = pytest.mark.integration
RUN_TIMEOUT_SECONDS = 60  # a run takes 5 s


def inject_fault(where: str) -> None:
    """Replace the named function with one that fails."""
    from transformers import TrainerCallback

    from colintern.encoding import page_features as features
    from colintern.monitoring import monitors
    from colintern.training import checkpoints, loss, pairs, trainer

    def bug(*args, **kwargs):
        raise ZeroDivisionError(f"a bug in {where}")

    def collate(self, rows):
        return {"cannot be pickled": lambda: rows}

    def refuse_fork(*args):
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    owner, name, replacement = {
        "step": (trainer.ContrastiveTrainer, "training_step", bug),
        "loss": (loss, "contrastive_loss", bug),
        "evaluation": (trainer.RetrievalEvaluator, "compute_ndcg", bug),
        "callback": (monitors.LossCurveMonitor, "on_step_end", bug),
        "save": (checkpoints, "commit_checkpoint", bug),
        "batch": (pairs.Collator, "__call__", bug),
        "page": (features.TileDataset, "__getitem__", bug),
        "queue": (pairs.Collator, "__call__", collate),
        "killed": (pairs.Collator, "__call__", lambda *args: kill()),
        "fork": (multiprocessing.popen_fork.Popen, "_launch", refuse_fork),
    }[where]
    assert hasattr(owner, name) or issubclass(owner, TrainerCallback), where
    setattr(owner, name, replacement)


def inject_fault_in_rank(rank: int, port: int) -> None:
    """Join a group of two ranks; make rank 1 inject_fault in its first step."""
    rank_of(2, rank, port)
    if rank:
        inject_fault("step")


def run_until_failure(place: Run, *arguments: object) -> int:
    """Run to a failure and return its exit code; assert that no process and no result is left."""
    process = place.start(*arguments)
    process.join(RUN_TIMEOUT_SECONDS)
    assert process.exitcode is not None, f"hangs: {place.log}"
    assert not (place.folder / OUT).exists()
    left = [p.pid for p in psutil.process_iter() if p.pid != os.getpid() and _works_in(p, place.folder)]
    assert not left, place.log
    return process.exitcode


def _works_in(process: psutil.Process, folder: Path) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.cwd() == str(folder)
    return False


@pytest.mark.parametrize(
    ("where", "workers"),
    [
        *((where, 1) for where in ("step", "loss", "evaluation", "callback", "save", "batch", "page")),
        *(("step", workers) for workers in (0, 4)),
    ],
)
def test_a_bug_ends_the_run_with_its_traceback(place, where, workers):
    shutil.rmtree(place.folder / "data" / ".features", ignore_errors=True)  # of the run that the fixture may have made
    with contextlib.chdir(place.folder):
        params(lr="2e-3", workers=workers)
    assert run_until_failure(place, inject_fault, where) == 1
    assert "Traceback" in place.log and f"a bug in {where}" in place.log


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (
            "killed",
            r"error: DataLoader worker \(pid\(?s?\)? \d+\) .*; it probably ran out of memory\. Lower workers \(now 1\)",
        ),
        ("queue", r"a worker cannot send a batch: .*\nerror: DataLoader worker .*; it probably ran out of memory"),
        ("fork", r"error: workers: 1: cannot start another process \(Resource temporarily unavailable\); lower"),
    ],
)
def test_a_lost_worker_is_reported_without_a_traceback(place, where, message):
    with contextlib.chdir(place.folder):
        params(lr="2e-3", workers=1)
    assert run_until_failure(place, inject_fault, where) == 6, place.log
    assert "Traceback" not in place.log
    assert re.search(message, place.log), place.log


def test_a_bug_in_one_rank_ends_all(place):
    with contextlib.chdir(place.folder):
        params(lr="2e-3", workers=1)
    port = free_port()
    ranks = [place.start(inject_fault_in_rank, rank, port) for rank in range(2)]
    for process in ranks:
        process.join(RUN_TIMEOUT_SECONDS)
    assert None not in {process.exitcode for process in ranks} and 0 not in {process.exitcode for process in ranks}
    assert "a bug in step" in place.log and not (place.folder / OUT).exists()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("can't start new thread"),
        RuntimeError("unable to mmap 903168 bytes from file <filename not specified>: Cannot allocate memory (12)"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
    ],
)
def test_lack_of_memory_is_reported_without_a_traceback(error, capsys):
    with pytest.raises(SystemExit) as stopped, exit_on_user_error():
        raise error
    assert stopped.value.code == 6
    told = capsys.readouterr().err
    assert told.startswith(f"error: out of memory: {type(error).__name__}: ") and "; give this process more mem" in told


def test_any_error_at_the_limit_of_the_address_space_is_lack_of_memory(monkeypatch, capsys):
    """As of a module that is half imported."""
    size = psutil.Process().memory_info().vms
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (size, size))
    with pytest.raises(SystemExit) as stopped, exit_on_user_error():
        raise AttributeError("half imported")
    assert stopped.value.code == 6
    assert f"AttributeError: half imported; `ulimit -v` allows {size / 1e9:.1f} GB" in capsys.readouterr().err
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (2 * size + 2**34, -1))
    with pytest.raises(AttributeError), exit_on_user_error():
        raise AttributeError("a bug")


def test_too_many_workers_are_refused(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    check_workers(8)
    with pytest.raises(UserError, match="workers: 9 is not valid on a machine of 2 CPUs; it must be from 0 to 8"):
        check_workers(9)


START_A_THREAD = """
import re, resource, sys, threading
from colintern.core.errors import exit_on_user_error

size = 1024 * int(re.search(r"VmSize:\\s+(\\d+)", open("/proc/self/status").read())[1])
resource.setrlimit(resource.RLIMIT_AS, (size + int(sys.argv[1]) * 1024**2,) * 2)
with exit_on_user_error():
    threading.Thread(target=print, args=["started"]).start()
"""


@pytest.mark.parametrize(("mebibytes", "code", "told"), [(100, 6, "error: out of memory: "), (600, 0, "started\n")])
def test_a_thread_is_refused_where_it_could_run_out_of_memory_before_it_started(mebibytes, code, told):
    """Its `start` would wait forever."""
    found = subprocess.run([sys.executable, "-c", START_A_THREAD, str(mebibytes)], capture_output=True, text=True)
    assert found.returncode == code and (found.stdout + found.stderr).startswith(told), found.stderr
