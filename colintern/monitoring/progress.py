"""Progress of a training run: one line that is redrawn in a terminal, a row now and then in a log.

Both show the step, the time left, the last loss and dev NDCG@5, pages per second and the peak memory. Every logged row
is in the run's history, and so in plots/, whether it is shown or not.
"""

import logging
import resource
import time
from collections import deque

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from colintern.scoring.metrics import EVAL_KEY

logger = logging.getLogger(__name__)
MIN_ROW_INTERVAL = 30  # seconds between two rows in a log; a dev score and the last step are always shown
MAX_RATE_STEPS = 20  # of the rate that is shown
# With days and 9,000 steps this is 79 characters.
BAR_FORMAT = "{percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}"


class ProgressReporter(TrainerCallback):
    """Shows the progress of a run, as rows where the Trainer's `disable_tqdm` is set."""

    def __init__(self, pages_per_step: int):
        self.pages_per_step, self.bar = pages_per_step, None
        self.loss = self.dev_score = ""
        self.step_times: deque[float] = deque(maxlen=MAX_RATE_STEPS + 1)
        self.start_time, self.start_step, self.last_row_time = 0.0, 0, float("-inf")

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_) -> None:
        """Start the bar, with the last scores of the checkpoint if the run is resumed."""
        for row in state.log_history:
            self._update_scores(row)
        self.start_time, self.start_step = time.monotonic(), state.global_step
        if not args.disable_tqdm and state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=self.start_step, bar_format=BAR_FORMAT, dynamic_ncols=True)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_) -> None:
        """Start to measure the rate."""
        if not self.step_times:
            self.step_times.append(time.monotonic())

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_) -> None:
        """Update the rate and the bar."""
        self.step_times.append(time.monotonic())
        if self.bar:
            self.bar.set_postfix_str(self._format_facts(), refresh=False)
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Show the scores of a row in the bar; in a log, print the row if it is due."""
        logs = kwargs["logs"]
        has_dev_score = self._update_scores(logs)
        if "loss" not in logs and not has_dev_score:
            return
        if self.bar:
            self.bar.set_postfix_str(self._format_facts())
            return
        is_last = state.global_step == state.max_steps
        is_due = has_dev_score or is_last or time.monotonic() - self.last_row_time >= MIN_ROW_INTERVAL
        if args.disable_tqdm and is_due and state.is_world_process_zero:
            self.last_row_time = time.monotonic()
            times = self._format_times(state)
            logger.info(f"step {state.global_step}/{state.max_steps} [{times}], {self._format_facts()}")

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_) -> None:
        """Start to measure the rate again: evaluation and saving are no step."""
        self.step_times.clear()

    on_save = on_evaluate

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_) -> None:
        """Close the bar."""
        if self.bar:
            self.bar.close()
            self.bar = None

    def _update_scores(self, row: dict[str, float]) -> bool:
        if "loss" in row:
            self.loss = f"loss {row['loss']:.3f}"
        if EVAL_KEY in row:
            self.dev_score = f"dev {row[EVAL_KEY]:.3f}"
        return EVAL_KEY in row

    def _format_facts(self) -> str:
        rate = ""
        if len(self.step_times) > 1:
            seconds = self.step_times[-1] - self.step_times[0]
            pages_per_second = self.pages_per_step * (len(self.step_times) - 1) / seconds
            rate = f"{pages_per_second:{'.0f' if pages_per_second > 10 else '.2g'}} pages/s"
        return ", ".join(filter(None, (self.loss, self.dev_score, rate, f"{peak_memory_bytes() / 1e9:.3g} GB")))

    def _format_times(self, state: TrainerState) -> str:
        elapsed = time.monotonic() - self.start_time
        left = elapsed * (state.max_steps - state.global_step) / max(1, state.global_step - self.start_step)
        return f"{tqdm.format_interval(elapsed)}<{tqdm.format_interval(left)}"


def peak_memory_bytes() -> int:
    """Return the peak memory of this process so far: of the GPU if there is one, else of main memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
