"""The scripts of .github on real clones of a small pipeline, and against GitHub's API on loopback."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from conftest import ROOT
from loopback import LoopbackHandler, LoopbackServer, run_in_thread
from pages import documented
from ruamel.yaml import YAML
from test_dvc_commands import IDENTITY, Repo, bare_environment, copy_working_tree

pytestmark = pytest.mark.integration
SCRIPTS = ROOT / ".github" / "scripts"
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
RUN = f"{sys.executable} {SCRIPTS}"
PIPELINE = """\
stages:
  train:
    cmd: python train.py
    deps:
    - folder
    - train.py
    params:
    - lr
    outs:
    - model
  eval:
    cmd: python eval.py
    deps:
    - eval.py
    - model
    params:
    - lr
    outs:
    - results/mteb_evaluation
    metrics:
    - metrics.json:
        cache: false
"""
EVAL = """\
import json
from pathlib import Path
from colintern.evaluation.results import QueryResult, write_query_results
from colintern.scoring.metrics import METRIC_KEYS

lr = float(Path("params.yaml").read_text().split()[1])
scores = [min(1.0, lr * 10 * (1 + query % 3)) for query in range(30)]
results = [
    QueryResult("docs", "DocsRetrieval", "default", f"q{query}", dict.fromkeys(METRIC_KEYS, score), 1, ["1"])
    for query, score in enumerate(scores)
]
out = Path("results/mteb_evaluation")
write_query_results(out / "queries/trained.parquet", results)
run = {"revision": "1", "params": {"lr": lr}, "data": {"DocsRetrieval": "1"}, "size": {}}
(out / "run.json").write_text(json.dumps(run))
Path("metrics.json").write_text(json.dumps({"docs": {"ndcg_at_5": sum(scores) / 30}}))
"""


@pytest.fixture(scope="module")
def two_commits(tmp_path_factory, forked) -> Repo:
    """`main` with lr 0.01, and a branch with 0.03, both evaluated; results are DVC's outs, as ours are."""
    top = tmp_path_factory.mktemp("two") / "repo"
    (top / "folder").mkdir(parents=True)
    own = {"PYTHONPATH": str(ROOT), "GIT_CONFIG_GLOBAL": str(top.parent / "gitconfig")}
    env = bare_environment(top.parent, forked) | own
    (top.parent / "gitconfig").write_text("[safe]\ndirectory = *\n")
    repo = Repo(top, env)
    repo.output("git init -q -b main && dvc init -q")
    (top / "dvc.yaml").write_text(PIPELINE)
    (top / "eval.py").write_text(EVAL)
    (top / "train.py").write_text(
        "from pathlib import Path\nPath('model').write_text(Path('params.yaml').read_text())\n"
    )
    (top / "folder" / "one.txt").write_text("one\n")
    shutil.copy(ROOT / ".gitattributes", top)
    (top / ".gitignore").write_text("/model\n/results/mteb_evaluation\n.venv\n.tools\n")
    for number, branch in ((0.01, "main"), (0.03, "faster")):
        (top / "params.yaml").write_text(f"lr: {number}\n")
        repo.output(f"git checkout -q -B {branch} && dvc repro -q")
        repo.commit()
    return repo


@pytest.fixture
def clone(two_commits, tmp_path) -> Repo:
    """What a fork's pull request has: git's files of both commits, and no data, cache or remote."""
    repo = Repo(tmp_path / "clone", two_commits.env)
    two_commits.output(f"git clone -q -c core.autocrlf=true --branch faster file://{two_commits.path} {repo.path}")
    repo.output("git branch -q main origin/main")
    assert not (repo.path / "model").exists()
    return repo


