"""A `python` command that forks from a server which has imported torch, transformers and the like.

A process of ours needs 8 CPU-seconds for these imports, and the tests of DVC's commands start a hundred of them. The
child runs the module as the main program in the folder, environment and streams of the command that asked for it, with
the code that is there: only libraries are imported in advance. What else `python` is called with runs as usual.

python tests/forked_python.py ADDRESS LIBRARY...    serves until its standard input ends
"""

import atexit
import contextlib
import importlib
import json
import os
import runpy
import select
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

LIBRARIES = """torch torchvision accelerate peft datasets mteb optuna sqlalchemy colpali_engine transformers.trainer
transformers.models.internvl.modeling_internvl transformers.models.qwen3.modeling_qwen3"""
# Without `datasets`, which reads whether it may use the hub when it is imported.
UNHUBBED = "torch torchvision transformers.modeling_utils peft"
# Signals that a stopped command gets are sent on, since the child is another process than the command's.
COMMAND = f"""#!{sys.executable} -ISE
import json, os, signal, socket, sys
argv = sys.argv[1:]
if argv[:1] != ["-m"] or not argv[1].startswith(("stages.", "colintern")):
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
    """Run a server; yield a folder for the front of PATH, with its `python`.

    `env` is what the libraries read when they are imported.
    """
    with tempfile.TemporaryDirectory() as folder:  # a socket's path has a limit, 107 characters
        address, command = Path(folder) / "server", Path(folder) / "bin" / "python"
        command.parent.mkdir()
        command.write_text(COMMAND.format(address=str(address)))
        command.chmod(0o755)
        env = os.environ | {"HOME": folder, "XDG_CACHE_HOME": folder, "HF_HOME": folder, "HF_HUB_OFFLINE": "1"} | env
        arguments = [sys.executable, __file__, str(address), *libraries.split()]
        server = subprocess.Popen(arguments, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert server.stdin and server.stdout
        try:
            assert server.stdout.readline() == b"ready\n"
            yield command.parent
        finally:
            server.stdin.close()
            server.wait(60)
            server.stdout.close()


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
    sys.argv[:] = [name, *arguments]
    sys.path[:1] = [os.getcwd(), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    run_module(name)
