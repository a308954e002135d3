"""Studies for tests, and workers of them that are forked processes: a trial's score is how near its lr is to 0.006."""

import os
from pathlib import Path

import optuna
from processes import kill

from colintern.tuning import trial_context
from colintern.tuning.search_space import BYTES_PER_PAGE, SearchSpace
from colintern.tuning.study_storage import StudyStorage
from colintern.tuning.trials import SIZE_ATTRIBUTE, ClaimedTrial, claim_trial

SETTINGS = {
    "seed": 0,
    "sampler": "tpe",
    "startup_trials": 3,
    "pruner": "median",
    "warmup_evaluations": 0,
    "against": "none",
}


def open_test_study(
    folder_or_url: Path | str, space: SearchSpace, heartbeat: int = 30
) -> tuple[StudyStorage, optuna.Study]:
    """Open the study "a" in a folder, or at an address."""
    is_url = isinstance(folder_or_url, str)
    storage = StudyStorage(folder_or_url if is_url else f"sqlite:///{folder_or_url}/a.db", "a", heartbeat)
    with storage.hold_exclusive_lock():
        study = optuna.create_study(
            storage=storage.rdb,
            study_name="a",
            directions=space.directions,
            load_if_exists=True,
            pruner=trial_context.make_pruner(space.settings),
        )
        study.set_user_attr(trial_context.SETTINGS, space.settings)
        has_sizes = space.second_objective == BYTES_PER_PAGE
        study.set_user_attr(SIZE_ATTRIBUTE, {"pool_factor": 1, "dim": 128} if has_sizes else {})
    return storage, study


def complete_trials(folder_or_url: Path | str, space: SearchSpace, total: int) -> None:
    storage, study = open_test_study(folder_or_url, space)
    while isinstance(trial := claim_trial(study, storage, space, total), ClaimedTrial):
        study.tell(trial.number, 1 - abs(trial.values["lr"] - 0.006))
    os._exit(0)


def claim_and_die(folder_or_url: Path | str, space: SearchSpace, total: int = 2) -> None:
    storage, study = open_test_study(folder_or_url, space, 1)
    assert isinstance(claim_trial(study, storage, space, total), ClaimedTrial)
    kill()
