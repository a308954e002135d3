"""`colintern tune`: what is refused, who takes which trial, what a trial reports, what is shown; U1 and U2 for real."""

import csv
import dataclasses
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from functools import partial
from pathlib import Path

import optuna
import pytest
from browser import PHONE, program, tab
from conftest import ROOT
from processes import FORKS, Place
from small_run import OUT, at_step
from studies import SETTINGS, claim_and_die, complete_trials, open_test_study
from test_dvc_commands import IDENTITY, copy_working_tree

from bench import study as bench_study
from colintern import __main__ as cli
from colintern.commands import tune
from colintern.commands.tune import _check_study_name
from colintern.core.errors import UserError
from colintern.params import load_params, update_params
from colintern.tuning import experiments, trial_context
from colintern.tuning.search_space import SearchSpace, list_extremes, read_search_space
from colintern.tuning.studies import add_finished_experiments
from colintern.tuning.study_report import collect_results, format_trial_table, write_study_report
from colintern.tuning.study_storage import StudyStorage, redact_address
from colintern.tuning.trials import SLOT, ClaimedTrial, claim_trial, find_cause, record_score, requeue_trial

HEAD = "".join(f"{key}: {value}\n" for key, value in SETTINGS.items())
SPACE = HEAD + "space:\n  lr: {low: 0.001, high: 0.02, log: true}\n  lora_rank: {choices: [8, 16]}\n"
TWO = HEAD.replace("median", "none").replace("against: none", "against: bytes_per_page")
TWO += (
    "space:\n  lr: {low: 0.001, high: 0.02, log: true}\n  pool_factor: {low: 1, high: 4}\n  dim: {choices: [32, 128]}\n"
)
optuna.logging.set_verbosity(optuna.logging.ERROR)
pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore:Heartbeat of storage", "ignore::optuna.exceptions.ExperimentalWarning"),
]


@pytest.fixture
def space(tmp_path, monkeypatch) -> SearchSpace:
    monkeypatch.chdir(ROOT)
    (tmp_path / "tune.yaml").write_text(SPACE)
    return read_search_space(load_params(ROOT / "params.yaml"), tmp_path / "tune.yaml")


# --- The space ---


