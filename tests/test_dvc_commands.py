"""The user's commands, verbatim, on a copy of this repository whose demo is cut down to seconds; no git identity."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from pages import documented

from colintern.params import load_params

pytestmark = pytest.mark.integration
ROOT = Path(__file__).resolve().parent.parent
STAGES = ("check-params", "fetch-data", "verify", "train", "eval")
UPDATES = {
    "epochs": "1",
    "lr": "0.006",
    "batch_size": "16",
    "micro_batch_size": "16",
    "warmup_steps": "2",
    "logging_steps": "2",
    "dev_queries": "10",
    "max_visual_tokens": "24",
    "threads": "1",  # two would wait for each other where the other core is busy
}
PAGES = "TRAIN_PAGES, DEV_PAGES, TEST_PAGES = "
# Of the commits a user would make.
IDENTITY = {f"GIT_{who}_{what}": "test@localhost" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
REFUSED = "Git user name and email must be configured"
GIT_MADE_KEYS = ("GIT_DIR", "GIT_INDEX_FILE", "GIT_WORK_TREE")  # set where the tests run inside a git hook
TIMEOUT = 400  # seconds a command may take, on a busy machine


class Repo(NamedTuple):
    """A working tree and the environment its commands run in."""

    path: Path
    env: dict[str, str]

    def run(self, command: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run a command as a user types it, stdout and stderr in one text."""
        return subprocess.run(
            command,
            shell=True,
            cwd=self.path,
            env=self.env | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT,
        )

    def output(self, command: str, **env: str) -> str:
        """What a command that must succeed prints."""
        done = self.run(command, **env)
        assert done.returncode == 0, f"{command}: exit {done.returncode}\n{done.stdout[-6000:]}"
        return done.stdout

    def commit(self) -> None:
        self.output("git add --all && git commit -qm state", **IDENTITY)

    def metric(self, name: str) -> dict:
        return json.loads((self.path / "metrics" / f"{name}.json").read_text())


def bare_environment(home: Path, *commands: Path) -> dict[str, str]:
    """This process's, without any git identity or outer make; folders of commands and the interpreter's lead PATH."""
    dropped = ("GIT_AUTHOR_", "GIT_COMMITTER_", "GIT_CONFIG", "DVC_", "PYTEST_", "MAKE", "MFLAGS", *GIT_MADE_KEYS)
    env = {key: value for key, value in os.environ.items() if not key.startswith(dropped) and key != "EMAIL"}
    return env | {
        "PATH": os.pathsep.join(map(str, (*commands, Path(sys.executable).parent, os.environ["PATH"]))),
        "HOME": str(home),
        "XDG_CONFIG_HOME": str(home / ".config"),
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1",
        "DVC_SITE_CACHE_DIR": str(home / "site"),
        "DVC_NO_ANALYTICS": "1",
    }


def copy_working_tree(target: Path) -> None:
    """Every file git tracks or would track, as it stands now; not what earlier runs of the pipeline left."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        made = name == "dvc.lock" or name.startswith(("metrics/", "plots/"))
        if not made and (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def cut_down(repo: Path) -> None:
    """Fewer pages, fewer steps, smaller pages: the commands are tested here, not the model."""
    params = (repo / "params.yaml").read_text()
    for key, value in UPDATES.items():
        params, found = re.subn(rf"^{key}: .*$", f"{key}: {value}", params, flags=re.MULTILINE)
        assert found == 1, key
    (repo / "params.yaml").write_text(params)
    file = repo / "demo" / "dataset.py"
    text, found = re.subn(rf"^{PAGES}.*$", f"{PAGES}64, 10, 10", file.read_text(), flags=re.MULTILINE)
    assert found == 1, PAGES
    file.write_text(text)


def set_up(repo: Repo) -> Repo:
    """As `make env` leaves it: the copy's own `colintern` first on PATH, all else is this environment's."""
    for file in (".venv/.installed", ".venv/bin/activate", ".tools/bin/uv"):
        (repo.path / file).parent.mkdir(parents=True, exist_ok=True)
        (repo.path / file).touch()
    command = repo.path / ".venv" / "bin" / "colintern"
    command.write_text('#!/bin/sh\nexec python -m colintern "$@"\n')
    command.chmod(0o755)
    return repo._replace(env=repo.env | {"PATH": f"{command.parent}{os.pathsep}{repo.env['PATH']}"})


def ran(output: str) -> list[str]:
    """The stages DVC says it ran."""
    return re.findall(r"Running stage '([\w-]+)'", output)


def skipped(output: str) -> list[str]:
    return re.findall(r"Stage '([\w-]+)' didn't change, skipping", output)


@pytest.fixture(scope="module")
def repo(tmp_path_factory, forked) -> Iterator[Repo]:
    """The copy after one `dvc repro`."""
    path, home = tmp_path_factory.mktemp("repo"), tmp_path_factory.mktemp("home")
    copy_working_tree(path)
    cut_down(path)
    repo = set_up(Repo(path, bare_environment(home, forked)))
    repo.output("git init -q -b main")
    repo.commit()
    assert ran(repo.output(documented("dvc repro"))) == list(STAGES)
    repo.commit()
    yield repo
    repo.run(documented("dvc queue stop --kill"))
    wait_until(repo, "the queue's worker stops", lambda status: "0 active, 0 idle" in status)


@pytest.fixture(scope="module")
def experiment(repo) -> tuple[str, str]:
    """Name and output of `dvc exp run -S lr=3e-5`, applied to the workspace. Nothing can be written into its HOME."""
    output = repo.output(documented("dvc exp run -S lr=3e-5"), HOME="/sys")
    name = re.search(r"Ran experiment\(s\): (\S+)", output)
    assert name, output
    return name[1], output


@pytest.fixture(scope="module")
def shallow(repo, experiment, tmp_path_factory) -> Repo:
    """A depth-1 clone of the first run's commit, without any cache."""
    path = tmp_path_factory.mktemp("clones") / "shallow"
    repo.output(f"git clone -q --depth 1 --branch main file://{repo.path} {path}")
    clone = Repo(path, repo.env)
    assert clone.output("git rev-list --count HEAD").strip() == "1"
    assert not (path / ".dvc" / "cache").exists()
    for folder in ("metrics", "plots"):  # as if the experiment had been pulled into the clone's workspace
        shutil.copytree(repo.path / folder, path / folder, dirs_exist_ok=True)
    shutil.copy(repo.path / "params.yaml", path / "params.yaml")
    return clone


