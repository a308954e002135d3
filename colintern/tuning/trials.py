"""One trial: settings are taken from the study, run as a DVC experiment, and its end is told to the study.

A trial of the study has a number and an experiment `STUDY-NNN`. Tries of one trial share its `slot`, so that a killed
trial and its second try count once.
"""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from colintern.evaluation.results import BYTES_PER_NUMBER
from colintern.tuning.experiments import Taken, children, dvc, experiment, experiments, git, wait
from colintern.tuning.space import BYTES, Search
from colintern.tuning.store import Store
from colintern.tuning.trial_context import MEASURED, SETTINGS, SIZE, STARTED, STOPPED

SLOT, CAUSE, EXPERIMENT, COMPUTED, CPU = "slot", "cause", "experiment", "pages computed", "CPU seconds"
FULL = "size"  # of a study: {pool_factor, dim} of params.yaml
# Not the settings' fault: a signal, a lock that DVC does not wait for.
AGAIN = re.compile(r"exited with 75|Unable to acquire (?:\w+ )?lock|is busy, it is being blocked")
RETRY_SECONDS = 5
LINE = 200  # characters of a cause on the terminal
SCORE = "dev_ndcg_at_5"  # in metrics/train.json


def sampler(search: Search, number: int) -> Any:
    """The sampler of one trial. Its seed is the trial's own: a resumed study would else draw its first trials again."""
    from optuna import samplers

    seed = int(np.random.SeedSequence([search.settings["seed"], number]).generate_state(1)[0])
    if search.settings["sampler"] == "random":
        return samplers.RandomSampler(seed)
    # A running trial counts as a bad one, so that workers at the same time look at different places.
    return samplers.TPESampler(n_startup_trials=search.settings["startup_trials"], seed=seed, constant_liar=True)


def take(study: Any, store: Store, search: Search, total: int) -> Taken | int:
    """The next trial, or how many trials of other workers run where no other is left to be taken."""
    from optuna import storages
    from optuna.trial import TrialState

    with store.alone():
        storages.fail_stale_trials(study)
        trials = study.get_trials(deepcopy=False)
        for trial in trials:  # its worker died where it held the lock, before it had settings
            if trial.state == TrialState.RUNNING and SLOT not in trial.user_attrs:
                study.tell(trial.number, state=TrialState.FAIL)
        waiting = [trial for trial in trials if trial.state == TrialState.WAITING]
        if not waiting and len(slots(trials)) >= total:
            return sum(trial.state == TrialState.RUNNING and SLOT in trial.user_attrs for trial in trials)
        study.sampler = sampler(search, len(trials))
        trial = study.ask(search.distributions())
        store.alive(trial._trial_id)
        for key in (STARTED, STOPPED, EXPERIMENT, MEASURED):  # of the try before
            if key in trial.user_attrs:
                trial.set_user_attr(key, None)
        trial.set_user_attr(SLOT, trial.user_attrs.get(SLOT, trial.number))
        if search.against == BYTES:
            trial.set_user_attr(SIZE, [trial.params.get(key, value) for key, value in study.user_attrs[FULL].items()])
        values = {key: trial.params[key] for key in search.distributions()}
        return Taken(
            trial.number,
            trial._trial_id,
            values,
            storages.RetryHeartbeatStaleTrialCallback.retry_history(study.get_trials(deepcopy=False)[trial.number]),
        )


def slots(trials: Any) -> set[int]:
    """The trials that were begun, each once however often it was tried."""
    return {trial.user_attrs[SLOT] for trial in trials if SLOT in trial.user_attrs}


def put_back(study: Any, number: int) -> None:
    """A trial that was stopped from outside: the same settings wait for the next worker."""
    import optuna
    from optuna.trial import TrialState

    [trial] = [one for one in study.get_trials(deepcopy=False) if one.number == number]
    again = optuna.create_trial(
        state=TrialState.WAITING,
        params=trial.params,
        distributions=trial.distributions,
        user_attrs={SLOT: trial.user_attrs[SLOT]},
        system_attrs=trial.system_attrs,
    )
    study.tell(number, state=TrialState.FAIL)
    study.add_trial(again)


