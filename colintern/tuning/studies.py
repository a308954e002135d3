"""A study: created, or resumed if nothing that decides its scores has changed since; and warm-started."""

import json
import re
import subprocess
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from colintern.core.errors import UserError
from colintern.params import Params, load_params
from colintern.scoring.metrics import DEV_KEY
from colintern.storage.identity import fingerprint, stage_identity
from colintern.tuning.experiments import list_experiments, run_git
from colintern.tuning.search_space import (
    BYTES_PER_PAGE,
    PAGE_SIZE_KEYS,
    SCORE_NEUTRAL_KEYS,
    SCORED_STAGES,
    SearchSpace,
    read_stage_params,
)
from colintern.tuning.study_storage import StudyStorage
from colintern.tuning.trial_context import SETTINGS, make_pruner
from colintern.tuning.trials import EXPERIMENT, SIZE_ATTRIBUTE

IGNORED_DEPS = {"metrics/verify.json"}  # a count of what LoRA trains: a searched key may change it
SOURCES = {
    "space": "the space of tune.yaml",
    SETTINGS: "sampler, pruner or seed in tune.yaml",
    "params": "params.yaml",
    SIZE_ATTRIBUTE: "params.yaml",
    "data": "the data",
    "code": "the code or its libraries",
}


def open_study(storage: StudyStorage, space: SearchSpace, params: Params) -> optuna.Study:
    """Create the study of this name, or resume it.

    Raises:
        UserError: It was created with another space, data or code, or experiments of its name exist without it.
    """
    inputs = describe_study_inputs(space, params)
    with storage.hold_exclusive_lock():
        if storage.study_name not in optuna.get_all_study_names(storage.rdb):
            pattern = rf"{re.escape(storage.study_name)}-\d+"
            if old := sorted(name for name in list_experiments() if re.fullmatch(pattern, name)):
                raise UserError(
                    f"--study: {storage.shown_url} has no study {storage.study_name!r}, but DVC has experiments of "
                    f"that name; give another, or `dvc exp remove {' '.join(old[:3])}{' ...' if len(old) > 3 else ''}`"
                )
        study = optuna.create_study(
            storage=storage.rdb,
            study_name=storage.study_name,
            directions=space.directions,
            load_if_exists=True,
            pruner=make_pruner(space.settings),
        )
        for key in inputs.keys() - study.user_attrs.keys():
            study.set_user_attr(key, inputs[key])
        _require_same_inputs(study, inputs)
    return study


def describe_study_inputs(space: SearchSpace, params: Params) -> dict[str, object]:
    """Return what decides a study's scores beside the settings of each trial, as JSON has it.

    Raises:
        UserError: The pipeline has not run yet, or dvc.lock is damaged.
    """
    if "eval" not in _parse_lock(_read_lock()):
        raise UserError("dvc.lock: has no eval; run `dvc repro` once, or `dvc exp apply` cannot take a trial")
    try:
        identity = stage_identity("train", params)
    except UserError as error:
        raise UserError(f"{error}; run `dvc repro` first") from error
    deps = {dep: value for dep, value in identity["deps"].items() if dep not in IGNORED_DEPS}
    data = {dep: value for dep, value in deps.items() if dep.startswith("data/")}
    code = {dep: value for dep, value in deps.items() if dep not in data}
    values = {key: getattr(params, key) for key in params.__slots__}
    inputs = {
        "space": space.describe_distributions(),
        SETTINGS: space.settings,
        "params": _select_fixed_values(values, space),
        SIZE_ATTRIBUTE: {key: values[key] for key in PAGE_SIZE_KEYS}
        if space.second_objective == BYTES_PER_PAGE
        else {},
        "data": fingerprint(data),
        "code": fingerprint({"deps": code, "of": identity["versions"]}),
    }
    return json.loads(json.dumps(inputs))


def check_inputs_unchanged(study: optuna.Study, space: SearchSpace) -> None:
    """Check that the workspace is still what the study was created with: each trial runs what it finds there.

    Raises:
        UserError: params.yaml, the data or the code have changed.
    """
    _require_same_inputs(study, describe_study_inputs(space, load_params(Path("params.yaml"))))