def test_the_report_has_metrics_params_and_the_comparison_where_the_outs_are(two_commits, tmp_path):
    repo = Repo(tmp_path / "copy", two_commits.env)
    shutil.copytree(two_commits.path, repo.path, symlinks=True)
    shutil.copy(ROOT / "Makefile", repo.path)
    for name in ("requirements.txt", "requirements-dev.txt"):
        (repo.path / name).touch()
    (repo.path / ".github").symlink_to(ROOT / ".github")
    for folder, file in ((".tools/bin", "uv"), (".venv", ".installed")):  # set up already
        (repo.path / folder).mkdir(parents=True)
        (repo.path / folder / file).touch()
    done = repo.run("make --silent pr-report BASE='nowhere$$(touch x)'")
    assert "is no revision here" in done.stdout and not (repo.path / "x").exists()
    text = repo.output(documented("make pr-report BASE=main") + " --silent")
    assert repo.output(documented("make stale") + " --silent") == "dvc.lock is up to date: train, eval\n"
    assert re.match(r"## [0-9a-f]{10} against [0-9a-f]{10}\n", text)
    assert re.search(r"\| metrics.json \| docs.ndcg_at_5 +\| 0\.2 +\| 0\.6 +\| 0\.4 +\|", text), text
    assert re.search(r"\| params.yaml \| lr +\| 0.01 +\| 0.03 +\|", text), text
    assert re.search(r"\| Docs \| 20.0 \| 60.0 \| \+40.0 \|.*\| 30/0/0 \| better \|", text), text
    assert text.endswith("### dvc.lock\n\ndvc.lock is up to date: train, eval\n") and "not committed" not in text


def test_without_cache_or_remote_the_report_says_what_could_not_be_compared_and_why(clone):
    (clone.path / "folder" / "one.txt").write_text("two\n")
    text = clone.output(f"{RUN}/pr_report.py main")
    assert "docs.ndcg_at_5" in text and "| lr" in text
    assert re.search(r"### Query by query\n\nNot compared: [0-9a-f]{10}: results/mteb_evaluation", text), text
    assert "is not in DVC's cache here, nor in a remote" in text and "dvc pull" in text
    assert "Changes that are not committed are not in this." in text
    assert text.endswith("- train: changed deps: folder modified\n") and "dvc.lock is stale (1 differences)" in text


def test_a_base_that_is_none_is_refused(clone):
    for base in ("nowhere", "--help"):
        done = clone.run(f"{RUN}/pr_report.py {base}")
        assert done.returncode == 2 and f"error: BASE: '{base}' is no revision here" in done.stdout


def test_head_as_its_own_base_is_refused_with_what_to_do(clone):
    for prepare, base, said in (
        ("true", "faster", "check out the branch to compare, or give an older commit, such as make"),
        ("echo >> eval.py", "HEAD", "commit your changes on a branch first, or"),
    ):
        done = clone.run(f"{prepare} && {RUN}/pr_report.py {base}")
        assert done.returncode == 2 and f"error: BASE: '{base}' is the commit that is checked out" in done.stdout
        assert said in done.stdout, done.stdout


def edit_lock(repo: Repo, change) -> None:
    yaml = YAML()
    lock = yaml.load(repo.path / "dvc.lock")
    change(lock["stages"])
    yaml.dump(lock, repo.path / "dvc.lock")


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda r: (r.path / "train.py").write_text("x"), "train: changed deps: train.py modified"),
        (lambda r: (r.path / "folder" / "two.txt").touch(), "train: changed deps: folder modified"),
        (lambda r: (r.path / "eval.py").unlink(), "eval: changed deps: eval.py deleted"),
        (lambda r: (r.path / "params.yaml").write_text("lr: 0.5"), "train: params.yaml: lr modified"),
        (lambda r: (r.path / "metrics.json").write_text("{}"), "eval: changed outs: metrics.json modified"),
        (lambda r: (r.path / "metrics.json").unlink(), "eval: changed outs: metrics.json "),
        (lambda r: (r.path / "dvc.yaml").write_text(PIPELINE.replace("n eval.py", "n -u eval.py")), "changed command"),
        (lambda r: edit_lock(r, lambda s: s["eval"]["deps"][1].update(md5="0" * 32)), "eval: read another model than"),
        (lambda r: edit_lock(r, lambda s: s.pop("eval")), "eval: "),
        (lambda r: (r.path / "dvc.yaml").write_text(PIPELINE.partition("  eval:")[0]), "eval: in dvc.lock, but no"),
        (lambda r: (r.path / "dvc.lock").unlink(), "dvc.lock: missing"),
    ],
)
def test_a_stale_lock_is_told_without_any_data(clone, edit, said):
    edit(clone)
    done = clone.run(f"{RUN}/stale.py")
    assert done.returncode == 1 and said in done.stdout, done.stdout


