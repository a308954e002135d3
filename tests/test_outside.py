"""Commands of the pages that need more than the lock: the package index, root, Debian's Slurm, buildah, debootstrap.

`make test-slow` runs them where these are there; each skip says what is missing. The two proofs take half an hour.
"""

import hashlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import NamedTuple

import pytest
from conftest import ROOT
from pages import documented, words
from small_run import OUT
from stores import KEY, SECRET, s3
from test_cluster import STAGES, TRAIN
from test_dvc_commands import IDENTITY, Repo, bare_environment, copy_working_tree, cut_down, set_up

pytestmark = pytest.mark.slow
READ = """import sky, sys
task = sky.Task.from_yaml(sys.argv[1])
print(task.num_nodes, all(one.use_spot for one in task.resources))
"""
PARSE = """import click, sys
from sky.client.cli.command import cli
words = sys.argv[1:]
command, context = cli, click.Context(cli)
while isinstance(command, click.Group):
    command = command.get_command(context, words.pop(0))
    context = click.Context(command, parent=context)
context = command.make_context(command.name, words)
print(context.params["entrypoint"], context.params["secret"], context.params["env"])
"""
SLURM = """ClusterName=proof
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmdPort={node_port}
SlurmUser=root
AuthInfo=socket={home}/munge/socket
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd.pid
SlurmctldLogFile={home}/slurmctld.log
SlurmdLogFile={home}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs=16 Gres=gpu:4
PartitionName=all Nodes=ALL Default=YES
"""


def need_root_and(*programs: str) -> None:
    missing = [name for name in programs if not shutil.which(name)]
    if os.getuid() or missing:
        pytest.skip(f"needs root and {', '.join(programs)}; missing: {', '.join(missing) or 'root'}")


