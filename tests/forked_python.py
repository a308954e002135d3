"""Commands `python` and `dvc` that fork from a server which has imported torch, transformers, DVC and the like.

A process of ours needs 8 CPU-seconds for these imports and one of DVC's 1 to 2, and the tests of DVC's commands start
hundreds of them. The child runs the module as the main program in the folder, environment and streams of the command
that asked for it, with the code that is there: only libraries are imported in advance. What else `python` is called
with runs as usual.

python tests/forked_python.py ADDRESS LIBRARY...    serves until its standard input ends
"""

import atexit
import contextlib
import fcntl
import importlib
import json
import logging
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

DVC = """dvc.cli.parser dvc.utils.hydra dvc.repo.reproduce dvc.repo.experiments.queue.celery dvc.repo.plots hydra
networkx dvc_s3 s3fs"""
LIBRARIES = f"""torch torchvision accelerate peft datasets mteb optuna sqlalchemy colpali_engine transformers.trainer
transformers.models.internvl.modeling_internvl transformers.models.qwen3.modeling_qwen3 {DVC}"""
# Without `datasets`, which reads whether it may use the hub when it is imported.
UNHUBBED = "torch torchvision transformers.modeling_utils peft"
# Signals that a stopped command gets are sent on, since the child is another process than the command's.
COMMAND = f"""#!{sys.executable} -ISE
import json, os, signal, socket, sys
argv = sys.argv[1:]
if argv[:1] != ["-m"] or not argv[1].startswith(("stages.", "colintern", "dvc", "held")):
    os.execv({sys.executable!r}, [{sys.executable!r}, *argv])
with socket.socket(socket.AF_UNIX) as server:
    server.connect({{address!r}})
    request = json.dumps([argv[1:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [len(request).to_bytes(8, "big")], [0, 1, 2])
    server.sendall(request)
    child = int.from_bytes(server.recv(8), "big")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _: os.kill(child, number))
    status = int.from_bytes(server.recv(8), "big", signed=True)
if status < 0:
    signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
sys.exit(status)
"""


@contextlib.contextmanager
def run_server(libraries: str = LIBRARIES, **env: str) -> Iterator[Path]:
    """Run a server; yield a folder for the front of PATH, with its commands.

    `env` is what the libraries read when they are imported.
    """
    with tempfile.TemporaryDirectory() as folder:  # a socket's path has a limit, 107 characters
        users, theirs = os.pipe()
        server = start_server(Path(folder), libraries, env, users)
        try:
            yield Path(folder) / "bin"
        finally:
            os.close(theirs)
            server.wait(60)


@contextlib.contextmanager
def join_server(folder: Path) -> Iterator[Path]:
    """Run a server for all processes that test, in a folder of theirs: the first starts it, and it ends with the last.

    Each holds the writing end of a named pipe, the server's standard input.
    """
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            held = os.open(folder / "users", os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # not there, or nobody reads it
            shutil.rmtree(folder / "bin", ignore_errors=True)
            for name in ("users", "server"):
                (folder / name).unlink(missing_ok=True)
            os.mkfifo(folder / "users")
            users = os.open(folder / "users", os.O_RDONLY | os.O_NONBLOCK)
            held = os.open(folder / "users", os.O_WRONLY)
            start_server(folder, LIBRARIES, {}, users)
    try:
        yield folder / "bin"
    finally:
        os.close(held)


def start_server(folder: Path, libraries: str, env: dict[str, str], users: int) -> "subprocess.Popen[bytes]":
    """Write the commands into `bin` and start the server, which ends when nobody writes to `users` any more."""
    (folder / "bin").mkdir()
    commands = {
        "python": COMMAND.format(address=str(folder / "server")),
        "dvc": f'#!/bin/sh\nexec {folder}/bin/python -m dvc "$@"\n',
    }
    for name, text in commands.items():
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    home = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "HF_HOME"), str(folder))
    arguments = [sys.executable, __file__, str(folder / "server"), *libraries.split()]
    server = subprocess.Popen(
        arguments, env=os.environ | home | {"HF_HUB_OFFLINE": "1"} | env, stdin=users, stdout=subprocess.PIPE
    )
    os.close(users)
    assert server.stdout and server.stdout.readline() == b"ready\n"
    server.stdout.close()
    return server


def serve(address: str, *libraries: str) -> list[str]:
    """Answer requests, each in a child; returns in the child alone, with the arguments of its command."""
    for name in libraries:
        importlib.import_module(name)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(64)
        print("ready", flush=True)
        while listener in (ready := select.select([listener, sys.stdin], [], [])[0]) or sys.stdin not in ready:
            connection, _ = listener.accept()
            if not os.fork():
                listener.close()
                return answer(connection)
            connection.close()
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
    os._exit(0)


def answer(connection: socket.socket) -> list[str]:
    """Fork the command's process, and tell the command its id and how it ends; if the command is killed, it is too."""
    prefix, streams, *_ = socket.recv_fds(connection, 8, 3)
    with connection.makefile("rb") as file:
        argv, folder, env = json.loads(file.read(int.from_bytes(prefix, "big")))
    if not (child := os.fork()):
        connection.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        # colorama wrapped them for a library, and removes colours, since the server's output is no terminal.
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(env)
        return argv
    for stream in (*streams, 0, 1, 2):
        os.close(stream)
    connection.sendall(child.to_bytes(8, "big"))
    ended = os.pidfd_open(child)
    if ended not in select.select([ended, connection], [], [])[0]:
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(status.to_bytes(8, "big", signed=True))
    os._exit(0)


def run_module(name: str) -> NoReturn:
    """Run a module as the main program, and exit without the seconds in which Python would free what is imported."""
    code: object = 0
    try:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if not isinstance(code, int | None):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code or 0)


if __name__ == "__main__":
    name, *arguments = serve(*sys.argv[1:])
    if name == "dvc":
        logging.root.handlers.clear()  # those of libraries that DVC does not import
    sys.argv[:] = [name, *arguments]
    sys.path[:1] = [os.getcwd(), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    run_module(name)
