"""What cluster/ starts, on machines that are taken away: real training, DVC and signals; a folder is the bucket.

Slurm and SkyPilot: test_outside.py.
"""

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
from conftest import ROOT
from pages import documented, words
from small_run import OUT
from test_dvc_commands import TIMEOUT, Repo, bare_environment
from test_image import linter

pytestmark = pytest.mark.integration
SCRIPTS = sorted((ROOT / "cluster").glob("*.sh"))
# Stops in the middle of a step until the file `go` is there, so that the test decides what happens in it.
TRAIN = """import os, time
from small_run import at_step
from stages import train

def hold():
    open("held", "w").close()
    while not os.path.exists("go"):
        time.sleep(0.05)

at_step(int(os.environ["HOLD"]), hold)
train.main()
"""
STAGES = """stages:
  fetch-data: {cmd: test -d data}
  verify: {cmd: test -f data/manifest.json}
  train:
    cmd: python -m held
    deps: [data/manifest.json, data/rows.parquet, held.py]
    params: [lr, batch_size, epochs, seed]
    outs: [experiments/colintern]
    metrics: [{metrics/train.json: {cache: false}}]
    plots: [{plots/train.csv: {cache: false}}, {plots/dev.csv: {cache: false}}]
"""


class Machine(NamedTuple):
    """A copy of the repository with cluster/repro.sh under way, and the bucket."""

    folder: Path
    bucket: Path
    process: subprocess.Popen
    log: Path

    def wait(self, file: Path) -> None:
        end = time.monotonic() + TIMEOUT
        while not file.exists():
            assert self.process.poll() is None and time.monotonic() < end, self.log.read_text()
            time.sleep(0.05)

    def kept(self, step: int) -> Path:
        """A checkpoint in the bucket, once it is there."""
        end = time.monotonic() + 60
        while not (found := list(self.bucket.glob(f".scratch/train-*/checkpoint-{step}.whole"))):
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.05)
        return found[0].with_suffix("")

    def take_away(self) -> None:
        """The whole machine, with its disk."""
        script = psutil.Process(self.process.pid)
        script.suspend()  # so that it starts nothing more
        everything = [*script.children(recursive=True), script]
        for one in everything:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        self.process.wait()
        psutil.wait_procs(everything, 10)
        shutil.rmtree(self.folder)


@pytest.fixture
def boot(fetched, tmp_path, forked):
    """step to stop in -> a fresh machine, on which cluster/repro.sh is started."""
    first = tmp_path / "first"
    shutil.copytree(fetched, first, symlinks=True, ignore=shutil.ignore_patterns(".scratch", "experiments", "dvc.yaml"))
    (first / "dvc.yaml").write_text(STAGES)
    (first / "held.py").write_text(TRAIN)
    python = tmp_path / "commands" / "python"  # and no `dvc`: a signal must reach its process group
    python.parent.mkdir()
    python.symlink_to(forked / "python")
    env = bare_environment(tmp_path / "home", python.parent) | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        "COLINTERN_KEPT": str(tmp_path / "bucket"),
        "COLINTERN_KEPT_SECONDS": "0.2",
    }
    repo = Repo(first, env)
    repo.output(f"git init -q && dvc init -q && dvc remote add -d store {tmp_path / 'store'}")

    def start(name: str, step: int) -> Machine:
        shutil.copytree(first, tmp_path / name, symlinks=True)
        with (tmp_path / f"{name}.log").open("w") as log:
            process = subprocess.Popen(
                [ROOT / "cluster" / "repro.sh"],
                cwd=tmp_path / name,
                env=env | {"HOLD": str(step)},
                stdout=log,
                stderr=log,
            )
        return Machine(tmp_path / name, tmp_path / "bucket", process, tmp_path / f"{name}.log")

    return start