def test_the_repositorys_own_space_fits_its_params(monkeypatch):
    monkeypatch.chdir(ROOT)
    params = load_params(ROOT / "params.yaml")
    assert read_search_space(params, Path("tune.yaml")).distributions.keys() >= {"lr", "lora_rank", "temperature"}
    wide = read_search_space(params, bench_study.SPACE).distributions
    for key, value in bench_study.GUIDE.items():
        assert bench_study.is_within(wide[key], list_extremes(wide[key]), value), key


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learning_rates: {low: 1, high: 2}", "space.learning_rates: unknown key; nearest key: "),
        (
            "pool_factor: {choices: [1, 2]}",
            "with against: bytes_per_page it can be searched",
        ),
        ("lora_rnk: {low: 1, high: 2}", "nearest key: lora_rank"),
        (
            "pool_factor: {choices: [1, 2]}",
            "space.pool_factor: no stage that decides the dev score reads it, only eval",
        ),
        ("dim: {choices: [64, 128]}", "space.dim: no stage that decides the dev score reads it"),
        ("dev_queries: {low: 1, high: 9}", "it decides what the dev score is measured on"),
        ("workers: {low: 0, high: 2}", "it does not change the dev score"),
        ("lora_targets: {choices: [a, b]}", "lists cannot be searched"),
        ("lr: 0.1", "it must be {low: A, high: B}"),
        ("lr: {low: 0.1, high: 0.01}", "low < high"),
        ("lr: {low: 0, high: 0.01, log: true}", "above 0 with log: true"),
        ("lr: {low: 0.01, high: 1.5}", "0 < lr <= 1"),
        ("lora_rank: {low: 4.0, high: 8}", "they must be whole numbers"),
        ("lora_rank: {choices: [8, 8]}", "two or more different values"),
        ("lora_rank: {choices: [8, big]}", "lora_rank: 'big' (str) is not valid"),
        ("batch_size: {choices: [16, 32]}", "micro_batch_size: 32 is not valid; it must be at most batch_size, 16"),
        ("lr_scheduler: {low: 0, high: 1}", "this key takes choices"),
    ],
)
def test_what_cannot_be_searched_is_refused(tmp_path, monkeypatch, text, words):
    monkeypatch.chdir(ROOT)
    (tmp_path / "tune.yaml").write_text(f"{HEAD}space:\n  {text}\n")
    with pytest.raises(UserError, match=re.escape(words)):
        read_search_space(load_params(ROOT / "params.yaml"), tmp_path / "tune.yaml")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (SPACE.replace("tpe", "tpr"), "sampler: 'tpr' is not valid; it must be tpe or random"),
        (SPACE.replace("pruner: median", "pruner: mean"), "pruner: 'mean' is not valid"),
        (SPACE.replace("seed: 0\n", ""), "seed: missing; it must be a whole number from 0"),
        (SPACE.replace("none", "bytes"), "against: 'bytes' is not valid; it must be none, bytes_per_page or training_"),
        (TWO.replace("pruner: none", "pruner: median"), "pruner: 'median' is not valid with against: bytes_per_page"),
        (
            TWO[: TWO.index("  pool")],
            "against: bytes_per_page needs pool_factor, dim, max_visual_tokens or tiling in the space",
        ),
        (TWO.replace("  lr: {low: 0.001, high: 0.02, log: true}\n", ""), "space: it needs a key that training reads"),
        (SPACE + "trials: 3\n", "trials: unknown key; nearest key: startup_trials"),
        (HEAD, "space: it must be a mapping"),
        ("[1, 2]", "must be a mapping"),
        ("a: [", "is not valid YAML"),
    ],
)
def test_a_bad_tune_yaml_is_refused(tmp_path, monkeypatch, text, words):
    monkeypatch.chdir(ROOT)
    (tmp_path / "tune.yaml").write_text(text)
    with pytest.raises(UserError, match=re.escape(words)):
        read_search_space(load_params(ROOT / "params.yaml"), tmp_path / "tune.yaml")


def test_the_winner_is_written_between_the_comments(tmp_path):
    file = tmp_path / "params.yaml"
    before = (ROOT / "params.yaml").read_text()
    file.write_text(before)
    assert update_params(file, {"lr": 0.00123456789, "lora_rank": 8, "lr_scheduler": "cosine", "compile": False}) == [
        "lr", "lora_rank", "lr_scheduler",
    ]  # fmt: skip
    assert (load_params(file).lr, load_params(file).lora_rank, load_params(file).lr_scheduler) == (
        0.00123456789,
        8,
        "cosine",
    )
    comments = [line for line in before.splitlines() if line.startswith("#")]
    assert [line for line in file.read_text().splitlines() if line.startswith("#")] == comments


def test_the_tuner_imports_no_torch():
    names = [f"colintern.{name}" for name in ("commands.tune", "tuning.study_report", "tuning.trials")]
    code = f"import sys, {', '.join(names)}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# --- Who takes which trial ---


def test_three_workers_make_no_trial_twice_and_none_too_many(tmp_path, space):
    workers = [FORKS.Process(target=complete_trials, args=(tmp_path, space, 12)) for _ in range(3)]
    for one in workers:
        one.start()
    for one in workers:
        one.join(120)
    trials = open_test_study(tmp_path, space)[1].trials
    assert [one.exitcode for one in workers] == [0, 0, 0]
    assert Counter(t.state.name for t in trials) == {"COMPLETE": 12} and {t.number for t in trials} == set(range(12))


