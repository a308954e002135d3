"""A study: made, or resumed if nothing that decides its scores has changed since; and warmed up by experiments."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from colintern.core.errors import UserError
from colintern.params import Params, load
from colintern.storage.identity import fingerprint, stage_identity
from colintern.tuning.experiments import experiments, git
from colintern.tuning.space import BYTES, SCORED, STILL, Search
from colintern.tuning.store import Store
from colintern.tuning.trial_context import SETTINGS, make_pruner
from colintern.tuning.trials import EXPERIMENT, FULL, SCORE

DATA = ("data/",)
LEFT_OUT = ("metrics/verify.json",)  # a count of what LoRA trains: a searched key may change it
WORDS = {
    "space": "the space of tune.yaml",
    SETTINGS: "sampler, pruner or seed in tune.yaml",
    "params": "params.yaml",
    FULL: "params.yaml",
    "data": "the data",
    "code": "the code or its libraries",
}


def facts(search: Search, params: Params) -> dict[str, Any]:
    """What decides a study's scores beside the trial's own settings.

    Raises:
        UserError: the pipeline has not run yet, or dvc.lock is broken.
    """
    lock = Path("dvc.lock")
    if "eval" not in _stages(lock.read_text() if lock.is_file() else ""):
        raise UserError("dvc.lock: has no eval; run `dvc repro` once, or `dvc exp apply` cannot take a trial")
    try:
        identity = stage_identity("train", params)
    except UserError as error:
        raise UserError(f"{error}; run `dvc repro` first") from error
    deps = {dep: value for dep, value in identity["deps"].items() if dep not in LEFT_OUT}
    data = {dep: value for dep, value in deps.items() if dep.startswith(DATA)}
    found = {
        "space": search.facts(),
        SETTINGS: search.settings,
        "params": _fixed({key: getattr(params, key) for key in params.__slots__}, search),
        FULL: {key: getattr(params, key) for key in ("pool_factor", "dim")} if search.against == BYTES else {},
        "data": fingerprint(data),
        "code": fingerprint({"deps": {k: v for k, v in deps.items() if k not in data}, "of": identity["versions"]}),
    }
    return json.loads(json.dumps(found))  # as a study keeps it


def _fixed(values: dict[str, Any], search: Search) -> dict[str, Any]:
    """Of the values of params.yaml those that decide the dev score and are not searched."""
    stages = YAML(typ="safe", pure=True).load(Path("dvc.yaml"))["stages"]
    keys = sorted(set().union(*(stages[stage]["params"] for stage in SCORED)) - {one.key for one in search.space})
    kept = [key for key in keys if key not in STILL]
    return json.loads(json.dumps({key: values.get(key) for key in kept}))


def open_study(store: Store, search: Search, params: Params) -> Any:
    """The study of this name, made or resumed.

    Raises:
        UserError: it was made with another space, data or code, or experiments of its name are there without it.
    """
    import optuna

    now = facts(search, params)
    with store.alone():
        known = {one.study_name for one in optuna.get_all_study_summaries(store.optuna)}
        if store.study not in known:
            old = [name for name in experiments() if re.fullmatch(rf"{re.escape(store.study)}-\d+", name)]
            if old:
                raise UserError(
                    f"--study: {store.shown} has no study {store.study!r}, but DVC has experiments of that name; give "
                    f"another, or `dvc exp remove {' '.join(sorted(old)[:3])}{' ...' if len(old) > 3 else ''}`"
                )
        study = optuna.create_study(
            storage=store.optuna,
            study_name=store.study,
            directions=search.directions,
            load_if_exists=True,
            pruner=make_pruner(search.settings),
        )
        for key, value in now.items():
            if key not in study.user_attrs:
                study.set_user_attr(key, value)
        _same(study, now)
    return study


def unchanged(study: Any, search: Search) -> None:
    """Raises UserError where params.yaml, the data or the code are not those that the study was made with: each trial
    runs what the workspace holds when it begins."""
    _same(study, facts(search, load(Path("params.yaml"))))


def _same(study: Any, now: dict[str, Any]) -> None:
    for key, value in now.items():
        if study.user_attrs[key] != value:
            raise UserError(f"--study: {_difference(study.study_name, key, study.user_attrs[key], value)}")


def _difference(name: str, key: str, was: Any, now: Any) -> str:
    words = ""
    if isinstance(was, dict):
        words = ": " + ", ".join(
            f"{k} was {was.get(k)!r}, is {now.get(k)!r}"
            for k in sorted(was.keys() | now.keys())
            if was.get(k) != now.get(k)
        )
    made = f"{name!r} was made with other values of {WORDS[key]}{words[:400]}"
    return f"{made}; scores would not compare: undo that, or give --study another name"


def warm_start(study: Any, search: Search, params: Params) -> tuple[int, dict[str, int]]:
    """Add finished DVC experiments whose code, data and other settings are those of this study; how many were added,
    and for each reason how many were not."""
    import optuna

    if search.against:
        raise UserError(f"--warm-start: experiments do not tell {search.against}; it needs against: none in tune.yaml")
    here = _lock(Path("dvc.lock").read_text() if Path("dvc.lock").is_file() else "")
    fixed = _fixed({key: getattr(params, key) for key in params.__slots__}, search)
    have = {trial.user_attrs.get(EXPERIMENT) for trial in study.get_trials(deepcopy=False)}
    added, left = 0, dict[str, int]()
    for name, place in sorted(experiments().items()):
        reason = ""
        try:
            values = YAML(typ="safe", pure=True).load(git("show", f"{place}:./params.yaml"))
            score = json.loads(git("show", f"{place}:./metrics/train.json"))[SCORE]
            lock = _lock(git("show", f"{place}:./dvc.lock"))
            if name in have:
                reason = "in the study already"
            elif not here or lock != here:
                reason = "of other code or data"
            elif _fixed(values, search) != fixed:
                reason = "with other settings that are not searched"
            else:
                _add(optuna, study, search, name, values, score)
                added += 1
        except subprocess.CalledProcessError:
            reason = "without params, lock or scores"
        except ValueError:
            reason = "outside the space"
        if reason:
            left[reason] = left.get(reason, 0) + 1
    return added, left


def _add(optuna: Any, study: Any, search: Search, name: str, values: dict[str, Any], score: float) -> None:
    chosen = {}
    for key, distribution in search.distributions().items():
        chosen[key] = values[key]
        if not distribution._contains(distribution.to_internal_repr(values[key])):
            raise ValueError(key)
    study.add_trial(
        optuna.create_trial(
            params=chosen, distributions=search.distributions(), value=score, user_attrs={EXPERIMENT: name}
        )
    )


def _lock(text: str) -> dict[str, str]:
    """{path: hash} of what the train stage of a dvc.lock depends on."""
    deps = _stages(text).get("train", {}).get("deps", [])
    return {dep["path"]: dep["md5"] for dep in deps if dep["path"] not in LEFT_OUT}


def _stages(lock: str) -> dict[str, Any]:
    try:
        return (YAML(typ="safe", pure=True).load(lock) or {}).get("stages", {})
    except YAMLError as error:
        raise UserError(
            "dvc.lock: is not valid YAML; after a merge: git checkout --ours -- dvc.lock metrics plots && dvc repro"
        ) from error
