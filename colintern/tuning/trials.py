"""A trial: claimed from the study, run as a DVC experiment, and its outcome recorded in the study.

Trial N of a study is the experiment `STUDY-N`. All tries of one trial share its `slot`, so that a killed trial and its
second try count once.
"""

import json
import re
import resource
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import optuna
from optuna import samplers
from optuna.storages import RetryHeartbeatStaleTrialCallback, fail_stale_trials
from optuna.trial import TrialState

from colintern.scoring.metrics import DEV_KEY
from colintern.tuning.experiments import ClaimedTrial, list_experiments, remove_experiment, run_experiment, run_git
from colintern.tuning.search_space import BYTES_PER_PAGE, SearchSpace
from colintern.tuning.study_storage import StudyStorage
from colintern.tuning.trial_context import MEASURED, SETTINGS, SIZE, STARTED, STOPPED

# User attributes of trials.
SLOT, CAUSE, EXPERIMENT, NUM_COMPUTED, CPU_SECONDS = "slot", "cause", "experiment", "pages computed", "CPU seconds"
FLOAT16_BYTES = 2  # of a number, as vector stores keep embeddings
SIZE_ATTRIBUTE = "size"  # user attribute of a study: {pool_factor, dim} of params.yaml
# Not caused by the settings: a signal, a lock that DVC does not wait for.
TRANSIENT = re.compile(r"exited with 75|Unable to acquire (?:\w+ )?lock|is busy, it is being blocked")
RETRY_SECONDS = 5
MAX_CAUSE_LENGTH = 200  # characters on the terminal
CAUSE_PATTERNS = (r"error: \S", r"(?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b")


def make_sampler(space: SearchSpace, number: int) -> samplers.BaseSampler:
    """Make the sampler of one trial, with its own seed, so that a resumed study does not repeat its first trials."""
    seed = int(np.random.SeedSequence([space.settings["seed"], number]).generate_state(1)[0])
    if space.settings["sampler"] == "random":
        return samplers.RandomSampler(seed)
    # A running trial counts as a bad one, so that workers at the same time sample different regions.
    return samplers.TPESampler(n_startup_trials=space.settings["startup_trials"], seed=seed, constant_liar=True)


def claim_trial(study: optuna.Study, storage: StudyStorage, space: SearchSpace, total: int) -> ClaimedTrial | int:
    """Claim the next trial of a study of `total` trials.

    Returns:
        The trial; or, where none is left, the number of trials that other workers still run.
    """
    with storage.hold_exclusive_lock():
        fail_stale_trials(study)
        trials = study.get_trials(deepcopy=False)
        for other in trials:  # its worker died inside this block, before the trial had settings
            if other.state == TrialState.RUNNING and SLOT not in other.user_attrs:
                study.tell(other.number, state=TrialState.FAIL)
        slots = {other.user_attrs[SLOT] for other in trials if SLOT in other.user_attrs}
        if len(slots) >= total and all(other.state != TrialState.WAITING for other in trials):
            return sum(other.state == TrialState.RUNNING and SLOT in other.user_attrs for other in trials)
        study.sampler = make_sampler(space, len(trials))
        trial = study.ask(space.distributions)
        trial_id = storage.get_trial_id(trial.number)
        storage.record_heartbeat(trial_id)
        for key in (STARTED, STOPPED, EXPERIMENT, MEASURED):  # of the try before
            if key in trial.user_attrs:
                trial.set_user_attr(key, None)
        trial.set_user_attr(SLOT, trial.user_attrs.get(SLOT, trial.number))
        if space.second_objective == BYTES_PER_PAGE:
            full_size = study.user_attrs[SIZE_ATTRIBUTE]
            trial.set_user_attr(SIZE, [trial.params.get(key, value) for key, value in full_size.items()])
        killed_tries = RetryHeartbeatStaleTrialCallback.retry_history(storage.rdb.get_trial(trial_id))
        values = {key: trial.params[key] for key in space.distributions}
        return ClaimedTrial(trial.number, trial_id, values, killed_tries)


def requeue_trial(study: optuna.Study, number: int) -> None:
    """Let the settings of a trial that was stopped from outside wait for the next worker."""
    trial = study.get_trials(deepcopy=False)[number]
    waiting = optuna.create_trial(
        state=TrialState.WAITING,
        params=trial.params,
        distributions=trial.distributions,
        user_attrs={SLOT: trial.user_attrs[SLOT]},
        system_attrs=trial.system_attrs,
    )
    study.tell(number, state=TrialState.FAIL)
    study.add_trial(waiting)