def test_u1_a_killed_workers_trial_is_tried_once_more_with_the_same_settings(tmp_path, space):
    storage, study = open_test_study(tmp_path, space, 1)

    def killed() -> None:
        one = FORKS.Process(target=claim_and_die, args=(tmp_path, space))
        one.start()
        one.join(60)
        assert one.exitcode == -signal.SIGKILL
        time.sleep(3.5)  # SQLite's clock shows whole seconds

    killed()
    killed()  # its second try
    second = claim_trial(study, storage, space, 2)
    assert isinstance(second, ClaimedTrial)
    study.tell(second.number, 0.5)
    assert claim_trial(study, storage, space, 2) == 0
    first, again, other = study.trials
    assert first.params == again.params != other.params
    assert [t.state.name for t in study.trials] == ["FAIL", "FAIL", "COMPLETE"]
    assert [t.user_attrs[SLOT] for t in study.trials] == [0, 0, 2]


def test_a_resumed_study_goes_on_as_if_never_stopped(tmp_path, space):
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    for folder, totals in ((straight, [8]), (parts, [3, 8])):
        for total in totals:
            storage, study = open_test_study(folder, space)
            while isinstance(trial := claim_trial(study, storage, space, total), ClaimedTrial):
                if len(study.trials) == 2 and folder == parts:
                    requeue_trial(study, trial.number)  # Ctrl-C
                    trial = claim_trial(study, storage, space, total)
                study.tell(trial.number, 1 - abs(trial.values["lr"] - 0.006))
    done = [
        [t.params for t in open_test_study(f, space)[1].trials if t.state.name == "COMPLETE"] for f in (straight, parts)
    ]
    assert len(done[0]) == len(done[1]) == 8
    assert done[0][:2] == done[1][:2], "put back with the same settings"
    assert len({json.dumps(one) for one in done[1]}) == 8, "a resumed study does not draw its first trials again"


def on_a_full_disk() -> None:
    """`colintern tune`; from its first trial on no file may grow any more."""
    work = tune._run_trials

    def full(*args):
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        work(*args)

    tune._run_trials = full
    os.environ |= IDENTITY
    cli.main(["tune", "--trials", "1"])


def test_a_storage_that_fails_under_a_study_is_told_without_a_traceback(tmp_path):
    copy_working_tree(tmp_path)
    shutil.copy(ROOT / "dvc.lock", tmp_path)  # of a `dvc repro`, which a study asks for
    for name in ("data/manifest.json", "data/rows.parquet", "metrics/verify.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    place = Place(tmp_path, on_a_full_disk)
    assert place.run() == 2, place.err
    assert re.fullmatch(r"error: --storage: sqlite:///.*/study.db failed: .*(disk|database).*; once .*\n", place.err)


@pytest.mark.parametrize("name", ["é", "c#", "a?b"])
def test_a_path_that_dvc_cannot_copy_is_refused_before_the_first_trial(tmp_path, monkeypatch, name):
    (tmp_path / name / "repo").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / name / "repo")
    with pytest.raises(
        UserError, match=rf"repo: DVC cannot copy a project whose path has '{re.escape(name.strip('abc'))}'"
    ):
        _check_study_name("fine")


# --- The password ---


@pytest.mark.parametrize(
    ("url", "words"),
    [
        (
            "postgresql+psycopg2://me:marked%40word@127.0.0.1:9/x",
            "postgresql+psycopg2: write postgresql://..., the driver",
        ),
        ("postgresql://me:marked%40word@127.0.0.1:9/x", "cannot be used: OperationalError"),
        ("mysql://me:marked%40word@h/x", "'mysql' is not valid; such as sqlite:///studies/NAME.db or postgresql://"),
    ],
)
def test_a_storage_that_cannot_be_used_is_named_without_its_password(url, words):
    with pytest.raises(UserError, match=re.escape(f"--storage: {words}")) as refused:
        StudyStorage(url, "a", 30)
    assert "marked" not in "".join(traceback.format_exception(refused.value))