def test_a_second_repro_runs_nothing(repo):
    output = repo.output(documented("dvc repro"))
    assert ran(output) == []
    assert skipped(output) == list(STAGES)
    assert "Data and pipelines are up to date." in output


def test_nothing_a_repro_writes_is_left_for_git_but_what_belongs_there(repo):
    tracked = repo.output("git ls-files dvc.lock metrics plots experiments results data").split()
    assert tracked == [
        "dvc.lock",
        "metrics/eval.json",
        "metrics/train.json",
        "metrics/verify.json",
        "plots/benchmarks.csv",
        "plots/data.csv",
        "plots/dev.csv",
        "plots/eval.csv",
        "plots/train.csv",
    ]


def test_no_out_says_where_on_the_disk_it_was_made(repo):
    outs = [path for out in ("experiments", "results", "metrics", "plots") for path in (repo.path / out).rglob("*")]
    files = [path for path in [*outs, *repo.path.glob("data/[!.]*.json")] if path.is_file()]
    assert len(files) > 15
    assert not [path for path in files if str(repo.path).encode() in path.read_bytes()]


def test_exp_run_runs_train_and_eval_alone(repo, experiment):
    _, output = experiment
    assert ran(output) == ["check-params", "train", "eval"]
    assert skipped(output) == ["fetch-data", "verify"]


def test_exp_run_writes_a_number_and_changes_the_metrics(repo, experiment):
    assert re.search(r"^lr: 3e-05$", (repo.path / "params.yaml").read_text(), re.MULTILINE)
    lr = load_params(repo.path / "params.yaml").lr
    assert isinstance(lr, float) and lr == 3e-05
    committed = json.loads(repo.output("git show HEAD:metrics/train.json"))
    assert repo.metric("train")["loss"] != committed["loss"]
    assert repo.metric("train").keys() == committed.keys()


def test_exp_show_lists_it(repo, experiment):
    name, _ = experiment
    shown = repo.output(documented("dvc exp show") + " --only-changed --no-pager", COLUMNS="1000")
    assert name in shown and " lr " in shown and "colintern/modeling/modeling_colintern.py" not in shown
    rows = list(csv.DictReader(repo.output("dvc exp show --csv").splitlines()))
    (row,) = (row for row in rows if row["Experiment"] == name)
    assert float(row["lr"]) == 3e-05
    assert float(row["loss"]) == repo.metric("train")["loss"]


def test_metrics_diff_in_a_shallow_clone_without_a_cache(shallow):
    changed = json.loads(shallow.output("dvc metrics diff --json"))
    loss = changed["metrics/train.json"]["loss"]
    assert loss["old"] != loss["new"]
    plain = shallow.output(documented("dvc metrics diff"))
    assert plain.splitlines()[0].split()[:2] == ["Path", "Metric"]
    assert "metrics/train.json" in plain


def test_params_diff_in_a_shallow_clone(shallow):
    changed = json.loads(shallow.output("dvc params diff --json"))
    assert list(changed) == ["params.yaml"] and list(changed["params.yaml"]) == ["lr"]
    assert (changed["params.yaml"]["lr"]["old"], changed["params.yaml"]["lr"]["new"]) == (0.006, 3e-05)
    assert re.search(r"params\.yaml\s+lr\s+0\.006\s+3e-05", shallow.output(documented("dvc params diff")))


