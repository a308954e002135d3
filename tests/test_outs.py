"""A byte changed in DVC's own cache (D5) is found by the stage that reads it, and what the message says mends it."""

import hashlib
import re
import shutil
from pathlib import Path

import pytest
from conftest import ROOT
from small_run import OUT
from test_dvc_commands import Repo, bare_environment, ran

pytestmark = pytest.mark.integration
STAGES = """stages:
  make:
    cmd: mkdir -p out/deep && echo one > out/deep/x && echo two > out/y && echo three > file
    outs: [out, file]
  use:
    cmd: python check.py
    deps: [out, file]
"""
PROGRAM = """from colintern.storage.outs import verify_dvc_outputs
from colintern.core.errors import exit_on_user_error
with exit_on_user_error():
    verify_dvc_outputs()
    print("passed")
"""


@pytest.fixture(scope="module")
def repo(tmp_path_factory, forked) -> Repo:
    path = tmp_path_factory.mktemp("outs")
    repo = Repo(path, bare_environment(tmp_path_factory.mktemp("home"), forked) | {"PYTHONPATH": str(ROOT)})
    repo.output("git init -q && dvc init -q")
    (path / "dvc.yaml").write_text(STAGES)
    (path / "check.py").write_text(PROGRAM)
    assert "passed" in repo.output("dvc repro")
    return repo


def flip(path: Path) -> None:
    mode = path.stat().st_mode
    path.chmod(0o644)
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    path.chmod(mode)


@pytest.mark.parametrize("name", ["file", "out/deep/x"])
def test_d5_a_flipped_byte_in_dvcs_cache_is_named_and_the_message_mends_it(repo, name):
    text = (repo.path / name).read_text()
    flip(repo.path / ".dvc/cache/files/md5" / cached(repo, name))
    (repo.path / name).unlink()
    assert repo.run("dvc checkout").returncode == 0 and (repo.path / name).read_text() != text
    assert ran(repo.output("dvc repro")) == [], "DVC serves it"
    failed = repo.run("dvc repro -f -s use")
    assert failed.returncode and "passed" not in failed.stdout
    assert f"error: {name}: is not what dvc.lock names, {cached(repo, name).replace('/', '')}" in failed.stdout
    [remedy] = re.findall(r"delete it here: (rm -rf .*)", failed.stdout)
    repo.output(remedy)
    assert ran(repo.output("dvc repro")) == ["make"] and (repo.path / name).read_text() == text
    assert "passed" in repo.output("dvc repro -f -s use")


def cached(repo: Repo, name: str) -> str:
    """The object of a file, as the cache's folder has it."""
    found = {"file": "three\n", "out/deep/x": "one\n"}[name]
    md5 = hashlib.md5(found.encode()).hexdigest()
    return f"{md5[:2]}/{md5[2:]}"


def test_dvc_may_be_started_from_a_sub_folder(repo):
    assert "passed" in repo.output("cd out && dvc repro -f -s ../dvc.yaml:use")


def test_run_by_hand_nothing_is_held_against_the_lock(repo):
    (repo.path / "file").write_text("mine")
    assert "passed" in repo.output("python check.py")
    refused = repo.run("dvc repro -s use")
    assert refused.returncode and "error: file: is not what dvc.lock names" in refused.stdout
    assert "passed" in repo.output("dvc repro -f")


TRAINING = """stages:
  train:
    cmd: python -m stages.train
    deps: [data/manifest.json, data/rows.parquet]
    params: [lr, batch_size, epochs, seed]
    outs: [experiments/colintern]
"""


def test_t3_what_dvc_could_not_store_is_not_trained_again(fetched, whole, tmp_path, forked):
    """DVC deletes the outs of a stage that it has not recorded, and starts it anew."""
    path = tmp_path / "repo"
    shutil.copytree(fetched, path, symlinks=True, ignore=shutil.ignore_patterns(".scratch", "experiments", "dvc.yaml"))
    (path / "dvc.yaml").write_text(TRAINING)
    repo = Repo(path, bare_environment(tmp_path / "home", forked) | {"PYTHONPATH": str(ROOT)})
    repo.output("git init -q && dvc init -q")
    (path / ".dvc" / "cache").touch()  # where a folder should be
    failed = repo.run("dvc repro")
    assert failed.returncode and "dev_ndcg_at_5=" in failed.stdout, failed.stdout
    assert not list((path / "experiments").glob("train-*")), "the run is over"

    (path / ".dvc" / "cache").unlink()
    said = repo.output("dvc repro")
    assert "checkpoint-10\n" in said and "step " not in said, said
    adapter = (path / OUT / "adapter_model.safetensors").read_bytes()
    assert hashlib.sha256(adapter).hexdigest() == whole["adapter_model.safetensors"]

    again = repo.output("dvc repro -f")
    assert "resuming from" not in again and "step 10/10" in again, "it was recorded, so this asks for all steps"
    assert not [one for one in (path / ".scratch").iterdir() if one.is_dir()], "and DVC can bring back what it made"
