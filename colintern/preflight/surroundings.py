"""What lies around a run, as facts and as rules in the manner of doctor.py: git, DVC's remote, hub, W&B.

None of it stops a training run; no token, key or address of a remote leaves this module.
"""

import atexit
import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token, is_offline_mode
from huggingface_hub.errors import HFValidationError, HTTPError

from colintern.core.rules import mixture, split_kernel, unsupported_path_characters
from colintern.monitoring.guide import DEMO
from colintern.params import Params, on_hub
from colintern.preflight.doctor import FAIL, PASS, WARN, Answer, Facts
from colintern.storage.hub import Repo, create_offline_error, to_user_error
from colintern.storage.manifest import MANIFEST

TIMEOUT = 10  # seconds for an answer of the hub


@dataclass(frozen=True)
class Surroundings:
    """`git`: "" or what git says is wrong; `changed`: tracked files that differ from the commit; `committer`: whether
    git knows one; `remotes`: names of DVC's remotes; `default_remote`: one of them, or "". `repos`: hub repositories of
    this run, `lacking`: those of which the cache lacks files; `hub`: "" or what stands between here and them; `token`:
    whether there is one; `wandb`: names of the W&B variables that are set; `tracked`: whether
    training reports to W&B; `odd_path`: characters of this folder's path with which DVC cannot copy the project."""

    demo: bool
    git: str
    commit: str
    changed: int
    committer: bool
    remotes: tuple[str, ...]
    default_remote: str
    repos: tuple[str, ...]
    lacking: tuple[str, ...]
    hub: str
    token: bool
    wandb: tuple[str, ...]
    tracked: bool
    odd_path: str


def surroundings(facts: Facts) -> Surroundings:
    """Look around; the hub is asked only for repositories that the cache lacks files of."""
    commit, problem = _git("rev-parse", "--short", "HEAD")
    remotes, default = _dvc_remotes()
    repos = hub_repos(facts.params)
    lacking = [repo for repo, files in repos.items() if not _cached(repo, files)]
    return Surroundings(
        demo=facts.bounds.name == DEMO,
        git=problem,
        commit=commit,
        changed=len(_git("status", "--porcelain", "--untracked-files=no")[0].splitlines()),
        committer=not _git("var", "GIT_COMMITTER_IDENT")[1],
        remotes=remotes,
        default_remote=default,
        repos=tuple(repo.name for repo in repos),
        lacking=tuple(repo.name for repo in lacking),
        hub=next((said for repo in lacking if (said := _asked(repo))), ""),
        token=get_token() is not None,
        wandb=tuple(sorted(name for name in os.environ if name.startswith("WANDB_"))),
        tracked=facts.params.tracker == "wandb",
        odd_path=unsupported_path_characters(os.getcwd()),
    )


def _git(*arguments: str) -> tuple[str, str]:
    """What git answers, and "" or the first line of what is wrong."""
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        return "", "git is not installed"
    if done.returncode:
        return "", done.stderr.strip().partition("\n")[0] or f"git {arguments[0]} failed"
    return done.stdout.rstrip("\n"), ""


def _dvc_remotes() -> tuple[tuple[str, ...], str]:
    """The names of DVC's remotes, and of the default one."""
    from colorama.initialise import reset_all
    from dvc.config import Config, ConfigError  # here: it takes a while to import

    atexit.unregister(reset_all)  # DVC's import leaves an escape sequence to be printed at the end, colour or none
    try:
        config = Config.from_cwd()
    except ConfigError:
        return (), ""
    return tuple(config["remote"]), config["core"].get("remote", "")


def hub_repos(params: Params) -> dict[Repo, list[str] | None]:
    """The run's hub repositories with their files, as the manifest names them; None where it does not yet."""
    repos = [Repo("base", params.base, params.base_revision, "model")]
    repos += [Repo("train_data", name, params.train_revision, "dataset") for name, _ in mixture(params.train_data)]
    repos += [Repo("train_corpus", params.train_corpus, params.train_corpus_revision, "dataset")]
    if kernel := split_kernel(params.attention):
        repos += [Repo("attention", *kernel, "kernel")]
    try:
        known, tasks = _listed()
    except (OSError, ValueError, KeyError, TypeError):  # none yet, or one of an older version: it is made anew
        known, tasks = {}, {}
    return {repo: known.get((repo.name, repo.revision)) for repo in repos if on_hub(repo.name)} | tasks


