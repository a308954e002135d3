"""How far a training run is: one line that is drawn again at a terminal, a row now and then in a log.

Both tell the step, the time left, the last loss and dev NDCG@5, pages a second and the most memory so far. Every logged
row is in the run's history, and so in plots/, whether it is shown or not.
"""

import resource
import time
from collections import deque
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback

from colintern.params import Params

EVERY = 30  # seconds between two rows in a log, at least; a dev score and the last step are always shown
RECENT = 20  # steps whose rate is shown
# With days and 9,000 steps this is 79 characters.
BAR = "{percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}"


class Progress(TrainerCallback):
    """Shows a run; `quiet`: as rows, for a log."""

    def __init__(self, params: Params, quiet: bool):
        self.pages, self.quiet, self.bar = params.batch_size * (1 + params.negatives), quiet, None
        self.loss = self.dev = ""
        self.times: deque[float] = deque(maxlen=RECENT + 1)
        self.began, self.first, self.shown = 0.0, 0, float("-inf")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A run that goes on shows what it knew at its checkpoint."""
        for row in state.log_history:
            self._learn(row)
        self.began, self.first = time.monotonic(), state.global_step
        if not self.quiet and state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=self.first, bar_format=BAR, dynamic_ncols=True)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.times:
            self.times.append(time.monotonic())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.times.append(time.monotonic())
        if self.bar:
            self.bar.set_postfix_str(self._facts(), refresh=False)
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        dev = self._learn(logs)
        if "loss" not in logs and not dev:
            return
        if self.bar:
            self.bar.set_postfix_str(self._facts())
            return
        due = dev or state.global_step == state.max_steps or time.monotonic() - self.shown >= EVERY
        if self.quiet and due and state.is_world_process_zero:
            self.shown = time.monotonic()
            print(f"step {state.global_step}/{state.max_steps} [{self._left(state)}], {self._facts()}", flush=True)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.times.clear()  # what is no step must not slow the rate

    on_save = on_evaluate

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar:
            self.bar.close()
            self.bar = None

    def _learn(self, row: dict[str, Any]) -> bool:
        """Take the loss or the dev score of a row; whether it had a score."""
        if "loss" in row:
            self.loss = f"loss {row['loss']:.3f}"
        if "eval_ndcg_at_5" in row:
            self.dev = f"dev {row['eval_ndcg_at_5']:.3f}"
        return "eval_ndcg_at_5" in row

    def _facts(self) -> str:
        rate = ""
        if len(self.times) > 1:
            each = self.pages * (len(self.times) - 1) / (self.times[-1] - self.times[0])
            rate = f"{each:{'.0f' if each > 10 else '.2g'}} pages/s"
        return ", ".join(filter(None, (self.loss, self.dev, rate, f"{most_memory() / 1e9:.3g} GB")))

    def _left(self, state: Any) -> str:
        spent = time.monotonic() - self.began
        left = spent * (state.max_steps - state.global_step) / max(1, state.global_step - self.first)
        return f"{tqdm.format_interval(spent)}<{tqdm.format_interval(left)}"


def most_memory() -> int:
    """Bytes that this process had at most so far: of the GPU where there is one, else of main memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