def run(study: Any, store: Store, trial: Taken, log: Path, check: Callable[[], None]) -> str:
    """Run it, and tell the study how it ended; returns a line about that. For `check` see `experiment`.

    The study may have given the trial to another worker meanwhile, if this machine was suspended: then the experiment
    made here is removed.
    """
    name = f"{study.study_name}-{trial.number:03}"
    start = time.monotonic()
    for number in trial.before:  # its worker was killed when the experiment was there and the study not told
        if (old := f"{study.study_name}-{number:03}") in experiments():
            return f"{name}  {finish(study, store, trial, old)}  was finished by the worker that was killed"
    used = children()
    code = experiment(store, trial, name, log, check)
    if code == 0 and study.user_attrs[SETTINGS]["against"] != "none" and not measured(store, trial):
        # DVC knew this training, of a trial that differs in the size of its pages alone: it is done again to measure.
        dvc("exp", "remove", "-q", name)
        code = experiment(store, trial, name, log, check, "--force")
    store.optuna.set_trial_user_attr(trial.id, CPU, round(children() - used, 1))
    text = store.redacted(log.read_text(errors="replace"))
    log.write_text(text)
    try:
        words = tell(study, store, trial, name, code, text)
    except (ValueError, RuntimeError) as error:  # optuna's: the trial is over already
        if "finish" not in str(error).lower() and "state" not in str(error).lower():
            raise
        dvc("exp", "remove", "-q", name)
        return f"{name}  was given to another worker, because nothing was heard of this one; its result is dropped"
    return f"{name}  {words}  {time.monotonic() - start:.0f} s"


def measured(store: Store, trial: Taken) -> dict[str, float]:
    """What the run of a trial told of time and size; {} where there was no run."""
    return store.optuna.get_trial(trial.id).user_attrs.get(MEASURED) or {}


def tell(study: Any, store: Store, trial: Taken, name: str, code: int, text: str) -> str:
    """How it ended, in the study and in words."""
    from optuna.trial import TrialState

    attributes = store.optuna.get_trial(trial.id).user_attrs
    if found := re.search(r"page features: (\d+) computed", text):
        store.optuna.set_trial_user_attr(trial.id, COMPUTED, int(found[1]))
    if code == 0:
        return finish(study, store, trial, name)
    if attributes.get(STOPPED):
        study.tell(trial.number, state=TrialState.PRUNED)
        return f"pruned    after evaluation {attributes[STOPPED]}"
    if AGAIN.search(text):
        wait(RETRY_SECONDS, store, trial)
        put_back(study, trial.number)
        return f"put back: {cause(text)}"[:LINE]
    return fail(study, store, trial, cause(text))


def fail(study: Any, store: Store, trial: Taken, why: str) -> str:
    from optuna.trial import TrialState

    store.optuna.set_trial_user_attr(trial.id, CAUSE, why)
    study.tell(trial.number, state=TrialState.FAIL)
    return f"failed    {why[:LINE]}"


def finish(study: Any, store: Store, trial: Taken, name: str) -> str:
    """Tell the score that is in the metrics of an experiment, or both objectives, as its run measured them."""
    score = json.loads(git("show", f"{experiments()[name]}:./metrics/train.json"))[SCORE]
    store.optuna.set_trial_user_attr(trial.id, EXPERIMENT, name)
    against = study.user_attrs[SETTINGS]["against"]
    if against == "none":
        study.tell(trial.number, score)
        return f"complete  {score:.4f}"
    [ran] = [one for one in study.get_trials(deepcopy=False) if one.number == int(name.rpartition("-")[2])]
    found = ran.user_attrs.get(MEASURED) or {}
    if against == BYTES and "vectors_per_page" in found:
        score, second = found[SCORE], found["vectors_per_page"] * ran.user_attrs[SIZE][1] * BYTES_PER_NUMBER
    elif against in found:
        second = found[against]
    else:  # the storage did not answer, or all steps were made by a try that was killed
        return fail(study, store, trial, f"{against} was not measured")
    study.tell(trial.number, [score, second])
    return f"complete  {score:.4f} at {second:,.0f} {against.replace('_', ' ')}"


def cause(text: str) -> str:
    """The line of a failed trial's output that says why: a stage's own error, an exception's, or DVC's."""
    lines = text.splitlines()
    for pattern in (r"error: \S", r"(?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b", r"ERROR: \S"):
        if found := [line.strip() for line in lines if re.match(pattern, line)]:
            return found[-1] if pattern != r"ERROR: \S" else found[0]
    return lines[-1].strip() if lines else "it said nothing"