def _require_same_inputs(study: optuna.Study, inputs: Mapping[str, Any]) -> None:
    stored_inputs = study.user_attrs
    for key, value in inputs.items():
        stored = stored_inputs[key]
        if stored == value:
            continue
        changes = ""
        if isinstance(stored, dict):
            changed_keys = sorted(k for k in stored.keys() | value.keys() if stored.get(k) != value.get(k))
            changes = ": " + ", ".join(f"{k} was {stored.get(k)!r}, is {value.get(k)!r}" for k in changed_keys)
        raise UserError(
            f"--study: {study.study_name!r} was made with other values of {SOURCES[key]}{changes[:400]}; scores would "
            "not compare: undo that, or give --study another name"
        )


def add_finished_experiments(study: optuna.Study, space: SearchSpace, params: Params) -> tuple[int, Counter[str]]:
    """Add the DVC experiments whose code, data and other settings are those of this study, as complete trials.

    Returns:
        The number of experiments added, and how many were skipped for each reason.
    """
    if space.second_objective:
        raise UserError(
            f"--warm-start: experiments do not record {space.second_objective}; set against: none in tune.yaml"
        )
    train_deps = _read_train_deps(_read_lock())
    fixed_values = _select_fixed_values({key: getattr(params, key) for key in params.__slots__}, space)
    known_names = {trial.user_attrs.get(EXPERIMENT) for trial in study.get_trials(deepcopy=False)}
    num_added, skipped = 0, Counter[str]()
    for name, ref in sorted(list_experiments().items()):
        try:
            values = YAML(typ="safe", pure=True).load(run_git("show", f"{ref}:./params.yaml"))
            score = json.loads(run_git("show", f"{ref}:./metrics/train.json"))[DEV_KEY]
            deps = _read_train_deps(run_git("show", f"{ref}:./dvc.lock"))
            if name in known_names:
                skipped["in the study already"] += 1
            elif not train_deps or deps != train_deps:
                skipped["of other code or data"] += 1
            elif _select_fixed_values(values, space) != fixed_values:
                skipped["with other settings that are not searched"] += 1
            else:
                trial = optuna.create_trial(
                    params={key: values[key] for key in space.distributions},
                    distributions=space.distributions,
                    value=score,
                    user_attrs={EXPERIMENT: name},
                )
                study.add_trial(trial)
                num_added += 1
        except (subprocess.CalledProcessError, KeyError):
            skipped["without params, lock or scores"] += 1
        except ValueError:  # Optuna's, of a value that the distribution does not contain
            skipped["outside the space"] += 1
    return num_added, skipped


def _select_fixed_values(values: Mapping[str, object], space: SearchSpace) -> dict[str, object]:
    """Return the values of params.yaml that decide the dev score and are not searched, as JSON has them."""
    stage_params = read_stage_params()
    keys = set().union(*(stage_params[stage] for stage in SCORED_STAGES))
    keys -= space.distributions.keys() | SCORE_NEUTRAL_KEYS
    return json.loads(json.dumps({key: values.get(key) for key in sorted(keys)}))


def _read_lock() -> str:
    lock = Path("dvc.lock")
    return lock.read_text() if lock.is_file() else ""


def _parse_lock(lock: str) -> dict[str, Any]:
    """Return the stages of a dvc.lock."""
    try:
        return (YAML(typ="safe", pure=True).load(lock) or {}).get("stages", {})
    except YAMLError as error:
        raise UserError(
            "dvc.lock: is not valid YAML; after a merge: git checkout --ours -- dvc.lock metrics plots && dvc repro"
        ) from error


def _read_train_deps(lock: str) -> dict[str, str]:
    """Return {path: hash} of what the train stage of a dvc.lock depends on."""
    deps = _parse_lock(lock).get("train", {}).get("deps", [])
    return {dep["path"]: dep["md5"] for dep in deps if dep["path"] not in IGNORED_DEPS}
