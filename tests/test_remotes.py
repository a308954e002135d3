"""DVC remotes, against a real S3-compatible server on loopback: the recipes of docs/remotes.md, the run cache, D5.

The pipeline runs once, with marked secrets in its environment, and nothing it leaves or says has one in it.
"""

import pickle
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3fs
from pages import block, documented
from ruamel.yaml import YAML
from stores import KEY, MARK, SECRET, Store, s3
from test_dvc_commands import IDENTITY, STAGES, Repo, bare_environment, copy_working_tree, cut_down, ran, skipped
from test_outs import flip

pytestmark = pytest.mark.integration
SECRETS = {
    "HF_TOKEN": f"hf_{MARK}0123456789abcdefghijkl",
    "WANDB_API_KEY": f"{MARK}0123456789012345678901234567890123",  # 40 characters, else W&B refuses it
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "COLINTERN_STORAGE": f"postgresql+psycopg://me:{MARK}word@127.0.0.1:9/x",  # pragma: allowlist secret
    "OPENAI_API_KEY": f"sk-{MARK}",
}
ROWS = "data/rows.parquet"


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Iterator[Store]:
    with s3(tmp_path_factory.mktemp("store")) as store:
        yield store


@pytest.fixture(scope="module")
def said() -> list[str]:
    """What all commands print."""
    return []


@pytest.fixture(scope="module")
def repo(store, said, tmp_path_factory, forked) -> Repo:
    """The copy, set up by the S3-compatible recipe, trained with W&B offline, committed and pushed."""
    path, home = tmp_path_factory.mktemp("repo"), tmp_path_factory.mktemp("home")
    copy_working_tree(path)
    cut_down(path)
    text = (path / "params.yaml").read_text()
    assert "\ntracker: none\n" in text
    (path / "params.yaml").write_text(text.replace("\ntracker: none\n", "\ntracker: wandb\n"))
    marked = SECRETS | {"AWS_ACCESS_KEY_ID": KEY, "WANDB_MODE": "offline"}
    env = {key: value for key, value in bare_environment(home, forked).items() if not key.startswith("WANDB_")}
    repo = Repo(path, env | marked)
    repo.output("git init -q -b main")
    said.append(repo.output(block("remotes.md", "**S3-compatible**").replace("https://s3.example.org", store.address)))
    repo.commit()
    said.append(repo.output(documented("dvc repro")))
    assert ran(said[-1]) == list(STAGES)
    repo.commit()
    said.append(repo.output(documented("dvc push --run-cache")))
    assert re.search(r"\d\d files pushed", said[-1])
    return repo


@pytest.fixture
def clone(repo, tmp_path) -> Repo:
    """A second machine: a clone, nothing of the first one's cache; its credentials come from the environment."""
    repo.output(f"git clone -q file://{repo.path} {tmp_path / 'clone'}")
    return Repo(tmp_path / "clone", repo.env | {"DVC_SITE_CACHE_DIR": str(tmp_path / "site")})


def md5(repo: Repo, out: str) -> str:
    stages = YAML(typ="safe").load(repo.path / "dvc.lock")["stages"]
    [found] = [entry["md5"] for stage in stages.values() for entry in stage["outs"] if entry["path"] == out]
    return found


def test_a_second_clone_pulls_and_runs_nothing(repo, clone):
    clone.output(documented("dvc pull --run-cache"))
    output = clone.output("dvc repro")
    assert ran(output) == [] and skipped(output) == list(STAGES)
    outs = [f for out in ("experiments/colintern", "results/mteb_evaluation") for f in (repo.path / out).rglob("*.*")]
    assert len(outs) > 10 and all(
        file.read_bytes() == (clone.path / file.relative_to(repo.path)).read_bytes() for file in outs if file.is_file()
    )
    clone.output("git config user.name Test && git config user.email test@localhost && dvc exp save --name NAME")
    clone.output(documented("dvc exp push origin NAME"))
    assert "NAME" in repo.output("dvc exp list")


def test_the_adapter_is_an_artifact_that_dvc_finds_by_name(repo, clone):
    clone.output(documented('git tag -a retriever@v1.0.0 -m "Baseline"'), **IDENTITY)
    clone.output(documented("dvc artifacts get . retriever --rev v1.0.0 --out retriever"))

    def contents(folder: Path) -> dict[Path, bytes]:
        return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    assert contents(clone.path / "retriever") == contents(repo.path / "experiments" / "colintern")
    assert (clone.path / "retriever" / "adapter_model.safetensors").is_file()