def test_git_on_windows_changes_no_byte_of_a_checkout(tmp_path, two_commits):
    """With CRLF bash runs no script, and the hashes of dvc.lock and data/manifest.json hold for no file."""
    copy_working_tree(tmp_path / "tree")
    (tmp_path / "tree" / "pages.npz").write_bytes(b"PK\r\n\n")
    repo = Repo(tmp_path / "tree", two_commits.env)
    repo.output("git init -q -b main")
    repo.commit()
    repo.output("git -c core.autocrlf=true clone -q -c core.autocrlf=true -c core.eol=crlf . ../clone")
    names = repo.output("git ls-files").split()
    assert {"docker/entrypoint", "cluster/tune.sh", "demo/base/model.safetensors", "pages.npz"} <= set(names)
    changed = [n for n in names if (tmp_path / "clone" / n).read_bytes() != (repo.path / n).read_bytes()]
    assert changed == []
    assert Repo(tmp_path / "clone", two_commits.env).output("git status --porcelain") == ""


def test_a_lock_that_is_not_stale_passes_without_any_data(clone):
    assert clone.output(f"{RUN}/stale.py") == "dvc.lock is up to date: train, eval\n"


def test_conflicts_of_a_merge_are_told_and_the_page_says_how_they_are_mended(two_commits, tmp_path):
    repo = Repo(tmp_path / "copy", two_commits.env)
    shutil.copytree(two_commits.path, repo.path, symlinks=True)
    repo.output("git checkout -q -B slower main && echo 'lr: 0.02' > params.yaml && dvc repro -q")
    repo.commit()
    assert "conflict in dvc.lock" in repo.run("git merge faster", **IDENTITY).stdout
    (repo.path / "params.yaml").write_text("lr: 0.02\n")
    done = repo.run(f"{RUN}/stale.py")
    assert done.returncode == 1 and done.stdout.startswith("error: dvc.lock: is not valid YAML; after a merge"), done
    mend = "git checkout --ours -- dvc.lock metrics plots"
    assert f"`{mend} && dvc repro`" in (ROOT / "docs" / "troubleshooting.md").read_text()
    repo.output(mend.replace("metrics plots", "metrics.json") + " && dvc repro")
    repo.commit()
    assert repo.output(f"{RUN}/stale.py") == "dvc.lock is up to date: train, eval\n"


# --- the comment -----------------------------------------------------------------------------------------------------
TOKEN = "t" * 20


class GitHub(LoopbackServer):
    """Pulls and comments of one repository, as GitHub's API gives and takes them; `asked` is what was asked."""

    def __init__(self) -> None:
        super().__init__(Handler)
        self.pulls: list[dict[str, Any]] = []
        self.comments: list[dict[str, Any]] = []
        self.asked: list[str] = []


class Handler(LoopbackHandler):
    server: GitHub

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        query = {key: value[0] for key, value in parse_qs(address.query).items()}
        found = self.server.comments if address.path.endswith("/comments") else self.server.pulls
        if "head" in query:
            found = [pull for pull in found if pull["head"]["label"] == query["head"]]
        start = (int(query["page"]) - 1) * int(query["per_page"])
        self.answer(found[start : start + int(query["per_page"])])

    def do_POST(self) -> None:
        self.server.comments.append({"id": 1000, "user": {"login": "github-actions[bot]"}, **self.content()})
        self.answer({})

    def do_PATCH(self) -> None:
        [comment] = [one for one in self.server.comments if str(one["id"]) == self.path.rpartition("/")[2]]
        comment |= self.content()
        self.answer({})

    def content(self) -> dict[str, Any]:
        return json.loads(self.read_body())

    def answer(self, content: Any) -> None:
        assert self.headers["Authorization"] == f"Bearer {TOKEN}"
        self.server.asked.append(f"{self.command} {urlsplit(self.path).path}")
        self.send_body(200, json.dumps(content).encode())


@pytest.fixture
def github() -> Iterator[GitHub]:
    with run_in_thread(GitHub()) as server:
        yield server


def pull(number: int, sha: str, repo: int = 7) -> dict[str, Any]:
    return {"number": number, "head": {"sha": sha, "label": "someone:a&b", "repo": {"id": repo}}}


