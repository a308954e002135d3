"""`colintern tune`: a search over settings, each trial a DVC experiment."""

import argparse
import dataclasses
import os
import re
import signal
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import Any

from colintern.core.errors import UserError
from colintern.core.project import root
from colintern.core.rules import unsupported_path_characters
from colintern.params import Params, load_params, update_params

SUMMARY = "search for settings, each trial a DVC experiment"
EXAMPLE = "colintern tune --trials 10"
PARAMS = Path("params.yaml")
STORAGE = "COLINTERN_STORAGE"


def arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--trials", type=_whole, required=True, metavar="N", help="trials of the study, over all its workers and runs")
    add("--space", type=Path, default=Path("tune.yaml"), metavar="FILE", help="what is searched (default: tune.yaml)")
    add("--study", default="study", metavar="NAME", help="its name: a study of this name goes on (default: study)")
    add(
        "--storage",
        default=os.environ.get(STORAGE, ""),
        metavar="URL",
        help=f"where it is kept (default: ${STORAGE}, which `ps` does not show, else sqlite, studies/NAME.db)",
    )
    add(
        "--heartbeat",
        type=_whole,
        default=30,
        metavar="SECONDS",
        help="a worker without a heartbeat for twice that is considered dead",
    )
    add("--warm-start", action="store_true", help="learn from finished experiments with this code and these data first")
    add("--apply", action="store_true", help="write the best settings into params.yaml")


def run(args: argparse.Namespace) -> None:
    params = load_params(PARAMS)
    from colintern.tuning.space import read

    values = {key: list(v) if isinstance(v, tuple) else v for key, v in dataclasses.asdict(params).items()}
    search = read(values, args.space)
    if search.against and args.apply:
        raise UserError(
            f"--apply: dev NDCG@5 against {search.against} has a front and no best trial; `dvc exp apply` one"
        )
    _check(args.study)
    from colintern.tuning.store import Store, quiet
    from colintern.tuning.studies import open_study, warm_start

    quiet()
    store = Store(args.storage, args.study, args.heartbeat)
    with store.answers():
        study = open_study(store, search, params)
        print(f"study {args.study} in {store.shown}")
        if args.warm_start:
            added, left = warm_start(study, search, params)
            print(f"warm start: {added} experiments added" + "".join(f"; {n} not, {why}" for why, n in left.items()))
        _work(study, store, search, args.trials)
        _tell(study, search, params, args.apply)


def _check(name: str) -> None:
    """Raises UserError where the name cannot be an experiment's, or DVC could not make one here."""
    if not re.fullmatch(r"[A-Za-z0-9][\w-]*", name):
        raise UserError(f"--study: {name!r} is not valid; letters, digits, - and _")
    if odd := unsupported_path_characters(os.getcwd()):
        raise UserError(
            f"{os.getcwd()}: DVC cannot copy a project whose path has {odd!r}, as each trial needs; move the "
            "repository to a path of ASCII characters without # and ?"
        )
    if subprocess.run(["git", "var", "GIT_COMMITTER_IDENT"], capture_output=True).returncode:
        raise UserError(
            'git: an experiment needs a committer\'s name; run `git config user.name "Your Name" && '
            "git config user.email you@example.com`"
        )


def _work(study: Any, store: Any, search: Any, total: int) -> None:
    """Trials until the study has `total`, and those of other workers are over too."""
    from colintern.tuning.studies import unchanged
    from colintern.tuning.trials import put_back, run, take

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    said = False
    while not isinstance(taken := take(study, store, search, total), int) or taken:
        if isinstance(taken, int):
            if not said:
                print(f"waiting for {taken} trials of other workers", flush=True)
            said = True
            time.sleep(min(5, store.heartbeat))
            continue
        said = False
        log = root() / "logs" / "tune" / f"{study.study_name}-{taken.number:03}.log"
        settings = ", ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in taken.values.items()
        )
        print(f"{study.study_name}-{taken.number:03}  {settings}", flush=True)
        try:
            print(run(study, store, taken, log, partial(unchanged, study, search)), flush=True)
        except UserError:
            put_back(study, taken.number)
            raise
        except KeyboardInterrupt:
            put_back(study, taken.number)
            print(
                "stopped; the trial under way waits for the next `colintern tune`, with the same settings", flush=True
            )
            raise SystemExit(75) from None


def _tell(study: Any, search: Any, params: Params, apply: bool) -> None:
    from colintern.tuning import outcome
    from colintern.tuning.store import FOLDER

    outcome.check(study)
    found, weights = outcome.rows(study), outcome.importance(study, search)
    print("\n" + "\n".join(outcome.table(found, weights, search)))
    if weights:
        print("importance: " + ", ".join(f"{key} {value:.2f}" for key, value in weights.items()))
    files = outcome.write(study, search, root() / FOLDER)
    print("written: " + ", ".join(map(str, files)))
    best = outcome.complete(found)
    if not best:
        return
    if search.against:
        print("front: " + ", ".join(row.name for row in outcome.front(found)) + "; `dvc exp apply` takes one")
        return
    print(f"best: {best[0].name}, dev NDCG@5 {best[0].score:.4f}; `dvc exp apply {best[0].name} && dvc repro` takes it")
    if apply:
        changed = update_params(PARAMS, best[0].values)
        print(f"{PARAMS}: " + (", ".join(changed) + " written" if changed else "has these values already"))


def _whole(text: str) -> int:
    if not (text.isdecimal() and len(text) <= 6 and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)
