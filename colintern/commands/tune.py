"""`colintern tune`: a search over settings, each trial a DVC experiment."""

import argparse
import os
import re
import signal
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from colintern.core.errors import UserError
from colintern.core.project import root
from colintern.core.rules import unsupported_path_characters
from colintern.params import load_params, read_yaml_mapping, update_params

if TYPE_CHECKING:  # they take a while to import, which `--help` need not wait for
    import optuna

    from colintern.tuning.search_space import SearchSpace
    from colintern.tuning.study_storage import StudyStorage

SUMMARY = "search for settings, each trial a DVC experiment"
EXAMPLE = "colintern tune --trials 10"
PARAMS = Path("params.yaml")
STORAGE = "COLINTERN_STORAGE"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add = parser.add_argument
    add("--trials", type=_parse_count, required=True, metavar="N", help="trials of the study, of all workers and runs")
    add("--space", type=Path, default=Path("tune.yaml"), metavar="FILE", help="what is searched (default: tune.yaml)")
    add("--study", default="study", metavar="NAME", help="its name: a study of this name is resumed (default: study)")
    add(
        "--storage",
        default=os.environ.get(STORAGE, ""),
        metavar="URL",
        help=f"where it is stored (default: ${STORAGE}, which `ps` does not show, else sqlite, studies/NAME.db)",
    )
    add(
        "--heartbeat",
        type=_parse_count,
        default=30,
        metavar="SECONDS",
        help="a worker without a heartbeat for twice that is considered dead",
    )
    add("--warm-start", action="store_true", help="learn from finished experiments with this code and these data first")
    add("--apply", action="store_true", help="write the best settings into params.yaml")


def run(args: argparse.Namespace) -> None:
    """Run trials until the study has enough, and report it."""
    params = load_params(PARAMS)
    if not args.space.is_file():  # before Optuna is imported, which takes seconds
        read_yaml_mapping(args.space, "of the settings and the space", "the repository has one to begin with")
    from colintern.tuning.search_space import read_search_space
    from colintern.tuning.studies import add_finished_experiments, open_study
    from colintern.tuning.study_storage import StudyStorage, silence_optuna

    space = read_search_space(params, args.space)
    if space.second_objective and args.apply:
        raise UserError(
            f"--apply: dev NDCG@5 against {space.second_objective} has a front and no best trial; `dvc exp apply` one"
        )
    _check_study_name(args.study)
    silence_optuna()
    storage = StudyStorage(args.storage, args.study, args.heartbeat)
    with storage.storage_errors():
        study = open_study(storage, space, params)
        print(f"study {args.study} in {storage.shown_url}")
        if args.warm_start:
            num_added, skipped = add_finished_experiments(study, space, params)
            reasons = "".join(f"; {count} not, {reason}" for reason, count in skipped.items())
            print(f"warm start: {num_added} experiments added{reasons}")
        _run_trials(study, storage, space, args.trials)
        _print_report(study, space, args.apply)


def _check_study_name(name: str) -> None:
    """Check that the name can be an experiment's, and that DVC can make experiments here."""
    if not re.fullmatch(r"[A-Za-z0-9][\w-]*", name):
        raise UserError(f"--study: {name!r} is not valid; letters, digits, - and _")
    if characters := unsupported_path_characters(os.getcwd()):
        raise UserError(
            f"{os.getcwd()}: DVC cannot copy a project whose path has {characters!r}, as each trial needs; move the "
            "repository to a path of ASCII characters without # and ?"
        )
    if subprocess.run(["git", "var", "GIT_COMMITTER_IDENT"], capture_output=True).returncode:
        raise UserError(
            'git: an experiment needs a committer\'s name; run `git config user.name "Your Name" && '
            "git config user.email you@example.com`"
        )


def _run_trials(study: "optuna.Study", storage: "StudyStorage", space: "SearchSpace", total: int) -> None:
    """Run trials until the study has `total`, and wait for those of other workers."""
    from colintern.tuning.studies import check_inputs_unchanged
    from colintern.tuning.trials import claim_trial, get_experiment_name, requeue_trial, run_trial

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    is_waiting = False
    while trial := claim_trial(study, storage, space, total):
        if isinstance(trial, int):
            if not is_waiting:
                print(f"waiting for {trial} trials of other workers", flush=True)
            is_waiting = True
            time.sleep(min(5, storage.heartbeat_seconds))
            continue
        is_waiting = False
        name = get_experiment_name(study, trial.number)
        settings = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in trial.values.items()]
        print(f"{name}  {', '.join(settings)}", flush=True)
        log = root() / "logs" / "tune" / f"{name}.log"
        try:
            print(run_trial(study, storage, trial, log, partial(check_inputs_unchanged, study, space)), flush=True)
        except UserError:
            requeue_trial(study, trial.number)
            raise
        except KeyboardInterrupt:
            requeue_trial(study, trial.number)
            print("stopped; the next `colintern tune` resumes this trial with the same settings", flush=True)
            raise SystemExit(75) from None


def _print_report(study: "optuna.Study", space: "SearchSpace", apply: bool) -> None:
    from colintern.tuning import study_report
    from colintern.tuning.study_storage import STUDIES

    results = study_report.collect_results(study, space)
    study_report.require_complete_trial(results)
    print("\n" + "\n".join(study_report.format_trial_table(results)))
    if results.importance:
        print("importance: " + ", ".join(f"{key} {value:.2f}" for key, value in results.importance.items()))
    print("written: " + ", ".join(map(str, study_report.write_study_report(results, root() / STUDIES))))
    if results.front:
        print("front: " + ", ".join(row.name for row in results.front) + "; `dvc exp apply` takes one")
    elif results.complete:
        best = results.complete[0]
        print(f"best: {best.name}, dev NDCG@5 {best.score:.4f}; `dvc exp apply {best.name} && dvc repro` takes it")
        if apply:
            keys = update_params(PARAMS, best.values)
            print(f"{PARAMS}: " + (", ".join(keys) + " written" if keys else "has these values already"))


def _parse_count(text: str) -> int:
    if not (text.isdecimal() and len(text) <= 6 and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)