def _listed() -> tuple[dict[tuple[str, str], list[str]], dict[Repo, list[str] | None]]:
    """The manifest's files of base, kernel and training data by folder and revision; its tasks that come from a hub."""
    manifest = json.loads(Path(MANIFEST).read_text())
    entries = [manifest["base"], *manifest["train"], *filter(None, (manifest["train_corpus"], manifest.get("kernel")))]
    tasks: dict[Repo, list[str] | None] = {
        Repo(f"benchmarks: {task}", part["folder"], part["revision"], "dataset"): list(part["files"])
        for task, part in manifest["evaluation"].items()
        if part["revision"]
    }
    return {(entry["folder"], entry["revision"]): list(entry["files"]) for entry in entries}, tasks


def _cached(repo: Repo, files: list[str] | None) -> bool:
    return files is not None and all((repo.snapshot_folder / name).is_file() for name in files)


def _asked(repo: Repo) -> str:
    """ "" if the hub would hand out `repo` at its commit, else what is wrong and what to do."""
    if is_offline_mode():
        return str(create_offline_error([repo], "HF_HUB_OFFLINE is set"))
    try:
        HfApi().repo_info(repo.name, revision=repo.revision, repo_type=repo.kind, timeout=TIMEOUT)
    except (HTTPError, OSError, HFValidationError) as error:
        return str(to_user_error(error, repo))
    return ""


def git_state(around: Surroundings) -> Answer:
    if around.git:
        remedy = "git clone the repository: DVC works in a git repository only"
        if "dubious ownership" in around.git:
            remedy = 'git config --global --add safe.directory "$PWD"'
        return FAIL, around.git, remedy
    if around.changed:
        return WARN, f"{around.commit} and {around.changed} changed files: no commit names this state", "git commit -a"
    if not around.committer:
        remedy = 'git config user.name "Your Name" && git config user.email you@example.com'
        return WARN, f"{around.commit}, but no committer: dvc exp run on edited files fails", remedy
    return PASS, f"commit {around.commit}, nothing changed"


def project_path(around: Surroundings) -> Answer:
    if around.odd_path:
        remedy = "move the repository to a path of ASCII characters without # and ?"
        return WARN, f"has {around.odd_path!r}: DVC fails at --temp, --queue and colintern tune", remedy
    return PASS, "DVC can copy the project for --temp, --queue and colintern tune"


def dvc_remote(around: Surroundings) -> Answer:
    if around.default_remote:
        return PASS, f"{around.default_remote}"
    if around.remotes:
        return WARN, f"{', '.join(around.remotes)}, none the default", f"dvc remote default {around.remotes[0]}"
    if around.demo:
        return PASS, "none; the demo can be made again anywhere"
    return WARN, "none: nobody else can fetch the adapter", "dvc remote add --default NAME URL"


def hub_access(around: Surroundings) -> Answer:
    token = "a token is set" if around.token else "no token"
    if not around.repos:
        return PASS, "nothing of this run comes from the hub"
    if not around.lacking:
        return PASS, f"all files of {len(around.repos)} repositories are in the cache"
    if around.hub:
        return FAIL, f"the cache lacks files of {', '.join(around.lacking)}; {token}", around.hub
    return PASS, f"{constants.ENDPOINT} will give what the cache lacks ({len(around.lacking)} repositories); {token}"


def wandb(around: Surroundings) -> Answer:
    if around.wandb and not around.tracked:
        return (
            WARN,
            f"{', '.join(around.wandb)} set, but training sends nothing to W&B",
            "tracker: wandb; or look at the curves in plots/: dvc plots show",
        )
    if around.tracked:
        return PASS, "tracker: wandb; where W&B cannot be reached the run is kept in wandb/"
    return PASS, "not used: curves are in plots/, figures in metrics/, both in git"


AROUND: dict[str, Callable[[Surroundings], Answer]] = {
    "git": git_state,
    "path": project_path,
    "DVC remote": dvc_remote,
    "hub access": hub_access,
    "W&B": wandb,
}
