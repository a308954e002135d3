"""`colintern tune` in a real repository, cut down to seconds: two workers of which one is killed (U1), and U2."""

import contextlib
import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import optuna
import psutil
import pytest
from pages import documented, words
from ruamel.yaml import YAML
from sqlalchemy.exc import SQLAlchemyError
from test_dvc_commands import ROOT, TIMEOUT, Repo, bare_environment, copy_working_tree, cut_down, set_up

from colintern import __main__ as cli
from colintern.params import load_params
from colintern.tuning.trial_context import STARTED
from colintern.tuning.trials import SLOT

pytestmark = pytest.mark.integration
SPACE = """seed: 0
sampler: tpe
startup_trials: 1
pruner: none
warmup_evaluations: 0
against: none
space:
  lr: {low: 0.001, high: 0.02, log: true}
  lora_rank: {choices: [4, 8]}
"""


@pytest.fixture(scope="module")
def repo(tmp_path_factory, forked) -> Repo:
    """The copy, whose data are fetched and whose later stages look finished, committed.

    A study needs a pipeline that has run, but reads no weights of it: outs that stand in for those of verify, train and
    eval save three stages, each of which imports torch for ten seconds.
    """
    path, home = tmp_path_factory.mktemp("repo"), tmp_path_factory.mktemp("home")
    copy_working_tree(path)
    cut_down(path)
    text = (path / "params.yaml").read_text()
    for old, new in (("\nepochs: 1\n", "\nepochs: 8\n"), ("eval_untrained: true", "eval_untrained: false")):
        assert old in text
        text = text.replace(old, new)
    (path / "params.yaml").write_text(text)
    (path / "tune.yaml").write_text(SPACE)
    repo = set_up(Repo(path, bare_environment(home, forked) | {"PYTHONPATH": ""}))
    repo.output("git init -q -b main")
    repo.commit()
    repo.output("dvc repro -q fetch-data")
    for folder in ("metrics", "plots"):
        shutil.copytree(ROOT / folder, path / folder)
    for folder in ("experiments/colintern", "results/mteb_evaluation"):
        (path / folder).mkdir(parents=True)
        (path / folder / "stand-in").touch()
    repo.output("dvc commit -q -f verify train eval")
    repo.commit()
    repo.output("git config user.name Test && git config user.email test@localhost")
    return repo


def start(repo: Repo, name: str, options: str = "--trials 2 --study s") -> subprocess.Popen:
    command = [sys.executable, "-m", *words(f"{documented('colintern tune --trials 10')} {options} --heartbeat 3")]
    with (repo.path / "logs" / name).open("w") as log:
        return subprocess.Popen(command, cwd=repo.path, env=repo.env, stdout=log, stderr=log)


def trials(repo: Repo, name: str = "s") -> list[optuna.trial.FrozenTrial]:
    try:
        return optuna.load_study(study_name=name, storage=f"sqlite:///{repo.path}/studies/{name}.db").trials
    except (KeyError, SQLAlchemyError):  # not made yet
        return []


def test_u1_two_workers_one_killed_nothing_lost_and_nothing_twice(repo):
    (repo.path / "logs").mkdir(exist_ok=True)
    (repo.path / "studies").mkdir(exist_ok=True)
    params = (repo.path / "params.yaml").read_text()
    log = repo.path / "logs" / "tune" / "s-000.log"
    first = start(repo, "first")
    until(log.is_file, "the first trial is there")  # before that, to look at the study would be to make its tables
    until(lambda: any(STARTED in t.user_attrs for t in trials(repo)), "the first trial trains", 2)
    second = start(repo, "second")
    until(lambda: "step 4/" in log.read_text(), "it has made four steps")
    started = [" ".join(child.cmdline()) for child in psutil.Process(first.pid).children()]
    option = documented("dvc exp run --temp").removeprefix("dvc ")
    assert any(option in command for command in started), started
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert second.wait(TIMEOUT) == 0, (repo.path / "logs" / "second").read_text()
    found = trials(repo)
    assert [t.state.name for t in found].count("COMPLETE") == 2, found
    killed, *others = found
    [again] = [t for t in others if t.user_attrs[SLOT] == 0]
    assert killed.state.name == "FAIL" and killed.params == again.params and len(others) == 2
    assert [t.user_attrs["pages computed"] for t in others if "pages computed" in t.user_attrs] in ([0], [0, 0])
    assert (
        "stopped at step" in log.read_text()
        and "resuming from" in (log.parent / f"s-{again.number:03}.log").read_text()
    )
    assert (repo.path / "params.yaml").read_text() == params and not repo.output("git status --short")


