"""Studies for tests, and workers of them that are forked processes: a trial's score is how near its lr is to 0.006."""

import os
from pathlib import Path

import optuna
from processes import kill

from colintern.tuning import trial_context as told
from colintern.tuning.space import BYTES, Search
from colintern.tuning.store import Store
from colintern.tuning.trial_context import make_pruner
from colintern.tuning.trials import FULL, Taken, take

SETTINGS = {
    "seed": 0,
    "sampler": "tpe",
    "startup_trials": 3,
    "pruner": "median",
    "warmup_evaluations": 0,
    "against": "none",
}


def made(where: Path | str, search: Search, heartbeat: int = 30) -> tuple[Store, optuna.Study]:
    """The study in a folder, or at an address."""
    store = Store(where if isinstance(where, str) else f"sqlite:///{where}/a.db", "a", heartbeat)
    with store.alone():
        study = optuna.create_study(
            storage=store.optuna,
            study_name="a",
            directions=search.directions,
            load_if_exists=True,
            pruner=make_pruner(search.settings),
        )
        study.set_user_attr(told.SETTINGS, search.settings)
        study.set_user_attr(FULL, {"pool_factor": 1, "dim": 128} if search.against == BYTES else {})
    return store, study


def worker(folder: Path | str, search: Search, total: int) -> None:
    store, study = made(folder, search)
    while isinstance(taken := take(study, store, search, total), Taken):
        study.tell(taken.number, 1 - abs(taken.values["lr"] - 0.006))
    os._exit(0)


def taker(folder: Path | str, search: Search, total: int = 2) -> None:
    """Takes a trial and is killed."""
    store, study = made(folder, search, 1)
    assert isinstance(take(study, store, search, total), Taken)
    kill()