def run_trial(
    study: optuna.Study, storage: StudyStorage, trial: ClaimedTrial, log: Path, check_workspace: Callable[[], None]
) -> str:
    """Run a trial, record its outcome in the study, and return a line that describes it.

    The study may have given the trial to another worker meanwhile, if this machine was suspended: then the experiment
    made here is removed.
    """
    name = get_experiment_name(study, trial.number)
    start = time.monotonic()
    for number in trial.killed_tries:  # the worker was killed between the experiment and the study's record of it
        if (old_name := get_experiment_name(study, number)) in list_experiments():
            outcome = record_score(study, storage, trial, old_name)
            return f"{name}  {outcome}  was finished by the worker that was killed"
    cpu_seconds = _get_child_cpu_seconds()
    code = run_experiment(storage, trial, name, log, check_workspace)
    has_two_objectives = study.user_attrs[SETTINGS]["against"] != "none"
    if code == 0 and has_two_objectives and not storage.rdb.get_trial(trial.id).user_attrs.get(MEASURED):
        # DVC knew this training, of a trial that differs in page size alone: it is repeated to be measured.
        remove_experiment(name)
        code = run_experiment(storage, trial, name, log, check_workspace, "--force")
    storage.rdb.set_trial_user_attr(trial.id, CPU_SECONDS, round(_get_child_cpu_seconds() - cpu_seconds, 1))
    output = storage.redact_address(log.read_text(errors="replace"))
    log.write_text(output)
    try:
        outcome = record_outcome(study, storage, trial, name, code, output)
    except (ValueError, RuntimeError) as error:  # Optuna's: the trial is over already
        if "finish" not in str(error).lower() and "state" not in str(error).lower():
            raise
        remove_experiment(name)
        return f"{name}  was given to another worker, because this one had no heartbeat; its result is dropped"
    return f"{name}  {outcome}  {time.monotonic() - start:.0f} s"


def get_experiment_name(study: optuna.Study, number: int) -> str:
    """Return the name of a trial's experiment."""
    return f"{study.study_name}-{number:03}"


def _get_child_cpu_seconds() -> float:
    """Return the CPU-seconds of the processes that this one has waited for, and of their children."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def record_outcome(
    study: optuna.Study, storage: StudyStorage, trial: ClaimedTrial, name: str, code: int, output: str
) -> str:
    """Record how the experiment ended, by its exit code and output, and return it in words."""
    if match := re.search(r"page features: (\d+) computed", output):
        storage.rdb.set_trial_user_attr(trial.id, NUM_COMPUTED, int(match[1]))
    if code == 0:
        return record_score(study, storage, trial, name)
    if evaluation := storage.rdb.get_trial(trial.id).user_attrs.get(STOPPED):
        study.tell(trial.number, state=TrialState.PRUNED)
        return f"pruned    after evaluation {evaluation}"
    if TRANSIENT.search(output):
        storage.sleep(RETRY_SECONDS, trial.id)
        requeue_trial(study, trial.number)
        return f"put back: {find_cause(output)}"[:MAX_CAUSE_LENGTH]
    return _record_failure(study, storage, trial, find_cause(output))


def record_score(study: optuna.Study, storage: StudyStorage, trial: ClaimedTrial, name: str) -> str:
    """Record the score in the metrics of an experiment, or both objectives as its run measured them."""
    score = json.loads(run_git("show", f"{list_experiments()[name]}:./metrics/train.json"))[DEV_KEY]
    storage.rdb.set_trial_user_attr(trial.id, EXPERIMENT, name)
    against = study.user_attrs[SETTINGS]["against"]
    if against == "none":
        study.tell(trial.number, score)
        return f"complete  {score:.4f}"
    attributes = study.get_trials(deepcopy=False)[int(name.rpartition("-")[2])].user_attrs
    measured = attributes.get(MEASURED) or {}
    if against == BYTES_PER_PAGE and "vectors_per_page" in measured:
        score, second = measured[DEV_KEY], measured["vectors_per_page"] * attributes[SIZE][1] * FLOAT16_BYTES
    elif against in measured:
        second = measured[against]
    else:  # the storage could not be reached, or a try that was killed made all steps
        return _record_failure(study, storage, trial, f"{against} was not measured")
    study.tell(trial.number, [score, second])
    return f"complete  {score:.4f} at {second:,.0f} {against.replace('_', ' ')}"


def _record_failure(study: optuna.Study, storage: StudyStorage, trial: ClaimedTrial, cause: str) -> str:
    storage.rdb.set_trial_user_attr(trial.id, CAUSE, cause)
    study.tell(trial.number, state=TrialState.FAIL)
    return f"failed    {cause[:MAX_CAUSE_LENGTH]}"


def find_cause(output: str) -> str:
    """Return the line of a failed trial's output that names the cause: a stage's error, an exception's, or DVC's."""
    lines = output.splitlines()
    for pattern in CAUSE_PATTERNS:
        if causes := [line for line in lines if re.match(pattern, line)]:
            return causes[-1].strip()
    dvc_errors = [line for line in lines if re.match(r"ERROR: \S", line)]
    return (dvc_errors or lines[-1:] or ["it printed nothing"])[0].strip()