def test_a_machine_that_is_taken_away_costs_no_more_than_the_steps_since_its_checkpoint(boot, whole, tmp_path):
    one = boot("one", 7)
    one.wait(one.folder / "held")
    torn = one.kept(6)
    one.kept(3)
    one.take_away()
    (torn / "adapter_model.safetensors").write_bytes(b"rotten")
    shutil.copytree(torn, torn.with_name("checkpoint-8"))  # not whole: the machine went while it was copied

    two = boot("two", 9)
    two.wait(two.folder / "held")
    assert "bytes that are not those that were saved; resuming from an older checkpoint" in two.log.read_text()
    assert "checkpoint-3\n" in two.log.read_text() and "checkpoint-8" not in two.log.read_text()
    two.process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    (two.folder / "go").touch()
    assert two.process.wait(120) == 75, two.log.read_text()
    two.kept(9)
    shutil.rmtree(two.folder)

    three = boot("three", 0)
    assert three.process.wait(200) == 0, three.log.read_text()
    assert "checkpoint-9\n" in three.log.read_text()
    adapter = (three.folder / OUT / "adapter_model.safetensors").read_bytes()
    assert hashlib.sha256(adapter).hexdigest() == whole["adapter_model.safetensors"]
    assert not list(three.bucket.glob(".scratch/train-*")), "pushed: nothing to keep"
    assert (three.bucket / "results" / "dvc.lock").read_bytes() == (three.folder / "dvc.lock").read_bytes()
    assert (three.bucket / "results" / "metrics" / "train.json").is_file()
    stored = [path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file()]
    assert adapter in stored, "pushed"


def test_a_failure_is_not_taken_for_a_preemption(boot):
    one = boot("one", 0)
    (one.folder / "held.py").write_text("raise SystemExit(5)")
    assert one.process.wait(120) not in (0, 75), one.log.read_text()
    assert "exited with 5" in one.log.read_text()


def test_shellcheck_finds_nothing():
    assert len(SCRIPTS) == 5
    found = subprocess.run([linter("shellcheck"), *SCRIPTS], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize(
    ("script", "env", "words"),
    [
        ("tune.sh a 1", {}, "COLINTERN_STORAGE"),
        ("tune.sh a 1", {"COLINTERN_STORAGE": "sqlite:///secret.db"}, "need a postgresql+psycopg:// address"),
        ("tune.sh a", {"COLINTERN_STORAGE": "postgresql+psycopg://me:secret@h/x"}, "trials of the study"),
        ("torchrun.sh", {"NODES": "2", "NODE": "0"}, "HEAD"),
        ("rank.sh", {}, "started by torchrun or srun"),
        ("slurm.sh", {}, "start it with sbatch"),
    ],
)
def test_what_is_missing_is_named(script, env, words):
    name, *arguments = script.split()
    known = {k: v for k, v in os.environ.items() if k not in ("RANK", "SLURM_PROCID", "COLINTERN_STORAGE")}
    done = subprocess.run(
        [ROOT / "cluster" / name, *arguments], env=known | env, cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode and words in done.stderr and "secret" not in done.stderr + done.stdout


def test_torchrun_starts_the_ranks_of_a_run(tmp_path):
    """The line itself, one machine, two ranks; two machines: bench/nodes.py."""
    (tmp_path / "rank.sh").write_text('echo "rank $RANK of $WORLD_SIZE" >> ranks\n')
    env = os.environ | {"NODES": "1", "NODE": "0", "HEAD": "127.0.0.1", "PORT": "0", "GPUS": "2"}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    command = f"{ROOT}/{documented('cluster/torchrun.sh')} --no-python bash rank.sh"
    done = subprocess.run(words(command), env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert sorted((tmp_path / "ranks").read_text().splitlines()) == ["rank 0 of 2", "rank 1 of 2"]


@pytest.mark.parametrize("changed", [False, True])
def test_a_rank_does_not_wait_for_a_stage_that_has_nothing_to_do(tmp_path, changed):
    """Both ask DVC first. DVC and Python are put in their places."""
    for name, lines in {"dvc": f'[ "$1" = status ] && exit {int(changed)}', "python": ""}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{lines}\necho ran {name} $@\n")
        (tmp_path / name).chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    found = [
        subprocess.run([ROOT / "cluster" / "rank.sh"], env=env | {"RANK": rank}, capture_output=True, text=True).stdout
        for rank in "01"
    ]
    if changed:  # a result from the run cache would start no stage either
        assert found == ["ran dvc repro --no-run-cache -s train\n", "ran python -m stages.train\n"]
    else:
        assert found == ["train: nothing has changed since it ran, nothing to do\n", ""]
