"""docker/entrypoint, run for real on this machine; `docker/prove.sh` runs it in the image, around the real training."""

import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration
ROOT = Path(__file__).resolve().parent.parent
ENTRY = str(ROOT / "docker" / "entrypoint")
STRANGER = 12345
# Counts what reaches it, as a stage that goes on to its checkpoint; a default handler says that Ctrl-C works at all.
COUNTS = """
import signal, sys, time
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
got = []
signal.signal(signal.SIGINT, lambda *_: got.append(1))
print("up", flush=True)
while not got: time.sleep(0.02)
time.sleep(0.5)
print("signals", len(got), flush=True)
sys.exit(75)
"""
# As `dvc repro`: waits out SIGINT, which is for the stage, and would die of SIGTERM.
LIKE_DVC = f"""
import signal, subprocess, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
heed = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
child = subprocess.Popen([sys.executable, "-c", {COUNTS!r}], preexec_fn=heed)
sys.exit(child.wait() + 1)
"""
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be another user's; docker/prove.sh is")


@pytest.fixture
def repository(tmp_path):
    """A repository of a user whom this machine does not know, below a folder that everyone may enter."""
    folder = tmp_path / "repo"
    for parent in (tmp_path, *tmp_path.parents[:-2]):
        parent.chmod(parent.stat().st_mode | 0o011)
    subprocess.run(["git", "init", "-q", folder], check=True)
    (folder / "sub").mkdir()
    subprocess.run(["chown", "-R", f"{STRANGER}:{STRANGER}", folder], check=True)
    return folder


def run(*command: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([ENTRY, *command], capture_output=True, text=True, timeout=60, **options)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["docker stop", "docker kill -s INT"])
@pytest.mark.parametrize(("program", "code"), [(COUNTS, 75), (LIKE_DVC, 76)], ids=["a stage", "a stage below dvc"])
def test_a_signal_to_the_entry_point_is_one_ctrl_c_for_all(number, program, code):
    command = [ENTRY, sys.executable, "-c", program]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as entry:
        assert entry.stdout is not None and entry.stdout.readline() == "up\n"
        entry.send_signal(number)
        assert entry.stdout.read() == "signals 1\n"
        assert entry.wait(60) == code


def test_ctrl_c_on_a_terminal_comes_once():
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(ENTRY, [ENTRY, sys.executable, "-c", COUNTS])
    said = b""
    while b"up" not in said:
        said += os.read(terminal, 100)
    os.write(terminal, b"\x03")
    while not (counted := re.search(rb"signals (\d+)\r", said)):  # a terminal hands on what is there
        said += os.read(terminal, 100)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 75
    assert counted[1] == b"1"
    os.close(terminal)


def test_input_output_and_exit_code_are_the_commands():
    done = run("sh", "-c", "cat; echo fault >&2; exit 7", input="asked")
    assert (done.stdout, done.stderr, done.returncode) == ("asked", "fault\n", 7)
    assert run("no-such-program").returncode == 127


@as_root
@pytest.mark.parametrize("place", [".", "sub"])
def test_root_is_refused_in_another_users_repository(repository, place):
    done = run("touch", "left", cwd=repository / place)
    assert done.returncode == 2 and not (repository / place / "left").exists()
    assert f"{repository} belongs to uid {STRANGER}" in done.stderr
    assert '--user "$(id -u):$(id -g)"' in done.stderr
    subprocess.run(["chown", "-R", "0:0", repository], check=True)
    assert run("touch", "left", cwd=repository / place).returncode == 0


@as_root
def test_a_uid_without_passwd_entry_gets_a_home_a_name_and_its_repository_alone(repository, tmp_path):
    def become():
        os.setgid(STRANGER + 1)
        os.setuid(STRANGER + 1)

    env = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "USER": ""}
    script = "echo $USER && touch $HOME/probe && git status -sb && cat $HOME/.gitconfig && cd / && git -C $0 log"
    done = run("sh", "-c", script, str(ROOT), cwd=repository, env=env, preexec_fn=become)
    user, status, *config = done.stdout.splitlines()
    assert user == "colintern" and status.startswith("## No commits yet on"), done.stderr
    assert config == ["[safe]", f"\tdirectory = {repository}"]
    assert done.returncode == 128 and "dubious ownership" in done.stderr and str(ROOT) in done.stderr
