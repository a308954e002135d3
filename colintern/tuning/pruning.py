"""Report a training run to the Optuna study that it is a trial of, and stop it when the study prunes it.

A run that is not stopped gives the same bytes as a run outside a study.
"""

import logging
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from transformers import TrainerControl, TrainerState, TrainingArguments

from colintern.core.errors import UserError
from colintern.monitoring.monitors import ThroughputMonitor
from colintern.scoring.metrics import DEV_KEY, EVAL_KEY
from colintern.training.distributed import DistributedContext
from colintern.training.trainer import ContrastiveTrainer, RunCallback
from colintern.tuning.trial_context import (
    MEASURED,
    OWNER,
    SETTINGS,
    SIZE,
    STARTED,
    STOPPED,
    STORAGE,
    STUDY,
    TRIAL,
    is_running,
    make_pruner,
    open_storage,
)

logger = logging.getLogger(__name__)
T = TypeVar("T")


class TrialPrunedError(UserError):
    """The study stopped this trial early; nothing of it is kept. The process exits with 3."""

    exit_code = 3


class OptunaPruningCallback(RunCallback):
    """Reports each dev score to the trial as that of evaluation 1, 2, ..., and stops the training if it is pruned.

    Rank 0 alone communicates with the study; all ranks stop. If the storage cannot be reached, training continues with
    one warning.
    """

    def __init__(self, context: DistributedContext, throughput: ThroughputMonitor):
        self.context, self.throughput = context, throughput
        self.num_evaluations, self.is_disabled = 0, False
        self.is_over = threading.Event()  # the study has ended this trial: its worker was stopped or believed dead

    def on_run_begin(self) -> None:
        """Load the trial, and watch its tuner."""
        if self.context.is_main_process:
            self._call_storage(self._load_trial)
        threading.Thread(target=self._stop_with_tuner, args=(int(os.environ[OWNER]),), daemon=True).start()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_) -> None:
        """Report the scores of a resumed run again: the trial may be another one's second try."""
        for row in state.log_history:
            if EVAL_KEY in row:
                self._report_score(row[EVAL_KEY])

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Report the score; stop all ranks if the trial should be pruned."""
        self._report_score(kwargs["metrics"][EVAL_KEY])
        is_last = state.global_step >= state.max_steps
        should_stop = self.context.is_main_process and not is_last and bool(self._call_storage(self._should_prune))
        if self.context.all_reduce_any(should_stop):
            control.should_training_stop = True
            self.stop_error = TrialPrunedError(
                f"stopped at step {state.global_step} of {state.max_steps}: the study found its dev score too low"
            )

    def save_artifacts(self, trainer: ContrastiveTrainer, folder: Path) -> dict[str, float | str]:
        """Store the trial's second objective: the time of all steps, and the score with smaller pages."""
        if self.is_disabled:
            return {}
        measured = {}
        if summary := self.throughput.summarize_steps():  # {} if all steps were made before a kill
            seconds = summary["step_seconds"] * trainer.state.max_steps * self.context.world_size
            measured["training_seconds"] = round(seconds, 3)
        if page_size := self.trial.user_attrs.get(SIZE):
            measured |= measure_at_page_size(trainer, *page_size)
        self._call_storage(lambda: self.trial.set_user_attr(MEASURED, measured))
        return {}

    def _load_trial(self) -> None:
        from optuna import load_study
        from optuna.trial import Trial

        storage, name = open_storage(os.environ[STORAGE]), os.environ[STUDY]
        study = load_study(study_name=name, storage=storage)
        study.pruner = make_pruner(study.user_attrs[SETTINGS])
        self.has_two_objectives = len(study.directions) > 1  # then Optuna takes no reports from a running trial
        study_id = storage.get_study_id_from_name(name)
        trial_id = storage.get_trial_id_from_study_id_trial_number(study_id, int(os.environ[TRIAL]))
        self.trial = Trial(study, trial_id)
        self.trial.set_user_attr(STARTED, os.getpid())

    def _report_score(self, score: float) -> None:
        self.num_evaluations += 1
        if self.context.is_main_process and not self.is_disabled and not self.has_two_objectives:
            self._call_storage(lambda: self.trial.report(score, self.num_evaluations))

    def _should_prune(self) -> bool:
        if self.has_two_objectives or not self.trial.should_prune():
            return False
        self.trial.set_user_attr(STOPPED, self.num_evaluations)
        return True

    def _stop_with_tuner(self, pid: int) -> None:
        """Send SIGTERM to this process once its tuner or its trial is over.

        It then saves a checkpoint, from which the next try of these settings resumes.
        """
        while is_running(pid) and not self.is_over.wait(1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    def _call_storage(self, function: Callable[[], T]) -> T | None:
        """Call a function that uses the storage; after an error, call none any more."""
        from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
        from sqlalchemy.exc import SQLAlchemyError

        if self.is_disabled:
            return None
        try:
            return function()
        except UpdateFinishedTrialError:
            self.is_disabled = True
            self.is_over.set()
        except (StorageInternalError, SQLAlchemyError) as error:
            self.is_disabled = True  # the message could name the storage, and with it a password
            name = type(error).__name__
            logger.warning(f"the study's storage does not answer ({name}); training continues without pruning")
        return None


def measure_at_page_size(trainer: ContrastiveTrainer, pool_factor: int, dim: int) -> dict[str, float]:
    """Measure the dev set with pages pooled and vectors truncated as in evaluation, and the mean vectors per page."""
    from colintern.encoding.pooling import pool_tiles, truncate_dim

    processor = trainer.processor
    queries, pages = trainer.evaluator.embed(trainer.model, processor)
    if pool_factor > 1:
        pages = [
            pool_tiles(page, pool_factor, processor.image_seq_length, processor.num_tokens_before_tiles)
            for page in pages
        ]
    ndcg = trainer.evaluator.compute_ndcg(truncate_dim(queries, dim), truncate_dim(pages, dim))
    return {DEV_KEY: round(ndcg, 6), "vectors_per_page": sum(map(len, pages)) / len(pages)}


def make_pruning_callbacks(context: DistributedContext, throughput: ThroughputMonitor) -> list[OptunaPruningCallback]:
    """Return the callback of a run that is a trial; [] for any other run."""
    return [OptunaPruningCallback(context, throughput)] if STORAGE in os.environ else []