def post(github: GitHub, tmp_path: Path, report: str, **run: str) -> "subprocess.CompletedProcess[str]":
    source = {"id": 7, "owner": {"login": "someone"}}
    event = {"event": "pull_request", "head_sha": "a" * 40, "head_branch": "a&b", "head_repository": source}
    (tmp_path / "event.json").write_text(json.dumps({"workflow_run": event | run}))
    if not (tmp_path / "report.md").is_symlink():
        (tmp_path / "report.md").write_text(report)
    env = {"GITHUB_EVENT_PATH": str(tmp_path / "event.json"), "GITHUB_REPOSITORY": "us/ours", "GITHUB_TOKEN": TOKEN}
    env |= {"GITHUB_API_URL": f"http://127.0.0.1:{github.server_port}", "PATH": os.environ["PATH"]}
    command = [sys.executable, SCRIPTS / "comment.py", tmp_path / "report.md"]
    return subprocess.run(command, env=env, capture_output=True, text=True)


def test_one_comment_is_posted_and_then_updated_on_the_pull_request_of_the_event(github, tmp_path):
    github.pulls = [pull(3, "b" * 40), pull(4, "a" * 40, repo=8), pull(5, "a" * 40)]
    theirs = {"id": 1, "user": {"login": "someone"}, "body": "<!-- colintern report --> not ours"}
    github.comments = [theirs, *({"id": n, "user": {"login": "x"}, "body": ""} for n in range(2, 200))]
    assert "pull request 5: posted" in post(github, tmp_path, "## first\n\nPR: 3").stdout
    assert github.asked[-1] == "POST /repos/us/ours/issues/5/comments"
    done = post(github, tmp_path, "## second")
    assert "pull request 5: updated" in done.stdout, done.stderr
    assert len(github.comments) == 200 and github.comments[-1]["body"] == "<!-- colintern report -->\n## second"
    assert github.comments[0] == theirs


def test_nothing_is_posted_where_the_event_names_no_open_pull_request(github, tmp_path):
    github.pulls = [pull(5, "b" * 40)]
    assert "nothing is posted" in post(github, tmp_path, "text").stdout
    assert post(github, tmp_path, "text", event="push").returncode == 1
    (tmp_path / "report.md").unlink()
    (tmp_path / "report.md").symlink_to("/etc/hostname")
    done = post(github, tmp_path, "")
    assert done.returncode == 1 and "is no file" in done.stderr
    assert not github.comments


def test_the_report_is_text_and_nothing_else(github, tmp_path):
    github.pulls = [pull(5, "a" * 40)]
    table = "## head\n\n| a | b |\n|---|---:|\n| **x** | -0.5 |\n"
    evil = (
        "@everyone <img src=x onerror=y> ![i](http://e.example/x.png) [t](javascript:x) www.e.example #12 us/ours#3 "
        "GH-4 `code` <!-- colintern report --> \\<b> :tada: a@e.example &lt; \u202e\x1b[31m ~~~"
    )
    post(github, tmp_path, table + evil)
    body = github.comments[0]["body"]
    assert body.startswith("<!-- colintern report -->\n" + table), "headings, tables and emphasis stay"
    rest = body.removeprefix("<!-- colintern report -->\n" + table)
    assert not re.search(r"[@<>\[\]!`~\\\x1b\u202e]|https?:|www\.|(?<!&)#\d|GH-|:\w|&(?!#\d+;)", rest), rest
    post(github, tmp_path, "| row | <&> |\n" * 20_000)
    body = github.comments[0]["body"]
    assert len(body) < 65_536 and body.endswith("the whole report is the artifact of the run)")
    assert body.splitlines()[-3] == "| row | &#60;&#38;&#62; |", "cut between lines"


# --- the workflows ---------------------------------------------------------------------------------------------------
def test_actions_are_pinned_and_a_pull_request_runs_without_secrets_or_rights():
    rights = {}
    for file in WORKFLOWS:
        text = file.read_text()
        uses = re.findall(r"uses: (.*)", text)
        assert uses and all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", one) for one in uses), uses
        content = YAML(typ="safe").load(text)
        assert content["permissions"] == {}
        rights[file.stem] = [job["permissions"] for job in content["jobs"].values()]
        runs = [step["run"] for job in content["jobs"].values() for step in job["steps"] if "run" in step]
        assert runs and not any("${{" in run for run in runs), "no value of an event is part of a command"
        if "pull_request" in content["on"]:
            assert not re.search(r"secrets|github\.token|actions/cache|cache:|dvc pull", text)
    assert rights["tests"] == [{"contents": "read"}] * 3 and rights["report"] == [{"contents": "read"}]
    assert rights["comment"] == [{"actions": "read", "contents": "read", "pull-requests": "write"}]