def until(holds: Callable[[], object], what: str, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, what
        time.sleep(0.2)


@pytest.mark.parametrize("command", [documented("make lock"), documented("make lock ARGS=--upgrade")])
def test_the_locks_are_written(command, tmp_path):
    copy_working_tree(tmp_path / "repo")
    (tmp_path / "repo" / ".tools").symlink_to(ROOT / ".tools")
    repo = Repo(tmp_path / "repo", bare_environment(tmp_path))
    repo.output(command)
    for name in ("requirements.txt", "requirements-dev.txt"):
        lines = (repo.path / name).read_text().splitlines()
        assert not any("://" in line for line in lines), "no index is named"
        pinned = [line for line in lines if re.match(r"[a-z0-9].*==", line)]
        kept = pinned == re.findall(r"^[a-z0-9].*==.*$", (ROOT / name).read_text(), re.M)
        assert kept or "upgrade" in command, "no version is new"
        assert sum("--hash=sha256:" in line for line in lines) > len(pinned)


@pytest.fixture(scope="module")
def cloud(tmp_path_factory) -> dict[str, str]:
    """The variables of an environment in which SkyPilot is installed, as its page does it; it brings AWS's command."""
    folder = tmp_path_factory.mktemp("cloud")
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    env |= {"PATH": f"{folder}/venv/bin{os.pathsep}{env['PATH']}", "HOME": str(folder)}
    subprocess.run(documented('pip install "skypilot[aws]"') + " -q", shell=True, env=env, check=True)
    return env


@pytest.mark.parametrize(("name", "nodes"), [("skypilot.yaml", 1), ("skypilot-tune.yaml", 4)])
def test_skypilot_takes_its_files(cloud, name, nodes):
    command = ["python", "-c", READ, ROOT / "cluster" / name]
    done = subprocess.run(command, env=cloud, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"{nodes} True"


@pytest.mark.parametrize(
    "line",
    [
        documented("sky jobs launch cluster/skypilot.yaml --secret HF_TOKEN"),
        documented("sky jobs launch cluster/skypilot-tune.yaml --secret COLINTERN_STORAGE --env TRIALS=40"),
    ],
)
def test_skypilots_parser_takes_the_lines(cloud, line):
    """Nothing is launched: that takes a cloud account."""
    command = ["python", "-c", PARSE, *words(line)[1:]]
    env = cloud | {"HF_TOKEN": "x", "COLINTERN_STORAGE": "x"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert words(line)[3] in done.stdout and words(line)[5] in done.stdout


def test_results_are_copied_and_a_bad_object_removed_by_awss_command(cloud, tmp_path):
    copy = documented("aws s3 cp --recursive s3://my-bucket-colintern/results/ .")
    remove = documented(
        "aws s3 rm s3://my-bucket/colintern/files/md5/ba/7790b1708b71cb2b61b1a30d824712"  # pragma: allowlist secret
    )
    bad, good = remove.rpartition("/")[2], "good"
    with s3(tmp_path) as store:
        objects = store.object(f"ba{bad}").parent
        results = store.folder / "my-bucket-colintern" / "results"
        for folder, name in ((objects, bad), (objects, good), (results, "dvc.lock")):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("there")
        env = cloud | {"AWS_ENDPOINT_URL": store.address, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
        for line in (copy, remove):
            subprocess.run(line, shell=True, env=env, cwd=tmp_path, check=True)
        assert [left.name for left in objects.iterdir()] == [good]
    assert (tmp_path / "dvc.lock").read_text() == "there"


def test_colpali_engine_draws_our_maps_with_its_extra(tmp_path):
    """The packages that tests/test_heatmaps.py otherwise replaces; what they need is in the lock."""
    install = "pip install einops seaborn"
    assert f"`{install}`" in (ROOT / "docs" / "colpali-engine.md").read_text()
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    options = ["-q", "--no-deps", "--target", tmp_path / "extra"]
    subprocess.run([tmp_path / "venv" / "bin" / "pip", *words(install)[1:], *options], check=True)
    paths = os.pathsep.join(map(str, (tmp_path / "extra", ROOT)))
    tests = ["-m", "pytest", "-q", "-n", "0", "tests/test_heatmaps.py", "-k", "colpali"]
    subprocess.run([sys.executable, *tests], check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": paths})


@pytest.fixture(scope="module")
def slurm(tmp_path_factory) -> Iterator[dict[str, str]]:
    """Debian's Slurm, one node that says it has sixteen cores and four GPUs: the variable its commands need."""
    need_root_and("munged", "slurmctld", "slurmd", "sbatch")
    home = tmp_path_factory.mktemp("slurm")
    home.chmod(0o755)
    for name in ("munge", "state", "spool"):
        (home / name).mkdir(mode=0o755)
    (home / "munge" / "key").write_bytes(os.urandom(128))
    (home / "munge" / "key").chmod(0o600)
    ports = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    host = socket.gethostname().partition(".")[0]
    (home / "slurm.conf").write_text(SLURM.format(home=home, host=host, port=ports[0], node_port=ports[1]))
    (home / "gres.conf").write_text(
        "".join(f"Name=gpu File=/dev/{name}\n" for name in ("null", "zero", "full", "random"))
    )
    variable = {"SLURM_CONF": str(home / "slurm.conf")}
    munge = [f"--{name}-file={home}/munge/{name}" for name in ("key", "log", "pid", "seed")]
    with ExitStack() as daemons, (home / "said").open("w") as said:
        for command in (
            ["munged", "--force", "--foreground", f"--socket={home}/munge/socket", *munge],
            ["slurmctld", "-D"],
            ["slurmd", "-D"],
        ):
            process = subprocess.Popen(command, env=os.environ | variable, stdout=said, stderr=said)
            daemons.callback(process.wait)
            daemons.callback(process.terminate)
            until((home / "munge" / "socket").exists, "munged does not answer")
        idle = lambda: "idle" in _ask("sinfo -h -o %T", os.environ | variable)  # noqa: E731
        until(idle, f"no node: {(home / 'said').read_text()}")
        yield variable


def _ask(command: str, env: dict[str, str]) -> str:
    return subprocess.run(words(command), env=env, capture_output=True, text=True).stdout


class Job(NamedTuple):
    number: str
    env: dict[str, str]

    def state(self, what: str = "%T") -> str:
        return _ask(f"squeue -h -t all -j {self.number} -o {what}", self.env).strip()

    def is_completed(self) -> bool:
        """A job that has gone back into the queue does not wait for the two minutes that Slurm gives it."""
        if self.state("%r") == "BeginTime":
            time.sleep(3)  # started in the second it was requeued in, it would be taken for the one that was revoked
            _ask(f"scontrol update JobId={self.number} StartTime=now", self.env)
        return self.state() == "COMPLETED"


def test_a_slurm_job_that_is_preempted_goes_back_into_the_queue_and_on(slurm, fetched, whole, tmp_path):
    folder = tmp_path / "shared"
    shutil.copytree(
        fetched, folder, symlinks=True, ignore=shutil.ignore_patterns(".scratch", "experiments", "dvc.yaml")
    )
    (folder / "dvc.yaml").write_text(STAGES)
    (folder / "held.py").write_text(TRAIN)
    (folder / "cluster").symlink_to(ROOT / "cluster")
    (folder / ".venv").symlink_to(sys.prefix)
    env = (
        bare_environment(tmp_path / "home") | slurm | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "HOLD": "7"}
    )
    repo = Repo(folder, env)
    repo.output(f"git init -q && dvc init -q && dvc remote add -d store {tmp_path / 'store'}")
    job = Job(repo.output(documented("sbatch cluster/slurm.sh")).split()[-1], env)
    said = lambda: "".join(file.read_text() for file in folder.glob("logs/slurm-*.log"))  # noqa: E731
    until((folder / "held").exists, "it trains")
    repo.output(f"scancel --batch --signal=USR1 {job.number}")  # as two minutes before its time is up
    time.sleep(0.5)
    (folder / "go").touch()
    until(lambda: job.state() == "PENDING", f"it waits again: {job.state()}, {said()}")
    assert f"stopped with a checkpoint; job {job.number} goes back into the queue" in said()
    until(job.is_completed, f"it goes on: {job.state()}, {said()}")
    assert "checkpoint-7\n" in said()
    assert list((tmp_path / "store").iterdir()), "pushed"
    adapter = (folder / OUT / "adapter_model.safetensors").read_bytes()
    assert hashlib.sha256(adapter).hexdigest() == whole["adapter_model.safetensors"], "that of an undisturbed run"
    again = Job(repo.output(documented("sbatch --gpus=4 --time=02:00:00 cluster/slurm.sh")).split()[-1], env)
    until(again.is_completed, f"nothing to do: {again.state()}, {said()}")
    assert "Stage 'train' didn't change, skipping" in said()
    about = repo.output(f"scontrol show job {again.number}")
    assert re.search(r"gpu[:=]4", about) and "TimeLimit=02:00:00" in about


def test_an_array_of_slurm_jobs_shares_a_study(slurm, postgresql, tmp_path):
    copy_working_tree(tmp_path / "repo")
    cut_down(tmp_path / "repo")
    repo = set_up(Repo(tmp_path / "repo", bare_environment(tmp_path / "home") | IDENTITY | slurm))
    repo.output("git init -q -b main")
    repo.commit()
    repo.output("dvc repro -q && mkdir -p logs")
    repo.commit()
    address = documented("export COLINTERN_STORAGE=postgresql+psycopg://USER:PASSWORD@HOST/DATABASE")
    address = re.sub(r"postgresql\S+", postgresql.replace("postgresql:", "postgresql+psycopg:"), address)
    fleet = documented("sbatch --array=0-7 cluster/tune.sh fleet 40").replace("0-7", "0-1").replace("40", "2")
    job = Job(repo.output(f"{address}; {fleet}").split()[-1], repo.env)
    until(lambda: job.state().split() == ["COMPLETED"] * 2, "both end", 300)
    said = [file.read_text() for file in sorted((repo.path / "logs").glob("slurm-tune-*.log"))]
    assert len(said) == 2 and not any("marked" in text for text in said)
    best = repo.output(
        f"{address}; {documented('colintern tune --study fleet --trials 40 --apply').replace('40', '2')}"
    )
    assert "written" in best and len(list((repo.path / "logs" / "tune").glob("fleet-*.log"))) == 2


def test_training_on_two_hosts_of_their_own_network(tmp_path):
    need_root_and("ip")
    repo = Repo(ROOT, bare_environment(tmp_path))
    assert re.search(r"RESULT nodes=2 ", repo.output(documented("python -m bench.nodes")))


@pytest.mark.parametrize(
    ("command", "programs"),
    [
        (documented("make image-proof"), ("buildah", "debootstrap")),
        (documented("make engine-proof"), ("debootstrap", "slirp4netns")),
    ],
)
def test_the_image_is_proved(command, programs):
    need_root_and(*programs)
    subprocess.run(words(command), cwd=ROOT, check=True, stdin=subprocess.DEVNULL)