def test_plots_in_a_shallow_clone(shallow):
    assert "index.html" in shallow.output(documented("dvc plots show"))
    page = (shallow.path / "dvc_plots" / "index.html").read_text()
    assert "vegaEmbed" in page and not re.search(r"<(?:script|link)[^>]*(?:src|href)=", page), "no network is needed"
    assert "index.html" in shallow.output(documented("dvc plots diff"))
    html = (shallow.path / "dvc_plots" / "index.html").read_text()
    for title in (
        "Training loss",
        "Dev NDCG@5",
        "NDCG@5 by task",
        "NDCG@5, mean of each benchmark",
        "Gradient norm",
        "Learning rate",
    ):
        assert title in html


def test_called_from_a_stage_of_another_project_this_one_is_run(repo, experiment, tmp_path):
    """DVC leaves the other project's DVC_ROOT in the environment."""
    (tmp_path / "dvc.yaml").write_text("stages: {model: {cmd: make -C ../colintern repro}}")
    output = repo.output("dvc repro --force --single-item check-params", DVC_ROOT=str(tmp_path), DVC_STAGE="model")
    assert ran(output) == ["check-params"]
    repo.output("python -m stages.verify", DVC_ROOT=str(tmp_path), DVC_STAGE="model")


@pytest.mark.parametrize("command", ["dvc exp run -S lr=2e-5", "dvc exp run --queue -S lr=1e-4"])
def test_without_an_identity_dvc_stashes_nothing_and_says_why(repo, experiment, command):
    """On a clean workspace `exp run` needs none (above); it stashes edits and queued runs, in a committer's name."""
    before = repo.output("git diff HEAD")
    assert before, "the experiment's results are in the workspace"
    refused = repo.run(command)
    assert refused.returncode != 0 and REFUSED in refused.stdout
    assert ran(refused.stdout) == []
    assert repo.output("git diff HEAD") == before


def test_a_queued_experiment_runs_to_success(repo, experiment):
    """In a temporary copy, which lacks the pages: they are found through DVC_ROOT."""
    repo.output("git checkout -q . && dvc checkout -q")
    repo.output("git config user.name Test && git config user.email test@localhost")
    names = []
    for command in (
        documented("dvc exp run --queue -S lr=1e-3"),
        documented("dvc exp run --queue -S temperature=0.05"),
    ):
        names.append(re.search(r"Queued experiment '(\S+)'", repo.output(command)))
    name, other = names
    assert name and other
    repo.output(f"dvc queue remove {other[1]}")
    assert "Started '1' new experiments task queue worker" in repo.output(documented("dvc queue start"))
    done = re.compile(rf"{name[1]}.*(Success|Failed)")
    status = wait_until(repo, f"{name[1]} ends", lambda status: done.search(status) is not None)
    logs = repo.output(f"dvc queue logs {name[1]}")
    assert re.search(rf"{name[1]}.*Success", status), f"{status}\n{logs[-6000:]}"
    assert ran(logs) == ["check-params", "train", "eval"]
    assert "page features: 0 computed, 74 of 74 pages in the cache" in logs, "the cache is found through DVC_ROOT too"
    rows = csv.DictReader(repo.output("dvc exp show --csv").splitlines())
    assert [float(row["lr"]) for row in rows if row["Experiment"] == name[1]] == [1e-3]
    assert load_params(repo.path / "params.yaml").lr == 0.006, "a queued run leaves the workspace alone"


def wait_until(repo: Repo, what: str, over: Callable[[str], bool]) -> str:
    """`dvc queue status` once it says so."""
    end = time.monotonic() + TIMEOUT
    while not over(status := repo.output("dvc queue status")):
        assert time.monotonic() < end, f"waited {TIMEOUT} s: {what}\n{status}"
        time.sleep(1)
    return status


def test_a_refused_value_stays_in_params_until_it_is_taken_back(repo):
    repo.output("git checkout -q . && dvc checkout -q")
    repo.output("git config user.name Test && git config user.email test@localhost")
    metrics = repo.path / "metrics" / "train.json"
    metrics.write_text(metrics.read_text() + "\n")  # as it is before its commit
    kept = [metrics, *(repo.path / "experiments" / "colintern").iterdir(), *(repo.path / "data").glob("[!.]*.*")]
    before = {path: path.read_bytes() for path in kept if path.name != "params-check.txt"}
    refused = repo.run(documented("dvc exp run -S lr=abc"))
    assert {path: path.read_bytes() for path in before} == before, "no stage has lost its outs"
    assert refused.returncode and "params.yaml: 1 problem\n  lr: 'abc'" in refused.stdout
    assert "params.yaml: 1 problem" in repo.run("colintern doctor").stdout
    repo.output("git checkout params.yaml metrics")
    assert repo.output("git status --porcelain") == ""
    unknown = repo.run("dvc exp run -S learning_rate=1").stdout
    assert "Could not override 'learning_rate'.\nTo append to your config use +learning_rate=1" in unknown
