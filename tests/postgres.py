"""A real PostgreSQL server, from Debian's package, on a free port, for one test."""

import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest


def _initdb() -> Path | None:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return found[-1] if found and (os.getuid() or shutil.which("runuser")) else None


INITDB = _initdb()


@pytest.fixture
def postgresql_or_none(request):
    """The address of a server, or "" where none is installed: then a study lives in its file."""
    return request.getfixturevalue("postgresql") if INITDB else ""


@pytest.fixture
def postgresql():
    """The address of a PostgreSQL server of our own; its password, `marked@word`, is in it as `marked%40word`."""
    if INITDB is None:
        pytest.skip("needs Debian's package postgresql")
    home = Path(tempfile.mkdtemp(prefix="pg-"))  # a socket's path must be short, and the server's user must see it
    (home / "password").write_text("marked@word\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    user = ["runuser", "-u", "nobody", "--"] if os.getuid() == 0 else []  # PostgreSQL refuses to be root
    if user:
        subprocess.run(["chown", "-R", "nobody", str(home)], check=True)
    data, options = f"{home}/data", f"-p {port} -c listen_addresses=127.0.0.1 -c fsync=off -k {home}"

    def run(name: str, *arguments: str) -> None:
        subprocess.run([*user, str(INITDB.with_name(name)), "-D", data, *arguments], check=True, capture_output=True)

    run("initdb", "--no-sync", "-U", "me", f"--pwfile={home}/password", "-A", "scram-sha-256")
    run("pg_ctl", "-o", options, "-l", f"{home}/log", "-w", "start")
    yield f"postgresql://me:marked%40word@127.0.0.1:{port}/postgres"
    run("pg_ctl", "-m", "immediate", "stop")
    shutil.rmtree(home)