def test_the_password_is_taken_out_of_whatever_is_shown():
    url = "postgresql://me:marked%40word@host/x"
    text = redact_address(f"cannot reach {url}; password marked@word, or marked%40word", url)
    assert "marked" not in text


# --- A trial's training ---


def as_trial(url: str, number: int, owner: int, step: int = 0, do: object = None) -> None:
    context = trial_context
    os.environ |= {context.STORAGE: url, context.STUDY: "a", context.TRIAL: str(number), context.OWNER: str(owner)}
    if do:
        at_step(step, do)


def gone(tuner: int) -> None:
    os.kill(tuner, signal.SIGKILL)
    time.sleep(2)


def dev_scores(folder: Path) -> dict[int, float]:
    """By step: of fewer than four epochs each quarter, and the last step."""
    with (folder / "plots" / "dev.csv").open() as file:
        return {int(row["step"]): float(row["eval_ndcg_at_5"]) for row in csv.DictReader(file)}


def test_a_trial_reports_each_dev_score_and_ends_on_the_same_bytes(place, whole, tmp_path, space):
    storage, study = open_test_study(tmp_path, space)
    trial = claim_trial(study, storage, space, 9)
    storage.rdb.set_trial_user_attr(trial.id, trial_context.SIZE, [1, 128])
    assert place.run(as_trial, storage.url, trial.number, os.getpid()) == 0, place.log
    assert place.result() == whole
    reported = study.trials[0].intermediate_values
    scores = dev_scores(place.folder)
    assert list(scores) == [3, 6, 9, 10] and reported == dict(enumerate(scores.values(), start=1))
    measured = study.trials[0].user_attrs[trial_context.MEASURED]
    assert measured["dev_ndcg_at_5"] == round(reported[4], 6), "at full size the same score"
    assert measured["training_seconds"] > 0 and measured["vectors_per_page"] == 12 + 16


def test_a_trial_stops_when_told_and_leaves_nothing(place, tmp_path, space):
    storage, study = open_test_study(tmp_path, space)
    for _ in range(3):  # as good as can be, so that the fourth is below their median
        good = study.ask(space.distributions)
        good.report(1.1, 1)
        study.tell(good, 1.1)
    trial = claim_trial(study, storage, space, 9)
    (place.folder / "metrics" / "train.json").unlink(missing_ok=True)  # of the run that the fixture may have made
    assert place.run(as_trial, storage.url, trial.number, os.getpid()) == 3, place.log
    assert "stopped at step 3 of 10: the study found its dev score too low" in place.err
    assert not (place.folder / OUT).exists() and not (place.folder / "metrics" / "train.json").exists()
    assert not [path for path in (place.folder / ".scratch").iterdir() if path.is_dir()]
    attributes = study.trials[-1].user_attrs
    assert attributes[trial_context.STOPPED] == 1 and list(study.trials[-1].intermediate_values) == [1]


def test_a_trial_whose_tuner_is_gone_leaves_a_checkpoint_for_the_second_try(place, whole, tmp_path, space):
    storage, study = open_test_study(tmp_path, space)
    trial, again = claim_trial(study, storage, space, 9), claim_trial(study, storage, space, 9)
    storage.rdb.set_trial_user_attr(again.id, trial_context.SIZE, [4, 2])
    tuner = subprocess.Popen(["sleep", "300"])
    assert place.run(as_trial, storage.url, trial.number, tuner.pid, 7, partial(gone, tuner.pid)) == 75, place.log
    tuner.wait()
    assert (place.scratch / "checkpoint-7").is_dir()
    assert place.run(as_trial, storage.url, again.number, os.getpid()) == 0, place.log
    assert "resuming from" in place.log and place.result() == whole
    assert list(study.trials[1].intermediate_values) == [1, 2, 3, 4], "also what was measured before the kill"
    small = study.trials[1].user_attrs[trial_context.MEASURED]
    assert small["vectors_per_page"] == 12 + 16 / 4, "text, and what is left of 16 tokens of a tile"


