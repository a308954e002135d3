"""A run that is a trial of a study: it reports its dev score to the study, and stops when told.

It gives the same bytes as a run that nobody asked, unless it is stopped.
"""

import os
import signal
import threading
from typing import Any

from transformers import TrainerCallback

from colintern.core.errors import UserError
from colintern.encoding.embed import embed_features, embed_queries
from colintern.scoring.maxsim import maxsim_scores
from colintern.scoring.metrics import ndcg_at_k
from colintern.training.processes import Processes
from colintern.training.trainer import ContrastiveTrainer
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
    alive,
    pruner,
    storage,
)


class Pruned(UserError):
    """The study stopped this trial early; nothing of it is kept. The process exits with 3."""

    exit_code = 3


class Reporter(TrainerCallback):
    """Reports each dev score under the number of the evaluation, from 1, and stops the training when told.

    Only the first of several processes talks to the study; all of them stop. Where the storage cannot be reached the
    training goes on, with one warning.
    """

    def __init__(self, processes: Processes):
        self.processes, self.count, self.stopped, self.silent = processes, 0, False, False
        self.is_over = threading.Event()  # the study has ended this trial: its worker was stopped or believed dead
        if processes.main:
            self._safely(self._join)
        threading.Thread(target=self._end_with, args=(int(os.environ[OWNER]),), daemon=True).start()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A resumed run reports again what it measured before: its trial may be another one's second try."""
        for row in state.log_history:
            if "eval_ndcg_at_5" in row:
                self._tell(row["eval_ndcg_at_5"])

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        self._tell(metrics["eval_ndcg_at_5"])
        last = state.global_step >= state.max_steps
        stop = self.processes.main and not last and bool(self._safely(self._should_stop))
        if self.processes.any(stop):
            self.stopped = control.should_training_stop = True

    def _tell(self, score: float) -> None:
        self.count += 1
        if self.processes.main and not self.silent and not self.several:
            self._safely(lambda: self.trial.report(score, self.count))

    def _join(self) -> None:
        """The trial, with the pruner that the study was made with."""
        from optuna import load_study
        from optuna.trial import Trial

        study = load_study(study_name=os.environ[STUDY], storage=storage(os.environ[STORAGE]))
        study.pruner = pruner(study.user_attrs[SETTINGS])
        self.several = len(study.directions) > 1  # of which optuna takes no reports while a trial runs
        [found] = [t for t in study.get_trials(deepcopy=False) if t.number == int(os.environ[TRIAL])]
        self.trial = Trial(study, found._trial_id)
        self.trial.set_user_attr(STARTED, os.getpid())

    def _should_stop(self) -> bool:
        if self.several or not self.trial.should_prune():
            return False
        self.trial.set_user_attr(STOPPED, self.count)
        return True

    def finish(self, trainer: ContrastiveTrainer) -> None:
        """Tells what the score may be weighed against: the time of all steps, and the score of smaller pages."""
        if self.silent:
            return
        found = {}
        if pace := trainer.pace.values():  # nothing where all steps were made before a kill
            seconds = pace["step_seconds"] * trainer.state.max_steps * self.processes.size
            found["training_seconds"] = round(seconds, 3)
        if size := self.trial.user_attrs.get(SIZE):
            score, vectors = _at_size(trainer, *size)
            found |= {"dev_ndcg_at_5": round(score, 6), "vectors_per_page": vectors}
        self._safely(lambda: self.trial.set_user_attr(MEASURED, found))

    def _end_with(self, owner: int) -> None:
        """Send SIGTERM to this process once its tuner or its trial is over: it writes a checkpoint, from which the next
        try of these settings resumes."""
        while alive(owner) and not self.is_over.wait(1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    def _safely(self, do: Any) -> Any:
        from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
        from sqlalchemy.exc import SQLAlchemyError

        if self.silent:
            return None
        try:
            return do()
        except UpdateFinishedTrialError:
            self.silent = True
            self.is_over.set()
            return None
        except (StorageInternalError, SQLAlchemyError) as error:
            self.silent = True  # the message could name the storage, and with it a password
            print(f"warning: the study's storage does not answer ({type(error).__name__}); training goes on, unpruned")
            return None


def _at_size(trainer: ContrastiveTrainer, factor: int, dim: int) -> tuple[float, float]:
    """Dev NDCG@5 with each page pooled and each vector cut as evaluation does it, and vectors a page on average."""
    from colintern.encoding.pooling import cut, pool

    dev, processor, size = trainer.dev, trainer.processor, trainer.params.eval_batch_size
    model: Any = trainer.model
    pages = list(embed_features(model, processor, map(dev.features, dev.pages), size))
    if factor > 1:
        pages = [pool(page, factor, processor.image_seq_length, processor.text_before) for page in pages]
    queries = embed_queries(model, processor, dev.queries, size)
    score = ndcg_at_k(maxsim_scores(cut(queries, dim), cut(pages, dim)), dev.relevant, 5)
    return score, sum(map(len, pages)) / len(pages)


def reporter(processes: Processes) -> Reporter | None:
    """None where this run is no trial."""
    return Reporter(processes) if STORAGE in os.environ else None
