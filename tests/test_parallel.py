"""`parallel_map` gives the same results whether this process does the work, others do, or both; in an `IsolatedPool` a
call that ends its process fails alone."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

import pytest

from colintern.core.errors import UserError
from colintern.storage import isolation, parallel
from colintern.storage.isolation import CallLimits, Failure, IsolatedPool, try_call
from colintern.storage.parallel import parallel_map

pytestmark = pytest.mark.integration


def where(number: int) -> tuple[int, int]:
    return number * number, os.getpid()


def slowly(number: int) -> tuple[int, int]:
    time.sleep(0.15)
    return where(number)


@pytest.mark.parametrize("seconds", [60.0, 0.0])
def test_results_come_in_order_from_here_or_from_other_processes(monkeypatch, seconds):
    monkeypatch.setattr(parallel, "SERIAL_SECONDS", seconds)
    found = list(parallel_map(where, range(9), "squares", "number"))
    assert [square for square, _ in found] == [number * number for number in range(9)]
    assert {process == os.getpid() for _, process in found} == {seconds > 0}


def test_what_is_left_after_the_first_seconds_goes_to_other_processes(monkeypatch):
    monkeypatch.setattr(parallel, "SERIAL_SECONDS", 0.2)
    found = list(parallel_map(slowly, range(5), "squares", "number"))
    assert [square for square, _ in found] == [0, 1, 4, 9, 16]
    assert [process == os.getpid() for _, process in found] == [True, True, False, False, False]


def test_nothing_to_do():
    assert list(parallel_map(where, [], "squares", "number")) == []


def end_itself(number: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_ends_the_work_with_a_sentence(monkeypatch):
    monkeypatch.setattr(parallel, "SERIAL_SECONDS", 0.0)
    with pytest.raises(UserError, match=r"squares: one of .* processes was killed"):
        list(parallel_map(end_itself, range(3), "squares", "number"))


def act(actions: Sequence[str]) -> Iterator[object]:
    for action in actions:
        if action.startswith("SIG"):
            os.kill(os.getpid(), signal.Signals[action])
        elif action == "exit":
            os._exit(3)
        elif action == "spin":
            while True:
                pass
        elif action == "sleep":
            time.sleep(60)
        elif action == "no room":
            raise OSError(28, "No space left on device")
        yield try_call(bytearray, 2**40) if action == "memory" else (action, os.getpid())


def test_a_call_that_ends_its_process_costs_no_other(monkeypatch):
    monkeypatch.setattr(isolation, "SECOND_WORKER_DELAY_SECONDS", 0.0)
    monkeypatch.setattr(isolation, "WALL_TIME_FACTOR", 100)  # other tests may have the CPU
    groups = [["a", "SIGKILL", "b", "SIGSEGV"], ["spin", "c"], ["memory", "d", "exit"]]
    with IsolatedPool(CallLimits(1, 2**31), processes=2) as pool:
        found = list(pool.map(act, groups))
        assert [one[0] for one in found if not isinstance(one, Failure)] == ["a", "b", "c", "d"]
        reasons = [one.reason for one in found if isinstance(one, Failure)]
        expected = ["SIGKILL", "SIGSEGV", "more than 1 s of CPU", "needs more memory", "(exit code 3)"]
        assert all(words in reason for words, reason in zip(expected, reasons, strict=True)), reasons
        monkeypatch.setattr(isolation, "WALL_TIME_FACTOR", 3)
        assert [one[0] for one in pool.map(act, [["e", "sleep"]])] == ["e", "did not finish in 3 s"]
        monkeypatch.undo()
        with pytest.raises(OSError, match="No space left"):
            list(pool.map(act, [["no room"]]))
        processes = [worker.process for worker in pool.workers]
    assert processes and all(process.poll() is not None for process in processes)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_worker_outlives_its_parent(number):
    main = "from test_parallel import *\nwith IsolatedPool(CallLimits(60, 2**31)) as pool:\n"
    main += "    for result in pool.map(act, [['a', 'spin']]):\n        print(result, flush=True)"
    with subprocess.Popen(
        [sys.executable, "-c", main], cwd=os.path.dirname(__file__), start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as parent:  # fmt: skip
        assert parent.stdout.readline().startswith("('a'")
        send = os.killpg if number == signal.SIGINT else os.kill  # Ctrl-C reaches the group
        send(parent.pid, number)
        _, errors = parent.communicate(timeout=20)  # until no process has the pipes open
    assert parent.returncode == -number and errors.count("Traceback") == (number == signal.SIGINT)


def test_a_worker_that_does_not_start_ends_the_work(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with (
        IsolatedPool(CallLimits(1, 2**31)) as pool,
        pytest.raises(UserError, match=r"cannot be started: exit code 1; see the messages above"),
    ):
        list(pool.map(act, [["a"]]))