def test_experiments_are_read_where_the_pipeline_is_a_sub_folder_of_gits(tmp_path, space, monkeypatch):
    project = tmp_path / "project"
    for name in ("dvc.yaml", "dvc.lock", "params.yaml", "metrics/train.json"):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, project / name)
    update_params(project / "params.yaml", {"lora_rank": 8})
    params = dataclasses.replace(load_params(ROOT / "params.yaml"), lora_rank=8)
    commit = "git -c user.name=T -c user.email=t@localhost commit -qm state"
    place = f"refs/exps/ab/{'c' * 38}/a-000"
    line = f"git init -q && git add -A && {commit} && git update-ref {place} HEAD"
    subprocess.run(line, shell=True, cwd=tmp_path, check=True)
    monkeypatch.chdir(project)
    storage, study = open_test_study(tmp_path, space)
    assert add_finished_experiments(study, space, params) == (1, {})
    assert record_score(study, storage, claim_trial(study, storage, space, 9), "a-000").startswith("complete  0.")


def test_a_workspace_that_changed_while_dvc_took_it_ends_the_trial(tmp_path, space, monkeypatch):
    storage, study = open_test_study(tmp_path, space)
    trial = claim_trial(study, storage, space, 9)
    asked = []

    def check() -> None:
        asked.append(1)
        if len(asked) == 2:
            raise UserError("lr was 1, is 2")

    dvc, begin = [sys.executable, "-c", "import sys; sys.stdin.read()"], subprocess.Popen
    monkeypatch.setattr(experiments.subprocess, "Popen", lambda command, **options: begin(dvc, **options))
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    with pytest.raises(UserError, match="lr was 1, is 2"):
        experiments.run_experiment(storage, trial, "a-000", tmp_path / "log", check)


# --- What is shown ---


@pytest.fixture
def finished(tmp_path, space):
    storage, study = open_test_study(tmp_path, space)
    for number in range(10):
        trial = claim_trial(study, storage, space, 10)
        score = 0.9 - 40 * abs(trial.values["lr"] - 0.006)
        for epoch in (1, 2):
            optuna.trial.Trial(study, trial.id).report(score * epoch / 2, epoch)
        if number in (4, 7):
            study.tell(trial.number, state=optuna.trial.TrialState.PRUNED)
        else:
            study.tell(trial.number, score)
    return study


def test_the_table_fits_80_columns_and_shows_the_best_first(finished, space):
    lines = format_trial_table(collect_results(finished, space))
    assert max(map(len, lines)) <= 80 and len(lines) == 11
    assert f"{finished.best_trial.number:03}" == lines[1].split()[0]
    assert sum("pruned" in line for line in lines) == 2


def test_importance_finds_the_key_that_matters(finished, space):
    importance = collect_results(finished, space).importance
    assert importance["lr"] > 0.8 and abs(sum(importance.values()) - 1) < 1e-9