def test_every_trial_is_an_experiment_that_repro_reproduces(repo):
    done = {t.user_attrs["experiment"]: t for t in trials(repo) if t.state.name == "COMPLETE"}
    rows = {row["Experiment"]: row for row in csv.DictReader(repo.output("dvc exp show --csv").splitlines())}
    for name, trial in done.items():
        assert float(rows[name]["dev_ndcg_at_5"]) == trial.value and float(rows[name]["lr"]) == trial.params["lr"]
    assert set(rows) - {"", "main"} == set(done), "nothing of the killed try"
    name, trial = next(iter(done.items()))
    (repo.path / "tune.yaml").write_text(SPACE + "# edited\n")
    repo.output(documented("dvc exp apply STUDY-NNN").replace("STUDY-NNN", name))
    assert (repo.path / "tune.yaml").read_text() == SPACE, "DVC keeps no edit"
    repo.output("git stash apply refs/exps/apply/stash")
    assert (repo.path / "tune.yaml").read_text() == SPACE + "# edited\n"
    lock = lambda: YAML(typ="safe").load(repo.path / "dvc.lock")["stages"]["train"]["outs"]  # noqa: E731
    before = lock()
    repo.output("dvc repro -f -s train")
    assert lock() == before and repo.metric("train")["dev_ndcg_at_5"] == trial.value
    repo.output("git checkout -q .")


HOLD = """import time
from dvc.repo import Repo
with Repo(".").lock:
    print("held", flush=True)
    time.sleep(12)
"""


