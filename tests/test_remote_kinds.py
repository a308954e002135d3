"""The recipes of docs/remotes.md for AWS, Google and SSH, as they stand, against servers on loopback: pushed, pulled.

A small pipeline, because test_remotes.py has training. What leads the commands to loopback: a variable of AWS's, an
option for Google, `~/.ssh/config`.
"""

import json
import shutil
from pathlib import Path

import pytest
import stores
from pages import block
from test_dvc_commands import Repo, bare_environment
from test_remotes import SECRETS

pytestmark = pytest.mark.integration
STAGES = """stages:
  train:
    cmd: mkdir -p experiments/colintern metrics && cp dvc.yaml experiments/colintern && echo {} > metrics/train.json
    deps: [params.yaml]
    outs: [experiments/colintern]
    metrics: [{metrics/train.json: {cache: false}}]
"""
OUT = "experiments/colintern/dvc.yaml"


@pytest.fixture(scope="module")
def made(tmp_path_factory, forked) -> Path:
    """A small pipeline that has run; no remote yet."""
    repo = Repo(tmp_path_factory.mktemp("made"), bare_environment(tmp_path_factory.mktemp("home"), forked))
    repo.output("git init -q -b main && dvc init -q")
    (repo.path / "dvc.yaml").write_text(STAGES)
    (repo.path / "params.yaml").write_text("lr: 1\n")
    repo.output("dvc repro")
    return repo.path


@pytest.fixture
def repo(made, tmp_path, forked) -> Repo:
    (tmp_path / "home").mkdir()
    shutil.copytree(made, tmp_path / "repo", symlinks=True)
    secrets = SECRETS | {"AWS_ACCESS_KEY_ID": stores.KEY}
    return Repo(tmp_path / "repo", bare_environment(tmp_path / "home", forked) | secrets)


def carried(repo: Repo) -> None:
    """Pushed from here, pulled in a clone with the same credentials, none of which is in git."""
    config = (repo.path / ".dvc" / "config").read_text()
    assert "url = " in config and "verify = true" in config
    for secret in ("key", "credential", "password", stores.MARK):
        assert secret not in config
    repo.commit()
    assert ".dvc/config.local" not in repo.output("git ls-files")
    assert "2 files pushed" in repo.output("dvc push")
    clone = Repo(repo.path.with_name("clone"), repo.env | {"DVC_SITE_CACHE_DIR": str(repo.path.with_name("site"))})
    repo.output(f"git clone -q file://{repo.path} {clone.path}")
    if (local := repo.path / ".dvc" / "config.local").is_file():
        shutil.copy(local, clone.path / ".dvc")
    clone.output("dvc pull")
    assert (clone.path / OUT).read_text() == STAGES


def test_s3(repo, tmp_path):
    with stores.s3(tmp_path) as store:
        repo.output(block("remotes.md", "**S3.**"))
        carried(repo._replace(env=repo.env | {"AWS_ENDPOINT_URL": store.address}))
    assert len(list((store.folder / "my-bucket" / "colintern" / "files" / "md5").rglob("??/*"))) == 2


def test_ssh(repo, tmp_path):
    (tmp_path / "disk" / "srv").mkdir(parents=True)
    with stores.ssh(tmp_path / "disk", Path(repo.env["HOME"])):
        repo.output(block("remotes.md", "**SSH.**"))
        carried(repo)
    assert len(list((tmp_path / "disk" / "srv" / "colintern" / "files" / "md5").rglob("??/*"))) == 2


def test_google(repo):
    with stores.google() as server:
        account = Path(repo.env["HOME"]) / ".config" / "gcloud" / "colintern.json"
        account.parent.mkdir(parents=True)
        account.write_text(json.dumps(server.account()))
        repo.output(block("remotes.md", "**Google Cloud Storage.**"))
        repo.output(f"dvc remote modify --local store endpointurl {server.url}")
        # gcsfs asks over gRPC and TLS, which this server has not, whether the bucket is one of the fast kind.
        carried(repo._replace(env=repo.env | {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}))
    assert len([name for name in server.objects if name.startswith("colintern/files/md5/")]) == 2