def test_the_files_are_the_same_each_time(finished, space, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = (
        [path.read_bytes() for path in write_study_report(collect_results(finished, space), Path("studies"))]
        for _ in range(2)
    )
    assert first == second
    best = json.loads(Path("optuna_best_params.json").read_text())
    assert best["params"] == finished.best_trial.params and best["dev_ndcg_at_5"] == finished.best_value
    assert best["trials"] == {"complete": 8, "pruned": 2}


@pytest.mark.skipif(program() is None, reason="needs a Chromium")
def test_the_page_is_whole_in_a_browser(finished, space, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = write_study_report(collect_results(finished, space), Path("studies"))[1]
    with tab(tmp_path / "profile") as one:
        for name, size, dark in (("desktop", (1280, 1500), False), ("phone", PHONE, True)):
            one.show(page, size, dark)
            assert not one.complaints() and len(one.fetched()) == 1
            pictures = "[...document.images].filter(i => i.complete && i.naturalWidth).map(i => i.alt).join()"
            assert one.value(pictures) == "History,In training,Importance,Settings and score"
            assert one.value("document.documentElement.scrollWidth <= innerWidth")
            one.picture(tmp_path / f"{name}.png")


@pytest.fixture
def weighed(tmp_path, space):
    """A study of two objectives: small pages cost score, and lr decides the rest."""
    (tmp_path / "tune.yaml").write_text(TWO)
    two = read_search_space(load_params(ROOT / "params.yaml"), tmp_path / "tune.yaml")
    storage, study = open_test_study(tmp_path, two)
    for _ in range(12):
        trial = claim_trial(study, storage, two, 12)
        factor, dim = study.trials[trial.number].user_attrs[trial_context.SIZE]
        assert (factor, dim) == (trial.values["pool_factor"], trial.values["dim"])
        score = 0.9 - 0.05 * factor - 0.1 * (dim < 128) - 10 * abs(trial.values["lr"] - 0.006)
        study.tell(trial.number, [score, 96 / factor * dim * 2])
    return study, two


def test_the_front_is_optunas_and_stands_in_table_file_and_page(weighed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study, two = weighed
    results = collect_results(study, two)
    front = [row.number for row in results.front]
    assert sorted(front) == sorted(trial.number for trial in study.best_trials) and 1 < len(front) < 12
    lines = format_trial_table(results)
    assert max(map(len, lines)) <= 80 and {int(line[:3]) for line in lines[1:13] if " * " in line} == set(front)
    page = write_study_report(results, Path("studies"))[1].read_text()
    best = json.loads(Path("optuna_best_params.json").read_text())["front"]
    assert [row["experiment"] for row in best] == [f"a-{number:03}" for number in front]
    assert [row["bytes_per_page"] for row in best] == sorted(row["bytes_per_page"] for row in best)
    assert 'alt="Front"' in page and page.count("<td>yes</td>") == len(front)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (
            "loading\nerror: batch_size: 99 is more than the 64 training pairs\nERROR: failed to reproduce 'train'",
            "error: batch",
        ),
        ("Traceback\n  File x\nValueError: no\nERROR: failed to reproduce", "ValueError: no"),
        ("ERROR: Git user name\nERROR: second", "ERROR: Git user name"),
        ("", "it printed nothing"),
    ],
)
def test_the_cause_of_a_failed_trial(text, found):
    assert find_cause(text).startswith(found)


# --- PostgreSQL, for several machines ---


def test_workers_on_a_postgresql_server(postgresql, tmp_path, space):
    workers = [FORKS.Process(target=complete_trials, args=(postgresql, space, 8)) for _ in range(2)]
    for one in workers:
        one.start()
    for one in workers:
        one.join(120)
    storage, study = open_test_study(postgresql, space, 1)
    assert Counter(t.state.name for t in study.trials) == {"COMPLETE": 8} and "marked" not in storage.shown_url
    for _ in range(2):  # and its second try
        killed = FORKS.Process(target=claim_and_die, args=(postgresql, space, 9))
        killed.start()
        killed.join(60)
        assert killed.exitcode == -signal.SIGKILL
        time.sleep(2.5)
    assert claim_trial(study, storage, space, 9) == 0, "no third try"
    first, again = study.trials[8:]
    assert first.params == again.params and (first.state.name, again.state.name) == ("FAIL", "FAIL")
    assert [t.user_attrs[SLOT] for t in (first, again)] == [8, 8]
    with pytest.raises(UserError) as refused:
        StudyStorage(postgresql.replace("marked", "markedwrong"), "a", 1)
    assert "marked" not in str(refused.value) and "authentication" in str(refused.value)
    assert refused.value.__cause__ is None and refused.value.__suppress_context__