@contextlib.contextmanager
def held_lock(repo: Repo):
    """DVC's lock, as `dvc push` holds it: longer than a command waits for it by default."""
    holder = subprocess.Popen([sys.executable, "-c", HOLD], cwd=repo.path, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    yield
    assert holder.wait(60) == 0


def test_a_trial_that_is_stopped_from_outside_is_put_back_and_resumes(repo):
    """SIGTERM to the training alone, then to the tuner, whose trial's training ends with it."""
    file, text = repo.path / "params.yaml", (repo.path / "params.yaml").read_text()
    file.write_text(text.replace("\nepochs: 8\n", "\nepochs: 80\n"))
    process = start(repo, "stopped", "--study stopped --trials 1")
    for number, wait_for in enumerate(("step 4/", "/320 [")):
        log = repo.path / "logs" / "tune" / f"stopped-{number:03}.log"
        until(lambda log=log, step=wait_for: log.is_file() and step in log.read_text(), wait_for)
        trainer = trials(repo, "stopped")[number].user_attrs[STARTED]
        os.kill((trainer, process.pid)[number], signal.SIGTERM)
        if number == 0:
            until(lambda: len(trials(repo, "stopped")) == 2, "the trial is put back", 2)
    assert process.wait(TIMEOUT) == 75, (repo.path / "logs" / "stopped").read_text()
    file.write_text(text)
    assert not psutil.pid_exists(trainer), "no training is left behind"
    first, second, third = trials(repo, "stopped")
    assert [t.state.name for t in (first, second, third)] == ["FAIL", "FAIL", "WAITING"]
    assert first.params == second.params == third.params
    said = (repo.path / "logs" / "stopped").read_text()
    assert re.search(r"stopped-000  put back: error: stopped at step \d+ of \d+, with a checkpoint", said), said
    assert "stopped; the next `colintern tune` resumes this trial" in said
    assert "resuming from" in log.read_text() and "with a checkpoint" in log.read_text()


def test_a_study_ends_where_params_are_edited_under_it(repo):
    file, text = repo.path / "params.yaml", (repo.path / "params.yaml").read_text()
    with held_lock(repo):  # the first trial waits for it
        process = start(repo, "edited", "--study edited --trials 4")
    until(lambda: any(STARTED in t.user_attrs for t in trials(repo, "edited")), "the first trial trains", 2)
    file.write_text(text.replace("temperature: 0.015", "temperature: 0.03"))
    assert process.wait(TIMEOUT) == 2, (repo.path / "logs" / "edited").read_text()
    file.write_text(text)
    assert "params.yaml: temperature was 0.015, is 0.03" in (repo.path / "logs" / "edited").read_text()
    *done, stopped, again = trials(repo, "edited")
    assert (stopped.state.name, again.state.name) == ("FAIL", "WAITING") and stopped.params == again.params
    for trial in done:
        name = trial.user_attrs["experiment"]
        rows = repo.output(f"git show $(git for-each-ref --format='%(refname)' | grep {name})")
        assert "+temperature" not in rows and "+lr: " in rows


@pytest.fixture
def tune(repo, monkeypatch, capsys):
    """The command in this process, for what starts no trial; gives its exit code and what it prints."""
    monkeypatch.chdir(repo.path)
    before = signal.getsignal(signal.SIGTERM)

    def run(*options: str) -> tuple[object, str]:
        try:
            code: object = cli.main(["tune", "--heartbeat", "3", *options])
        except SystemExit as stop:
            code = stop.code
        return code, "".join(capsys.readouterr())

    yield run
    signal.signal(signal.SIGTERM, before)
    repo.output("git checkout -q .")


def test_a_finished_study_runs_nothing_more_and_applies_its_best(repo, tune):
    command = documented("colintern tune --trials 10 --apply") + " --trials 2 --study s"
    code, output = tune(*words(command)[2:])
    best = max((t for t in trials(repo) if t.state.name == "COMPLETE"), key=lambda t: t.value)
    assert code == 0 and "lr, lora_rank written" in output and max(map(len, output.splitlines())) < 200
    assert load_params(repo.path / "params.yaml").lr == best.params["lr"]


def test_another_space_is_refused(repo, tune):
    (repo.path / "tune.yaml").write_text(SPACE.replace("0.02", "0.03"))
    code, said = tune("--trials", "3", "--study", "s")
    assert code == 2 and "other values of the space of tune.yaml" in said
    (repo.path / "tune.yaml").write_text(SPACE)
    text = (repo.path / "params.yaml").read_text()
    (repo.path / "params.yaml").write_text(text.replace("temperature: 0.015", "temperature: 0.03"))
    code, said = tune("--trials", "3", "--study", "s")
    assert code == 2 and "params.yaml: temperature was 0.015, is 0.03" in said


def test_a_lock_with_the_conflicts_of_a_merge_is_refused(repo, tune):
    lock = repo.path / "dvc.lock"
    lock.write_text(lock.read_text().replace("stages:\n", "<<<<<<< HEAD\nstages:\n"))
    code, said = tune("--trials", "3", "--study", "s")
    assert code == 2 and "dvc.lock: is not valid YAML; after a merge: git checkout --ours" in said


def test_two_objectives_have_no_winner_and_take_no_experiments(repo, tune):
    (repo.path / "tune.yaml").write_text(SPACE.replace("against: none", "against: training_seconds"))
    code, said = tune(*words(documented("colintern tune --study fleet --trials 40 --apply"))[2:])
    assert code == 2 and "--apply: dev NDCG@5 against training_seconds has a front and no best trial" in said
    code, said = tune("--trials", "3", "--study", "two", "--warm-start")
    assert code == 2 and "--warm-start: experiments do not record training_seconds" in said


def test_u2_where_every_trial_fails_the_cause_is_told_and_params_stay(repo, postgresql_or_none):
    params = (repo.path / "params.yaml").read_text()
    (repo.path / "tune.yaml").write_text(
        SPACE.replace("lr: {low: 0.001, high: 0.02, log: true}", "batch_size: {choices: [98, 99]}")
    )
    command = documented("colintern tune --trials 40 --study wide") + " --trials 1 --study bad --heartbeat 3"
    address = documented("export COLINTERN_STORAGE=postgresql://USER:PASSWORD@HOST/DATABASE").partition("=")[0]
    failed = repo.run(f"{address}={postgresql_or_none}; {command} --apply --warm-start")
    assert failed.returncode == 4, failed.stdout
    assert "no trial of 'bad' is complete; 1 of 1 failed with:\n  error: batch_size: 9" in failed.stdout
    # Those of the studies before: they have other values of what this space does not vary.
    assert re.search(r"warm start: 0 experiments added; \d+ not, with other ", failed.stdout), failed.stdout
    assert (repo.path / "params.yaml").read_text() == params
    said = failed.stdout + (repo.path / "logs" / "tune" / "bad-000.log").read_text()
    assert "marked" not in said and ("postgresql+psycopg://me:***@" in said) == bool(postgresql_or_none)
    repo.output("git checkout -q .")


def test_a_storage_that_does_not_answer_is_refused_without_its_password(tune, monkeypatch):
    monkeypatch.setenv("COLINTERN_STORAGE", "postgresql://me:marked%40word@127.0.0.1:9/x")
    code, said = tune("--trials", "1")
    assert code == 2 and "--storage: cannot be used" in said and "marked" not in said
    assert said.count("\n") == 1, said


def until(over, what: str, pause: float = 0.4) -> None:
    """Wait; `pause` is longer where to look takes long itself, as into a study."""
    end = time.monotonic() + TIMEOUT
    while not over():
        assert time.monotonic() < end, what
        time.sleep(pause)
