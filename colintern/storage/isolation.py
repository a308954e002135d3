"""Run a function on many arguments in processes that can be killed.

A call that hangs, crashes or takes all memory fails alone.

A process pool of the standard library breaks as a whole when one worker dies, and never ends a slow one.
"""

import ctypes
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from heapq import heappop, heappush
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from colintern.core.errors import UserError

T = TypeVar("T")
WALL_TIME_FACTOR = 10  # wall-time limit per second of the CPU limit: a call may wait or share its CPU
SECOND_WORKER_DELAY_SECONDS = 2.0  # more workers are started only after this: each spends CPU time on imports
PR_SET_PDEATHSIG = 1  # option of prctl(2)


class CallLimits(NamedTuple):
    """Bounds on one call: CPU time, and memory of its process in bytes."""

    seconds: int
    memory: int


class Failure(NamedTuple):
    """The reason why a call has no result."""

    reason: str


class IsolatedPool:
    """Worker processes that are started when they are needed, and killed at the end of the `with` block.

    Args:
        limits: bounds on each call.
        processes: maximum number of workers; 0 means one per CPU.
    """

    def __init__(self, limits: CallLimits, processes: int = 0):
        self.limits, self.processes = limits, processes or os.cpu_count() or 1
        self.workers: list[_Worker] = []
        self.started = time.monotonic()

    def __enter__(self) -> "IsolatedPool":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            worker.end()

    def map(self, function: Callable[[Sequence[T]], Iterator[object]], groups: Sequence[Sequence[T]]) -> Iterator[Any]:
        """Yield one result per argument, in their order; a `Failure` where the call crashed or exceeded a limit.

        Workers send large results only as they are read here, so each holds at most one in memory.

        Args:
            function: yields a result for each argument of a group; picklable. After a call that ended the process it
                is called again with the rest of the group.
            groups: the arguments.

        Raises:
            UserError: no worker can be started.
            Exception: what the function raises.
        """
        waiting: list[tuple[int, Sequence[object]]] = []  # a heap of (number of the first argument, arguments)
        total = 0
        for group in groups:
            waiting.append((total, group))
            total += len(group)
        results: dict[int, object] = {}
        for number in range(total):
            while number not in results:
                self._assign_groups(function, waiting)
                self._collect_results(waiting, results)
            result = results.pop(number)
            if isinstance(result, Exception):
                raise result
            yield result

    def _assign_groups(self, function: object, waiting: list[tuple[int, Sequence[object]]]) -> None:
        """Send groups to idle workers, and to new ones."""
        while waiting:
            worker = next((worker for worker in self.workers if not worker.group), None)
            if worker is None:
                grows = not self.workers or time.monotonic() > self.started + SECOND_WORKER_DELAY_SECONDS
                if not grows or len(self.workers) >= self.processes:
                    return
                worker = _Worker(self.limits)
                self.workers.append(worker)
            worker.send(function, *heappop(waiting))

    def _collect_results(self, waiting: list[tuple[int, Sequence[object]]], results: dict[int, object]) -> None:
        """Wait for results; put back the arguments that an ended worker has not reached."""
        busy = [worker for worker in self.workers if worker.group]
        deadline = min(worker.deadline for worker in busy)
        ready = wait([worker.connection for worker in busy], min(1.0, max(0, deadline - time.monotonic())))
        for worker in busy:
            if worker.connection not in ready and time.monotonic() < worker.deadline:
                continue
            results.update(worker.receive(late=worker.connection not in ready))
            if worker.process.returncode is not None:
                self.workers.remove(worker)
                if worker.group:
                    heappush(waiting, (worker.first, worker.group))


class _Worker:
    """A process and the arguments that it still has to process; `first` is the number of the first of them."""

    def __init__(self, limits: CallLimits):
        self.limits, self.is_ready = limits, False
        self.first, self.deadline = 0, 0.0
        self.group: Sequence[object] = []
        self.connection, theirs = Pipe()
        # A process of multiprocessing would import the program's main file first.
        main = f"import sys; sys.path[:] = {sys.path!r}; import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        main += f"from colintern.storage.isolation import run_worker; run_worker({theirs.fileno()}, *{tuple(limits)})"
        command = [sys.executable, "-c", main]
        environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}  # each thread's stack counts as memory
        self.process = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        theirs.close()

    def send(self, function: object, first: int, group: Sequence[object]) -> None:
        self.first, self.group = first, group
        self._extend_deadline()
        with suppress(OSError):  # it has ended, which `receive` finds
            self.connection.send((function, group))

    def _extend_deadline(self) -> None:
        self.deadline = time.monotonic() + self.limits.seconds * WALL_TIME_FACTOR

    def receive(self, late: bool) -> dict[int, object]:
        """Return the next result by its number; `Failure` where the process ended, or is `late` and killed here.

        Raises:
            UserError: it ended before its first call.
        """
        try:
            if late:
                raise EOFError
            result = self.connection.recv()
        except (EOFError, OSError):
            self.end(late)
            if not self.is_ready:
                raise UserError(
                    f"a worker process cannot be started: {self._describe_exit()}; see the messages above"
                ) from None
            result = Failure(self._describe_failure(late))
        self._extend_deadline()
        if not self.is_ready:
            self.is_ready = True
            return {}
        self.first, self.group = self.first + 1, self.group[1:]
        return {self.first - 1: result}

    def end(self, kill: bool = True) -> None:
        """Wait for the process to exit, killing it first if `kill`, and close the connection."""
        if kill:
            self.process.kill()
        self.process.wait()
        self.connection.close()

    def _describe_failure(self, late: bool) -> str:
        code = self.process.returncode
        if late:
            return f"did not finish in {self.limits.seconds * WALL_TIME_FACTOR} s"
        if code == -signal.SIGXCPU:
            return f"takes more than {self.limits.seconds} s of CPU time"
        memory = f"{self.limits.memory / 1e9:.1f} GB of memory"
        return f"its process ended ({self._describe_exit()}): it is damaged, or needs more than {memory}"

    def _describe_exit(self) -> str:
        """Return how the process ended: its signal or its exit code."""
        code = self.process.returncode
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def run_worker(descriptor: int, seconds: int, memory: int) -> None:
    """Call functions that arrive over a connection, until its other end is closed.

    Ctrl-C, which reaches the whole process group, is ignored: the parent ends its workers.
    """
    if sys.platform == "linux":  # elsewhere a call outlives a killed parent until its limit of CPU time
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # where memory is short, this process goes first
    _lower_limit(resource.RLIMIT_CORE, 0)
    _lower_limit(resource.RLIMIT_DATA, memory)
    with Connection(descriptor) as connection, suppress(EOFError, OSError):
        connection.send(None)
        while True:
            function, group = connection.recv()
            results = function(group)
            for _ in group:
                used = resource.getrusage(resource.RUSAGE_SELF)
                _lower_limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + seconds + 1)
                connection.send(_get_next_result(results))


def _get_next_result(results: Iterator[object]) -> object:
    try:
        return next(results)
    except Exception as error:  # raised in the parent
        return error


def try_call(function: Callable[..., T], *arguments: object) -> T | Failure:
    """Call a function; return `Failure` for any exception."""
    try:
        return function(*arguments)
    except MemoryError:
        return Failure("needs more memory than its process may take")
    except Exception as error:
        return Failure(str(error) or type(error).__name__)


def _lower_limit(kind: int, value: int) -> None:
    """Set a soft limit, which may already be lower for all processes of the user."""
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))