def test_where_dvc_lock_was_never_committed_the_run_cache_carries_training_all_the_same(repo, clone, store):
    """DVC's own push leaves out what `cache: false` keeps in git, and without it a run counts as none."""
    metrics = store.object(md5(repo, "metrics/train.json"))
    assert not metrics.exists(), "DVC pushes it by now: cluster/push_runs.py can go"
    assert "5 runs with " in repo.output(documented("python cluster/push_runs.py"))
    assert metrics.is_file()
    clone.output("git checkout -q main~1")  # no dvc.lock, no metrics
    output = clone.output(documented("dvc repro --pull"))
    assert ran(output) == [] and all(f"Stage '{stage}' is cached - skipping run" in output for stage in STAGES)
    assert repo.output("cat dvc.lock metrics/* plots/*") == clone.output("cat dvc.lock metrics/* plots/*")


def test_d5_a_corrupt_object_is_refused_by_the_recipes_pull_and_mended_as_the_page_says(repo, clone, store):
    wrong = store.object(md5(repo, ROWS))
    flip(wrong)
    refused = clone.run("dvc pull")
    assert refused.returncode == 1 and ROWS in refused.stdout and not (clone.path / ROWS).exists()
    assert (clone.path / "experiments" / "colintern" / "head.safetensors").is_file(), "the rest is pulled"
    repo.output(documented("dvc push"))
    assert clone.run("dvc pull").returncode == 1, "DVC believes the name"
    bucket = s3fs.S3FileSystem(key=KEY, secret=SECRET, endpoint_url=store.address)
    bucket.rm(wrong.relative_to(store.folder).as_posix())  # what `aws s3 rm` does
    assert "1 file pushed" in repo.output("dvc push")
    clone.output(documented("dvc pull"))
    assert ran(clone.output("dvc repro")) == []


def test_d5_without_verify_dvc_serves_it_and_training_refuses_it(repo, clone, store):
    flip(store.object(md5(repo, ROWS)))
    try:
        clone.output("dvc remote modify store verify false")
        clone.output("dvc pull")
        assert "up to date" in clone.output("dvc repro"), "DVC serves it with rc 0"
        refused = clone.run("dvc repro -f -s train")
    finally:
        flip(store.object(md5(repo, ROWS)))
    assert refused.returncode and f"error: {ROWS}: is not what dvc.lock names, {md5(repo, ROWS)}" in refused.stdout
    assert not list((clone.path / "experiments").glob("train-*")), "before training"


def test_a_folder_as_remote(repo, tmp_path):
    other = tmp_path / "other"
    repo.output(f"git clone -q file://{repo.path} {other}")
    shutil.copytree(repo.path / ".dvc" / "cache", other / ".dvc" / "cache")
    first = Repo(other, repo.env | {"DVC_SITE_CACHE_DIR": str(tmp_path / "site")})
    first.output("dvc remote remove store")
    first.output(block("remotes.md", "**A folder**").replace("/mnt/store", str(tmp_path / "store")))
    first.output(documented('git commit -am "L40S, spot"'), **IDENTITY)
    first.output("dvc push")
    first.output(f"git clone -q file://{other} {tmp_path / 'second'}")
    second = first._replace(path=tmp_path / "second")
    second.output("dvc pull")
    second.output(documented("dvc gc --cloud") + " --all-commits --force")
    assert ran(second.output("dvc repro")) == [], "all that a commit names is kept"


def pickles(folder: Path) -> list[Path]:
    """Files that unpickling would run: by their first bytes (a pickle's, or the zip that torch.save makes), or name."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    names = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
    return [
        f for f in files if f.suffix in names or f.read_bytes()[:2] in (b"PK", *(bytes([128, n]) for n in range(6)))
    ]


def test_no_pickle_is_in_what_is_published(repo, store, tmp_path):
    assert list((repo.path / "experiments" / "colintern").glob("*.safetensors"))
    for folder in (repo.path / "experiments" / "colintern", repo.path / "results", store.folder):
        assert not pickles(folder)
    (tmp_path / "planted").write_bytes(pickle.dumps({"a": 1}))
    assert pickles(tmp_path) == [tmp_path / "planted"]


def marked(folder: Path) -> list[Path]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [path for path in files if MARK.encode() in path.read_bytes()]


def test_secrets_are_in_nothing_that_the_pipeline_leaves_or_says(repo, said, store):
    said.append(repo.output("colintern report experiments/colintern"))
    assert marked(repo.path) == [repo.path / ".dvc" / "config.local"], "where the recipe has put them"
    assert ".dvc/config.local" not in repo.output("git ls-files --cached --others --exclude-standard")
    assert MARK not in repo.output("git log -p --all")
    assert not marked(Path(repo.env["HOME"])) and not marked(store.folder)
    assert len(said) == 4 and not [text for text in said if MARK in text]
    for kind in ("wandb/offline-run-*/*.wandb", "logs/*.json", "results/report/*.html", "data/manifest.json"):
        assert list(repo.path.glob(kind)), f"{kind}: nothing was looked at"
